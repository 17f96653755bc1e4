"""AlexNet, VGG-16, GoogLeNet and ResNets with random weights, for what depends on shapes and not on training.

The CPU runs what it would run in use: BatchNorm is folded into the convolutions of every network, before anything is
measured or compressed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


class _Block(nn.Module):
    """Convolutions with ReLU in between, added to a shortcut."""

    def __init__(self, convs: list[nn.Module], shortcut: nn.Module | None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs[:-1]:
            y = F.relu(conv(y), inplace=True)
        y = self.convs[-1](y)
        return F.relu(y.add_(x if self.shortcut is None else self.shortcut(x)), inplace=True)


class _ResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...], *, bottleneck: bool, size: int, classes: int, width: int) -> None:
        super().__init__()
        small = size <= 64
        self.stem = _conv(3, width, 3 if small else 7, 1 if small else 2)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        first, stages = width, []
        for stage, count in enumerate(blocks):
            inner = first * 2**stage
            outer = 4 * inner if bottleneck else inner
            for index in range(count):
                stride = 2 if stage and not index else 1
                if bottleneck:
                    convs = [_conv(width, inner, 1), _conv(inner, inner, 3, stride), _conv(inner, outer, 1)]
                else:
                    convs = [_conv(width, inner, 3, stride), _conv(inner, outer, 3)]
                stages.append(_Block(convs, _conv(width, outer, 1, stride) if stride > 1 or width != outer else None))
                width = outer
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.pool(F.relu(self.stem(x)))).mean((2, 3)))


def network(name: str, size: int, *, seed: int = 0, width: int = 64) -> nn.Module:
    """A folded network in evaluation mode, for square colour images.

    ``alexnet`` is in one column, ``vgg16`` as published, without BatchNorm, ``googlenet`` version 1, without the
    auxiliary classifiers. Up to a side of 64 the networks are those used on CIFAR: the ResNets begin with a 3 x 3
    convolution of stride 1 and VGG-16 ends in one linear layer, with 10 classes; above, they are those for ImageNet.
    ``width`` is of the ResNets' first layer.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classes = 10 if size <= 64 else 1000
        if name == "vgg16":
            model: nn.Module = _vgg16(size, classes)
        elif name == "alexnet":
            model = _alexnet(classes)
        elif name == "googlenet":
            model = _googlenet(classes)
        elif name in ("resnet18", "resnet50"):
            blocks = (2, 2, 2, 2) if name == "resnet18" else (3, 4, 6, 3)
            model = _ResNet(blocks, bottleneck=name == "resnet50", size=size, classes=classes, width=width)
        else:
            raise ValueError(f"no network {name!r}; there are alexnet, vgg16, googlenet, resnet18, resnet50")
    return model.eval().requires_grad_(False)


def images(count: int, size: int, *, seed: int = 0) -> Tensor:
    """Random crops ``[count, 3, size, size]`` of scikit-learn's two photographs, normalised."""
    from sklearn.datasets import load_sample_images

    draw = torch.Generator().manual_seed(seed)
    photographs = [torch.tensor(photo).permute(2, 0, 1).float() / 255 for photo in load_sample_images().images]
    crops = []
    for index in range(count):
        photo = photographs[index % len(photographs)]
        top, left = (int(torch.randint(n - size + 1, (1,), generator=draw)) for n in photo.shape[1:])
        crops.append(photo[:, top : top + size, left : left + size])
    return (torch.stack(crops) - 0.45) / 0.225


def _vgg16(size: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    width = 3
    for item in _VGG16:
        if isinstance(item, int):
            layers += [_initialised(nn.Conv2d(width, item, 3, padding=1)), nn.ReLU(inplace=True)]
            width = item
        else:
            layers.append(nn.MaxPool2d(2))
    features = width * (size // 32) ** 2
    if size <= 64:
        head = [_initialised(nn.Linear(features, classes))]
    else:
        head = [_initialised(nn.Linear(features, 4096)), nn.ReLU(inplace=True)]
        head += [_initialised(nn.Linear(4096, 4096)), nn.ReLU(inplace=True), _initialised(nn.Linear(4096, classes))]
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Sequential(*head))


def _alexnet(classes: int) -> nn.Module:
    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 1) -> list[nn.Module]:
        return [_initialised(nn.Conv2d(inputs, outputs, kernel, stride, padding)), nn.ReLU(inplace=True)]

    pool = nn.MaxPool2d(3, 2)
    layers = [*conv(3, 64, 11, 4, 2), pool, *conv(64, 192, 5, 1, 2), pool, *conv(192, 384, 3), *conv(384, 256, 3)]
    layers += [*conv(256, 256, 3), pool, nn.AdaptiveAvgPool2d(6), nn.Flatten()]
    head = [_initialised(nn.Linear(9216, 4096)), nn.ReLU(inplace=True)]
    head += [_initialised(nn.Linear(4096, 4096)), nn.ReLU(inplace=True), _initialised(nn.Linear(4096, classes))]
    return nn.Sequential(*layers, *head)


class _Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pooled: int) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.branches = nn.ModuleList(
            [
                nn.Sequential(_conv(inputs, one, 1), relu),
                nn.Sequential(_conv(inputs, three[0], 1), relu, _conv(three[0], three[1], 3), relu),
                nn.Sequential(_conv(inputs, five[0], 1), relu, _conv(five[0], five[1], 5), relu),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(inputs, pooled, 1), relu),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _googlenet(classes: int) -> nn.Module:
    relu = nn.ReLU(inplace=True)
    blocks = [
        (192, 64, (96, 128), (16, 32), 32), (256, 128, (128, 192), (32, 96), 64), None,
        (480, 192, (96, 208), (16, 48), 64), (512, 160, (112, 224), (24, 64), 64),
        (512, 128, (128, 256), (24, 64), 64), (512, 112, (144, 288), (32, 64), 64),
        (528, 256, (160, 320), (32, 128), 128), None,
        (832, 256, (160, 320), (32, 128), 128), (832, 384, (192, 384), (48, 128), 128),
    ]  # fmt: skip
    pool = nn.MaxPool2d(3, 2, 1)
    layers: list[nn.Module] = [_conv(3, 64, 7, 2), relu, pool, _conv(64, 64, 1), relu, _conv(64, 192, 3), relu, pool]
    layers += [pool if block is None else _Inception(*block) for block in blocks]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), _initialised(nn.Linear(1024, classes)))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution with the BatchNorm that follows it in the original folded in."""
    conv = _initialised(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False))
    norm = nn.BatchNorm2d(outputs)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.0)
        norm.bias.normal_(std=0.1)
        norm.running_var.uniform_(0.8, 1.5)
    return fuse_conv_bn_eval(conv.eval(), norm.eval())


def _initialised(layer: nn.Module) -> nn.Module:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer
