"""Eigenvalues of symmetric matrices, also where the solver of a machine gives none.

Of matrices with many equal eigenvalues, as moments of a few samples have, solvers in single precision may not converge,
or end with NaN and no word of it: on some machines, with some numbers of threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg.finite import all_finite

log = logging.getLogger(__name__)


def eigh(matrix: Float[Tensor, "*g n n"]) -> tuple[Float[Tensor, "*g n"], Float[Tensor, "*g n n"]]:
    """Eigenvalues, ascending, and orthonormal eigenvectors of a symmetric matrix, of which half may be read."""
    values, vectors = _solved(lambda each: tuple(torch.linalg.eigh(each)), matrix)
    return values, vectors


def eigvalsh(matrix: Float[Tensor, "*g n n"]) -> Float[Tensor, "*g n"]:
    """As :func:`eigh`, the eigenvalues alone."""
    return _solved(lambda each: (torch.linalg.eigvalsh(each),), matrix)[0]


def _solved(solve: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor) -> tuple[Tensor, ...]:
    try:
        solution = solve(matrix)
    except RuntimeError as error:  # what does not converge
        log.info("eigenvalues of %s are sought again: %s", tuple(matrix.shape), error)
    else:
        if all_finite(*solution) or not all_finite(matrix):
            return solution
    exact = matrix.double()
    # A little on the diagonal keeps equal eigenvalues apart from what is rounding.
    size = exact.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    steps = torch.arange(exact.shape[-1], dtype=exact.dtype, device=exact.device) / exact.shape[-1]
    return tuple(part.to(matrix.dtype) for part in solve(exact + torch.diag_embed(1e-9 * size * (1 + steps))))
