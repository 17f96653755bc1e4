"""Low rank plus sparse by two published methods, written from their papers, to measure the library's fits against.

Both alternate: the best low-rank weight for what the sparse one leaves, the largest entries of what the low-rank one
leaves. GoDec (Zhou and Tao, ICML 2011) does so with the weight itself; OATS (Zhang and Papyan, ICLR 2025) with the
weight scaled by the root mean square of each input, ``W D`` with ``D = sqrt(diag(X^T X))``, and scales back at the end.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# A rank up to this share of the full one is cut by a randomised decomposition, which is then the faster one.
_SKETCHED = 0.2
# From this many numbers on; smaller ones are decomposed whole.
_LARGE = 2**19


def godec(weight: Float[Tensor, "o n"], rank: int, kept: int, *, turns: int = 80) -> Float[Tensor, "o n"]:
    """The sum of a weight of a rank and one with as many entries as are kept."""
    sparse = torch.zeros_like(weight)
    low = torch.zeros_like(weight)
    for _ in range(turns):
        low = truncated(weight - sparse, rank)
        sparse = largest(weight - low, kept)
    return low + sparse


def oats(
    weight: Float[Tensor, "o n"], moment: Float[Tensor, " n"], rank: int, kept: int, *, turns: int = 80
) -> Float[Tensor, "o n"]:
    """The same for the weight scaled by what its inputs are in the mean; ``moment`` holds their mean squares."""
    scale = moment.sqrt().to(weight.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return godec(weight * scale, rank, kept, turns=turns) / scale


def truncated(matrix: Float[Tensor, "o n"], rank: int) -> Float[Tensor, "o n"]:
    """The best matrix of a rank; of large matrices nearly (``torch.svd_lowrank``)."""
    if not rank:
        return torch.zeros_like(matrix)
    if matrix.numel() >= _LARGE and rank <= _SKETCHED * min(matrix.shape):
        left, values, right = torch.svd_lowrank(matrix, q=rank + 8, niter=2)
        return (left[:, :rank] * values[:rank]) @ right[:, :rank].mT
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def largest(matrix: Float[Tensor, "o n"], kept: int) -> Float[Tensor, "o n"]:
    """The matrix with all but its largest entries zero."""
    sparse = torch.zeros_like(matrix).view(-1)
    held = matrix.reshape(-1).abs().topk(kept, sorted=False).indices
    sparse[held] = matrix.reshape(-1)[held]
    return sparse.view_as(matrix)
