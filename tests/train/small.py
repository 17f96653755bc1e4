"""A network and data small enough to train in a test, and pairs of factors with their dense product."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Pair(nn.Sequential):
    """Two layers that stand for one, marked as the compression marks them."""

    is_factored = True


class Net(nn.Module):
    """Convolution, normalisation, a spatial pair, dropout, a linear pair."""

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(1, width, 3, padding=1)
            self.norm = nn.BatchNorm2d(width)
            self.pair = Pair(
                nn.Conv2d(width, 4, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(4, width, (1, 3), padding=(0, 1))
            )
            self.drop = nn.Dropout(0.2)
            self.head = Pair(nn.Linear(width, 3, bias=False), nn.Linear(3, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.stem(inputs)))
        hidden = torch.relu(self.pair(hidden)).mean((2, 3))
        return self.head(self.drop(hidden))


class Textures(Dataset):
    """6 x 6 images: plain, rows, columns or chequered. Noise is drawn anew at every access, from all generators."""

    def __init__(self, count: int = 48, noise: float = 0.3) -> None:
        self.count, self.noise = count, noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % 4
        bright = torch.arange(6) % 2 == (index // 4) % 2
        row, column = bright.view(1, 6, 1), bright.view(1, 1, 6)
        image = (torch.ones(1, 6, 6), row.expand(1, 6, 6), column.expand(1, 6, 6), row ^ column)[label].float()
        scale = self.noise * (0.9 + 0.1 * random.random() + 0.1 * np.random.random())  # noqa: NPY002 - the global one
        return image + scale * torch.randn(1, 6, 6), label


def loader(count: int = 48, batch_size: int = 8) -> DataLoader:
    """Shuffled batches with random augmentation."""
    return DataLoader(Textures(count), batch_size, shuffle=True)


def fixed_batches(count: int = 48, batch_size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """The same batches in every epoch."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global one
    random.seed(1)
    return [(x, y) for x, y in DataLoader(Textures(count), batch_size)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all tensors agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def accuracy(model: nn.Module) -> float:
    """Share of noiseless images that are classified correctly."""
    images, labels = next(iter(DataLoader(Textures(16, noise=0), 16)))
    return (model(images).argmax(1) == labels).float().mean().item()
