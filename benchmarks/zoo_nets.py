"""Small convolutional classifiers in plain PyTorch for the model zoo, one a way in which channels are tied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def head(inputs: int, classes: int = 10) -> nn.Sequential:
    """Global average pooling and a classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Dense(nn.Module):
    """DenseNet: every layer reads the concatenation of all before it."""

    def __init__(self, inputs: int = 16, growth: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, inputs, 3, padding=1)
        widths = [inputs + growth * n for n in range(layers + 1)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, growth, 3, padding=1)) for w in widths[:-1]
        )
        self.transition = nn.Sequential(unit(widths[-1], 16, 1), nn.AvgPool2d(2))
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return self.head(self.transition(x))


class UNet(nn.Module):
    """Transposed convolutions upwards, with the maps from the way down concatenated."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = unit(3, width), unit(width, 2 * width)
        self.middle = unit(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join2 = unit(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join1 = unit(2 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.up2(self.middle(F.max_pool2d(second, 2)))
        y = self.join2(torch.cat([second, y], dim=1))
        return self.out(self.join1(torch.cat([first, self.up1(y)], dim=1)))


class Residual(nn.Module):
    """1 x 1, 3 x 3 (perhaps grouped), 1 x 1 beside a shortcut; the norm and a gate may be given."""

    def __init__(
        self, inputs: int, inner: int, outputs: int, *, groups: int = 1, gate: bool = False, group_norm: bool = False
    ) -> None:
        super().__init__()

        def norm(width: int) -> nn.Module:
            return nn.GroupNorm(4, width) if group_norm else nn.BatchNorm2d(width)

        self.branch = nn.Sequential(
            nn.Conv2d(inputs, inner, 1), norm(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=groups), norm(inner), nn.ReLU(),
            nn.Conv2d(inner, outputs, 1), norm(outputs),
        )  # fmt: skip
        self.gate = Gate(outputs) if gate else nn.Identity()
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gate(self.branch(x)) + self.shortcut(x))


class Gate(nn.Module):
    """Squeeze and excitation: every channel times a number that depends on the means of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


def residual_net(**options: bool | int) -> nn.Module:
    """Stem, three residual blocks, classifier."""
    blocks = [Residual(i, 16, o, **options) for i, o in ((16, 32), (32, 32), (32, 48))]  # type: ignore[arg-type]
    return nn.Sequential(unit(3, 16), *blocks, head(48))


class Shuffle(nn.Module):
    """Grouped convolutions with the channels of the groups shuffled in between."""

    def __init__(self, width: int = 24, groups: int = 3) -> None:
        super().__init__()
        self.groups = groups
        self.stem, self.head = unit(3, width), head(width)
        self.first, self.last = unit(width, width, 1, groups=groups), unit(width, width, 1, groups=groups)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.first(x)
        n, c, h, w = y.shape
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x + self.last(self.depthwise(y)))


class Split(nn.Module):
    """ShuffleNet V2: half of the channels go through the branch, then all are shuffled."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.branch, self.head = unit(3, 2 * width), unit(width, width), head(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        y = torch.cat([left, self.branch(right)], dim=1)
        n, c, h, w = y.shape
        return self.head(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Fire(nn.Module):
    """SqueezeNet's module: a narrow layer, then two wide ones side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], dim=1)


def squeeze_net() -> nn.Module:
    """The classifier is a convolution before the pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), Fire(16, 8, 16), Fire(32, 8, 16), nn.Conv2d(32, 10, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Inception(nn.Module):
    """Branches side by side, one of them with an asymmetric pair of convolutions."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = unit(inputs, 8, 1)
        self.three = nn.Sequential(unit(inputs, 8, 1), unit(8, 12))
        self.pair = nn.Sequential(nn.Conv2d(inputs, 8, (1, 5), padding=(0, 2)), nn.Conv2d(8, 8, (5, 1), padding=(2, 0)))
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), unit(inputs, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.pair(x), self.pooled(x)], dim=1)


class Inverted(nn.Module):
    """MobileNetV3's block: wide, depthwise, gated, narrow, added to its input."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand, self.depthwise = unit(inputs, inner, 1), unit(inner, inner, 5, stride, groups=inner)
        self.gate = Gate(inner)
        self.project = nn.Sequential(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.gate(F.hardswish(self.depthwise(self.expand(x)))))
        return x + y if self.same else y


def mobile_net() -> nn.Module:
    blocks = [Inverted(8, 24, 8, 1), Inverted(8, 24, 12, 2), Inverted(12, 32, 12, 1)]
    return nn.Sequential(unit(3, 8, 3, 2), *blocks, head(12))
