"""Low rank in a layer's own responses, for every way of splitting its kernel (METHODS.md, section H, generalised).

A layer computes ``y = W x`` for a patch ``x`` with coordinates ``(p, q)``: ``p`` are those that the first factor sees
together (input channel and kernel axes in ``S``), ``q`` the other kernel positions. The first factor maps each slice
``x[:, q]`` by the same ``left^T``; the second combines the results. With ``C`` the centred second moment of ``x``:

    min over left, right of   tr[(W - W') C (W - W')^T],    W'[o, (p, q)] = sum_r right[r, (o, q)] left[p, r]

If ``q`` has one value (channel unfolding, linear layers) this is principal component analysis of ``y`` and solved
exactly by one eigendecomposition. Otherwise the metric does not separate and there is no closed form; a good start
(:func:`spectrum <spectrim.linalg.lowrank.spectrum>` in the average slice), the exact second factor (:func:`refit`) and
alternation (:func:`alternate`) come close, each step only lowering the error.

``C`` is a :class:`~spectrim.linalg.metric.SlicedMetric`, and weights are matrices ``[g, p, (o, q)]`` of its unfolding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg.metric import Full, SlicedMetric, cholesky


def mix(matrix: Float[Tensor, "g p c"], weight: Float[Tensor, "g t o"] | None) -> Float[Tensor, "g p c"]:
    """Apply an output weight ``[g, t, o]`` to the columns ``(o, q)`` of an unfolded matrix (or right factor)."""
    if weight is None:
        return matrix.double()
    g, p, columns = matrix.shape
    o = weight.shape[-1]
    opened = matrix.double().reshape(g, p, o, columns // o)
    return torch.einsum("gpoq,gto->gptq", opened, weight).reshape(g, p, columns)


def unmix(matrix: Float[Tensor, "g p c"], root: Float[Tensor, "g o o"] | None) -> Float[Tensor, "g p c"]:
    """Inverse of :func:`mix` by an upper triangular root."""
    if root is None:
        return matrix.double()
    g, p, columns = matrix.shape
    o = root.shape[-1]
    opened = matrix.double().reshape(g, p, o, columns // o).transpose(1, 2).flatten(2)
    solved = torch.linalg.solve_triangular(root, opened, upper=True)
    return solved.reshape(g, o, p, columns // o).transpose(1, 2).reshape(g, p, columns)


def total_energy(matrix: Float[Tensor, "g p c"], metric: SlicedMetric) -> Float[Tensor, " g"]:
    """``tr(W C W^T)`` a group, for ``W`` given as the unfolded matrix ``[g, p, (o, q)]``."""
    return torch.einsum("gpoq,gpqo->g", metric.open(matrix), metric.seen(matrix))


# Energy, beside the largest, of responses too small to be told from the rounding of what they are computed from.
_NOTHING = 1e-20


@dataclass(frozen=True, eq=False)
class Normal:
    """Normal equations of the second factor for a given first one.

    Those of several layers that share their second factor are added up.

    Attributes
    ----------
    gram
        ``G^T C G`` over ``(r, q)``; over ``r`` alone where it is the same for every ``q``, and nothing between two.
    cross
        ``G^T C W^T``, ``[g, (r, q), o]``.
    energy
        ``tr(W C W^T)``, summed over the groups: the error of rank 0.
    slices
        Values of ``q``.
    """

    gram: Full
    cross: Float[Tensor, "g n o"]
    energy: Tensor
    slices: int

    def __add__(self, other: Normal) -> Normal:
        one, two = self.gram.moment, other.gram.moment
        if one.shape != two.shape:
            one, two = self._whole(), other._whole()
        return Normal(Full(one + two), self.cross + other.cross, self.energy + other.energy, self.slices)

    def _whole(self) -> Float[Tensor, "g n n"]:
        """The Gram matrix over ``(r, q)``."""
        moment = self.gram.moment
        eye = torch.eye(self.cross.shape[1] // moment.shape[1], dtype=moment.dtype, device=moment.device)
        return torch.stack([torch.kron(each, eye) for each in moment])

    def half(self) -> tuple[Float[Tensor, "g m m"], Float[Tensor, "g n o"]]:
        """Cholesky factor of the Gram matrix, and its inverse times ``cross``."""
        factor = cholesky(self.gram.moment)
        return factor, solved(factor, self.cross, upper=False)

    def errors(self) -> Float[Tensor, " ranks"]:
        """Energy lost at every rank ``0 .. R`` of a nested first factor.

        One Cholesky factorisation serves all ranks: the leading blocks of the Gram matrix are those of the smaller
        ranks.
        """
        _, half = self.half()
        g, n, _ = self.cross.shape
        gained = half.square().sum(-1).reshape(g, n // self.slices, self.slices).sum(-1).sum(0).cumsum(0)
        # What is gained is a running sum of squares, so the error never rises with the rank, rounding included.
        return (self.energy - torch.cat([gained.new_zeros(1), gained])).clamp_min(0)

    def solve(self) -> Float[Tensor, "g r c"]:
        """The second factor, ``[g, r, (o, q)]``; zero for what never responds."""
        g, n, outputs = self.cross.shape
        moment = self.gram.moment
        size = moment.diagonal(dim1=-2, dim2=-1)
        # What responds by rounding alone would be divided by it.
        still = size <= _NOTHING * size.amax(-1, keepdim=True)
        if bool(still.any()):
            moment = moment.masked_fill(still.unsqueeze(-1) | still.unsqueeze(-2), 0.0)
        cross = self.cross.reshape(*size.shape, -1).masked_fill(still.unsqueeze(-1), 0.0)
        right = Full(moment).solve(cross).reshape(g, n // self.slices, self.slices, outputs)
        return right.transpose(2, 3).flatten(2)


def solved(factor: Float[Tensor, "*g m m"], rows: Float[Tensor, "*g n o"], *, upper: bool) -> Float[Tensor, "*g n o"]:
    """Rows ``(r, q)`` through the inverse of a triangular factor over them, or over ``r`` alone for every ``q``."""
    every = rows.reshape(*factor.shape[:-1], -1)
    return torch.linalg.solve_triangular(factor, every, upper=upper).reshape(rows.shape)


def normal(
    matrix: Float[Tensor, "g p c"],
    metric: SlicedMetric,
    left: Float[Tensor, "g p r"],
    *,
    energy: bool = True,
    seen: Float[Tensor, "g p q o"] | None = None,
) -> Normal:
    """Normal equations of the second factor of one layer; without ``energy``, for :meth:`Normal.solve` alone.

    What the metric sees of the matrix may be known.
    """
    if energy and seen is None:
        seen = metric.seen(matrix)
    gram, cross = metric.normal(matrix, left, seen)
    whole = torch.einsum("gpoq,gpqo->", metric.open(matrix), seen) if energy else cross.new_zeros(())
    return Normal(gram, cross, whole, metric.slices)


def refit_errors(
    matrix: Float[Tensor, "g p c"], metric: SlicedMetric, left: Float[Tensor, "g p R"]
) -> Float[Tensor, " ranks"]:
    """Relative error of every rank ``0 .. R`` of a nested first factor with its exact second factor."""
    equations = normal(matrix, metric, left)
    return _relative(equations.errors(), equations.energy)


def refit(matrix: Float[Tensor, "g p c"], metric: SlicedMetric, left: Float[Tensor, "g p r"]) -> Float[Tensor, "g r c"]:
    """The exact second factor for a given first one: ``W C G (G^T C G)^{-1}``."""
    return normal(matrix, metric, left, energy=False).solve()


def product_errors(
    left: Float[Tensor, "g p R"],
    right: Float[Tensor, "g R c"],
    metric: SlicedMetric,
    total: float,
    matrix: Float[Tensor, "g p c"] | None = None,
) -> Float[Tensor, " ranks"]:
    """Error of keeping the first ``0 .. R`` components of a product, relative to the energy ``total``.

    The components need not be orthogonal in the metric, so the error may rise with the rank. Where they are the first
    of more, ``matrix`` is the whole product.
    """
    pairs = metric.pairs(left, right)
    if matrix is not None:
        seen = torch.einsum("gpa,gpqo->gaqo", left, metric.seen(matrix))
        shared = torch.einsum("gaqo,gaoq->a", seen, metric.open(right))
        kept = pairs.cumsum(0).cumsum(1).diagonal() - 2 * shared.cumsum(0)
        return _relative(total + torch.cat([kept.new_zeros(1), kept]), torch.as_tensor(total, dtype=torch.float64))
    return _relative(trailing(pairs), pairs.new_tensor(total))


def trailing(pairs: Float[Tensor, "R R"]) -> Float[Tensor, " ranks"]:
    """Sums of the trailing blocks ``pairs[j:, j:]`` for ``j = 0 .. R``."""
    sums = pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


def alternate(
    matrix: Float[Tensor, "g p c"],
    metric: SlicedMetric,
    left: Float[Tensor, "g p r"],
    *,
    sweeps: int,
    steps: int = 8,
) -> Float[Tensor, "g p r"]:
    """Improve the first factor by turns: the exact second one, then a few conjugate-gradient steps on the first.

    Parameters
    ----------
    sweeps
        Rounds.
    steps
        Conjugate-gradient steps a round on the quadratic problem for the first factor.

    Returns
    -------
    left
        The objective is never larger than at the start, with the exact second factor (:func:`refit`) for each.
    """
    seen = metric.seen(matrix)
    target = metric.first_seen(seen)
    for _ in range(sweeps):
        right = normal(matrix, metric, left, energy=False, seen=seen).solve()
        left = _lowered([target], [metric], left, [right], steps)
        left = left / left.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return left


def refit_first(
    matrices: Sequence[Float[Tensor, "g p _"]],
    metrics: Sequence[SlicedMetric],
    left: Float[Tensor, "g p r"],
    rights: Sequence[Float[Tensor, "g r _"]],
    *,
    steps: int = 8,
) -> Float[Tensor, "g p r"]:
    """Lower the error in the first factor that several layers share (or the one of one layer), the second ones given.

    A few steps of conjugate gradients from ``left`` on the sum of the layers' quadratic problems.
    """
    targets = [metric.first_target(matrix) for matrix, metric in zip(matrices, metrics, strict=True)]
    return _lowered(targets, metrics, left, rights, steps)


def _lowered(
    targets: Sequence[Callable[[Tensor], Tensor]],
    metrics: Sequence[SlicedMetric],
    left: Tensor,
    rights: Sequence[Tensor],
    steps: int,
) -> Tensor:
    operators = [metric.first_operator(right) for metric, right in zip(metrics, rights, strict=True)]
    wanted = torch.zeros_like(left)
    for target, right in zip(targets, rights, strict=True):
        wanted += target(right)

    def image(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for operator in operators:
            total += operator(x)
        return total

    return _conjugate_gradient(image, wanted, left, steps)


def _conjugate_gradient(operator: Callable[[Tensor], Tensor], target: Tensor, start: Tensor, steps: int) -> Tensor:
    """A few steps on ``operator(x) = target`` from ``start``; each lowers the quadratic objective."""
    x = start.clone()
    residual = target - operator(x)
    direction = residual.clone()
    energy = residual.square().sum()
    for _ in range(steps):
        if float(energy) <= 0:
            break
        image = operator(direction)
        curvature = (direction * image).sum()
        if float(curvature) <= 0:
            break
        step = energy / curvature
        x = x + step * direction
        residual = residual - step * image
        fresh = residual.square().sum()
        direction = residual + (fresh / energy) * direction
        energy = fresh
    return x


def _relative(lost: Tensor, total: Tensor) -> Tensor:
    if float(total) <= 0:
        return torch.zeros_like(lost)
    return (lost / total).clamp_min(0)
