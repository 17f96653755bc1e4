"""Models of the command line tests for filters."""

from __future__ import annotations

import torch
from torch import nn


def separable() -> nn.Module:
    """A depthwise convolution in the middle; two of the first filters are dead."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    )
    with torch.no_grad():
        first, _, second, *_ = model.children()
        first.weight[:2] = 0
        # What is not meant to be dead is well above 0 behind both layers.
        first.bias.fill_(1)
        second.bias.fill_(2)
    return model


def redundant() -> nn.Module:
    """The layer in the middle has rank 2, which low rank finds and no filter shows alone."""
    torch.manual_seed(0)
    wide = nn.Conv2d(16, 16, 1)
    with torch.no_grad():
        wide.weight[:, :, 0, 0] = torch.randn(16, 2) @ torch.randn(2, 16)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), wide, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip
