"""The best low-rank weight for a layer's responses, with a singular value decomposition and without one.

The problem ``min over rank-r L of tr[(T - L) C (T - L)^T]`` is solved by projecting the rows of ``T`` onto the leading
eigenvectors ``X`` of ``T C T^T``: ``L = X (X^T T)``. :func:`exact` takes the eigenvectors. :func:`greedy` does without:
the factors are refined by turns,

    X <- qr(T C V^T),      V <- X^T T

where the orthonormal ``X`` makes ``C`` cancel in the second (GreBsmo, Zhou and Tao 2013, in the metric ``C``). What
the rank lacks begins with the inputs that tell most beside those before (QR with pivoting), so that no order of
channels and no sign decides. It takes products and thin QR decompositions alone. From a start every turn lowers the
error. Without one the turns are over-relaxed: ``qr(T C V^T - s X)``, the shift ``s`` below
half of the smallest kept eigenvalue, as R tells it, which turns faster towards the leading directions (dynamic shifts;
Feng and Yu, ACM TOMS 2024).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import symmetric
from spectrim.linalg.metric import Metric

# From this many entries on the first turns are taken in float32, at half the time.
_SINGLE = 2**18


def exact(
    target: Float[Tensor, "g o n"], metric: Metric, rank: int
) -> tuple[Float[Tensor, "g o r"], Float[Tensor, "g r n"]]:
    """The best factors, from one eigendecomposition of ``T C T^T``. Cost ``O(o n^2 + o^3)``."""
    gram = metric.times(target) @ target.mT
    _, vectors = symmetric.eigh((gram + gram.mT) / 2)
    left = vectors[..., vectors.shape[-1] - rank :].flip(-1)
    return left, left.mT @ target


def greedy(
    target: Float[Tensor, "g o n"],
    metric: Metric,
    rank: int,
    *,
    start: Float[Tensor, "g c n"] | None = None,
    turns: int = 4,
) -> tuple[Float[Tensor, "g o r"], Float[Tensor, "g r n"]]:
    """Factors close to the best ones, without a decomposition of the target. Cost ``O(r n^2 + r o n)`` a turn.

    Parameters
    ----------
    start
        A second factor to go on from, of rank ``c <= rank``.
    turns
        Refinements of both factors; more with the same rank come closer to :func:`exact`. From
        nothing, four lose 1 to 2 % more than it does for ranks up to a quarter of the full one, where the spectrum
        falls like a power.

    Returns
    -------
    left, right
        ``left`` has orthonormal columns, ``right`` is the best second factor for it.
    """
    if start is None and turns > 1 and target.dtype == torch.float64 and target[0].numel() >= _SINGLE:
        # A subspace that the last turn refines need not be known to sixteen digits.
        right = greedy(target.float(), metric.single(), rank, turns=turns - 1)[1]
        return greedy(target, metric, rank, start=right.double(), turns=1)
    g, o, n = target.shape
    right = target.new_zeros(g, 0, n) if start is None else start
    missing = rank - right.shape[1]
    if missing < 0:
        raise ValueError(f"the start has rank {right.shape[1]}, more than the {rank} asked for")
    if missing:
        right = torch.cat([right, _pivoted(target, metric, right, missing).mT @ target], dim=1)
    left, shift = target.new_zeros(g, o, 0), target.new_zeros(g, 1, 1)
    for turn in range(turns):
        image = target @ metric.times(right).mT
        if turn and start is None:
            image = image - shift * left
        left, upper = torch.linalg.qr(image)
        right = left.mT @ target
        if turn:
            # Of an image of orthonormal columns: R has the scale of the eigenvalues, less the shift.
            least = upper.diagonal(dim1=-2, dim2=-1).abs().amin(-1).reshape(g, 1, 1)
            shift = torch.maximum(shift, (least + shift) / 2)
    return left, right


def _pivoted(
    target: Float[Tensor, "g o n"], metric: Metric, right: Float[Tensor, "g c n"], count: int
) -> Float[Tensor, "g o m"]:
    """Orthonormal columns beside those of a second factor, by QR of ``T C`` with pivoting of the inputs.

    The inputs count as equally strong. What is spanned is the same in any order of inputs and for any rotation of the
    outputs.
    """
    seen = metric.times(target)
    basis = known = torch.linalg.qr(seen @ right.mT).Q
    least = torch.finfo(seen.dtype).tiny
    seen = seen * metric.diagonal().to(seen).clamp_min(least).rsqrt().unsqueeze(1)
    energy = seen.square().sum(1) - (known.mT @ seen).square().sum(1)
    for _ in range(count):
        column = seen.take_along_dim(energy.argmax(1).reshape(-1, 1, 1), 2)
        for _ in range(2):  # once leaves what rounding gave
            column = column - basis @ (basis.mT @ column)
        column = column / column.norm(dim=1, keepdim=True).clamp_min(least)
        basis = torch.cat([basis, column], dim=2)
        energy = energy - (column.mT @ seen).square().squeeze(1)
    return basis[:, :, known.shape[2] :]
