"""Factors that several matrices share (Chen et al. 2021), in plain or weighted norms.

The matrices ``M_n`` of ``N`` layers, unfolded the same way, are written as

    right-shared (RJSVD)   M_n ~ U_n V          [U_1; ...; U_N] V   = SVD of the vertical stack
    left-shared (LJSVD)    M_n ~ U V_n          U [V_1 ... V_N]     = SVD of the horizontal stack
    both (Bi-JSVD)         M_n ~ U_n V + U V_n  by turns, each part fitted to what the other leaves

which minimise ``sum_n ||M_n - product_n||^2``. With a metric ``A_n`` a layer, the norm is ``||X||_A^2 = tr(X^T A X)``:
what the layer's responses lose if ``A_n`` is the second moment of what it sees. The right-shared problem keeps its
closed form, since the best ``U_n`` for orthonormal rows ``V`` is ``M_n V^T`` whatever the metric: ``V`` are the leading
eigenvectors of ``sum_n M_n^T A_n M_n``. The left-shared one keeps it where all layers have one metric, as layers that
see the same input do; otherwise the solution in the mean metric is improved by turns, ``V_n`` exactly and ``U`` by
conjugate gradients. Nothing is inverted but Gram matrices of the size of the rank.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import lowrank, response

_FIRST = ("left", "right")
# Steps of subspace iteration in a half round that starts from the one before.
_STEPS = 3


def right_shared(
    matrices: Sequence[Float[Tensor, "g _ c"]],
    metrics: Sequence[Float[Tensor, "g _ _"]] | None = None,
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
    _same(matrices, 2, "columns")
    doubles = [m.double() for m in matrices]
    if metrics is None:
        return lowrank.spectrum(torch.cat(doubles, dim=-2), most=most)
    if doubles[0].shape[-1] <= sum(m.shape[-2] for m in doubles):
        gram = sum((m.mT @ (a.double() @ m) for m, a in zip(doubles, metrics, strict=True)), doubles[0].new_zeros(()))
        found = lowrank.principal(gram)
        return lowrank.Spectrum(found.energies, found.basis[..., :most])
    halves = [lowrank.square_root(a) @ m for m, a in zip(doubles, metrics, strict=True)]
    return lowrank.spectrum(torch.cat(halves, dim=-2), most=most)


def left_shared(
    matrices: Sequence[Float[Tensor, "g p _"]], metric: Float[Tensor, "g p p"] | None = None, most: int | None = None
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
    _same(matrices, 1, "rows")
    stacked = torch.cat([m.double() for m in matrices], dim=-1)
    found = lowrank.spectrum(stacked, metric, most)
    left, right = lowrank.factors(stacked, found.basis, found.basis.shape[-1])
    return left, tuple(right.split([m.shape[-1] for m in matrices], dim=-1)), found.energies


@dataclass(frozen=True, eq=False)
class Bilateral:
    """``M_n ~ own_lefts[n] @ shared_right + shared_left @ own_rights[n]``.

    Attributes
    ----------
    own_lefts, shared_right
        The right-shared part, ``[g, p, r_r]`` a layer and ``[g, r_r, c]``.
    shared_left, own_rights
        The left-shared part, ``[g, p, r_l]`` and ``[g, r_l, c]`` a layer.
    errors
        The objective after every half sweep; it never rises.
    """

    own_lefts: tuple[Tensor, ...]
    shared_right: Tensor
    shared_left: Tensor
    own_rights: tuple[Tensor, ...]
    errors: tuple[float, ...] = ()

    def products(self) -> tuple[Tensor, ...]:
        """The matrices that the factors stand for."""
        # Layers that share one factor only may differ in the other's size, so an empty product is left out.
        if not self.shared_left.shape[-1]:
            return tuple(u @ self.shared_right for u in self.own_lefts)
        if not self.shared_right.shape[-2]:
            return tuple(self.shared_left @ v for v in self.own_rights)
        pairs = zip(self.own_lefts, self.own_rights, strict=True)
        return tuple(u @ self.shared_right + self.shared_left @ v for u, v in pairs)


def bilateral(
    matrices: Sequence[Float[Tensor, "g _ _"]],
    left_rank: int,
    right_rank: int,
    metrics: Sequence[Float[Tensor, "g _ _"]] | None = None,
    *,
    sweeps: int = 30,
    tolerance: float = 1e-5,
    first: str = "left",
    start: Bilateral | None = None,
) -> Bilateral:
    """Both kinds of sharing at once, by turns.

    Parameters
    ----------
    matrices
        ``M_n``, all of one shape.
    left_rank, right_rank
        Ranks of the left-shared and of the right-shared part; 0 leaves a part out, and one of them is not 0.
    metrics
        ``A_n``, symmetric positive semidefinite; identities if None.
    sweeps
        Most rounds over both parts; 30 in the paper.
    tolerance
        Stop when a round lowers the objective by less than this share of it.
    first
        Which part is fitted first, ``"left"`` as in the paper's code or ``"right"`` as in its text.
    start
        Where to go on from, of the same or other ranks.

    Returns
    -------
    Bilateral

    Notes
    -----
    Each half round is a right- or left-shared problem for what the other part leaves. The first round solves it, the
    following ones lower it by subspace iteration from the solution of the round before (for the left part in metrics
    that differ, by :func:`alternate_left`): the objective never rises. The limit depends on the order.
    """
    if first not in _FIRST:
        raise ValueError(f"first is {first!r}; expected 'left' or 'right'")
    if left_rank:
        _same(matrices, 1, "rows")
    if right_rank:
        _same(matrices, 2, "columns")
    doubles = [m.double() for m in matrices]
    state = start or nothing(doubles)
    errors: list[float] = []
    ranks = {"left": left_rank, "right": right_rank}
    order = [part for part in (_FIRST if first == "left" else _FIRST[::-1]) if ranks[part]]
    for _ in range(max(1, sweeps)):
        before = errors[-1] if errors else None
        for part in order:
            if part == "left":
                state = _left_part(doubles, state, left_rank, metrics)
            else:
                state = _right_part(doubles, state, right_rank, metrics)
            errors.append(objective(doubles, state.products(), metrics))
        if len(order) < 2 or (before is not None and before - errors[-1] <= tolerance * before):
            break
    return Bilateral(state.own_lefts, state.shared_right, state.shared_left, state.own_rights, tuple(errors))


def objective(matrices: Sequence[Tensor], products: Sequence[Tensor], metrics: Sequence[Tensor] | None = None) -> float:
    """``sum_n ||M_n - product_n||^2`` in the metrics."""
    total = 0.0
    for n, (matrix, product) in enumerate(zip(matrices, products, strict=True)):
        rest = matrix.double() - product
        seen = rest if metrics is None else metrics[n] @ rest
        total += float((rest * seen).sum())
    return total


def nothing(matrices: Sequence[Float[Tensor, "g _ _"]]) -> Bilateral:
    """Factors of rank 0."""
    lefts = tuple(m.new_zeros(*m.shape[:2], 0) for m in matrices)
    rights = tuple(m.new_zeros(m.shape[0], 0, m.shape[2]) for m in matrices)
    return Bilateral(lefts, rights[0], lefts[0], rights)


def _right_part(matrices: Sequence[Tensor], state: Bilateral, rank: int, metrics: Sequence[Tensor] | None) -> Bilateral:
    rest = list(matrices)
    if state.shared_left.shape[-1]:
        rest = [m - state.shared_left @ v for m, v in zip(matrices, state.own_rights, strict=True)]
    if state.shared_right.shape[-2] == rank:
        # Close to the solution already: a few steps of subspace iteration lower the error at a fraction of the cost.
        basis = state.shared_right.mT
        for _ in range(_STEPS):
            seen = [m @ basis if metrics is None else metrics[n] @ (m @ basis) for n, m in enumerate(rest)]
            images = torch.stack([m.mT @ image for m, image in zip(rest, seen, strict=True)])
            basis = torch.linalg.qr(images.sum(0)).Q
    else:
        basis = right_shared(rest, metrics, rank).basis[..., :rank]
    return Bilateral(tuple(m @ basis for m in rest), basis.mT, state.shared_left, state.own_rights)


def _left_part(matrices: Sequence[Tensor], state: Bilateral, rank: int, metrics: Sequence[Tensor] | None) -> Bilateral:
    rest = list(matrices)
    if state.shared_right.shape[-2]:
        rest = [m - u @ state.shared_right for m, u in zip(matrices, state.own_lefts, strict=True)]
    if metrics is None or all(a is metrics[0] for a in metrics):
        metric = None if metrics is None else metrics[0]
        if state.shared_left.shape[-1] != rank:
            left, rights, _ = left_shared(rest, metric, rank)
            return Bilateral(state.own_lefts, state.shared_right, left, rights)
        stacked = torch.cat(rest, dim=-1)
        basis = torch.cat(state.own_rights, dim=-1).mT
        for _ in range(_STEPS):
            seen = stacked @ basis
            basis = torch.linalg.qr(stacked.mT @ (seen if metric is None else metric @ seen)).Q
        rights = basis.mT.split([m.shape[-1] for m in rest], dim=-1)
        return Bilateral(state.own_lefts, state.shared_right, stacked @ basis, tuple(rights))
    left = state.shared_left
    if left.shape[-1] != rank:
        left, _ = left_start(rest, metrics, rank)
    left, rights = alternate_left(rest, metrics, left, [m.shape[-1] for m in rest], sweeps=1)
    return Bilateral(state.own_lefts, state.shared_right, left, rights)


def left_start(
    matrices: Sequence[Float[Tensor, "g p _"]],
    metrics: Sequence[Float[Tensor, "g p p"]] | None,
    most: int | None = None,
) -> tuple[Float[Tensor, "g p r"], Float[Tensor, "g R"]]:
    """A nested first factor to share, and energies: exact in one metric, in their mean where they differ.

    Before the mean is taken, the size of every metric goes over to its matrix, or the largest one alone would count.
    """
    if metrics is None or all(a is metrics[0] for a in metrics):
        left, _, energies = left_shared(matrices, None if metrics is None else metrics[0], most)
        return left, energies
    sizes = [a.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-300) for a in metrics]
    scaled = [size.sqrt() * m.double() for size, m in zip(sizes, matrices, strict=True)]
    mean = torch.stack([a / size for size, a in zip(sizes, metrics, strict=True)]).mean(0)
    left, _, energies = left_shared(scaled, mean, most)
    return left, energies


def alternate_left(
    matrices: Sequence[Float[Tensor, "g p _"]],
    metrics: Sequence[Tensor],
    left: Float[Tensor, "g p r"],
    outputs: Sequence[int],
    *,
    sweeps: int,
) -> tuple[Float[Tensor, "g p r"], tuple[Float[Tensor, "g r _"], ...]]:
    """Improve a left-shared product in the layers' own metrics by turns: ``U`` by a few steps, then ``V_n`` exactly.

    Parameters
    ----------
    metrics
        ``[g, p, p]``, or in full ``[g, p, q, p, q]`` (:mod:`spectrim.linalg.response`).
    left
        ``U`` to start from.
    outputs
        Output channels of every layer.
    sweeps
        Rounds; 0 fits the second factors alone.

    Returns
    -------
    left, rights
        The objective is never larger than at the start.
    """
    layers = list(zip(matrices, metrics, outputs, strict=True))

    def fitted(left: Tensor) -> tuple[Tensor, ...]:
        return tuple(response.refit(m, a, left, o) for m, a, o in layers)

    rights = fitted(left)
    for _ in range(sweeps):
        left = response.refit_first(matrices, metrics, left, rights, outputs)
        left = left / left.norm(dim=1, keepdim=True).clamp_min(1e-300)
        rights = fitted(left)
    return left, rights


def alternate_right(
    matrices: Sequence[Float[Tensor, "g _ c"]],
    metrics: Sequence[Tensor],
    lefts: Sequence[Float[Tensor, "g _ r"]],
    outputs: Sequence[int],
    *,
    sweeps: int,
) -> tuple[tuple[Float[Tensor, "g _ r"], ...], Float[Tensor, "g r c"]]:
    """Improve a right-shared product in the layers' own metrics: every ``U_n`` by a few steps, then ``V`` exactly.

    Parameters and returns as for :func:`alternate_left`, with the ``U_n`` and the one ``V``.
    """
    layers = list(zip(matrices, metrics, outputs, strict=True))

    def fitted(lefts: Sequence[Tensor]) -> Tensor:
        pairs = zip(layers, lefts, strict=True)
        equations = [response.normal(m, a, left, o, energy=False) for (m, a, o), left in pairs]
        return functools.reduce(operator.add, equations).solve()

    right = fitted(lefts)
    for _ in range(sweeps):
        pairs = zip(layers, lefts, strict=True)
        lefts = [response.refit_first([m], [a], left, [right], [o]) for (m, a, o), left in pairs]
        right = fitted(lefts)
    return tuple(lefts), right


def _same(matrices: Sequence[Tensor], axis: int, what: str) -> None:
    sizes = [m.shape[axis] for m in matrices]
    if not sizes or len(set(sizes)) > 1 or len({m.shape[0] for m in matrices}) > 1:
        shapes = ", ".join(str(tuple(m.shape)) for m in matrices) or "none"
        raise ValueError(f"matrices that share a factor have the same groups and {what}; these are {shapes}")
