"""Factors that several matrices share (Chen et al. 2021), in plain or weighted norms.

The matrices ``M_n`` of ``N`` layers, unfolded the same way, are written as

    right-shared (RJSVD)   M_n ~ U_n V          [U_1; ...; U_N] V   = SVD of the vertical stack
    left-shared (LJSVD)    M_n ~ U V_n          U [V_1 ... V_N]     = SVD of the horizontal stack

which minimise ``sum_n ||M_n - product_n||^2``. With a metric ``A_n`` a layer, the norm is ``||X||_A^2 = tr(X^T A X)``:
what the layer's responses lose if ``A_n`` is the second moment of what it sees (of a split kernel: of its average
slice, :attr:`SlicedMetric.average <spectrim.linalg.metric.SlicedMetric.average>`). The right-shared problem keeps its
closed form, since the best ``U_n`` for orthonormal rows ``V`` is ``M_n V^T`` whatever the metric: ``V`` are the leading
eigenvectors of ``sum_n M_n^T A_n M_n``. The left-shared one keeps it where all layers have one metric, as layers that
see the same input do; otherwise the solution in the mean metric is improved by turns, ``V_n`` exactly and ``U`` by
conjugate gradients. Nothing is inverted but Gram matrices of the size of the rank.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import lowrank, response
from spectrim.linalg.metric import Full, SlicedMetric


def right_shared(
    matrices: Sequence[Float[Tensor, "g _ c"]],
    metrics: Sequence[SlicedMetric] | None = None,
    most: int | None = None,
) -> lowrank.Spectrum:
    """The row space that several matrices share best: ``V_r`` is the transpose of the first ``r`` basis vectors.

    Parameters
    ----------
    matrices
        ``M_n [g, p_n, c]``; the numbers of rows may differ.
    metrics
        ``A_n``, symmetric positive semidefinite; identities if None.
    most
        Basis vectors wanted; all if None.

    Returns
    -------
    Spectrum
        Energies of the vertical stack of the ``A_n^{1/2} M_n``: their tail sums are the errors of every rank.

    Notes
    -----
    Cost ``O(P c min(P, c))`` with ``P = sum p_n``: the eigenproblem is that of the smaller Gram matrix.
    """
    check_same(matrices, 2, "columns")
    doubles = [m.double() for m in matrices]
    if metrics is None:
        return lowrank.spectrum(torch.cat(doubles, dim=-2), most=most)
    if doubles[0].shape[-1] <= sum(m.shape[-2] for m in doubles):
        gram = sum((m.mT @ a.weigh(m) for m, a in zip(doubles, metrics, strict=True)), doubles[0].new_zeros(()))
        spectrum = lowrank.principal(gram)
        return lowrank.Spectrum(spectrum.energies, spectrum.basis[..., :most])
    halves = [lowrank.root(a.average) @ m for m, a in zip(doubles, metrics, strict=True)]
    return lowrank.spectrum(torch.cat(halves, dim=-2), most=most)


def left_shared(
    matrices: Sequence[Float[Tensor, "g p _"]], metric: SlicedMetric | None = None, most: int | None = None
) -> tuple[Float[Tensor, "g p r"], tuple[Float[Tensor, "g r _"], ...], Float[Tensor, "g R"]]:
    """The first factor that several matrices share best in one metric, and their second ones.

    Parameters
    ----------
    matrices
        ``M_n [g, p, c_n]``; the numbers of columns may differ.
    metric
        ``A`` of all of them; the identity if None.
    most
        Components wanted; all if None.

    Returns
    -------
    left
        ``U``, nested: its first ``r`` columns are the factor of rank ``r``.
    rights
        ``V_n``, the horizontal stack of which has orthonormal rows.
    energies
        Of the horizontal stack; their tail sums are the errors of every rank.
    """
    check_same(matrices, 1, "rows")
    stacked = torch.cat([m.double() for m in matrices], dim=-1)
    spectrum = lowrank.spectrum(stacked, None if metric is None else metric.average, most)
    left, right = lowrank.factors(stacked, spectrum.basis, spectrum.basis.shape[-1])
    return left, tuple(right.split([m.shape[-1] for m in matrices], dim=-1)), spectrum.energies


def left_start(
    matrices: Sequence[Float[Tensor, "g p _"]],
    metrics: Sequence[SlicedMetric] | None,
    most: int | None = None,
) -> tuple[Float[Tensor, "g p r"], Float[Tensor, "g R"]]:
    """A nested first factor to share, and energies: exact in one metric, in their mean where they differ.

    Before the mean is taken, the size of every metric goes over to its matrix, or the largest one alone would count.
    """
    if metrics is None or all(a is metrics[0] for a in metrics):
        left, _, energies = left_shared(matrices, None if metrics is None else metrics[0], most)
        return left, energies
    averages = [a.average for a in metrics]
    sizes = [a.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-300) for a in averages]
    scaled = [size.sqrt() * m.double() for size, m in zip(sizes, matrices, strict=True)]
    mean = torch.stack([a / size for size, a in zip(sizes, averages, strict=True)]).mean(0)
    left, _, energies = left_shared(scaled, Full(mean), most)
    return left, energies


def alternate_left(
    matrices: Sequence[Float[Tensor, "g p _"]],
    metrics: Sequence[SlicedMetric],
    left: Float[Tensor, "g p r"],
    *,
    sweeps: int,
) -> tuple[Float[Tensor, "g p r"], tuple[Float[Tensor, "g r _"], ...]]:
    """Improve a left-shared product in the layers' own metrics by turns: ``U`` by a few steps, then ``V_n`` exactly.

    Parameters
    ----------
    metrics
        Of the slices, not of their average.
    left
        ``U`` to start from.
    sweeps
        Rounds; 0 fits the second factors alone.

    Returns
    -------
    left, rights
        The objective is never larger than at the start.
    """

    def fitted(left: Tensor) -> tuple[Tensor, ...]:
        return tuple(response.refit(m, a, left) for m, a in zip(matrices, metrics, strict=True))

    rights = fitted(left)
    for _ in range(sweeps):
        left = response.refit_first(matrices, metrics, left, rights)
        left = left / left.norm(dim=1, keepdim=True).clamp_min(1e-300)
        rights = fitted(left)
    return left, rights


def alternate_right(
    matrices: Sequence[Float[Tensor, "g _ c"]],
    metrics: Sequence[SlicedMetric],
    lefts: Sequence[Float[Tensor, "g _ r"]],
    *,
    sweeps: int,
) -> tuple[tuple[Float[Tensor, "g _ r"], ...], Float[Tensor, "g r c"]]:
    """Improve a right-shared product in the layers' own metrics: every ``U_n`` by a few steps, then ``V`` exactly.

    Parameters and returns as for :func:`alternate_left`, with the ``U_n`` and the one ``V``.
    """

    def fitted(lefts: Sequence[Tensor]) -> Tensor:
        layers = zip(matrices, metrics, lefts, strict=True)
        return functools.reduce(operator.add, (response.normal(*layer, energy=False) for layer in layers)).solve()

    right = fitted(lefts)
    for _ in range(sweeps):
        layers = zip(matrices, metrics, lefts, strict=True)
        lefts = [response.refit_first([m], [a], left, [right]) for m, a, left in layers]
        right = fitted(lefts)
    return tuple(lefts), right


def check_same(matrices: Sequence[Tensor], axis: int, what: str) -> None:
    """Raise ValueError unless the matrices have the same groups and the same length along an axis."""
    sizes = [m.shape[axis] for m in matrices]
    if not sizes or len(set(sizes)) > 1 or len({m.shape[0] for m in matrices}) > 1:
        shapes = ", ".join(str(tuple(m.shape)) for m in matrices) or "none"
        raise ValueError(f"matrices that share a factor have the same groups and {what}; these are {shapes}")
