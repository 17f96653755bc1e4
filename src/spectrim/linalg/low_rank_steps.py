"""How the low-rank part of a sum is found: without decompositions, exactly, or with the kernel shared out.

A step finds the part for a target that the sparse part leaves it, going on from the turn before, and tells what a
sparse weight costs if the second factor makes up for it as well as it can.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import bilateral, lowrank, response
from spectrim.linalg.metric import Metric, SlicedMetric
from spectrim.linalg.sparse import Quadratic, Ridge

# Weighted outputs up to this many are decomposed anew in every turn of a search.
_FEW = 128


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
    """Upper triangular ``R`` with ``R^T R = G``, or None."""

    @cached_property
    def outer(self) -> Float[Tensor, "g o o"] | None:
        """``G``."""
        return None if self.root is None else self.root.mT @ self.root

    @abstractmethod
    def __call__(self, target: Float[Tensor, "g o n"], rank: int, start: Product | None) -> Product:
        """The low-rank weight for a target, going on from ``start`` if that helps."""

    @abstractmethod
    def refit(self, target: Float[Tensor, "g o n"], product: Product) -> Product:
        """The best second factor for a target and the first factor of a product."""

    @abstractmethod
    def eliminated(self, product: Product) -> Quadratic:
        """What a weight difference costs if the second factor of a product makes up for it as well as it can."""

    def following(self, ridge: Ridge, product: Product) -> Callable[[Tensor, float], Tensor] | None:
        """:meth:`Ridge.solve` where the second factor of a product makes up for what it can, or None: too dear."""
        return None

    @abstractmethod
    def energies(self, target: Float[Tensor, "g o n"]) -> Float[Tensor, "g R"]:
        """Spectrum of a target alone, descending; of a split that in the average slice."""

    @abstractmethod
    def unfolded(self, product: Product) -> tuple[Float[Tensor, "g p r"], Float[Tensor, "g r c"]]:
        """The factors of a product as those of an unfolded weight."""


@dataclass(frozen=True, eq=False)
class _Projecting(LowRankStep):
    """Projects the outputs, weighted by ``root`` (``R`` with ``R^T R = G``) or as they are, onto orthonormal columns.

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
        if self.root is not None and self.outer is not None:
            made_up = self.root.mT @ left
            return Quadratic(self.metric, self.outer - made_up @ made_up.mT)
        eye = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
        # Two thin products take less than a square one while their columns are fewer than half of the outputs.
        return Quadratic(self.metric, eye - left @ left.mT, left if 2 * left.shape[2] < left.shape[1] else None)

    def following(self, ridge: Ridge, product: Product) -> Callable[[Tensor, float], Tensor] | None:
        left = product.factors[0]
        if self.root is None:
            # All outputs count alike: what is solved for in the other directions stays in them.
            return lambda rows, penalty: ridge.solve(_without(left, rows), penalty)
        outer = self.eliminated(product).outer
        return ridge.weighted(outer).solve if outer is not None and left.shape[1] <= _FEW else None

    def energies(self, target: Float[Tensor, "g o n"]) -> Float[Tensor, "g R"]:
        mixed = self._mixed(target)
        return lowrank.variances(self.metric.times(mixed) @ mixed.mT)

    def unfolded(self, product: Product) -> tuple[Float[Tensor, "g p r"], Float[Tensor, "g r c"]]:
        left, right = product.factors
        return right.mT, left.mT

    def _basis(self, product: Product) -> Float[Tensor, "g o r"]:
        left = product.factors[0]
        return left if self.root is None else self.root @ left

    def _mixed(self, target: Tensor) -> Tensor:
        return target if self.root is None else self.root @ target

    def _product(self, left: Tensor, right: Tensor) -> Product:
        if self.root is not None:
            left = torch.linalg.solve_triangular(self.root, left, upper=True)
        return Product(left @ right, (left, right))


def _without(left: Float[Tensor, "g o r"], rows: Float[Tensor, "g o n"]) -> Float[Tensor, "g o n"]:
    return torch.baddbmm(rows, left, left.mT @ rows, alpha=-1)


@dataclass(frozen=True, eq=False)
class Greedy(_Projecting):
    """Greedy bilateral factors, without decompositions: a turn costs two products and a thin QR."""

    turns: int = 2

    def __call__(self, target: Float[Tensor, "g o n"], rank: int, start: Product | None) -> Product:
        mixed = self._mixed(target)
        right = None if start is None else start.factors[1]
        # A first factor out of nothing takes a turn more than one to go on from.
        turns = self.turns if right is not None and right.shape[1] == rank else self.turns + 1
        left, right = bilateral.greedy(mixed, self.metric, rank, start=right, turns=turns)
        return self._product(left, right)


@dataclass(frozen=True, eq=False)
class Exact(_Projecting):
    """The best factors, by one eigendecomposition a turn."""

    def __call__(self, target: Float[Tensor, "g o n"], rank: int, start: Product | None) -> Product:
        return self._product(*bilateral.exact(self._mixed(target), self.metric, rank))


@dataclass(frozen=True, eq=False)
class Alternating(LowRankStep):
    """Factors that share the kernel out between them, by alternation (:mod:`spectrim.linalg.response`).

    Attributes
    ----------
    metric
        ``C``, for the slices of the split.
    root
        Upper triangular, with ``R^T R = G``, or None.
    steps
        Conjugate-gradient steps on the first factor a turn.
    """

    metric: SlicedMetric
    root: Float[Tensor, "g o o"] | None = None
    steps: int = 4

    def __call__(self, target: Float[Tensor, "g o n"], rank: int, start: Product | None) -> Product:
        matrix = self.metric.unfold(target)
        mixed = response.mix(matrix, self.root)
        if start is None or self.metric.separates:
            # In a metric of slices this is the solution, otherwise a good start.
            basis = lowrank.spectrum(mixed, self.metric.average, rank).basis
            left, _ = lowrank.factors(mixed, basis, rank)
            right = None if self.metric.separates else response.refit(mixed, self.metric, left)
        else:
            left, right = start.factors[0], response.mix(start.factors[1], self.root)
        if right is not None:
            left = response.refit_first([mixed], [self.metric], left, [right], steps=self.steps)
            left = left / left.norm(dim=1, keepdim=True).clamp_min(1e-300)
        return self._product(left, response.refit(matrix, self.metric, left))

    def refit(self, target: Float[Tensor, "g o n"], product: Product) -> Product:
        left = product.factors[0]
        return self._product(left, response.refit(self.metric.unfold(target), self.metric, left))

    def eliminated(self, product: Product) -> Quadratic:
        return Quadratic(self.metric.beside(product.factors[0]), self.outer)

    def energies(self, target: Float[Tensor, "g o n"]) -> Float[Tensor, "g R"]:
        return lowrank.energies(response.mix(self.metric.unfold(target), self.root), self.metric.average)

    def unfolded(self, product: Product) -> tuple[Float[Tensor, "g p r"], Float[Tensor, "g r c"]]:
        return product.factors

    def _product(self, left: Tensor, right: Tensor) -> Product:
        return Product(self.metric.fold(left @ right), (left, right))


# Its name in 0.1, until 0.3.
Split = Alternating
