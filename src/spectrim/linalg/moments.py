"""Streamed moments: count, mean and centred second moment of feature vectors, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spectrim.linalg.finite import all_finite


def without_casting(function: Callable[..., None]) -> Callable[..., None]:
    """Have a method run in the precision of its numbers where the network casts them by itself (``torch.autocast``)."""

    @functools.wraps(function)
    def exact(self: Any, rows: Tensor, *counts: Tensor) -> None:
        kind = rows.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return function(self, rows, *counts)
        return function(self, rows, *counts)

    return exact


class Moments:
    """Count, mean and centred second moment of a stream of vectors.

    Memory depends on the number of features only. Batches are merged with the pairwise formula of Chan, Golub and
    LeVeque (1983), which keeps the centred sums accurate when the mean is large against the spread.

    Parameters
    ----------
    groups, features
        Shape of one observation, ``[groups, features]``.
    device
        Where the sums live.

    Attributes
    ----------
    count
        Observations so far.
    mean
        ``[groups, features]``, float64.
    scatter
        ``[groups, features, features]``, float64: the sum of centred outer products.
    """

    __slots__ = ("__weakref__", "_rounding", "count", "mean", "scatter")

    def __init__(self, groups: int, features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        # Of the observations, as a share of their size.
        self._rounding = 0.0
        self.mean = torch.zeros(groups, features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(groups, features, features, dtype=torch.float64, device=device)

    def __repr__(self) -> str:
        groups, features = self.mean.shape
        return f"Moments(count={self.count}, groups={groups}, features={features})"

    @torch.no_grad()
    @without_casting
    def update(self, rows: Float[Tensor, "g n d"], counts: Int64[Tensor, "1 n"] | None = None) -> None:
        """Add ``n`` observations a group, each once or as often as is said. Cost ``O(n d^2)``.

        Half and single precision rows are centred, multiplied in float32 and added up in float64; float64 rows stay.
        """
        n = rows.shape[1]
        if n == 0:
            return
        rows = rows if rows.dtype == torch.float64 else rows.float()
        rows = rows.to(self.mean.device)
        self._rounding = max(self._rounding, torch.finfo(rows.dtype).eps)
        rough = rows.mean(dim=1, keepdim=True)
        centred = rows - rough
        # The rounding of the mean leaves a remainder; taking it into account keeps the sums exact.
        rest = _mean(centred)
        if counts is not None:
            often, n = counts.to(rows).unsqueeze(2), int(counts.sum())
            rest = _mean(centred * often) * (rows.shape[1] / n)
            centred = centred * often.sqrt()
        self._add(n, (rough + rest).squeeze(1), self._scattered(centred))
        self._shift(rest.squeeze(1), -float(n))

    def _scattered(self, rows: Tensor) -> Tensor:
        """The scatter of centred rows."""
        return _products(rows, rows.shape[2])[0]

    def _shift(self, delta: Float[Tensor, "g d"], weight: float) -> None:
        """Add the products of a vector with itself."""
        self.scatter.baddbmm_(delta.unsqueeze(2), delta.unsqueeze(1), alpha=weight)

    @classmethod
    @torch.no_grad()
    def of_rows(
        cls, rows: Float[Tensor, "n d"], weights: Float[Tensor, " n"], count: int, *, centred: bool = True
    ) -> Moments:
        """The moments ``[1, d]`` of rows of these weights, which rest on so many observations; else about zero."""
        moments = cls(1, rows.shape[1], rows.device)
        weights = weights.to(rows.device, torch.float64)
        present = weights > 0
        rows, shares = rows[present].double(), (weights[present] / weights.sum()).unsqueeze(1)
        moments.count = count
        if centred:
            moments.mean = (rows * shares).sum(0, keepdim=True)
        apart = (rows - moments.mean) * shares.sqrt()
        moments.scatter = (apart.mT @ apart).unsqueeze(0) * count
        moments._rounding = torch.finfo(torch.float64).eps
        return moments

    @torch.no_grad()
    def merge(self, other: Moments) -> None:
        """Add the observations of another accumulator of the same shape."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"cannot merge moments of shape {tuple(other.mean.shape)} into {tuple(self.mean.shape)}")
        if other.count:
            self._rounding = max(self._rounding, other._rounding)
            self._add(other.count, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + n
        delta = mean - self.mean
        self.scatter += scatter
        if self.count:
            self._shift(delta, self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total

    def standing_for(self, count: int) -> Moments:
        """The same mean and covariance, resting on so many observations."""
        part = Moments(len(self.mean), 0, self.mean.device)
        part.count, part._rounding, part.mean = count, self._rounding, self.mean.clone()
        part.scatter = self.scatter * (count / self.count)
        return part

    def take(self, entries: Int64[Tensor, "g n"]) -> Moments:
        """The moments of some entries of the vectors."""
        index = entries.to(self.mean.device)
        groups, features = index.shape
        part = Moments(groups, features, self.mean.device)
        rows = torch.take_along_dim(self.scatter, index.unsqueeze(2), 1)
        part._rounding = self._rounding
        part.count, part.mean = self.count, torch.take_along_dim(self.mean, index, 1)
        part.scatter = torch.take_along_dim(rows, index.unsqueeze(1), 2)
        return part

    def swapped(self, outer: int) -> Moments:
        """Of vectors that are matrices ``[outer, inner]`` written row by row, those of their transposes."""
        groups, features = self.mean.shape
        part, shape = Moments(groups, 0, self.mean.device), (groups, outer, features // outer)
        part._rounding, part.count = self._rounding, self.count
        part.mean = self.mean.reshape(shape).mT.reshape(groups, features)
        pairs = self.scatter.reshape(*shape, *shape[1:]).permute(0, 2, 1, 4, 3)
        part.scatter = pairs.reshape(groups, features, features)
        return part

    @property
    def covariance(self) -> Float[Tensor, "g d d"]:
        """Centred second moment ``E[(x - m)(x - m)^T]``, divided by the count; of entries that never change zero."""
        result, still = self.scatter / max(self.count, 1), self._still
        if bool(still.any()):
            result.masked_fill_(still.unsqueeze(1) | still.unsqueeze(2), 0.0)
        return result

    @property
    def _sums(self) -> Tensor:
        """Sums of centred squares."""
        return self.scatter.diagonal(dim1=-2, dim2=-1)

    @property
    def _still(self) -> Tensor:
        """Entries whose spread is no more than the rounding of their mean."""
        spread = (self._sums / max(self.count, 1)).clamp_min(0).sqrt()
        return spread <= self._rounding * self.mean.abs()

    @property
    def variance(self) -> Float[Tensor, "g d"]:
        """Diagonal of :attr:`covariance`."""
        return (self._sums / max(self.count, 1)).masked_fill(self._still, 0.0)

    @property
    def mean_squares(self) -> Float[Tensor, "g d"]:
        """Mean squares: the diagonal of :attr:`second_moment`."""
        return self.variance + self.mean.square()

    @property
    def second_moment(self) -> Float[Tensor, "g d d"]:
        """Raw second moment ``E[x x^T]``."""
        return self.covariance + self.mean.unsqueeze(2) @ self.mean.unsqueeze(1)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return (self.mean.numel() + self.scatter.numel()) * 8

    def is_finite(self) -> bool:
        """Whether nothing was NaN, Inf or too large; the diagonal tells, which bounds the other entries."""
        return all_finite(self.mean, self._sums)


class Squares:
    """Mean squares of a stream of vectors, entry by entry: of those that are too long for products of entries.

    Parameters as for :class:`Moments`.
    """

    __slots__ = ("_sums", "count")

    def __init__(self, groups: int, features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._sums = torch.zeros(groups, features, dtype=torch.float64, device=device)

    @torch.no_grad()
    @without_casting
    def update(self, rows: Float[Tensor, "g n d"]) -> None:
        """Add ``n`` observations a group."""
        self._sums += torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square().to(self._sums.device)
        self.count += rows.shape[1]

    @property
    def mean_squares(self) -> Float[Tensor, "g d"]:
        """Their means."""
        return self._sums / max(self.count, 1)

    def is_finite(self) -> bool:
        """Whether nothing was NaN, Inf or too large."""
        return bool(self._sums.isfinite().all())


class Paired(Moments):
    """Moments of vectors ``[x, y]`` without the products of different ``y``, whose cost is that of ``y`` squared.

    Parameters
    ----------
    inner
        Length of ``x``.

    Attributes
    ----------
    scatter
        ``[groups, features, inner]``: products with ``x`` alone.
    squares
        ``[groups, features - inner]``: those of each ``y`` with itself.
    """

    __slots__ = ("inner", "squares")

    def __init__(self, groups: int, features: int, inner: int, device: torch.device | str = "cpu") -> None:
        self.count, self.inner, self._rounding = 0, inner, 0.0
        self.mean = torch.zeros(groups, features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(groups, features, inner, dtype=torch.float64, device=device)
        self.squares = torch.zeros(groups, features - inner, dtype=torch.float64, device=device)

    def _scattered(self, rows: Tensor) -> Tensor:
        products, squares = _products(rows, self.inner)
        self.squares += squares[:, self.inner :]
        return products

    def _shift(self, delta: Float[Tensor, "g d"], weight: float) -> None:
        self.scatter.baddbmm_(delta.unsqueeze(2), delta[:, : self.inner].unsqueeze(1), alpha=weight)
        self.squares.add_(delta[:, self.inner :].square(), alpha=weight)

    @torch.no_grad()
    def merge(self, other: Moments) -> None:
        """Add the observations of another accumulator of the same shape."""
        super().merge(other)
        if isinstance(other, Paired):
            self.squares += other.squares.to(self.squares.device)

    @property
    def inputs(self) -> Moments:
        """Those of ``x``."""
        groups, _ = self.mean.shape
        part = Moments(groups, 0, self.mean.device)
        part.count, part._rounding, part.mean = self.count, self._rounding, self.mean[:, : self.inner].clone()
        part.scatter = self.scatter[:, : self.inner].clone()
        return part

    @property
    def covariance(self) -> Float[Tensor, "g d inner"]:
        """Centred second moments of ``[x, y]`` with ``x``, divided by the count; of entries that never change zero."""
        result, still = self.scatter / max(self.count, 1), self._still
        if bool(still.any()):
            result.masked_fill_(still.unsqueeze(2) | still[:, : self.inner].unsqueeze(1), 0.0)
        return result

    @property
    def _sums(self) -> Tensor:
        inner = self.scatter[:, : self.inner].diagonal(dim1=-2, dim2=-1)
        return torch.cat([inner, self.squares], dim=1)


def shrunk(covariance: Float[Tensor, "*g d d"], count: int) -> Float[Tensor, "*g d d"]:
    """Covariance whose correlations are shrunk by how few the samples are, with a little of its own variance added.

    Directions that the samples never reached would otherwise be free to take any value, and be said to lose nothing.
    Units of entries do not matter, ``shrunk(D C D) = D shrunk(C) D``; an entry that never changes is left without
    variance. The shares are :func:`noise` and :func:`ridge`.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    size = variance.clamp_min(0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    correlation = covariance / size.unsqueeze(-1) / size.unsqueeze(-2)
    share = noise(correlation.square_().sum((-2, -1)), (variance > 0).sum(-1), count)
    result = torch.mul(covariance, 1 - share[..., None, None], out=correlation)
    result.diagonal(dim1=-2, dim2=-1).copy_(variance * (1 + ridge(count, covariance.shape[-1])))
    return result


def damped(covariance: Float[Tensor, "*g d d"], count: int) -> Float[Tensor, "*g d d"]:
    """Covariance with a little of each entry's own variance added, for least squares of rows that are given."""
    result = covariance.clone()
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    result.diagonal(dim1=-2, dim2=-1).add_(variance, alpha=ridge(count, covariance.shape[-1]))
    return result


def noise(squares: Float[Tensor, "*g"], features: Tensor, count: int) -> Float[Tensor, "*g"]:
    """Share of correlations that is taken for noise, by the sum of their squares over all pairs of so many features.

    That of Chen et al. (2010, OAS), which is the best one for normal vectors, times ``(d / n)^2`` where there are more
    vectors than features: with four times as many nothing is gained by it, and what is stated is to be that of the
    vectors themselves.
    """
    d = features.to(squares).clamp_min(1)
    apart = (count + 1 - 2 / d) * (squares - d)
    share = torch.where(apart > 0, ((1 - 2 / d) * squares + d.square()) / apart.clamp_min(1e-300), 1.0).clamp(0, 1)
    return share * (d / max(count, 1)).clamp_max(1).square()


def ridge(count: int, features: int) -> float:
    """Share of its own variance that is added to every entry."""
    return 1e-6 + 1e-2 * min(1.0, features / max(count, 1))


# Sums of products of float32 numbers are exact enough as long as they are within these bounds.
_SMALL, _LARGE = 1e-24, 1e30


def _mean(rows: Float[Tensor, "g n d"]) -> Float[Tensor, "g 1 d"]:
    """In float64. A few rows at a time are added up as they are: to convert all of them takes five times as long."""
    g, n, d = rows.shape
    even = n - n % _TOGETHER
    sums = rows[:, :even].reshape(g, -1, _TOGETHER, d).sum(2) if even else rows[:, :0]
    whole = sums.sum(1, keepdim=True, dtype=torch.float64) + rows[:, even:].sum(1, keepdim=True, dtype=torch.float64)
    return whole / n


# Rows whose sum loses less to rounding than the rows have lost themselves.
_TOGETHER = 32


def _products(rows: Float[Tensor, "g n d"], inner: int) -> tuple[Float[Tensor, "g d inner"], Float[Tensor, "g d"]]:
    """``rows^T x``, ``x`` the first entries of the rows, and the squares of all entries, summed over the rows.

    Entries whose products leave the range of float32 are multiplied in units of their own.
    """
    result, sums = _multiplied(rows, inner)
    if rows.dtype == torch.float64:
        return result, sums
    # NaN and Inf are out of the range too, and stay what they are.
    odd = ~((sums >= _SMALL) & (sums <= _LARGE))
    if not bool(odd.any()):
        return result, sums
    size = torch.zeros_like(sums)
    columns = odd.any(dim=0).nonzero().squeeze(1)
    size[:, columns] = rows[:, :, columns].abs().amax(dim=1)
    # A power of two changes no digit.
    power = torch.where(odd & (size > 0) & size.isfinite(), size.log2().floor(), torch.zeros_like(size)).double()
    if not bool(power.any()):
        return result, sums
    unit = torch.exp2(power)
    result, sums = _multiplied((rows.double() / unit.unsqueeze(1)).to(rows.dtype), inner)
    return result.double() * unit.unsqueeze(2) * unit[:, :inner].unsqueeze(1), sums.double() * unit.square()


# Least size of the blocks of which only those on and below the diagonal are multiplied. Larger squares have eight.
_BLOCK = 144


def _multiplied(rows: Float[Tensor, "g n d"], inner: int) -> tuple[Float[Tensor, "g d inner"], Float[Tensor, "g d"]]:
    """The same in the type of the rows; of the products of ``x`` with itself one half is copied from the other."""
    if inner < 2 * _BLOCK:
        result = rows.mT @ rows[..., :inner]
    else:
        result, size = rows.new_empty(len(rows), rows.shape[2], inner), max(_BLOCK, -(-inner // 8))
        for start in range(0, inner, size):
            end = min(start + size, inner)
            result[:, start:, start:end] = rows[:, :, start:].mT @ rows[:, :, start:end]
            result[:, start:end, end:] = result[:, end:inner, start:end].mT
    rest = rows[..., inner:].square().sum(dim=1)
    return result, torch.cat([result.diagonal(dim1=-2, dim2=-1), rest], dim=1)
