"""How the low-rank part of a sum is found: without decompositions, exactly, or with the kernel shared out.

A step finds the part for a target that the sparse part leaves it, going on from the turn before, and tells what a
sparse weight costs if the second factor makes up for it as well as it can.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import bilateral, lowrank, response
from spectrim.linalg.metric import Full, Metric, Slices
from spectrim.linalg.response import cholesky
from spectrim.linalg.sparse import Quadratic


@dataclass(frozen=True, eq=False)
class Product:
    """A low-rank weight.

    Attributes
    ----------
    weight
        ``[g, o, n]``, multiplied out.
    factors
        The two factors in the coordinates of the step that made them.
    """

    weight: Float[Tensor, "g o n"]
    factors: tuple[Tensor, Tensor]


class LowRankStep(ABC):
    """Finds the low-rank part for a target."""

    grows: bool = False
    """Whether a smaller rank is a start for a larger one."""
    root: Float[Tensor, "g o o"] | None
    """Square root of ``G``, or None."""

    @abstractmethod
    def __call__(self, target: Float[Tensor, "g o n"], rank: int, start: Product | None) -> Product:
        """The low-rank weight for a target, going on from ``start`` if that helps."""

    @abstractmethod
    def refit(self, target: Float[Tensor, "g o n"], product: Product) -> Product:
        """The best second factor for a target and the first factor of a product."""

    @abstractmethod
    def eliminated(self, product: Product) -> Quadratic:
        """What a weight difference costs if the second factor of a product makes up for it as well as it can."""


@dataclass(frozen=True, eq=False)
class _Projecting(LowRankStep):
    """Projects the outputs, weighted by ``root`` (a square root of ``G``) or as they are, onto orthonormal columns.

    Attributes
    ----------
    metric
        ``C``.
    root
        ``[g, o, o]``, or None.
    """

    metric: Metric
    root: Float[Tensor, "g o o"] | None = None
    grows = True

    def refit(self, target: Float[Tensor, "g o n"], product: Product) -> Product:
        left = self._basis(product)
        return self._product(left, left.mT @ self._mixed(target))

    def eliminated(self, product: Product) -> Quadratic:
        left = self._basis(product)
        eye = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
        beside = eye - left @ left.mT
        return Quadratic(self.metric, beside if self.root is None else self.root @ beside @ self.root)

    def _basis(self, product: Product) -> Float[Tensor, "g o r"]:
        left = product.factors[0]
        return left if self.root is None else self.root @ left

    def _mixed(self, target: Tensor) -> Tensor:
        return target if self.root is None else self.root @ target

    def _product(self, left: Tensor, right: Tensor) -> Product:
        if self.root is not None:
            left = torch.linalg.solve(self.root, left)
        return Product(left @ right, (left, right))


@dataclass(frozen=True, eq=False)
class Greedy(_Projecting):
    """Greedy bilateral factors, without decompositions: a turn costs two products and a thin QR."""

    turns: int = 2

    def __call__(self, target: Float[Tensor, "g o n"], rank: int, start: Product | None) -> Product:
        mixed = self._mixed(target)
        held = None if start is None else start.factors[1]
        # A first factor out of nothing takes a turn more than one to go on from.
        turns = self.turns if held is not None and held.shape[1] == rank else self.turns + 1
        left, right = bilateral.greedy(mixed, self.metric, rank, start=held, rounds=1, turns=turns)
        return self._product(left, right)


@dataclass(frozen=True, eq=False)
class Exact(_Projecting):
    """The best factors, by one eigendecomposition a turn."""

    def __call__(self, target: Float[Tensor, "g o n"], rank: int, start: Product | None) -> Product:
        return self._product(*bilateral.exact(self._mixed(target), self.metric, rank))


@dataclass(frozen=True, eq=False)
class Split(LowRankStep):
    """Factors that share the kernel out between them, by alternation (:mod:`spectrim.linalg.response`).

    Attributes
    ----------
    metric
        ``C``; slices must be those of the split.
    root
        Square root of ``G``, or None.
    patch
        ``(i, *k)``.
    axes
        Kernel axes of the first factor.
    steps
        Conjugate-gradient steps on the first factor a turn.
    """

    metric: Metric
    root: Float[Tensor, "g o o"] | None
    patch: tuple[int, ...]
    axes: tuple[int, ...]
    steps: int = 4

    @cached_property
    def moment(self) -> Tensor:
        """The metric in the coordinates of the split, ``[g, p, q, p, q]`` or ``[g, p, p]``."""
        if isinstance(self.metric, Full):
            return response.arrange(self.metric.moment, self.axes, self.patch)
        if isinstance(self.metric, Slices):
            return self.metric.moment
        diagonal = self.metric.diagonal()
        return torch.eye(self._rows, dtype=diagonal.dtype, device=diagonal.device).expand(len(diagonal), -1, -1)

    def __call__(self, target: Float[Tensor, "g o n"], rank: int, start: Product | None) -> Product:
        outputs = target.shape[1]
        matrix = self._unfolded(target)
        mixed = matrix if self.root is None else self._unfolded(self.root @ target)
        if start is None or self.moment.dim() == 3:
            # In a metric of slices this is the solution, otherwise a good start.
            basis = lowrank.spectrum(mixed, response.slice_metric(self.moment), rank).basis
            left, _ = lowrank.factors(mixed, basis, rank)
        else:
            left = start.factors[0]
        if self.moment.dim() == 5:
            left, _ = response.alternate(mixed, self.moment, left, outputs, sweeps=1, steps=self.steps)
        return self._product(left, response.refit(matrix, self.moment, left, outputs), outputs)

    def refit(self, target: Float[Tensor, "g o n"], product: Product) -> Product:
        left = product.factors[0]
        outputs = target.shape[1]
        return self._product(left, response.refit(self._unfolded(target), self.moment, left, outputs), outputs)

    def eliminated(self, product: Product) -> Quadratic:
        left = product.factors[0]
        if isinstance(self.metric, Full):
            g, _, rank = left.shape
            q = self.moment.shape[2]
            eye = torch.eye(q, dtype=left.dtype, device=left.device)
            # All that the second factor can see, as a map from patches.
            opened = torch.einsum("gpa,qs->gpqas", left, eye).reshape(g, *(self.patch[d] for d in self._order), -1)
            back = [1 + self._order.index(d) for d in range(len(self.patch))]
            views = opened.permute(0, *back, -1).reshape(g, -1, rank * q)
            metric: Metric = Full(_beside(self.metric.moment, views))
        else:
            metric = Slices(_beside(self.moment, left), self.patch, self.axes)
        return Quadratic(metric, None if self.root is None else self.root @ self.root)

    @property
    def _order(self) -> list[int]:
        """Axes of the patch, those that the first factor sees together first."""
        kernel = range(len(self.patch) - 1)
        return [0, *(1 + a for a in self.axes), *(1 + a for a in kernel if a not in self.axes)]

    @property
    def _rows(self) -> int:
        return math.prod((self.patch[0], *(self.patch[1 + a] for a in self.axes)))

    def _unfolded(self, weight: Tensor) -> Tensor:
        g, o, _ = weight.shape
        opened = weight.reshape(g, o, *self.patch).permute(0, *(2 + d for d in self._order), 1)
        return opened.reshape(g, self._rows, -1, o).transpose(2, 3).reshape(g, self._rows, -1)

    def _product(self, left: Tensor, right: Tensor, outputs: int) -> Product:
        g = left.shape[0]
        opened = (left @ right).reshape(g, self._rows, outputs, -1).transpose(1, 2)
        opened = opened.reshape(g, outputs, *(self.patch[d] for d in self._order))
        back = [2 + self._order.index(d) for d in range(len(self.patch))]
        return Product(opened.permute(0, 1, *back).reshape(g, outputs, -1), (left, right))


def _beside(moment: Float[Tensor, "g n n"], views: Float[Tensor, "g n m"]) -> Float[Tensor, "g n n"]:
    """The moment of what cannot be predicted from ``views^T x``."""
    seen = moment @ views
    half = torch.linalg.solve_triangular(cholesky(views.mT @ seen), seen.mT, upper=False)
    return moment - half.mT @ half
