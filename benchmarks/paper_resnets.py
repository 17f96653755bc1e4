"""ResNet-18, 34 and 50 of the joint-decomposition paper: 3 x 3 stem for CIFAR, 1 x 1 convolutions as shortcuts.

Chen et al. 2021. ``width`` is the number of channels of the first stage, 64 in the paper.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}


class Residual(nn.Module):
    """Two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1, beside a shortcut."""

    def __init__(self, inputs: int, inner: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * inner if bottleneck else inner
        shapes = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)]
        if not bottleneck:
            shapes = [(inputs, inner, 3, stride), (inner, inner, 3, 1)]
        self.count = len(shapes)
        for number, (i, o, kernel, step) in enumerate(shapes, 1):
            setattr(self, f"conv{number}", nn.Conv2d(i, o, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{number}", nn.BatchNorm2d(o))
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.count + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            if number < self.count:
                y = F.relu(y)
        return F.relu(y + self.downsample(x))


class PaperResNet(nn.Module):
    """``resnet18``, ``resnet34`` or ``resnet50`` for 32 x 32 images, or for 224 x 224 ones with ``imagenet``."""

    def __init__(self, name: str, classes: int = 10, *, imagenet: bool = False, width: int = 64) -> None:
        super().__init__()
        bottleneck = name == "resnet50"
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        inputs = width
        for stage, count in enumerate(BLOCKS[name]):
            inner, blocks = width * 2**stage, []
            for index in range(count):
                step = 2 if stage and not index else 1
                blocks.append(Residual(inputs, inner, step, bottleneck=bottleneck))
                inputs = 4 * inner if bottleneck else inner
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))
