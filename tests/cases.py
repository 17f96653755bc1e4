"""Tiny models as lambdas, and the table of layer kinds, for all tests.

Models are made from torch's global generator, which every test starts at seed 0.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectrim
from spectrim.testing import LAYERS, SmallLayer, sample_inputs, small_site

__all__ = [
    "ENVIRONMENT", "LAYERS", "MODELS", "Seen", "SmallLayer", "batches_for", "one_thread", "sample_inputs", "settled",
    "small_site",
]  # fmt: skip


class Seen:
    """What a model is seen to do: in a slot, where the library does not take it back as it does what a model keeps."""

    __slots__ = ("entries",)

    def __init__(self, entries: Any = ()) -> None:
        self.entries: Any = entries or []


# Of programs that tests start: they find the package and the tests, and use one thread.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(map(str, (Path(spectrim.__path__[0]).parent, Path(__file__).parents[1]))),
    "OMP_NUM_THREADS": "1",
}


class Residual(nn.Module):
    """Three convolutions without biases, BatchNorm after each, a skip connection, a linear head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.norm0(self.stem(inputs)))
        change = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(hidden)))))
        return self.head(torch.relu(hidden + change).mean((2, 3)))


class Twice(nn.Module):
    """A convolution that is called twice in a forward pass, and also known under a second name."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.block = nn.Conv2d(width, width, 3, padding=1)
        self.again = self.block
        self.head = nn.Linear(width, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(inputs))
        hidden = torch.relu(self.again(torch.relu(self.block(hidden))))
        return self.head(hidden.mean((2, 3)))


# (maker, shape of one input sample)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), (12,)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 4 * 4, 5),
        ),
        (3, 8, 8),
    ),
    "residual": (Residual, (3, 8, 8)),
    "twice": (Twice, (3, 8, 8)),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1)
        ),
        (3, 8, 8),
    ),
}


def settled(name: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in evaluation mode whose BatchNorm statistics have seen some inputs and whose scales are not all one."""
    maker, shape = MODELS[name]
    model = maker()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = None
    with torch.no_grad():
        model.train()(sample_inputs(shape, 64, seed=11))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval().to(dtype)


def batches_for(name: str, *, count: int = 2, size: int = 48, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Input batches of a model."""
    return [sample_inputs(MODELS[name][1], size, dtype=dtype, seed=seed) for seed in range(count)]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tiny operators run faster on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
