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

from collections.abc import Callable

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


def _projected(metric: Tensor, left: Tensor, slices: int) -> Float[Tensor, "g r q r q"]:
    """``G^T C G``: second moment of the first factor's responses, ordered with the rank before the slice."""
    if metric.dim() == 3:
        small = left.mT @ metric @ left
        eye = torch.eye(slices, dtype=small.dtype, device=small.device)
        return torch.einsum("gab,qs->gaqbs", small, eye)
    # The metric is contracted over its first axis, as it lies in memory; the other order would copy it.
    half = torch.einsum("gpa,gpqts->gaqts", left, metric)
    return torch.einsum("gaqts,gtb->gaqbs", half, left)


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


def _cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor of a positive semidefinite matrix, with the smallest jitter that succeeds."""
    scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for jitter in (1e-12, 1e-10, 1e-8, 1e-6, 1e-4):
        factor, info = torch.linalg.cholesky_ex(matrix + (jitter * scale)[:, None, None] * eye)
        if not bool(info.any()):
            return factor
    raise ValueError("the second moment of a layer's responses is not positive semidefinite; it holds NaN or Inf")


def refit_errors(
    matrix: Float[Tensor, "g p c"], metric: Tensor, left: Float[Tensor, "g p R"], outputs: int
) -> Float[Tensor, " ranks"]:
    """Relative error of every rank ``0 .. R`` of a nested first factor with its exact second factor.

    One Cholesky factorisation serves all ranks: the leading blocks of ``G^T C G`` are those of the smaller ranks.
    """
    slices = matrix.shape[2] // outputs
    g, _, rank = left.shape
    gram = _projected(metric, left, slices).reshape(g, rank * slices, rank * slices)
    weight = _open(matrix, outputs)
    seen = _seen(weight, metric)
    cross = torch.einsum("gpa,gpqo->gaqo", left, seen).reshape(g, rank * slices, outputs)
    solved = torch.linalg.solve_triangular(_cholesky(gram), cross, upper=False)
    gained = solved.square().sum(-1).reshape(g, rank, slices).sum(-1).sum(0).cumsum(0)
    total = torch.einsum("gpoq,gpqo->", weight, seen)
    # Rounding aside the exact error does not rise with the rank.
    return _relative(total - torch.cat([gained.new_zeros(1), gained]), total).cummin(0).values


def refit(
    matrix: Float[Tensor, "g p c"], metric: Tensor, left: Float[Tensor, "g p r"], outputs: int
) -> Float[Tensor, "g r c"]:
    """The exact second factor for a given first one: ``W C G (G^T C G)^{-1}``."""
    slices = matrix.shape[2] // outputs
    g, _, rank = left.shape
    gram = _projected(metric, left, slices).reshape(g, rank * slices, rank * slices)
    seen = _seen(_open(matrix, outputs), metric)
    cross = torch.einsum("gpa,gpqo->gaqo", left, seen).reshape(g, rank * slices, outputs)
    solved = torch.cholesky_solve(cross, _cholesky(gram))
    return solved.reshape(g, rank, slices, outputs).transpose(2, 3).reshape(g, rank, outputs * slices)


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
    g, _, rank = left.shape
    slices = matrix.shape[2] // outputs
    seen = _seen(_open(matrix, outputs), metric)
    right = refit(matrix, metric, left, outputs)
    for _ in range(sweeps):
        second = right.reshape(g, rank, outputs, slices)
        pairs = torch.einsum("gaoq,gbos->gaqbs", second, second)
        target = torch.einsum("gpqo,gaoq->gpa", seen, second)

        def normal(x: Tensor, pairs: Tensor = pairs) -> Tensor:
            half = torch.einsum("gpqts,gtb->gpqbs", metric, x)
            return torch.einsum("gpqbs,gaqbs->gpa", half, pairs)

        left = _conjugate_gradient(normal, target, left, steps)
        left = left / left.norm(dim=1, keepdim=True).clamp_min(1e-300)
        right = refit(matrix, metric, left, outputs)
    return left, right


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
