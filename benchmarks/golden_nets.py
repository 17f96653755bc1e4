"""Small networks with seeded weights, and inputs for them, that the golden set is made of.

Their weights, and so the files in ``tests/golden``, follow from the definitions here: add networks, do not change them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Conv1d, Conv2d, Conv3d, ConvTranspose2d, Flatten, Linear, ReLU, Sequential
from torch.nn.modules.batchnorm import _BatchNorm


class Block(nn.Module):
    """A residual block of two convolutions, with a projection where its shortcut needs one."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = BatchNorm2d(outputs)
        self.conv2 = Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = BatchNorm2d(outputs)
        self.shortcut = Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """Two stages of residual blocks."""

    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = Conv2d(3, width, 3, 1, 1)
        self.layer1 = Sequential(*(Block(width, width) for _ in range(blocks)))
        self.layer2 = Sequential(*(Block((1 + (n > 0)) * width, 2 * width, 1 + (n == 0)) for n in range(blocks)))
        self.head = Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(torch.relu(self.stem(x)))).mean((2, 3)))


class Attention(nn.Module):
    """Two heads of attention over rows, and the layers around it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inputs = Linear(6, width)
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.up, self.down = Linear(width, 2 * width), Linear(2 * width, width)
        self.head = Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


class Concatenation(nn.Module):
    """Channels of two branches side by side, read by one layer; a depthwise layer and flattened positions behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv2d(3, 8, 3, padding=1), Conv2d(3, 8, 1)
        self.norm = BatchNorm2d(16)
        self.depthwise = Conv2d(16, 16, 3, 2, 1, groups=16)
        self.c = Conv2d(16, 12, 3, padding=1)
        self.d, self.head = Linear(12 * 16, 16), Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1)))
        return self.head(torch.relu(self.d(torch.relu(self.c(self.depthwise(x))).flatten(1))))


def _convolutions() -> nn.Module:
    return Sequential(
        Conv2d(3, 16, 3, padding=1, bias=False), BatchNorm2d(16), ReLU(), Conv2d(16, 24, 3, 2, 1, bias=False),
        BatchNorm2d(24), ReLU(), Conv2d(24, 24, 3, padding=1), ReLU(), Flatten(), Linear(384, 10),
    )  # fmt: skip


def _spatial() -> nn.Module:
    return Sequential(
        Conv2d(3, 12, (3, 5), (2, 1), (1, 2)), ReLU(), Conv2d(12, 16, 3, padding=2, dilation=2), ReLU(),
        Conv2d(16, 16, (5, 3), padding="same", padding_mode="reflect"), ReLU(),
        Conv2d(16, 12, 3, padding=1, padding_mode="circular"), ReLU(), Flatten(), Linear(12 * 32, 6),
    )  # fmt: skip


def _perceptron() -> nn.Module:
    return Sequential(
        Linear(12, 32), ReLU(), Linear(32, 32), ReLU(), Linear(32, 32), ReLU(), Linear(32, 32, bias=False), ReLU(),
        Linear(32, 4),
    )  # fmt: skip


def _small_perceptron() -> nn.Module:
    return Sequential(Linear(12, 16), ReLU(), Linear(16, 16), ReLU(), Linear(16, 4))


def _grouped() -> nn.Module:
    return Sequential(
        Conv2d(3, 16, 3, padding=1), ReLU(), Conv2d(16, 32, 3, 2, 1, groups=2), BatchNorm2d(32), ReLU(),
        Conv2d(32, 32, 3, padding=1, groups=32), Conv2d(32, 24, 1, bias=False), BatchNorm2d(24), ReLU(),
        Conv2d(24, 16, 3, padding=1, groups=4), ReLU(), Flatten(), Linear(256, 5),
    )  # fmt: skip


def _transposed() -> nn.Module:
    return Sequential(
        Conv2d(3, 16, 3, 2, 1), ReLU(), ConvTranspose2d(16, 16, 4, 2, 1), BatchNorm2d(16), ReLU(),
        ConvTranspose2d(16, 16, 3, 2, 1, output_padding=1, groups=2), ReLU(), Conv2d(16, 2, 3, padding=1),
    )  # fmt: skip


def _one_axis() -> nn.Module:
    return Sequential(Conv1d(3, 16, 5, padding=2), ReLU(), Conv1d(16, 16, 3, 2, dilation=2), ReLU(), Conv1d(16, 8, 1))


def _three_axes() -> nn.Module:
    return Sequential(
        Conv3d(2, 12, 3, padding=1), ReLU(), Conv3d(12, 12, (3, 2, 3), 2, (1, 0, 1)), ReLU(), Flatten(),
        Linear(12 * 27, 5),
    )  # fmt: skip


def _long_patches() -> nn.Module:
    return Sequential(
        Conv2d(3, 136, 1), ReLU(), Conv2d(136, 16, 3, padding=1), ReLU(), Flatten(), Linear(16 * 12 * 12, 12), ReLU(),
        Linear(12, 4),
    )  # fmt: skip


IMAGE = (3, 8, 8)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (_convolutions, IMAGE),
    "spatial": (_spatial, IMAGE),
    "perceptron": (_perceptron, (12,)),
    "small perceptron": (_small_perceptron, (12,)),
    "grouped": (_grouped, IMAGE),
    "transposed": (_transposed, IMAGE),
    "one axis": (_one_axis, (3, 24)),
    "three axes": (_three_axes, (2, 6, 6, 6)),
    "long patches": (_long_patches, (3, 12, 12)),
    "residual": (ResNet, IMAGE),
    "small residual": (lambda: ResNet(2, 4), IMAGE),
    "attention": (Attention, (5, 6)),
    "concatenation": (Concatenation, IMAGE),
}
"""Constructor and shape of one input sample."""


def dense(name: str, *, seed: int = 0) -> nn.Module:
    """A network in evaluation mode, with the same weights at every call; BatchNorm has the statistics of its inputs."""
    maker, _ = NETS[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = maker()
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None
        with torch.no_grad():
            model.train()(inputs(name, 64, seed=1000 + seed))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()


def inputs(name: str, count: int, *, seed: int) -> Tensor:
    """Samples ``[count, *shape]`` whose neighbouring numbers are correlated, along all axes."""
    shape = NETS[name][1]
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    for axis in range(1, len(shape) + 1):
        x = x + 0.7 * x.roll(1, axis)
    return x


def batches(name: str, count: int = 4, size: int = 32) -> list[Tensor]:
    """Calibration batches."""
    return [inputs(name, size, seed=100 + n) for n in range(count)]


def labelled(name: str, count: int = 4, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Training batches, whose labels say where a sample is largest, by parts of its numbers."""
    found: list[tuple[Any, Any]] = []
    for n in range(count):
        x = inputs(name, size, seed=200 + n)
        found.append((x, x.flatten(1).unflatten(1, (4, -1)).sum(2).argmax(1)))
    return found
