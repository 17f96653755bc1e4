"""Models and data that the command line tests name by reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Tiny(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.wide = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.wide(self.conv(images).relu()).relu().mean((2, 3)))


def tiny(width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return Tiny(width)


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def chatty() -> nn.Module:
    print("a library that prints")
    return tiny()


def no_layers() -> nn.Module:
    return nn.ReLU()


def not_a_model() -> str:
    return "model"


def batches(samples: int = 64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, 1, 8, 8, generator=generator)
    return list(zip(images.split(32), torch.arange(samples).remainder(10).split(32), strict=True))


def shuffled() -> DataLoader[Any]:
    images = torch.cat([images for images, _ in batches()])
    return DataLoader(TensorDataset(images), 16, shuffle=True, generator=torch.Generator().manual_seed(2))


def coloured() -> list[tuple[Tensor, Tensor]]:
    return [(images.expand(-1, 3, -1, -1), labels) for images, labels in batches()]


def unlabelled() -> list[Tensor]:
    return [images for images, _ in batches()]


def of_several_lengths() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, length, 8, generator=generator) for length in (3, 9, 5)]


class Marked(nn.Module):
    """Takes what says where data is, and makes no use of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = perceptron()

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.layers(x)


def not_numbers_in_padding() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, 6, 8, generator=generator)
    keep = torch.arange(6) < torch.randint(2, 7, (32, 1), generator=generator)
    inputs[~keep] = torch.nan
    return [{"x": x, "keep": some} for x, some in zip(inputs.split(8), keep.split(8), strict=True)]


def triples() -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(images, labels, labels) for images, labels in batches()]


def stream():
    yield from batches()


NUMBER = 3


class Tied(nn.Module):
    """A table and a head of one weight, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(words)))


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied()
