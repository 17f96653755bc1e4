"""Which entries stay beside a low-rank part: the alternating direction method of multipliers, its penalty growing.

The sparse weight is held twice, once free to fit the responses (``W``) and once with its pattern (``S``), and a penalty
draws the two together (Boyd et al. 2011; for pruning Meng et al., ALPS, 2024):

    W <- argmin of error(T - L - W) + penalty ||W - S + M||^2,    S <- share of the entries of W + M,    M <- M + W - S

The step of ``S`` is continuous: near the border entries stay in part (:func:`spectrim.linalg.patterns.ramp`), and which
ones stay as a whole is asked once, at the end. With a mask in every turn rounding decided between entries that were
nearly equal, and one exchange sent the search to another minimum. The continuous one also finds lower errors.

A small penalty lets ``W`` make up for what ``S`` lacks, wherever that is, and what ``W`` then asks for decides which
entries are exchanged: many, and far ones, which thresholding of gradients does not find. As it grows by the same factor
a turn both become one. In units in which every entry has curvature one the same penalties serve all layers. The
low-rank part takes a step a turn to what ``S`` leaves; where its first factor projects the outputs, ``W`` leaves to it
what it will make up for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectrim.linalg.low_rank_steps import LowRankStep, Product
from spectrim.linalg.patterns import Pattern
from spectrim.linalg.sparse import Quadratic, shares, threshold

# Penalties of the first and of the last turn, in shares of the curvature of an entry.
FIRST, LAST = 0.04, 2.0
# The first one where the search goes on from a neighbour's.
NEXT = 0.2
# Over-relaxation of a path.
RELAX = 1.5


@dataclass(frozen=True, eq=False)
class Iterate:
    """What a search found, and where another may go on.

    Attributes
    ----------
    product
        The low-rank part, or None.
    weight, mask
        The sparse weight. Its values want to be fitted (:func:`spectrim.linalg.sparse.solve`).
    multiplier
        ``M``.
    """

    product: Product | None
    weight: Float[Tensor, "g o n"]
    mask: Bool[Tensor, "g o n"]
    multiplier: Float[Tensor, "g o n"]


def search(
    target: Float[Tensor, "g o n"],
    error: Quadratic,
    step: LowRankStep | None,
    rank: int,
    pattern: Pattern,
    density: float,
    kernel: tuple[int, ...],
    *,
    turns: int,
    first: float = FIRST,
    start: Iterate | None = None,
    relax: float = 1.0,
) -> Iterate:
    """Find a low-rank and a sparse weight.

    Parameters
    ----------
    target
        ``T``.
    error
        What is minimised.
    step
        How the low-rank part of that rank is found; None with a rank of 0.
    pattern, density, kernel
        Of the sparse part; ``kernel`` is ``(i, *k)``.
    turns
        Over which the penalty grows: more of them find better entries.
    first
        The first penalty, as a share of the curvature of an entry.
    start
        To go on from, of at most that rank and density; nothing if None.
    relax
        Over-relaxation: so much of the way of ``W`` from ``S`` (Eckstein and Bertsekas 1992).
    """
    ridge = error.ridge
    units = ridge.units
    wanted = target * units
    if start is None:
        product = None
        sparse, multiplier = torch.zeros_like(wanted), torch.zeros_like(wanted)
    else:
        product = start.product
        sparse, multiplier = start.weight * units, start.multiplier
    if rank and step is not None and (product is None or product.factors[0].shape[2] < rank):
        product = step(target - sparse / units, rank, product if step.grows else None)
    penalty, growth = first, (LAST / first) ** (1 / max(1, turns - 1))
    calm, share = 0, None
    # What every turn writes again: the arrays may be large, and fresh memory costs as much as the sums.
    rest, scores = torch.empty_like(wanted), torch.empty_like(wanted)
    for _ in range(turns):
        torch.sub(wanted, sparse, out=rest).add_(multiplier)
        solve = ridge.solve
        if step is not None and product is not None:
            following = step.following(ridge, product)
            if following is None:
                rest.sub_(product.weight * units)
            else:
                solve = following
        free = solve(rest, penalty).mul_(relax).add_(sparse).add_(multiplier, alpha=1 - relax)
        torch.square(free, out=scores)
        before, share = share, shares(scores, pattern, density, kernel)
        torch.mul(free, share, out=sparse)
        # The multiplier is held in units of the penalty.
        multiplier = free.sub_(sparse).div_(growth)
        penalty *= growth
        if step is not None and product is not None:
            product = step(torch.div(sparse, units, out=rest).sub_(target).neg_(), rank, product)
        calm = calm + 1 if before is not None and torch.equal(share, before) else 0
        if calm == 2:
            break
    mask = threshold(scores, pattern, density, kernel)
    return Iterate(product, sparse * mask / units, mask, multiplier)
