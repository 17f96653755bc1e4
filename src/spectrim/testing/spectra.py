"""Matrices whose spectra are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def planted(
    rows: int,
    columns: int,
    energies: Sequence[float],
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Float[Tensor, "g rows columns"]:
    """Random matrices whose squared singular values are known.

    Parameters
    ----------
    energies
        Squared singular values, at most ``min(rows, columns)``; the others are zero. Any order.
    groups
        How many, each with other singular vectors.

    Returns
    -------
    Tensor
        ``[groups, rows, columns]``.

    Raises
    ------
    ValueError
        For more energies than the matrix has singular values, or negative ones.
    """
    if len(energies) > min(rows, columns) or any(e < 0 for e in energies):
        raise ValueError(
            f"a {rows} x {columns} matrix takes at most {min(rows, columns)} energies of at least 0; "
            f"got {list(energies)}"
        )
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(size: int) -> Tensor:
        drawn = torch.randn(groups, size, len(energies), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn)[0]

    values = torch.tensor([float(e) for e in energies], dtype=torch.float64).sqrt()
    return ((orthonormal(rows) * values) @ orthonormal(columns).mT).to(dtype)
