"""How many independent rows the rows of samples are worth, which may be much alike within a sample."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Directions along which rows are looked at.
_DIRECTIONS = 16


class Alike:
    """Squares of rows along a few directions, added up sample by sample.

    Attributes
    ----------
    count
        Rows so far.
    """

    def __init__(self, features: int, seed: int = 0) -> None:
        self.count = 0
        generator = torch.Generator().manual_seed(seed)
        self._directions = torch.randn(features, _DIRECTIONS, dtype=torch.float64, generator=generator)
        # Close to the mean, so that powers of what is left are exact enough.
        self._middle: Tensor | None = None
        self._powers = torch.zeros(4, _DIRECTIONS, dtype=torch.float64)
        self._parts: list[Tensor] = []  # ``[samples, 3, directions]``: rows, their sums and sums of squares
        self._part = -1

    @torch.no_grad()
    def add(self, rows: Float[Tensor, "n d"], sample: Int64[Tensor, " n"], size: int, part: int) -> None:
        """Add rows, each of one of so many samples; those of a ``part`` that was last are of the same samples."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        along = (rows @ self._directions.to(rows)).double().cpu()
        if self._middle is None:
            self._middle = along.mean(0)
        powers = (along - self._middle).unsqueeze(1) ** torch.arange(5).unsqueeze(1)
        sums = torch.zeros(size, 3, _DIRECTIONS, dtype=torch.float64).index_add_(0, sample, powers[:, :3])
        self._powers += powers[:, 1:].sum(0)
        if part == self._part and len(self._parts[-1]) == size:
            self._parts[-1] += sums
        else:
            self._parts.append(sums)
        self._part = part
        self.count += len(rows)

    @property
    def independent(self) -> float:
        """Independent rows of the same spread whose variances would be known as well as those of the rows are.

        By how far the squares of samples are apart, and those of rows. Directions count by their energy: what hardly
        changes has no part in it.
        """
        if not self._parts:
            return 0.0
        rows, sums, squares = torch.cat(self._parts).unbind(1)
        mean, second, third, fourth = self._powers / self.count
        variance = second - mean.square()
        # Of all rows, and of each sample, about the common mean.
        wild = fourth - 4 * mean * third + 6 * mean.square() * second - 3 * mean**4 - variance.square()
        apart = squares - 2 * mean * sums + rows * (mean.square() - variance)
        spread = apart.square().sum() * len(rows) / max(len(rows) - 1, 1)
        return min(float(self.count), float(wild.sum() * self.count**2 / spread)) if spread > 0 else float(self.count)
