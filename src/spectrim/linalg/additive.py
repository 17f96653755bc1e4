"""Low rank plus sparse, fitted together to a layer's responses (after Yu et al., CVPR 2017).

    min over L, S of  tr[G (T - L - S) C (T - L - S)^T],    rank(L) <= r,  S with a pattern

is solved from nothing by the alternating direction method of multipliers (:mod:`spectrim.linalg.admm`), which finds the
entries that stay; then the mask is frozen and the values of both parts settle, by turns that lower the error.

A low-rank part alone is found by turns of its step. Between turns it may be over-relaxed (it sees a little more than
what is missing, as in GreBsmo); what does not lower the error is taken back.

How the low-rank part is found is an object, since a kernel can be split in several ways:
:mod:`spectrim.linalg.low_rank_steps`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import admm, sparse
from spectrim.linalg.low_rank_steps import LowRankStep, Product
from spectrim.linalg.patterns import Pattern
from spectrim.linalg.sparse import Quadratic, Sparse


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

    def double(self) -> Additive:
        """The same in float64."""
        product, state = self.product, dataclasses.replace(self.sparse, weight=self.sparse.weight.double())
        if product is not None:
            left, right = product.factors
            product = Product(product.weight.double(), (left.double(), right.double()))
        return dataclasses.replace(self, product=product, sparse=state)


@dataclass(frozen=True)
class Alternation:
    """How the two parts take turns.

    Attributes
    ----------
    turns, tolerance
        With a sparse part exactly so many turns, over which the penalty grows (:mod:`spectrim.linalg.admm`). Of a
        low-rank part alone at most so many; fewer once two in a row lower the error by less than this share of it.
    growth, relax
        Of a low-rank part alone: turns over which its rank grows from nothing, and whether its step is over-relaxed.
    polish
        At most so many turns with a frozen mask at the end, until one lowers the error by less than ``tolerance``.
    """

    turns: int = 60
    tolerance: float = 1e-4
    growth: int = 4
    relax: bool = True
    polish: int = 12


def decompose(
    target: Float[Tensor, "g o n"],
    error: Quadratic,
    step: LowRankStep,
    rank: int,
    pattern: Pattern,
    density: float,
    kernel: tuple[int, ...],
    *,
    alternation: Alternation = Alternation(),
    cautious: bool = False,
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
    alternation
        How many turns the parts take, and how.
    cautious
        Begin with a smaller penalty: it ends in another minimum.

    Returns
    -------
    Additive
        The errors never rise from turn to turn once the rank is reached.
    """
    sized = pattern, density, kernel
    if pattern.kept((*target.shape[:2], *kernel), density):
        first = admm.FIRST / 10 if cautious else admm.FIRST
        fit = admm.search(target, error, step if rank else None, rank, *sized, turns=alternation.turns, first=first)
        return _valued(target, error, step, fit, alternation)
    nothing = Sparse(torch.zeros_like(target), torch.zeros_like(target, dtype=torch.bool), error.value(target))
    if not rank:
        return Additive(None, nothing, (nothing.error,), True)
    product, errors, converged = _alternated(target, error, step, rank, nothing.error, alternation)
    return Additive(product, nothing, tuple(errors), converged)


# Up to this density neighbours on a path are close.
_SPARSE = 0.25


def path(
    target: Float[Tensor, "g o n"],
    error: Quadratic,
    step: LowRankStep,
    points: Iterable[tuple[int, float]],
    pattern: Pattern,
    kernel: tuple[int, ...],
    *,
    turns: int,
    between: int,
) -> Iterator[Additive]:
    """Fits of one rank and density after the other, as :func:`decompose` without polish, but fast.

    Parameters
    ----------
    target, error, step, pattern, kernel
        As there.
    points
        Ranks and densities, these above 0. Where neither falls from one point to the next, the search goes on from the
        last one's; not at densities above a quarter, where little is lost and six turns find a multiple of it.
    turns, between
        Of a search from nothing, and of one that goes on. With 0 none does, and each is that of :func:`decompose`.
    """
    fit, last = None, (0, 0.0)
    for rank, density in points:
        near = last[1] <= density <= _SPARSE and rank >= last[0]
        goes_on = between and near and fit is not None
        fit = admm.search(
            target, error, step if rank else None, rank, pattern, density, kernel,
            turns=between if goes_on else turns, first=admm.NEXT if goes_on else admm.FIRST,
            start=fit if goes_on else None, relax=admm.RELAX if between else 1.0,
        )  # fmt: skip
        last = rank, density
        yield _valued(target, error, step, fit, Alternation(polish=0))


def _alternated(
    target: Tensor, error: Quadratic, step: LowRankStep, rank: int, total: float, alternation: Alternation
) -> tuple[Product, list[float], bool]:
    """The low-rank part alone by turns: its errors, the last its own, and whether they no longer fell."""
    grown, extra, calm = 0 if step.grows else rank, 0.0, 0
    product = best = None
    errors: list[float] = []
    for turn in range(alternation.turns):
        if grown < rank:
            grown = max(grown + 1, rank * (turn + 1) // max(1, min(alternation.growth, alternation.turns)))
        asked = target + extra * (target - best.weight) if extra and best is not None else target
        product = step(asked, grown, product)
        if grown < rank:
            continue
        value = error.value(target - product.weight)
        if best is not None and value > errors[-1]:
            product = best
            if not extra:
                return best, errors, True
            # Relaxed too far: go on from before.
            extra = 0.0
            continue
        fell = 1 - value / errors[-1] if errors and errors[-1] > 0 else 1.0
        calm = calm + 1 if fell < alternation.tolerance else 0
        best = product
        errors.append(value)
        if value <= 1e-12 * total or calm == 2:
            return best, errors, True
        if alternation.relax and fell < 0.3:
            extra = min(extra + 0.25, 2.0)
    best = best or product
    assert best is not None
    return best, errors or [error.value(target - best.weight)], False


def _valued(
    target: Tensor,
    error: Quadratic,
    step: LowRankStep,
    fit: admm.Iterate,
    alternation: Alternation,
) -> Additive:
    """The values of both parts of a search."""
    product = fit.product
    seen = error if product is None else step.eliminated(product)
    state = sparse.solve(target, seen, fit.mask, start=fit.weight, steps=6)
    if product is None:
        state = sparse.solve(target, error, state.mask, start=state.weight, steps=10 * alternation.polish)
        return Additive(None, state, (state.error,), True)
    product = step.refit(target - state.weight, product)
    return _polished(target, error, step, (product, state), [state.error], alternation.polish, alternation.tolerance)


def better(*arguments: Any, **options: Any) -> Additive:
    """The better of two fits by :func:`decompose`, one of them cautious: there are many minima."""
    return min((decompose(*arguments, **options, cautious=c) for c in (False, True)), key=lambda fit: fit.error)


def settled(target: Float[Tensor, "g o n"], error: Quadratic, step: LowRankStep, start: Additive) -> Additive:
    """The same support and rank with better values, such as of a fit in lower precision."""
    if start.product is None:
        state = sparse.solve(target, error, start.sparse.mask, start=start.sparse.weight, steps=12)
        return Additive(None, state, (state.error,), start.converged)
    rest = error.value(target - start.product.weight - start.sparse.weight)
    return _polished(target, error, step, (start.product, start.sparse), [rest], 1, 0.0)


def _polished(
    target: Tensor,
    error: Quadratic,
    step: LowRankStep,
    best: tuple[Product, Sparse],
    errors: list[float],
    turns: int,
    tolerance: float,
) -> Additive:
    """The values of both parts with the mask as it is, until a turn gains less than the tolerance."""
    product, state = best
    rank, converged = product.factors[0].shape[2], False
    for _ in range(turns):
        fresh = step(target - state.weight, rank, product)
        fit = sparse.solve(target, step.eliminated(fresh), state.mask, start=state.weight, steps=12)
        fresh = step.refit(target - fit.weight, fresh)
        fell = 1 - fit.error / errors[-1] if errors[-1] > 0 else 0.0
        if fell > 0:
            product, state = fresh, fit
            errors.append(fit.error)
        if fell <= tolerance:
            converged = True
            break
    # The error as it is, without the rounding of all the steps.
    errors[-1] = error.value(target - product.weight - state.weight)
    return Additive(product, state, tuple(errors), converged)
