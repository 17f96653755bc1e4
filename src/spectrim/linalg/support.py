"""Whether the data determine a fitted support, told from the fit alone.

A sparse and a low-rank part can always be fitted; that they mean something takes three things. What was kept must stand
out from what was dropped (*gap*). A kept entry must not be replaceable by one at an input that is nearly the same
(counted within the gap). And no combination of kept entries may be something that the low-rank part can become as well,
as a whole row is (*overlap*: the incoherence of Chandrasekaran et al. 2011, between the tangent space of the low-rank
part and the entries of the support).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg.additive import Additive
from spectrim.linalg.patterns import Pattern
from spectrim.linalg.sparse import Quadratic

# A gap below this is what noise alone leaves between neighbours in rank; see benchmarks/planted.py.
GAP = 2.0
# Squared: this share of a combination of kept entries may be of low rank.
OVERLAP = 0.97


@dataclass(frozen=True)
class Support:
    """What a fit tells of its support.

    Attributes
    ----------
    gap
        Least error of doing without a kept unit, or with its closest substitute, over the most that a dropped one of
        its pool would gain; about 1 where noise decides. Infinite where nothing was kept or dropped.
    overlap
        Largest cosine between a combination of kept entries and what the low-rank part can change by: 1 where the two
        parts cannot be told apart, 0 without a low-rank part.
    """

    gap: float
    overlap: float

    @property
    def is_determined(self) -> bool:
        """Whether the support, and what belongs to which part, can be believed."""
        return self.gap >= GAP and self.overlap <= OVERLAP


def examine(
    target: Float[Tensor, "g o n"],
    error: Quadratic,
    fit: Additive,
    pattern: Pattern,
    kernel: tuple[int, ...],
    *,
    turns: int = 30,
) -> Support:
    """Examine the support of a fit.

    Parameters
    ----------
    target, error, pattern, kernel
        Of the fit (:func:`spectrim.linalg.additive.decompose`).
    found
        The fit; its low-rank part, if any, is of the split after the whole kernel.
    turns
        Of the power iteration for the overlap, which it approaches from below.

    Raises
    ------
    ValueError
        If the low-rank part is of another split.
    """
    mask, weight = fit.sparse.mask, fit.sparse.weight
    g, o, n = target.shape
    scale = error.scale(o)
    rest = target - weight if fit.product is None else target - weight - fit.product.weight
    gains = (error.apply(rest) / scale).square()
    alone = 1 - torch.maximum(_likeness(error, g, n, target), _outputs_likeness(error, target)).clamp_max(1)
    losses = (weight * scale).square() * alone
    units = pattern.open(torch.where(mask, losses, gains).reshape(g, o, *kernel)).sum(-1)
    kept = pattern.open(mask.reshape(g, o, *kernel)).any(-1)
    least = units.masked_fill(~kept, float("inf")).amin(1)
    most = units.masked_fill(kept, 0.0).amax(1)
    gap = float((least / most.clamp_min(1e-300)).min())
    return Support(gap, _overlap(fit, scale, turns))


def _likeness(error: Quadratic, g: int, n: int, like: Tensor) -> Float[Tensor, "g 1 n"]:
    """Largest squared correlation of every input with another one."""
    strength = error.metric.diagonal().clamp_min(1e-300)
    maxima = []
    for entries in torch.arange(n, device=like.device).split(1024):
        rows = torch.zeros(g, entries.numel(), n, dtype=like.dtype, device=like.device)
        rows[:, torch.arange(entries.numel(), device=like.device), entries] = 1
        squares = error.metric.times(rows).square() / (strength[:, entries].unsqueeze(2) * strength.unsqueeze(1))
        maxima.append((squares * (1 - rows)).amax(2))
    return torch.cat(maxima, dim=1).unsqueeze(1)


def _outputs_likeness(error: Quadratic, like: Tensor) -> Float[Tensor, "g _ 1"]:
    """Largest squared correlation of every output with another one; 0 where they count as they are."""
    if error.outer is None:
        return like.new_zeros(like.shape[0], 1, 1)
    strength = error.outer.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300)
    squares = error.outer.square() / (strength.unsqueeze(2) * strength.unsqueeze(1))
    off = 1 - torch.eye(squares.shape[-1], dtype=squares.dtype, device=squares.device)
    return (squares * off).amax(2, keepdim=True)


def _overlap(fit: Additive, scale: Tensor, turns: int) -> float:
    """Largest singular value of the projection of the support onto the tangent space, by power iteration."""
    mask = fit.sparse.mask
    if fit.product is None or not bool(mask.any()):
        return 0.0
    left, right = fit.product.factors
    g, o, n = mask.shape
    if left.shape[1] != o or right.shape[2] != n:
        raise ValueError(
            f"low-rank factors of shapes {tuple(left.shape)} and {tuple(right.shape)}; expected those of the split "
            f"after the whole kernel, with {o} outputs and {n} inputs"
        )
    # In units in which every entry has curvature one; these are products of one number an output and one an input.
    columns = torch.linalg.qr(scale[:, :, :1] * left).Q
    rows = torch.linalg.qr((scale[:, :1] * right).mT).Q
    inside = mask.to(scale.dtype)
    draw = torch.Generator().manual_seed(0)
    moving = torch.randn(g, o, n, generator=draw, dtype=scale.dtype).to(scale.device) * inside
    cosine = 0.0
    for _ in range(turns):
        moving = moving / moving.norm().clamp_min(1e-300)
        outside = moving - columns @ (columns.mT @ moving)
        outside = outside - (outside @ rows) @ rows.mT
        moving = (moving - outside) * inside
        cosine = float(moving.norm())
    return min(1.0, cosine) ** 0.5
