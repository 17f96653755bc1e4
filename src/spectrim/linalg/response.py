"""Low rank in a layer's own responses, for every way of splitting its kernel (METHODS.md, section H, generalised).

A layer computes ``y = W x`` for a patch ``x`` with coordinates ``(p, q)``: ``p`` are those that the first factor sees
together (input channel and kernel axes in ``S``), ``q`` the other kernel positions. The first factor maps each slice
``x[:, q]`` by the same ``left^T``; the second combines the results. With ``C`` the centred second moment of ``x``:

    min over left, right of   tr[(W - W') C (W - W')^T],    W'[o, (p, q)] = sum_r right[r, (o, q)] left[p, r]

If ``q`` has one value (channel unfolding, linear layers) this is principal component analysis of ``y`` and solved
exactly by one eigendecomposition. Otherwise the metric does not separate and there is no closed form; a good start
(:func:`slice_metric` and :func:`spectrum <spectrim.linalg.lowrank.spectrum>`), the exact second factor
(:func:`refit`) and alternation (:func:`alternate`) come close, each step only lowering the error.

Where ``C`` is too large to hold, calibration keeps the average slice metric only, ``A = mean_q C[(., q), (., q)]``.
All functions take either: a ``metric`` of shape ``[g, p, q, p, q]``, or ``[g, p, p]`` standing for the same ``A`` in
every slice and no correlation between slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def arrange(covariance: Tensor, axes: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Covariance of patches ``[g, (i, *k), (i, *k)]`` as ``[g, p, q, p, q]`` for a first factor with ``axes``.

    ``shape`` is ``(i, *k)``.
    """
    g, n = covariance.shape[0], len(shape)
    rest = [a for a in range(n - 1) if a not in axes]
    order = [0, *(1 + a for a in axes), *(1 + a for a in rest)]
    opened = covariance.reshape(g, *shape, *shape)
    moved = opened.permute(0, *(1 + d for d in order), *(1 + n + d for d in order))
    q = 1
    for a in rest:
        q *= shape[1 + a]
    p = covariance.shape[1] // q
    return moved.reshape(g, p, q, p, q)


def slice_metric(metric: Tensor) -> Float[Tensor, "g p p"]:
    """Average over the slices, ``mean_q C[(., q), (., q)]``: the metric of the start."""
    if metric.dim() == 3:
        return metric
    return metric.diagonal(dim1=2, dim2=4).mean(-1)


def _seen(weight: Float[Tensor, "g p o q"], metric: Tensor) -> Float[Tensor, "g p q o"]:
    """``C W^T``: moment between what the layer sees and what it answers."""
    if metric.dim() == 3:
        return torch.einsum("gpt,gtoq->gpqo", metric, weight)
    return torch.einsum("gpqts,gtos->gpqo", metric, weight)


def total_energy(matrix: Float[Tensor, "g p c"], metric: Tensor, outputs: int) -> Float[Tensor, " g"]:
    """``tr(W C W^T)`` a group, for ``W`` given as the unfolded matrix ``[g, p, (o, q)]``."""
    weight = _open(matrix, outputs)
    return torch.einsum("gpoq,gpqo->g", weight, _seen(weight, metric))


def _open(matrix: Tensor, outputs: int) -> Float[Tensor, "g p o q"]:
    g, p, columns = matrix.shape
    return matrix.double().reshape(g, p, outputs, columns // outputs)


def cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor of a positive semidefinite matrix, with the smallest jitter that succeeds."""
    scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for jitter in (1e-12, 1e-10, 1e-8, 1e-6, 1e-4):
        factor, info = torch.linalg.cholesky_ex(matrix + (jitter * scale)[:, None, None] * eye)
        if not bool(info.any()):
            return factor
    raise ValueError("the second moment of a layer's responses is not positive semidefinite; it holds NaN or Inf")


@dataclass(frozen=True, eq=False)
class Normal:
    """Normal equations of the second factor for a given first one.

    Those of several layers that share their second factor are added up.

    Attributes
    ----------
    gram
        ``G^T C G``, ``[g, (r, q), (r, q)]``.
    cross
        ``G^T C W^T``, ``[g, (r, q), o]``.
    energy
        ``tr(W C W^T)``, summed over the groups: the error of rank 0.
    slices
        Values of ``q``.
    """

    gram: Float[Tensor, "g n n"]
    cross: Float[Tensor, "g n o"]
    energy: Tensor
    slices: int

    def __add__(self, other: Normal) -> Normal:
        return Normal(self.gram + other.gram, self.cross + other.cross, self.energy + other.energy, self.slices)

    def errors(self) -> Float[Tensor, " ranks"]:
        """Energy lost at every rank ``0 .. R`` of a nested first factor.

        One Cholesky factorisation serves all ranks: the leading blocks of the Gram matrix are those of the smaller
        ranks.
        """
        solved = torch.linalg.solve_triangular(cholesky(self.gram), self.cross, upper=False)
        g, n, _ = self.cross.shape
        gained = solved.square().sum(-1).reshape(g, n // self.slices, self.slices).sum(-1).sum(0).cumsum(0)
        # Rounding aside the exact error does not rise with the rank.
        return (self.energy - torch.cat([gained.new_zeros(1), gained])).cummin(0).values.clamp_min(0)

    def solve(self) -> Float[Tensor, "g r c"]:
        """The second factor, ``[g, r, (o, q)]``."""
        solved = torch.cholesky_solve(self.cross, cholesky(self.gram))
        g, n, outputs = self.cross.shape
        rank = n // self.slices
        return solved.reshape(g, rank, self.slices, outputs).transpose(2, 3).reshape(g, rank, outputs * self.slices)


def normal(
    matrix: Float[Tensor, "g p c"], metric: Tensor, left: Float[Tensor, "g p r"], outputs: int, *, energy: bool = True
) -> Normal:
    """Normal equations of the second factor of one layer; without ``energy``, for :meth:`Normal.solve` alone."""
    slices = matrix.shape[2] // outputs
    g, _, rank = left.shape
    weight = _open(matrix, outputs)
    if metric.dim() == 3:
        half = metric @ left
        eye = torch.eye(slices, dtype=half.dtype, device=half.device)
        gram = torch.einsum("gab,qs->gaqbs", left.mT @ half, eye)
        cross = torch.einsum("gpa,gpoq->gaqo", half, weight)
    else:
        # The metric is contracted over its first axis, as it lies in memory; the other order would copy it.
        half = torch.einsum("gpa,gpqts->gaqts", left, metric)
        gram = torch.einsum("gaqts,gtb->gaqbs", half, left)
        cross = torch.einsum("gaqts,gtos->gaqo", half, weight)
    whole = torch.einsum("gpoq,gpqo->", weight, _seen(weight, metric)) if energy else gram.new_zeros(())
    n = rank * slices
    return Normal(gram.reshape(g, n, n), cross.reshape(g, n, outputs), whole, slices)


def refit_errors(
    matrix: Float[Tensor, "g p c"], metric: Tensor, left: Float[Tensor, "g p R"], outputs: int
) -> Float[Tensor, " ranks"]:
    """Relative error of every rank ``0 .. R`` of a nested first factor with its exact second factor."""
    equations = normal(matrix, metric, left, outputs)
    return _relative(equations.errors(), equations.energy)


def refit(
    matrix: Float[Tensor, "g p c"], metric: Tensor, left: Float[Tensor, "g p r"], outputs: int
) -> Float[Tensor, "g r c"]:
    """The exact second factor for a given first one: ``W C G (G^T C G)^{-1}``."""
    return normal(matrix, metric, left, outputs, energy=False).solve()


def product_errors(
    left: Float[Tensor, "g p R"],
    right: Float[Tensor, "g R c"],
    metric: Tensor,
    outputs: int,
    total: float,
    matrix: Float[Tensor, "g p c"] | None = None,
) -> Float[Tensor, " ranks"]:
    """Error of keeping the first ``0 .. R`` components of a product, relative to the energy ``total``.

    The components need not be orthogonal in the metric, so the error may rise with the rank. Where they are the first
    of more, ``matrix`` is the whole product.
    """
    g, _, rank = left.shape
    slices = right.shape[2] // outputs
    second = right.double().reshape(g, rank, outputs, slices)
    if metric.dim() == 3:
        flat = second.flatten(2)
        pairs = ((left.mT @ metric @ left) * (flat @ flat.mT)).sum(0)
    else:
        # Both moments of a block of components at a time: all at once they would take more room than the metric.
        rows = second.transpose(2, 3).reshape(g, rank * slices, outputs)
        pairs = left.new_zeros(rank, rank)
        for some in torch.arange(rank, device=left.device).split(max(1, -(-rank // 4))):
            a, b = int(some[0]), int(some[-1]) + 1
            half = torch.einsum("gpa,gpqts->gaqts", left[..., a:b], metric)
            first = torch.einsum("gaqts,gtb->gaqbs", half, left)
            other = (rows[:, a * slices : b * slices] @ rows.mT).reshape(first.shape)
            pairs[a:b] = first.mul_(other).sum(dim=(0, 2, 4))
    if matrix is not None:
        seen = torch.einsum("gpa,gpqo->gaqo", left, _seen(_open(matrix, outputs), metric))
        shared = torch.einsum("gaqo,gaoq->a", seen, second)
        kept = pairs.cumsum(0).cumsum(1).diagonal() - 2 * shared.cumsum(0)
        return _relative(total + torch.cat([kept.new_zeros(1), kept]), torch.as_tensor(total, dtype=torch.float64))
    return _relative(trailing(pairs), pairs.new_tensor(total))


def trailing(pairs: Float[Tensor, "R R"]) -> Float[Tensor, " ranks"]:
    """Sums of the trailing blocks ``pairs[j:, j:]`` for ``j = 0 .. R``."""
    sums = pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


def alternate(
    matrix: Float[Tensor, "g p c"],
    metric: Float[Tensor, "g p q p q"],
    left: Float[Tensor, "g p r"],
    outputs: int,
    *,
    sweeps: int,
    steps: int = 8,
) -> tuple[Float[Tensor, "g p r"], Float[Tensor, "g r c"]]:
    """Improve both factors by turns: a few conjugate-gradient steps on the first, then the exact second.

    Parameters
    ----------
    sweeps
        Rounds; 0 returns the refitted pair.
    steps
        Conjugate-gradient steps a round on the quadratic problem for the first factor.

    Returns
    -------
    left, right
        The objective is never larger than at the start.
    """
    seen = _seen(_open(matrix, outputs), metric)
    right = refit(matrix, metric, left, outputs)
    for _ in range(sweeps):
        left = refit_first([matrix], [metric], left, [right], [outputs], steps=steps, seen=[seen])
        left = left / left.norm(dim=1, keepdim=True).clamp_min(1e-300)
        right = refit(matrix, metric, left, outputs)
    return left, right


def refit_first(
    matrices: Sequence[Float[Tensor, "g p _"]],
    metrics: Sequence[Tensor],
    left: Float[Tensor, "g p r"],
    rights: Sequence[Float[Tensor, "g r _"]],
    outputs: Sequence[int],
    *,
    steps: int = 8,
    seen: Sequence[Tensor] | None = None,
) -> Float[Tensor, "g p r"]:
    """Lower the error in the first factor that several layers share (or the one of one layer), the second ones given.

    A few steps of conjugate gradients from ``left`` on the sum of the layers' quadratic problems.
    """
    g, _, rank = left.shape
    target = torch.zeros_like(left)
    grams: list[Tensor] = []
    for n, (matrix, o, metric, right) in enumerate(zip(matrices, outputs, metrics, rights, strict=True)):
        if metric.dim() == 3:
            grams.append(right @ right.mT)
            target += metric @ (matrix.double() @ right.mT)
            continue
        second = right.reshape(g, rank, o, right.shape[2] // o)
        grams.append(torch.einsum("gaoq,gbos->gaqbs", second, second))
        looked = _seen(_open(matrix, o), metric) if seen is None else seen[n]
        target += torch.einsum("gpqo,gaoq->gpa", looked, second)

    def operator(x: Tensor) -> Tensor:
        image = torch.zeros_like(x)
        for metric, pairs in zip(metrics, grams, strict=True):
            if metric.dim() == 3:
                image += metric @ x @ pairs
            else:
                half = torch.einsum("gpqts,gtb->gpqbs", metric, x)
                image += torch.einsum("gpqbs,gaqbs->gpa", half, pairs)
        return image

    return _conjugate_gradient(operator, target, left, steps)


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
