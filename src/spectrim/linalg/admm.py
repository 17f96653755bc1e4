"""Which entries stay beside a low-rank part: the alternating direction method of multipliers, its penalty growing.

The sparse weight is held twice, once free to fit the responses (``W``) and once with its pattern (``S``), and a penalty
draws the two together (Boyd et al. 2011; for pruning Meng et al., ALPS, 2024):

    W <- argmin of error(T - L - W) + penalty ||W - S + M||^2,    S <- largest entries of W + M,    M <- M + W - S

A small penalty lets ``W`` make up for what ``S`` lacks, wherever that is, and what ``W`` then asks for decides which
entries are exchanged: many, and far ones, which thresholding of gradients does not find. As it grows by the same factor
a turn both become one. In units in which every entry has curvature one the same penalties serve all layers. The
low-rank part takes a step a turn to what ``S`` leaves; where its first factor projects the outputs, ``W`` leaves to it
what it will make up for.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg.low_rank_steps import LowRankStep, Product
from spectrim.linalg.patterns import Pattern
from spectrim.linalg.sparse import Quadratic, threshold

# Penalties of the first and of the last turn, in shares of the curvature of an entry.
FIRST, LAST = 0.04, 1.0


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
) -> tuple[Product | None, Float[Tensor, "g o n"], Tensor]:
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

    Returns
    -------
    product, weight, mask
        The low-rank part (None without), and the sparse weight with its mask. Their values want to be fitted
        (:func:`spectrim.linalg.sparse.solve`).
    """
    ridge = error.ridge
    units = ridge.units
    wanted = target * units
    sparse, multiplier = torch.zeros_like(wanted), torch.zeros_like(wanted)
    product = step(target, rank, None) if step is not None and rank else None
    mask = torch.zeros_like(wanted, dtype=torch.bool)
    penalty, growth = first, (LAST / first) ** (1 / max(1, turns - 1))
    calm = 0
    for _ in range(turns):
        rest, solve = wanted - sparse + multiplier, ridge.solve
        if step is not None and product is not None:
            following = step.following(ridge, product)
            if following is None:
                rest = rest - product.weight * units
            else:
                solve = following
        free = solve(rest, penalty)
        free += sparse
        before, mask = mask, threshold(free.square(), pattern, density, kernel)
        sparse = free * mask
        # The multiplier is held in units of the penalty.
        multiplier = (free - sparse) / growth
        penalty *= growth
        if step is not None and product is not None:
            product = step(target - sparse / units, rank, product)
        calm = calm + 1 if torch.equal(mask, before) else 0
        if calm == 2:
            break
    return product, sparse / units, mask
