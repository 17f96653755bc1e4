"""VGG-16, ResNet-18 and ResNet-50 with random weights, for what depends on shapes and not on training.

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

    Parameters
    ----------
    name
        ``vgg16`` (as published, without BatchNorm), ``resnet18`` or ``resnet50``.
    size
        Side of the images. Up to 64 the networks are those used on CIFAR: the ResNets begin with a 3 x 3 convolution of
        stride 1 and VGG-16 ends in one linear layer, with 10 classes; above, they are those for ImageNet.
    width
        Channels of the ResNets' first layer.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classes = 10 if size <= 64 else 1000
        if name == "vgg16":
            model: nn.Module = _vgg16(size, classes)
        elif name in ("resnet18", "resnet50"):
            blocks = (2, 2, 2, 2) if name == "resnet18" else (3, 4, 6, 3)
            model = _ResNet(blocks, bottleneck=name == "resnet50", size=size, classes=classes, width=width)
        else:
            raise ValueError(f"no network {name!r}; there are vgg16, resnet18, resnet50")
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
