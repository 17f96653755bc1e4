"""Low rank in a metric: one eigendecomposition gives the factors and the error of every rank.

The problem is ``min ||(M - L R)^T||`` over rank-``r`` products, where the norm weighs the rows of ``M`` by a positive
semidefinite metric ``A``: ``||X||_A^2 = tr(X^T A X)``. Without a metric this is the truncated SVD of a weight matrix;
with the second moment of a layer's inputs it is principal component analysis of the layer's outputs.

The solution projects onto the leading eigenvectors ``V_r`` of ``M^T A M``: ``L = M V_r``, ``R = V_r^T``. Nothing is
inverted, so rank-deficient metrics need no special case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import symmetric


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Energies and right basis of a matrix in a metric.

    Attributes
    ----------
    energies
        ``[g, R]``, squared singular values of ``A^{1/2} M``, descending, ``R = min(rows, columns)``.
    basis
        ``[g, columns, B]``, orthonormal; its first ``r`` columns span the best rank-``r`` row space. ``B`` is ``R``, or
        what was asked for.
    """

    energies: Float[Tensor, "g R"]
    basis: Float[Tensor, "g columns B"]


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and not negative, and eigenvectors with fixed signs."""
    values, vectors = symmetric.eigh((gram + gram.mT).div_(2))
    # The largest entry of each vector is made positive, so that results do not depend on the eigensolver's mood.
    pivots = vectors.abs().argmax(dim=-2, keepdim=True)
    vectors *= torch.where(vectors.gather(-2, pivots) < 0, -1.0, 1.0)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def standard(covariance: Float[Tensor, "*g d d"]) -> tuple[Float[Tensor, "*g d d"], Float[Tensor, "*g d"]]:
    """A covariance as correlations and deviations; an entry without variance is on its own, with a deviation of 0."""
    size = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(size > 0, 1 / size, torch.zeros_like(size))
    correlation = covariance * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    correlation.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return correlation, size


def root(metric: Float[Tensor, "g n n"]) -> Float[Tensor, "g n n"]:
    """A triangular ``R`` with ``R^T R`` the metric, to rounding.

    Any root has the spectrum of any other. Rounding is relative to every entry's own diagonal, whatever their units;
    entries without any have a column of zeros.

    Raises
    ------
    ValueError
        If the matrix is not positive semidefinite.
    """
    standardised, size = standard(metric.double())
    for jitter in (0.0, 1e-13, 1e-11, 1e-9, 1e-7):
        standardised.diagonal(dim1=-2, dim2=-1).fill_(1 + jitter)
        factor, failed = torch.linalg.cholesky_ex(standardised)
        if not bool(failed.any()):
            return factor.mT * size.unsqueeze(-2)
    raise ValueError("a second moment is not positive semidefinite; it holds NaN or Inf")


def energies(
    matrix: Float[Tensor, "g rows columns"], metric: Float[Tensor, "g rows rows"] | None = None
) -> Float[Tensor, "g R"]:
    """Energies of :func:`spectrum` alone, descending, in a fraction of its time."""
    m = matrix.double()
    if m.shape[-1] <= m.shape[-2]:
        gram = m.mT @ (m if metric is None else metric.double() @ m)
    elif metric is None:
        gram = m @ m.mT
    else:
        whitened = root(metric) @ m
        gram = whitened @ whitened.mT
    return variances(gram)


def spectrum(
    matrix: Float[Tensor, "g rows columns"],
    metric: Float[Tensor, "g rows rows"] | None = None,
    most: int | None = None,
) -> Spectrum:
    """Spectrum of ``A^{1/2} M`` by the eigenproblem of the smaller side, in float64.

    Parameters
    ----------
    matrix
        ``M``.
    metric
        ``A``, symmetric positive semidefinite; the identity if None.
    most
        Basis vectors wanted; all if None.

    Returns
    -------
    Spectrum
        ``min(rows, columns)`` energies and, if not fewer are wanted, as many right basis vectors.

    Notes
    -----
    Cost ``O(rows columns min(rows, columns))``; 512 x 4608 takes a fifth of the time of an SVD.
    """
    m = matrix.double()
    rows, columns = m.shape[-2:]
    if columns <= rows:
        weighted = m if metric is None else metric.double() @ m
        values, vectors = _eigh(m.mT @ weighted)
        return Spectrum(values, vectors[..., :most])
    whitened = m if metric is None else root(metric) @ m
    values, vectors = _eigh(whitened @ whitened.mT)
    # QR keeps the spans of leading columns and completes them where the spectrum has died out.
    basis, triangle = torch.linalg.qr(whitened.mT @ vectors[..., :most])
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return Spectrum(values, basis * signs.unsqueeze(-2))


def factors(
    matrix: Float[Tensor, "g rows columns"], basis: Float[Tensor, "g columns R"], rank: int
) -> tuple[Float[Tensor, "g rows r"], Float[Tensor, "g r columns"]]:
    """``L = M V_r`` and ``R = V_r^T``, in float64."""
    v = basis[..., :rank]
    return matrix.double() @ v, v.mT.contiguous()


def balance(
    left: Float[Tensor, "g rows r"], right: Float[Tensor, "g r columns"]
) -> tuple[Float[Tensor, "g rows r"], Float[Tensor, "g r columns"]]:
    """The same product with equally long column ``j`` of the left and row ``j`` of the right factor.

    Training converges better, and half precision loses less, when the two factors are of one size. Components of
    length zero are left as they are.
    """
    a, b = left.norm(dim=-2), right.norm(dim=-1)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
    return left * scale.unsqueeze(-2), right / scale.unsqueeze(-1)


def tail_errors(energies: Float[Tensor, "g R"]) -> Float[Tensor, " ranks"]:
    """Relative error of every rank ``0 .. R``: energy of the components left out, over all groups.

    A matrix without energy loses nothing at any rank.
    """
    kept = torch.cat([energies.new_zeros(1), energies.sum(dim=0).cumsum(0)])
    whole = kept[-1]
    if float(whole) <= 0:
        return torch.zeros_like(kept)
    return ((whole - kept) / whole).clamp(0, 1)


def principal(covariance: Float[Tensor, "g n n"]) -> Spectrum:
    """Principal components of a covariance: its eigenvalues, descending, and eigenvectors."""
    return Spectrum(*_eigh(covariance.double()))


def variances(covariance: Float[Tensor, "*g n n"]) -> Float[Tensor, "*g n"]:
    """Energies of :func:`principal` alone, descending, in a fraction of its time."""
    gram = covariance.double()
    return symmetric.eigvalsh((gram + gram.mT).div_(2)).flip(-1).clamp_min(0)


def profile(energies: Float[Tensor, "g R"], most: int = 256) -> tuple[float, ...]:
    """Share of the energy in each component, over all groups: at most ``most`` of them, for people to look at."""
    energy = energies.sum(0)
    return tuple((energy / energy.sum().clamp_min(1e-300))[:most].tolist())
