"""ResNet-56 on CIFAR-10."""

from benchmarks.headline.cifar_resnet import CifarResNet


class Plugin(CifarResNet):
    name = "resnet56"
    title = "ResNet-56, CIFAR-10"
    budgets = ("macs=50%", "macs=33%", "macs=25%", "bytes=25%", "bytes=10%")
