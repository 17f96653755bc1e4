"""Low rank plus sparse, fitted together to a layer's responses (Yu et al., CVPR 2017, formulated as in METHODS B.2).

    min over L, S of  tr[G (T - L - S) C (T - L - S)^T],    rank(L) <= r,  S with a pattern

is solved by turns: the best low-rank part for ``T - S``, the best sparse part for ``T - L``. The rank grows over the
first turns, so that large single entries go to the sparse part and not into directions of their own. Between turns the
low-rank step may be over-relaxed (it sees a little more than what the sparse part leaves, as in GreBsmo); what does not
lower the error is taken back. Then the mask is frozen and the values of both parts settle.

How the low-rank part is found is an object (:class:`LowRankStep`), since a kernel can be split in several ways:
:class:`Greedy` (without decompositions) and :class:`Exact` for the split after the whole kernel, :class:`Split` for
the others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import bilateral, lowrank, response, sparse
from spectrim.linalg.metric import Full, Metric, Slices
from spectrim.linalg.patterns import Pattern
from spectrim.linalg.response import cholesky
from spectrim.linalg.sparse import Quadratic, Sparse


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


@dataclass(frozen=True, eq=False)
class Additive:
    """A low-rank and a sparse weight.

    Attributes
    ----------
    product
        None at rank 0.
    sparse
        With an empty mask at density 0.
    errors
        ``tr(G R C R^T)`` of what is left after every turn; the last is that of the result.
    converged
        Whether the turns ended because the error no longer fell.
    """

    product: Product | None
    sparse: Sparse
    errors: tuple[float, ...]
    converged: bool

    @property
    def error(self) -> float:
        return self.errors[-1]


def decompose(
    target: Float[Tensor, "g o n"],
    error: Quadratic,
    step: LowRankStep,
    rank: int,
    pattern: Pattern,
    density: float,
    kernel: tuple[int, ...],
    *,
    start: Additive | None = None,
    turns: int = 60,
    tolerance: float = 1e-4,
    growth: int = 4,
    relax: bool = True,
    polish: int = 3,
    paths: int = 1,
) -> Additive:
    """Fit a low-rank plus a sparse weight.

    Parameters
    ----------
    target
        ``T``, float64.
    error
        What is minimised.
    step
        How the low-rank part is found, in the same metric.
    rank, pattern, density
        Of the two parts; with a rank of 0 it is pruning with reconstruction, with a density of 0 low rank in the
        layer's responses.
    kernel
        ``(i, *k)``.
    start
        To go on from, of the same rank or, if the step grows, of a lower one.
    turns, tolerance
        At most so many turns; fewer once two in a row lower the error by less than this share of it.
    growth
        Turns over which the rank grows from nothing.
    relax
        Over-relax the low-rank step.
    polish
        Turns with a frozen mask at the end.
    paths
        1, or 2 to fit a second time with cautious sparse steps and to return the better fit: there are many minima.

    Returns
    -------
    Additive
        The errors never rise from turn to turn once the rank is reached.
    """
    given = (target, error, step, rank, pattern, density, kernel, start, turns, tolerance, growth, relax, polish)
    fits = [_path(*given, cautious=cautious) for cautious in (False, True)[:paths]]
    return min(fits, key=lambda fit: fit.error)


def _path(
    target: Tensor,
    error: Quadratic,
    step: LowRankStep,
    rank: int,
    pattern: Pattern,
    density: float,
    kernel: tuple[int, ...],
    start: Additive | None,
    turns: int,
    tolerance: float,
    growth: int,
    relax: bool,
    polish: int,
    *,
    cautious: bool,
) -> Additive:
    shape = (target.shape[0], target.shape[1], *kernel)
    if not rank:
        found = sparse.fit(
            target,
            error,
            pattern,
            density,
            kernel,
            start=None if start is None else start.sparse,
            rounds=turns,
            cautious=cautious,
        )
        found = sparse.solve(target, error, found.mask, start=found.weight, steps=10 * polish)
        return Additive(None, found, (found.error,), True)
    state = Sparse(torch.zeros_like(target), torch.zeros_like(target, dtype=torch.bool), 0.0)
    product = None
    if start is not None:
        state, product = start.sparse, start.product
    alone = not pattern.kept(shape, density)
    grown = rank if not step.grows or product is not None else 0
    extra, calm = 0.0, 0
    errors: list[float] = []
    best: tuple[Product, Sparse] | None = None
    converged = False
    total = error.value(target)
    for turn in range(turns):
        if grown < rank:
            grown = max(grown + 1, rank * (turn + 1) // max(1, min(growth, turns)))
        asked = target - state.weight
        if extra and best is not None:
            asked = asked + extra * (asked - best[0].weight)
        product = step(asked, grown, product)
        value = error.value(target - product.weight) if alone or grown >= target.shape[1] else math.inf
        if not alone and value <= 1e-12 * total:
            # Nothing is left for the sparse part.
            mask = sparse.one_shot(target, error, pattern, density, kernel).mask
            product = step.refit(target, product)
            state = Sparse(torch.zeros_like(target), mask, value)
        elif not alone:
            held = state if bool(state.mask.any()) else None
            state = sparse.fit(
                target,
                step.eliminated(product),
                pattern,
                density,
                kernel,
                start=held,
                rounds=2,
                steps=4,
                halvings=2,
                cautious=cautious,
            )
            product = step.refit(target - state.weight, product)
            value = state.error
        if grown < rank:
            continue
        if best is not None and value > errors[-1]:
            product, state = best
            if not extra:
                converged = True
                break
            # Relaxed too far: go on from before.
            extra = 0.0
            continue
        fell = 1 - value / errors[-1] if errors and errors[-1] > 0 else 1.0
        calm = calm + 1 if fell < tolerance else 0
        best = product, state
        errors.append(value)
        # A turn may gain little just before a change of the mask gains much.
        if value <= 1e-12 * total or calm == 2:
            converged = True
            break
        if relax and fell < 0.3:
            extra = min(extra + 0.25, 2.0)
    if best is None:
        assert isinstance(product, Product)
        best = product, state
        errors.append(error.value(target - product.weight - state.weight))
    return _polished(target, error, step, rank, best, errors, converged, 0 if alone else polish)


def _polished(
    target: Tensor,
    error: Quadratic,
    step: LowRankStep,
    rank: int,
    best: tuple[Product, Sparse],
    errors: list[float],
    converged: bool,
    turns: int,
) -> Additive:
    """The values of both parts with the mask as it is."""
    product, state = best
    for _ in range(turns):
        fresh = step(target - state.weight, rank, product)
        settled = sparse.solve(target, step.eliminated(fresh), state.mask, start=state.weight, steps=12)
        fresh = step.refit(target - settled.weight, fresh)
        if settled.error >= errors[-1]:
            break
        product, state = fresh, settled
        errors.append(settled.error)
    # The error as it is, without the rounding of all the steps.
    errors[-1] = error.value(target - product.weight - state.weight)
    return Additive(product, state, tuple(errors), converged)
