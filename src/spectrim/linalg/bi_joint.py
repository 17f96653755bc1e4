"""Both factors shared among several matrices at once (Bi-JSVD, Chen et al. 2021), in plain or weighted norms.

The matrices ``M_n`` of ``N`` layers, of one shape, are written as ``M_n ~ U_n V + U V_n``: a right-shared product plus
a left-shared one (:mod:`spectrim.linalg.joint`). They are found by turns, each part fitted to what the other leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg.joint import alternate_left, check_same, left_shared, left_start, right_shared
from spectrim.linalg.metric import SlicedMetric

_FIRST = ("left", "right")
# Steps of subspace iteration in a half round that starts from the one before.
_STEPS = 3


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
    metrics: Sequence[SlicedMetric] | None = None,
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
    that differ, by :func:`~spectrim.linalg.joint.alternate_left`): the objective never rises. The limit depends on the
    order.
    """
    if first not in _FIRST:
        raise ValueError(f"first is {first!r}; expected 'left' or 'right'")
    if left_rank:
        check_same(matrices, 1, "rows")
    if right_rank:
        check_same(matrices, 2, "columns")
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


def objective(
    matrices: Sequence[Tensor], products: Sequence[Tensor], metrics: Sequence[SlicedMetric] | None = None
) -> float:
    """``sum_n ||M_n - product_n||^2`` in the metrics."""
    total = 0.0
    for n, (matrix, product) in enumerate(zip(matrices, products, strict=True)):
        rest = matrix.double() - product
        seen = rest if metrics is None else metrics[n].weigh(rest)
        total += float((rest * seen).sum())
    return total


def nothing(matrices: Sequence[Float[Tensor, "g _ _"]]) -> Bilateral:
    """Factors of rank 0."""
    lefts = tuple(m.new_zeros(*m.shape[:2], 0) for m in matrices)
    rights = tuple(m.new_zeros(m.shape[0], 0, m.shape[2]) for m in matrices)
    return Bilateral(lefts, rights[0], lefts[0], rights)


def _right_part(
    matrices: Sequence[Tensor], state: Bilateral, rank: int, metrics: Sequence[SlicedMetric] | None
) -> Bilateral:
    rest = list(matrices)
    if state.shared_left.shape[-1]:
        rest = [m - state.shared_left @ v for m, v in zip(matrices, state.own_rights, strict=True)]
    if state.shared_right.shape[-2] == rank:
        # Close to the solution already: a few steps of subspace iteration lower the error at a fraction of the cost.
        basis = state.shared_right.mT
        for _ in range(_STEPS):
            seen = [m @ basis if metrics is None else metrics[n].weigh(m @ basis) for n, m in enumerate(rest)]
            images = torch.stack([m.mT @ image for m, image in zip(rest, seen, strict=True)])
            basis = torch.linalg.qr(images.sum(0)).Q
    else:
        basis = right_shared(rest, metrics, rank).basis[..., :rank]
    return Bilateral(tuple(m @ basis for m in rest), basis.mT, state.shared_left, state.own_rights)


def _left_part(
    matrices: Sequence[Tensor], state: Bilateral, rank: int, metrics: Sequence[SlicedMetric] | None
) -> Bilateral:
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
            basis = torch.linalg.qr(stacked.mT @ (seen if metric is None else metric.weigh(seen))).Q
        rights = basis.mT.split([m.shape[-1] for m in rest], dim=-1)
        return Bilateral(state.own_lefts, state.shared_right, stacked @ basis, tuple(rights))
    left = state.shared_left
    if left.shape[-1] != rank:
        left, _ = left_start(rest, metrics, rank)
    left, rights = alternate_left(rest, [a.averaged for a in metrics], left, sweeps=1)
    return Bilateral(state.own_lefts, state.shared_right, left, rights)
