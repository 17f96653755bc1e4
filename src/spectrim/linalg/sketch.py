"""Second moments of long vectors in bounded memory: a few rows ``B`` with ``B^T B`` close to the centred scatter."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spectrim.linalg import symmetric
from spectrim.linalg.finite import all_finite
from spectrim.linalg.moments import Moments, noise, ridge, without_casting


class Sketch(Moments):
    """Count, mean and a sketch of the centred second moment of a stream of vectors (frequent directions).

    As long as there are no more than ``size`` observations the sketch is exact. Then, whenever twice as many rows have
    gathered, the strongest directions are kept and all weakened by the strength of the first that is not, which bounds
    the error by the energy beyond ``size`` directions (Liberty 2013; Ghashami et al. 2016). Strength is measured with
    every feature in units of its own deviation, so that the units of features do not matter. What was taken away from
    the variance of a feature, which is known exactly, is given back to it.

    Parameters
    ----------
    groups, features
        Shape of one observation, ``[groups, features]``.
    size
        Directions kept. Memory is ``2 * size * features`` numbers a group, in float32.
    device
        Where the rows live.

    Attributes
    ----------
    rows
        ``[groups, m, features]``, float32.
    squares
        ``[groups, features]``, float64: the diagonal of the scatter, exact.
    """

    __slots__ = ("rows", "size", "squares")

    def __init__(self, groups: int, features: int, size: int = 512, device: torch.device | str = "cpu") -> None:
        self.count, self._rounding = 0, 0.0
        # More directions than features there are not.
        self.size = min(size, features)
        self.mean = torch.zeros(groups, features, dtype=torch.float64, device=device)
        self.rows = torch.zeros(groups, 0, features, device=device)
        self.squares = torch.zeros(groups, features, dtype=torch.float64, device=device)

    def __repr__(self) -> str:
        groups, features = self.mean.shape
        return f"Sketch(count={self.count}, groups={groups}, features={features}, size={self.size})"

    @torch.no_grad()
    @without_casting
    def update(self, rows: Float[Tensor, "g n d"]) -> None:
        """Add ``n`` observations a group. Cost ``O((n + size)^2 d)`` where the rows are shrunk, else ``O(n d)``."""
        for part in rows.to(self.mean.device).split(self.size, dim=1):
            n = part.shape[1]
            if not n:
                continue
            mean = part.mean(dim=1, keepdim=True, dtype=torch.float64)
            centred = part.float() - mean.float()
            self.squares = self.squares + _squares(centred)
            self._add(n, mean.squeeze(1), centred)

    @torch.no_grad()
    def merge(self, other: Moments) -> None:
        """Add the observations of another sketch of the same shape."""
        if not isinstance(other, Sketch) or other.mean.shape != self.mean.shape:
            raise ValueError(f"cannot merge {other!r} into {self!r}")
        if other.count:
            self.squares = self.squares + other.squares.to(self.squares.device)
            self._add(other.count, other.mean.to(self.mean.device), other.rows.to(self.rows.device))

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        """Rows of a scatter around a mean: with them comes that of the means around each other."""
        total = self.count + n
        delta = (mean - self.mean) * math.sqrt(self.count * n / total)
        parts = [self.rows, scatter, delta.float().unsqueeze(1)] if self.count else [scatter]
        self.squares = self.squares + delta.square()
        self.rows = torch.cat(parts, dim=1)
        self.mean = self.mean + (mean - self.mean) * (n / total)
        self.count = total
        if self.rows.shape[1] > 2 * self.size:
            self._shrink()

    def _shrink(self) -> None:
        unit = self.squares.sqrt()
        standard = self.rows * torch.where(unit > 0, 1 / unit, torch.zeros_like(unit)).float().unsqueeze(1)
        gram = (standard @ standard.mT).double()
        energies, vectors = symmetric.eigh(gram)
        energies, vectors = energies.flip(-1).clamp_min(0), vectors.flip(-1)
        kept, first = energies[:, : self.size], energies[:, self.size : self.size + 1]
        weaker = (kept - first).clamp_min(0)
        scale = torch.where(kept > 0, (weaker / kept.clamp_min(1e-300)).sqrt(), torch.zeros_like(kept))
        self.rows = (vectors[..., : self.size] * scale.unsqueeze(1)).mT.float() @ self.rows

    def take(self, entries: Int64[Tensor, "g n"]) -> Sketch:
        """The sketch of some entries of the vectors."""
        index = entries.to(self.mean.device)
        groups, features = index.shape
        part = Sketch(groups, features, self.size, self.mean.device)
        part.count, part.mean = self.count, torch.take_along_dim(self.mean, index, 1)
        part.rows = torch.take_along_dim(self.rows, index.unsqueeze(1), 2)
        part.squares = torch.take_along_dim(self.squares, index, 1)
        return part

    @property
    def lost(self) -> Float[Tensor, "g d"]:
        """Energy of every feature that the rows do not hold."""
        return (self.squares - _squares(self.rows)).clamp_min(0)

    @property
    def variance(self) -> Float[Tensor, "g d"]:
        return self.squares / max(self.count, 1)

    @property
    def scatter(self) -> Float[Tensor, "g d d"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The sum of centred outer products that the sketch stands for, ``[groups, features, features]``."""
        rows = self.rows.double()
        result = rows.mT @ rows
        result.diagonal(dim1=-2, dim2=-1).add_(self.lost)
        return result

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return (self.mean.numel() + self.squares.numel()) * 8 + self.rows.numel() * 4

    def is_finite(self) -> bool:
        return all_finite(self.mean, self.rows)

    def level(self) -> Float[Tensor, "g d"]:
        """What every feature has beside the rows, of the covariance: what the rows have lost, and a little."""
        return (self.lost + ridge(self.count, self.mean.shape[1]) * self.squares) / max(self.count, 1)

    def shrunk(self) -> tuple[Float[Tensor, "g m d"], Float[Tensor, "g d"]]:
        """Rows ``B`` and level ``L``: ``B^T B + L`` is what :func:`spectrim.linalg.moments.shrunk` makes of it."""
        unit = self.squares.sqrt()
        inverse = torch.where(unit > 0, 1 / unit, torch.zeros_like(unit))
        standard, beside = self.rows * inverse.float().unsqueeze(1), self.lost * inverse.square()
        # Squares of all entries of the correlation.
        squares = (standard @ standard.mT).square().sum((1, 2)) + (2 * _squares(standard) + beside).mul(beside).sum(1)
        share = noise(squares, (unit > 0).sum(1), self.count)
        rows = self.rows.double() * ((1 - share) / max(self.count, 1)).sqrt()[:, None, None]
        return rows, self.level() + share.unsqueeze(1) * (self.squares - self.lost) / max(self.count, 1)

    def solve(self, missing: Float[Tensor, "g m o"]) -> Float[Tensor, "g o d"]:
        """The weight that answers its rows with ``missing``, damped by :meth:`level`: least squares of ``m`` equations.

        With ``B`` the rows and ``L`` the level it is ``missing^T (B L^-1 B^T + I)^-1 B L^-1``.
        """
        return damped_solution(self.rows, missing, self.level() * max(self.count, 1))


def damped_solution(
    rows: Float[Tensor, "g m d"], missing: Float[Tensor, "g m o"], level: Float[Tensor, "g d"]
) -> Float[Tensor, "g o d"]:
    """The weight that answers rows with ``missing``, each feature damped by its level; ``m`` equations are solved."""
    size = level.sqrt()
    # A feature that never changes gets no weight.
    inverse = torch.where(size > 0, 1 / size, torch.zeros_like(size)).unsqueeze(1)
    damped = rows.double() * inverse
    gram = damped @ damped.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(1)
    return (torch.linalg.solve(gram, missing).mT @ damped) * inverse


def _squares(rows: Float[Tensor, "g n d"]) -> Float[Tensor, "g d"]:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
