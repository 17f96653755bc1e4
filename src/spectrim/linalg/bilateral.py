"""The best low-rank weight for a layer's responses, with a singular value decomposition and without one.

The problem ``min over rank-r L of tr[(T - L) C (T - L)^T]`` is solved by projecting the rows of ``T`` onto the leading
eigenvectors ``X`` of ``T C T^T``: ``L = X (X^T T)``. :func:`exact` takes the eigenvectors. :func:`greedy` does without:
the factors are refined by turns,

    X <- qr(T C V^T),      V <- X^T T

where the orthonormal ``X`` makes ``C`` cancel in the second (GreBsmo, Zhou and Tao 2013, in the metric ``C``). Its rank
grows in rounds by random sketches of what is still missing, and every step lowers the error. It takes products and thin
QR decompositions alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg.metric import Metric


def exact(
    target: Float[Tensor, "g o n"], metric: Metric, rank: int
) -> tuple[Float[Tensor, "g o r"], Float[Tensor, "g r n"]]:
    """The best factors, from one eigendecomposition of ``T C T^T``. Cost ``O(o n^2 + o^3)``."""
    gram = metric.times(target) @ target.mT
    _, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    left = vectors[..., vectors.shape[-1] - rank :].flip(-1)
    return left, left.mT @ target


def greedy(
    target: Float[Tensor, "g o n"],
    metric: Metric,
    rank: int,
    *,
    start: Float[Tensor, "g c n"] | None = None,
    rounds: int = 3,
    turns: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "g o r"], Float[Tensor, "g r n"]]:
    """Factors close to the best ones, without a decomposition of the target. Cost ``O(r n^2 + r o n)`` a turn.

    Parameters
    ----------
    start
        A second factor to go on from, of rank ``c <= rank``.
    rounds
        In which the rank grows from that of the start.
    turns
        Refinements of both factors after each growth; more with the same rank come closer to :func:`exact`.
    generator
        Of the sketches; a fixed one if None.

    Returns
    -------
    left, right
        ``left`` has orthonormal columns, ``right`` is the best second factor for it.
    """
    g, o, n = target.shape
    draw = generator or torch.Generator().manual_seed(0)
    right = target.new_zeros(g, 0, n) if start is None else start
    left = target.new_zeros(g, o, 0)
    missing = rank - right.shape[1]
    if missing < 0:
        raise ValueError(f"the start has rank {right.shape[1]}, more than the {rank} asked for")
    growth = [missing * (k + 1) // max(rounds, 1) - missing * k // max(rounds, 1) for k in range(max(rounds, 1))]
    for grow in growth if missing else [0]:
        if grow:
            rest = target - left @ (left.mT @ target) if left.shape[-1] else target
            sketch = torch.randn(g, grow, o, generator=draw, dtype=target.dtype).to(target.device)
            right = torch.cat([right, sketch @ rest], dim=1)
        for _ in range(turns):
            left = torch.linalg.qr(target @ metric.times(right).mT).Q
            right = left.mT @ target
    return left, right
