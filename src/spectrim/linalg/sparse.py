"""The best sparse weight for a layer's responses: hard thresholding in the metric of the inputs.

The problem, with a target ``T``, the second moment ``C`` of the inputs and a weight ``G`` of the outputs:

    min over S with a pattern of  tr[G (T - S) C (T - S)^T]

It is that of pruning connections with reconstruction. Keeping the largest entries of ``T`` once is not its solution
where inputs correlate. Hard thresholding pursuit (Foucart 2011) takes a gradient step, keeps the best entries of the
result, and solves for the values of what was kept, here by a few conjugate-gradient steps. Entries are measured in
units of ``sqrt(diag(G) diag(C))``, in which a step of length one is right for every entry on its own. Where inputs
correlate it exchanges too many entries at once; the curvature along the step gives another length (normalised iterative
hard thresholding, Blumensath and Davies 2010). Both are tried, and halved until the error falls: it never rises.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectrim.linalg import symmetric
from spectrim.linalg.eigen import Eigen
from spectrim.linalg.metric import Metric
from spectrim.linalg.patterns import Pattern


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The error of a weight difference: ``tr(G R C R^T)``.

    Attributes
    ----------
    metric
        ``C``.
    outer
        ``G [g, o, o]``, or None for the identity.
    less
        Few orthonormal columns ``[g, o, r]`` with ``G = I - less less^T``, by which that is applied in less time, if
        there are any.
    """

    metric: Metric
    outer: Float[Tensor, "g o o"] | None = None
    less: Float[Tensor, "g o r"] | None = None

    def apply(self, rows: Float[Tensor, "g o n"]) -> Float[Tensor, "g o n"]:
        """``G R C``, half the gradient."""
        seen = self.metric.times(rows)
        if self.less is not None:
            return torch.baddbmm(seen, self.less, self.less.mT @ seen, alpha=-1)
        return seen if self.outer is None else self.outer @ seen

    def value(self, rows: Float[Tensor, "g o n"]) -> float:
        return _dot(rows, self.apply(rows))

    @cached_property
    def ridge(self) -> Ridge:
        """The error by its eigenvectors."""
        return Ridge.of(self)

    def scale(self, outputs: int) -> Float[Tensor, "g o n"]:
        """Square root of the curvature along each entry, at least 1e-4 of the largest."""
        inputs = self.metric.diagonal().clamp_min(0).sqrt().unsqueeze(1)
        if self.outer is None:
            scale = inputs.expand(inputs.shape[0], outputs, inputs.shape[2])
        else:
            scale = self.outer.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().unsqueeze(2) * inputs
        # What hardly changes the error gets no long steps; where nothing does, any length will do.
        largest = float(scale.max())
        return scale.clamp_min(1e-4 * largest if largest > 0 else 1.0)


@dataclass(frozen=True, eq=False)
class Ridge:
    """An error in units in which entries have curvature one, by its eigenvectors; made once for many fits.

    Attributes
    ----------
    outputs, inputs
        The units, ``[g, o, 1]`` (``[g, 1, 1]`` where outputs count as they are) and ``[g, 1, n]``.
    metric
        Of the inputs.
    values, vectors
        Of the outputs, ``[g, o]`` and ``[g, o, o]``; ones ``[g, 1]`` and no vectors where they count as they are.
    """

    outputs: Float[Tensor, "g o 1"]
    inputs: Float[Tensor, "g 1 n"]
    metric: Eigen
    values: Float[Tensor, "g o"]
    vectors: Float[Tensor, "g o o"] | None

    @classmethod
    def of(cls, error: Quadratic) -> Ridge:
        inputs = _units(error.metric.diagonal())
        metric = error.metric.eigen(inputs)
        alike = inputs.new_ones(inputs.shape[0], 1)
        if error.outer is None:
            return cls(alike.unsqueeze(2), inputs.unsqueeze(1), metric, alike, None)
        each = _units(error.outer.diagonal(dim1=-2, dim2=-1))
        return cls(each.unsqueeze(2), inputs.unsqueeze(1), metric, torch.ones_like(each), None).weighted(error.outer)

    def weighted(self, outer: Float[Tensor, "g o o"]) -> Ridge:
        """The same with another weight of the outputs, in the units of this one."""
        values, vectors = symmetric.eigh(outer / self.outputs / self.outputs.mT)
        return dataclasses.replace(self, values=values.clamp_min(0), vectors=vectors)

    @property
    def units(self) -> Float[Tensor, "g o n"]:
        """What a weight is multiplied by."""
        return self.outputs * self.inputs

    def solve(self, rows: Float[Tensor, "g o n"], penalty: float) -> Float[Tensor, "g o n"]:
        """``argmin over Y of error(rows - Y) + penalty ||Y||^2``."""
        if self.vectors is None:
            return self.metric.ridge(rows, penalty, self.values)
        return self.vectors @ self.metric.ridge(self.vectors.mT @ rows, penalty, self.values)


@dataclass(frozen=True, eq=False)
class Sparse:
    """A sparse weight ``[g, o, n]``, its mask, and the error of what it leaves of its target."""

    weight: Float[Tensor, "g o n"]
    mask: Bool[Tensor, "g o n"]
    error: float


def threshold(scores: Float[Tensor, "g o n"], pattern: Pattern, density: float, kernel: tuple[int, ...]) -> Tensor:
    """Mask ``[g, o, n]`` of a pattern's entries with the largest scores; ``kernel`` is ``(i, *k)``."""
    g, o, n = scores.shape
    return pattern.keep(scores.reshape(g, o, *kernel), density).reshape(g, o, n)


def shares(scores: Float[Tensor, "g o n"], pattern: Pattern, density: float, kernel: tuple[int, ...]) -> Tensor:
    """How much of each entry stays, in place of whether it does: the same, continuous in the scores."""
    g, o, n = scores.shape
    return pattern.shares(scores.reshape(g, o, *kernel), density).reshape(g, o, n)


def one_shot(
    target: Float[Tensor, "g o n"], error: Quadratic, pattern: Pattern, density: float, kernel: tuple[int, ...]
) -> Sparse:
    """Entries of the target that matter most on their own, unchanged: magnitude times strength of the input."""
    scores = (target * error.scale(target.shape[1])).square()
    mask = threshold(scores, pattern, density, kernel)
    kept = target * mask
    return Sparse(kept, mask, error.value(target - kept))


def solve(
    target: Float[Tensor, "g o n"],
    error: Quadratic,
    mask: Bool[Tensor, "g o n"],
    *,
    start: Float[Tensor, "g o n"] | None = None,
    steps: int,
    tolerance: float = 1e-10,
) -> Sparse:
    """The best values inside a mask, by conjugate gradients from ``start`` (zero if None)."""
    scale = error.scale(target.shape[1])
    # In place, and by one vector of inverse curvatures that is zero outside the mask: the arrays may be large.
    inverse = mask / scale.square()
    weight = torch.zeros_like(target) if start is None else start * mask
    residual = error.apply(target - weight)
    value = _dot(target - weight, residual)
    scaled = residual * inverse
    direction = scaled.clone()
    energy = _dot(residual, scaled)
    limit = tolerance * max(value, 1e-300)
    for _ in range(steps):
        if energy <= limit:
            break
        image = error.apply(direction)
        along = _dot(direction, image)
        if along <= 0:
            break
        step = energy / along
        weight.add_(direction, alpha=step)
        residual.add_(image, alpha=-step)
        value -= step * energy
        torch.mul(residual, inverse, out=scaled)
        fresh = _dot(residual, scaled)
        direction.mul_(fresh / energy).add_(scaled)
        energy = fresh
    return Sparse(weight, mask, max(value, 0.0))


def _dot(one: Tensor, two: Tensor) -> float:
    return float(torch.dot(one.reshape(-1), two.reshape(-1)))


def fit(
    target: Float[Tensor, "g o n"],
    error: Quadratic,
    pattern: Pattern,
    density: float,
    kernel: tuple[int, ...],
    *,
    start: Sparse | None = None,
    rounds: int = 8,
    steps: int = 6,
    halvings: int = 3,
) -> Sparse:
    """Fit a sparse weight of a pattern to the responses of a target.

    Parameters
    ----------
    target
        ``T``, float64.
    kernel
        ``(i, *k)`` with product ``n``.
    start
        Weight and mask to go on from; :func:`one_shot` if None.
    rounds
        Changes of the mask that are tried; 0 fits the values alone.
    steps
        Conjugate-gradient steps on the values after each.
    halvings
        Shorter steps tried where a new mask does not lower the error; a shorter step exchanges fewer entries.

    Returns
    -------
    Sparse
        With an error of at most that of the start.
    """
    if pattern.kept((target.shape[0], target.shape[1], *kernel), density) == 0:
        return Sparse(torch.zeros_like(target), torch.zeros_like(target, dtype=torch.bool), error.value(target))
    if start is None:
        start = one_shot(target, error, pattern, density, kernel)
    best = solve(target, error, start.mask, start=start.weight, steps=steps)
    scale = error.scale(target.shape[1])
    for turn in range(rounds):
        gradient = error.apply(target - best.weight) / scale
        if not bool(gradient.any()):
            break
        # One is right for every entry on its own; along what would change, the curvature asks for less.
        moving = best.mask | threshold(gradient.square(), pattern, density, kernel)
        part = gradient * moving
        length = float(part.square().sum()) / max(error.value(part / scale), 1e-300)
        long, short = ([whole / 2**k for k in range(halvings + 1)] for whole in (1.0, length))
        improved = None
        for reach in [*short, *long] if turn % 2 else [*long, *short]:
            moved = best.weight * scale + reach * gradient
            mask = threshold(moved.square(), pattern, density, kernel)
            if torch.equal(mask, best.mask):
                continue
            tried = solve(target, error, mask, start=moved / scale, steps=steps)
            if tried.error < best.error:
                improved = tried
                break
        if improved is None:
            break
        best = improved
    return best


def _units(strength: Tensor) -> Tensor:
    """Roots, at least 1e-4 of the largest; ones where there is nothing."""
    roots = strength.clamp_min(0).sqrt()
    largest = roots.amax(-1, keepdim=True)
    return torch.where(largest > 0, torch.maximum(roots, 1e-4 * largest), torch.ones_like(roots))
