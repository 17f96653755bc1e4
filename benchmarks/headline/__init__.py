"""The headline: real networks compressed by every arm of ours and by what a user would have taken otherwise.

python -m benchmarks.headline --path cifar10=DIR --path weights=DIR ... [--networks resnet20 ...] [--arms auto ...]
"""
