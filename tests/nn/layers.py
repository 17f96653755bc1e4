"""One layer of every kind that ``find`` lists, with the shape of one input batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Make = Callable[[], nn.Module]

LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (6, 7)),
    "linear-tokens": (lambda: nn.Linear(7, 5, bias=False), (2, 4, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=1), (2, 4, 13)),
    "conv1d-circular": (lambda: nn.Conv1d(4, 6, 4, padding=3, padding_mode="circular"), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 6, 5)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 5, 5)),
    "conv2d-oblong": (lambda: nn.Conv2d(3, 5, (3, 4), stride=(2, 1), padding=(0, 2), bias=False), (2, 3, 8, 7)),
    "conv2d-dilated": (lambda: nn.Conv2d(3, 5, 3, dilation=(2, 1), padding=1), (2, 3, 8, 7)),
    "conv2d-valid": (lambda: nn.Conv2d(3, 5, 3, padding="valid"), (2, 3, 6, 6)),
    "conv2d-same": (lambda: nn.Conv2d(3, 5, 3, padding="same"), (2, 3, 6, 5)),
    "conv2d-same-even": (lambda: nn.Conv2d(3, 5, (4, 2), padding="same", dilation=(1, 3)), (2, 3, 8, 7)),
    "conv2d-same-reflect": (lambda: nn.Conv2d(3, 5, (2, 3), padding="same", padding_mode="reflect"), (2, 3, 6, 6)),
    "conv2d-reflect": (lambda: nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 6, 6)),
    "conv2d-replicate": (lambda: nn.Conv2d(3, 5, 3, padding=1, stride=2, padding_mode="replicate"), (2, 3, 6, 6)),
    "conv2d-circular": (lambda: nn.Conv2d(3, 5, (3, 1), padding=(1, 0), padding_mode="circular"), (2, 3, 6, 6)),
    "conv2d-grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (3, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1)), (2, 3, 4, 5, 4)),
    "conv3d-grouped": (lambda: nn.Conv3d(4, 6, 2, groups=2, bias=False), (1, 4, 3, 4, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1, output_padding=2), (2, 4, 7)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
    "transposed2d-cropped": (lambda: nn.ConvTranspose2d(4, 3, (1, 3), padding=(1, 2), bias=False), (2, 4, 6, 5)),
    "transposed2d-grouped": (
        lambda: nn.ConvTranspose2d(8, 6, (3, 2), stride=(2, 1), groups=2, dilation=(2, 1)), (2, 8, 4, 5),
    ),
    "transposed3d": (lambda: nn.ConvTranspose3d(3, 4, (2, 3, 1), stride=(2, 1, 1)), (1, 3, 3, 4, 3)),
}  # fmt: skip


class Wrapped(nn.Module):
    """Owns one layer called ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def close(given: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether the largest difference is small beside the largest value."""
    assert given.shape == wanted.shape
    gap = (given.double() - wanted.double()).abs().max()
    return bool(gap <= tolerance * wanted.double().abs().max().clamp_min(1e-30))


class ConvNet(nn.Module):
    """Normalised, grouped and transposed convolutions, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.after = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.after(self.up(torch.relu(self.grouped(x)))))
        return self.head(x.mean((2, 3)))
