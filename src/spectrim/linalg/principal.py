"""Principal filter analysis: how many units the responses of a layer span, and which of them repeat the others.

The spectrum of the covariance of a layer's responses, one scalar for each unit and sample, tells how many units the
layer needs: those that hold a given share of the energy (PFA-En), or a number in proportion to the spectral entropy,
``n H(p) / ln n`` (PFA-KL). The correlations of the same responses tell which units go, greedily.

Every function raises ValueError, and quotes the value, for NaN, infinity or an option out of range.

Source: Suau, Zappella, Apostoloff, "Filter Distillation for Network Compression", WACV 2020 (arXiv 1807.10585), and
the authors' implementation (apple/dnikit). Where that one keeps a layer of dead units whole, this keeps one unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg.lowrank import variances

RULES = ("l1-max", "abs-max", "l1-min", "abs-min")
"""Rules of :func:`removal_order`; the two ``min`` rules are controls that remove what correlates least."""

_EPSILON = torch.finfo(torch.float64).eps
_TIE = (1e-8, 1e-5)
"""Absolute and relative distance of tied scores, as in the authors' implementation: more than rounding moves them."""


def _checked(values: Tensor, name: str) -> Tensor:
    """The tensor in float64, if its numbers are finite."""
    odd = (~torch.isfinite(values)).nonzero()
    if len(odd):
        where = odd[0].tolist()
        entry = f"{name}{where} is {float(values[tuple(where)])}"
        raise ValueError(f"{entry}, expected finite numbers: look for NaN or overflow in the responses of this layer")
    return values.detach().double()


def _shares(energies: Tensor) -> Tensor:
    """Energies over their sum, descending, in float64; zeros if there is no energy."""
    values = _checked(energies, "energies").sort(descending=True).values
    if values[-1] < 0:
        raise ValueError(f"energies hold {float(values[-1])}, expected numbers >= 0: clip the eigenvalues at 0")
    if values[0] == 0:
        return values
    values = values / values[0]  # first, so that no scale of the responses overflows the sum
    return values / values.sum()


def _check_share(value: float, name: str) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}, expected a number above 0 and at most 1")


def spectrum(covariance: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Energies of the principal components: eigenvalues, descending, float64; rounding below 0 is clipped.

    Parameters
    ----------
    covariance
        ``[n, n]``, of the responses of ``n`` units. Its scale, and hence the divisor, does not matter to the widths.
    """
    return variances(_checked(covariance, "covariance"))


def energy_width(energies: Float[Tensor, " n"], threshold: float) -> int:
    """Units that a share of the spectral energy needs (PFA-En).

    Parameters
    ----------
    energies
        ``[n]``, not negative, in any order.
    threshold
        Share of the energy to keep, above 0 and at most 1.

    Returns
    -------
    int
        The smallest ``k`` whose ``k`` largest energies hold the share, up to the rounding of the sum. A layer without
        energy (all units dead) keeps 1; the authors' implementation keeps all of it.
    """
    _check_share(threshold, "threshold")
    shares = _shares(energies)
    if shares[0] == 0:
        return 1
    # Without room for n roundings, 9 of 10 equal energies would not hold 0.9 of their sum.
    short = shares.cumsum(0) < threshold - len(shares) * _EPSILON
    return min(int(short.sum()) + 1, len(shares))


def divergence(energies: Float[Tensor, " n"]) -> tuple[float, float]:
    """Divergence of a spectrum from a flat one, and the share of units it leaves (PFA-KL).

    With ``p`` the energies over their sum, ``KL = sum p ln(n p)`` and ``gamma = 1 - KL / ln n = H(p) / ln n``: 1 for a
    flat spectrum, 0 for a single component.

    Returns
    -------
    tuple[float, float]
        ``KL`` in nats and ``gamma`` in 0 .. 1. A layer without energy counts as a single component; one unit alone has
        ``gamma = 1``.
    """
    shares = _shares(energies)
    n = len(shares)
    if n == 1:
        return 0.0, 1.0
    if shares[0] == 0:
        return math.log(n), 0.0
    p = shares + _EPSILON
    p = p / p.sum()
    kl = min(max(float((p * (p * n).log()).sum()), 0.0), math.log(n))
    return kl, 1 - kl / math.log(n)


def kl_width(energies: Float[Tensor, " n"]) -> int:
    """Units that the entropy of the spectrum asks for, without a parameter (PFA-KL): ``ceil(n gamma)``.

    Returns
    -------
    int
        In ``1 .. n``; 1 if all units are dead. ``gamma`` of :func:`divergence` counts up to 1e-9, so that rounding adds
        no unit where ``n gamma`` is whole.
    """
    gamma = divergence(energies)[1]
    return min(max(math.ceil(len(energies) * (gamma - 1e-9)), 1), len(energies))


def size_threshold(spectra: Sequence[Float[Tensor, " _"]], share: float) -> float:
    """Threshold at which :func:`energy_width` keeps a share of the units of all layers together (PFA-Size).

    A unit is kept if the energy before it is below the threshold, which therefore is a percentile of those energies,
    pooled over the layers. It counts units: for a target of parameters or operations, bisect on the threshold.

    Parameters
    ----------
    spectra
        Energies of each layer, ``[n]``. Layers without energy count as units that are all left out.
    share
        Share of the units to keep, above 0 and at most 1.

    Returns
    -------
    float
        In ``1e-8 .. 1 - 1e-8``.
    """
    _check_share(share, "share")
    if not spectra:
        raise ValueError("no spectra, expected the energies of one layer at least")
    shares = [_shares(energies).cpu() for energies in spectra]
    before = [torch.ones_like(s) if s[0] == 0 else s.cumsum(0) - s for s in shares]
    pooled = torch.cat(before).sort().values
    # The interpolation of torch.quantile, which refuses long inputs.
    place = share * (len(pooled) - 1)
    low, high = float(pooled[math.floor(place)]), float(pooled[math.ceil(place)])
    return min(max(low + (high - low) * (place - math.floor(place)), 1e-8), 1 - 1e-8)


def inactive(covariance: Float[Tensor, "n n"], share: float = 1e-8) -> list[int]:
    """Units, ascending, whose variance is 0 or below a share of the largest one; every unit of a dead layer."""
    variance = _checked(covariance, "covariance").diagonal()
    return ((variance < share * variance.max()) | (variance <= 0)).nonzero().flatten().tolist()


def correlations(covariance: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Absolute Pearson correlations between units, ``[n, n]``, float64; 0 on the diagonal and for inactive units."""
    c = _checked(covariance, "covariance")
    spread = c.diagonal().clamp_min(0).sqrt()
    spread[inactive(c)] = torch.inf
    # One spread after the other, as their product could underflow; the mean of both orders is symmetric to the bit.
    result = (c / spread.unsqueeze(0) / spread.unsqueeze(1)).abs().clamp_max(1).fill_diagonal_(0)
    return (result + result.mT) / 2


def removal_order(correlation: Float[Tensor, "n n"], keep: int, rule: str, inactive: Sequence[int] = ()) -> list[int]:
    """Units to remove, first to last: inactive ones, then greedily the one that repeats the others most.

    ``l1-max`` removes the unit with the largest sum of correlations with the remaining ones (of ties, the one with the
    largest single correlation); ``abs-max``, of the pair that correlates most, the unit whose next correlation is
    larger. ``l1-min`` and ``abs-min`` take the smallest instead. Of units that are tied still, the first goes.

    Parameters
    ----------
    correlation
        ``[n, n]``, absolute, symmetric; the diagonal and the rows and columns of inactive units are not read.
    keep
        Units that remain, ``1 .. n``.
    rule
        One of :data:`RULES`.
    inactive
        Units that go before all others, in this order. If more are inactive than have to go, the first ones go.

    Returns
    -------
    list[int]
        ``n - keep`` different units. Cost ``O(n (n - keep))`` but for ties.

    Notes
    -----
    The authors' implementation removes every inactive unit even if that leaves fewer than ``keep``, and may break a tie
    of sums by removing a unit outside of it; this does neither.
    """
    n, first = len(correlation), [int(unit) for unit in inactive]
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown, expected one of {', '.join(RULES)}")
    if not 1 <= keep <= n:
        raise ValueError(f"keep is {keep}, expected 1 .. {n}, the units of this layer")
    if len(set(first)) < len(first) or not all(0 <= unit < n for unit in first):
        raise ValueError(f"inactive units {first}: expected different indices in 0 .. {n - 1}")
    if len(first) >= n - keep:
        return first[: n - keep]
    scores = correlation.detach().double().cpu().clone().fill_diagonal_(0)
    scores[first], scores[:, first] = 0, 0
    scores = _checked(scores, "correlation").abs() * (-1 if rule.endswith("min") else 1)
    # The diagonal and units that are gone must never be the largest.
    live = scores.clone().fill_diagonal_(-torch.inf)
    live[first], live[:, first] = -torch.inf, -torch.inf
    # Sums or largest scores of the rows are kept up to date: a removal changes few of them.
    by_sum = rule.startswith("l1")
    best = scores.sum(1) if by_sum else live.amax(1)
    best[first] = -torch.inf
    order = first
    while len(order) < n - keep:
        ties = _largest(best)
        if len(ties) > 1:
            rows = live[ties]
            ties = ties[_largest(rows.amax(1) if by_sum else rows.topk(2).values[:, 1])]
        unit = int(ties[0])
        live[unit], live[:, unit] = -torch.inf, -torch.inf
        if by_sum:
            best -= scores[:, unit]
        else:
            stale = (scores[:, unit] == best).nonzero().flatten()
            best[stale] = live[stale].amax(1)
        best[unit] = -torch.inf
        order.append(unit)
    return order


def _largest(scores: Tensor) -> Tensor:
    """Indices of the largest score and of those tied with it, ascending."""
    top = float(scores.max())
    return (scores >= top - (_TIE[0] + _TIE[1] * abs(top))).nonzero().flatten()
