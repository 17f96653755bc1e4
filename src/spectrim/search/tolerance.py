"""A tolerance in place of a budget: the smallest network that loses no more, by bisection over plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

from spectrim.errors import CalibrationError, InfeasibleBudgetError
from spectrim.progress import Progress, silent
from spectrim.search.judge import Judge, Verdict
from spectrim.selection.budget import Budget, Limit

R = TypeVar("R")
# Networks that are made at most. The interval of limits is halved each time, in ratios.
_STEPS = 8
_TRIED = "sizes tried"
# Limits that differ by no more than this ratio make the same network, nearly.
_CLOSE = 1.02
# What is lost goes up and down as limits get tighter: below the smallest that held, steps by this ratio are tried until
# so many in a row do not hold.
_BELOW, _MISSES = 1.1, 2
# What another set of methods has to save at least, as a ratio: below that no network is made with it.
_WORTH = 1.05
# The smallest share of a cost that is tried.
_LEAST = 0.01


@dataclass(frozen=True)
class Tolerance:
    """What a compressed network may lose."""

    # How much worse the user's metric may be than the dense network's, in the metric's own unit.
    max_drop: float | None = None
    # Share of held-out samples whose class is to be the dense network's, or 1 - relative error for other outputs.
    min_agreement: float | None = None

    @classmethod
    def of(cls, max_drop: float | None, min_agreement: float | None, judge: Judge) -> Tolerance | None:
        """The tolerance that is stated; None if there is none.

        Raises
        ------
        TypeError, ValueError
            For what cannot be meant; the message quotes it.
        """
        if max_drop is None and min_agreement is None:
            return None
        if max_drop is not None and min_agreement is not None:
            raise ValueError(
                f"max_drop={max_drop!r} and min_agreement={min_agreement!r} are both given: give one of them, max_drop "
                "with a metric of yours, min_agreement without labels"
            )
        for name, value in {"max_drop": max_drop, "min_agreement": min_agreement}.items():
            if value is not None and (not isinstance(value, Real) or isinstance(value, bool)):
                raise TypeError(f"{name} is {value!r}: expected a number")
        if max_drop is not None and not 0 <= max_drop < math.inf:
            raise ValueError(f"max_drop is {max_drop!r}: expected a finite number of at least 0, in the metric's unit")
        if min_agreement is not None and not 0 < min_agreement <= 1:
            raise ValueError(f"min_agreement is {min_agreement!r}: expected a share above 0 and at most 1, as 0.99")
        if max_drop is not None and judge.evaluate is None:
            raise ValueError(
                f"max_drop={max_drop!r} is a drop of a metric, and there is none: give evaluate=, a function of a "
                "model that returns a number; without labels give min_agreement=0.99"
            )
        return cls(max_drop, min_agreement)

    def holds(self, verdict: Verdict) -> bool:
        """Whether a network loses no more.

        Raises
        ------
        CalibrationError
            If the outputs cannot be compared.
        """
        if self.max_drop is not None:
            # A metric that is as good as dense has no drop, whatever rounding does.
            return verdict.drop is not None and verdict.drop <= self.max_drop + 1e-9
        if verdict.agreed is None:
            raise CalibrationError(
                "min_agreement cannot be measured: the outputs are zero, or of another shape than the dense network's. "
                "Give max_drop with evaluate=, a function of a model that returns a number"
            )
        return verdict.agreed >= (self.min_agreement or 0.0)

    def said(self, verdict: Verdict) -> str:
        """What was asked for and what was measured, in a sentence."""
        met = "is met" if self.holds(verdict) else "is NOT met"
        if self.max_drop is not None:
            return (
                f"the tolerance {met}: {verdict.name} {verdict.metric:.6g}, {verdict.dense:.6g} for the dense network, "
                f"a drop of {verdict.drop:.6g} where {self.max_drop:.6g} is allowed"
            )
        agreement = verdict.agreement
        assert agreement is not None
        what = "outputs agree with the dense network's" if agreement.top1 is None else "the same class comes first"
        which = "held-out calibration samples" if agreement.held_out else "calibration samples"
        return (
            f"the tolerance {met}: {what} in {verdict.agreed:.2%}, measured on {agreement.samples:,} {which}, where "
            f"{self.min_agreement:.2%} is asked for"
        )


def smallest(
    limits: Mapping[str, float],
    dense: Mapping[str, float],
    made: Callable[[Budget], R],
    holds: Callable[[R], bool],
    over: Callable[[], bool] = lambda: False,
    *,
    refused: Callable[[InfeasibleBudgetError], object] = lambda error: None,
    close: float = _CLOSE,
    misses: int = _MISSES,
    progress: Progress = silent,
) -> R | None:
    """The smallest network that holds, between limits and the dense network's costs.

    Limits lie on the line, in ratios, from the stated ones to the dense costs, and the interval between one that holds
    and a tighter one that does not is halved. What is lost need not grow as limits get tighter: a few that are tighter
    still are tried below it. The network that is returned was measured itself.

    Parameters
    ----------
    limits
        The tightest, by the cost.
    dense
        Costs of the dense network.
    made
        The network under a budget.
    holds
        Whether it loses no more than is tolerated.
    over
        Whether no further network is to be made.
    refused
        Told why no network was made under a budget.
    close
        Limits that differ by no more than this ratio are not told apart.
    misses
        How many in a row do not hold before nothing tighter is tried.
    progress
        Told how many networks were made, of those that are made at most.

    Returns
    -------
    R or None
        None if none of them holds.
    """
    best: R | None = None
    tight, wide, made_so_far = 0.0, 1.0, 0
    ratio = math.log(max(1.0, *(dense[cost] / limit for cost, limit in limits.items())))

    def tried(share: float) -> bool:
        nonlocal best, wide, made_so_far
        progress(_TRIED, made_so_far, max(made_so_far + 1, _STEPS + misses))
        made_so_far += 1
        budget = Budget(**{c: Limit(limit ** (1 - share) * dense[c] ** share) for c, limit in limits.items()})
        try:
            trial = made(budget)
        except InfeasibleBudgetError as error:
            refused(error)
            return False
        if not holds(trial):
            return False
        best, wide = trial, share
        return True

    while made_so_far < _STEPS and (wide - tight) * ratio > math.log(close) and not over():
        if not tried(share := (tight + wide) / 2):
            tight = share
    below = 1
    while best is not None and below <= misses and not over():
        share = wide - below * math.log(_BELOW) / max(ratio, 1e-12)
        if share <= 0:
            break
        below = 1 if tried(share) else below + 1
    progress(_TRIED, made_so_far, made_so_far)
    return best


def smaller(
    limits: Mapping[str, float],
    reached: Mapping[str, float],
    made: Callable[[Budget], R | None],
    holds: Callable[[R], bool],
    over: Callable[[], bool] = lambda: False,
) -> R | None:
    """A network that holds and is smaller than one that was reached in another way: by steps that grow, then halving.

    Parameters
    ----------
    limits
        The tightest, by the cost.
    reached
        Costs of the network to be improved on.
    made
        The network under a budget; None if there is none.
    holds, over
        As for :func:`smallest`.

    Returns
    -------
    R or None
        None if a network that is a little smaller does not hold.
    """
    best: R | None = None
    last, step = {cost: max(limit, reached[cost]) for cost, limit in limits.items()}, _WORTH

    def tried(budget: Budget) -> tuple[R | None, bool]:
        trial = made(budget)
        return trial, trial is not None and holds(trial)

    while last != limits and not over():
        aim = {cost: max(limit, last[cost] / step) for cost, limit in limits.items()}
        trial, holds_it = tried(Budget(**{cost: Limit(limit) for cost, limit in aim.items()}))
        if holds_it:
            best, last, step = trial, aim, step**4
        elif best is None:
            return None
        else:
            between = smallest(aim, last, tried, lambda pair: pair[1], over, close=_WORTH, misses=0)
            return best if between is None else between[0]
    return best


def tightest(cost: str, dense: Mapping[str, float]) -> dict[str, float]:
    """Where a search without a budget begins: a small share of one cost."""
    return {cost: _LEAST * dense[cost]}
