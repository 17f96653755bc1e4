"""The smallest network within a tolerance: one set of methods is searched in full, others from the size it reached."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from spectrim.errors import SlowerError, SpectrimError, ToleranceError
from spectrim.pipeline.goal import Goal
from spectrim.pipeline.making import Making, Tables
from spectrim.pipeline.report import Result
from spectrim.pipeline.shrinking import shrink, shrink_best, verdict_of, with_verdict
from spectrim.preparation import Prepared
from spectrim.search.arms import Arm, Tried, not_tried
from spectrim.search.measured import asked_time, is_late
from spectrim.search.standings import Standings
from spectrim.search.tolerance import Tolerance, smaller, smallest, tightest
from spectrim.selection.budget import Budget, Limit

log = logging.getLogger(__name__)
# Times what the dense network costs: a limit that lets it be as it is.
_AMPLE = 100.0
_LESS = (
    "these methods make no network of a size that was tried ({}): methods='auto' (--method auto) has other sets "
    "compete, which may hold the tolerance with less"
)


Others = Callable[[str], tuple[Prepared, Sequence[Arm]]]
"""The network prepared for other sets of methods, and these, the simplest first; called with why they are asked for."""


class Within:
    """A search for the smallest network that loses no more than a goal tolerates.

    Attributes
    ----------
    best
        The smallest network that was seen to hold; None if none was.
    refused
        Why the one set of methods makes no network of a size that was tried; empty if all could be had.
    widened
        Why other sets competed after the one; empty if they did not.
    """

    best: Result | None = None
    refused: str = ""
    widened: str = ""

    def __init__(
        self, model: nn.Module, goal: Goal, tolerance: Tolerance, making: Making, prepared: Prepared,
        arms: Sequence[Arm] = (),
    ) -> None:  # fmt: skip
        """With ``arms``, the simplest first, or with the one set of methods of ``making``."""
        self.model, self.goal, self.tolerance, self.making = model, goal, tolerance, making
        self._began = time.monotonic()
        self._why = ""  # the last network could not be had, if it was not for the tolerance
        self._fallen = math.inf  # the smallest network that could be had and does not hold
        self._competes(prepared, arms)

    def _competes(self, prepared: Prepared, arms: Sequence[Arm]) -> None:
        only = Arm("", None if self.making.methods is None else tuple(self.making.methods))
        self._prepared, self._arms = prepared, arms
        self._tables, self._standings = Tables(prepared, arms or (only,), self.making), Standings(arms)
        self._first = self._tables.of((arms or (only,))[0])

    def reached(self, others: Others | None = None) -> Result:
        """The network by all that compete: what the goal's budget gives if it holds, else the smallest.

        Where the one set of methods makes no smaller network than one that holds, ``others`` compete for less; where
        what it makes of the budget does not hold, for the budget.

        Raises
        ------
        ToleranceError
            If the budget is met by no network that holds.
        """
        budget = self.goal.budget
        if budget is None:
            self._in_full(tightest(self.goal.cost, self._first.dense))
            if others is not None and self._at_the_end:
                self.widened, self.refused = self.refused, ""
                self._widen(*others(self.widened))
            return self._concluded()
        stated = self._stated(budget)
        if not self._holds(stated) and others is not None:
            self.widened = f"with low rank alone {self.tolerance.said(verdict_of(stated))}"
            self._competes(*others(self.widened))
            stated = self._stated(budget)
        if self._holds(stated):
            return stated
        self._in_full(budget.limits(self._first.dense))
        raise ToleranceError(_gate(budget, stated, self.best), self.best)

    def _stated(self, budget: Budget) -> Result:
        """The network of a budget by all that compete."""
        return self._among(self._arms, budget) if self._arms else self._made(budget)

    @property
    def _at_the_end(self) -> bool:
        """Whether smaller networks cannot be had by the one set of methods, which the tolerance would let them be."""
        size = math.inf if self.best is None else self.best.plan.costs[self._axis]
        return bool(self.refused) and size <= self._fallen

    def _widen(self, prepared: Prepared, arms: Sequence[Arm]) -> None:
        """Have other sets compete after all, from the size on that the first of the arms reached."""
        self._competes(prepared, arms)
        name = arms[0].name
        if self.best is None:
            self._standings.refused(arms[:1], self._first.dense[self.goal.cost], self.widened)
        else:
            verdict, plan = verdict_of(self.best), self.best.plan
            row = Tried(
                name, verdict.loss, standard_error=verdict.standard_error, predicted=plan.loss, costs=plan.costs,
                dense_costs=plan.dense_costs, chosen=True,
            )  # fmt: skip
            self.best = self.best.reporting(arms=(row,))
        self._others(tightest(self.goal.cost, self._first.dense))

    def _in_full(self, limits: dict[str, float]) -> None:
        """Search the first set in full, then the others."""
        self.best = smallest(
            limits, self._first.dense, self._made, self._holds, self._over, refused=self._not_made,
            progress=self.making.progress,
        )  # fmt: skip
        self._others(limits)

    def _others(self, limits: dict[str, float]) -> None:
        """Improve on what was reached by the arms behind the first."""
        if self.best is not None:
            self._standings.take(self.best.report.arms, self.best.plan.costs[self._axis], holds=True)
        known = self._first.dense if self.best is None else self.best.plan.costs
        self.best = smaller(limits, known, self._standing, self._holds, self._over) or self.best

    @property
    def _axis(self) -> str:
        """The cost that sizes are compared by."""
        return self.goal.cost if self.goal.budget is None else next(iter(self.goal.budget.costs))

    def _over(self) -> bool:
        """Whether no further size is to be tried."""
        seconds = self.goal.seconds
        return bool(self._arms) and seconds is not None and time.monotonic() - self._began >= seconds

    def _among(self, arms: Sequence[Arm], limits: Budget) -> Result:
        return shrink_best(
            self.model, self._prepared, limits, arms, self.goal.judge, self.making, seconds=self.goal.seconds,
            spent=time.monotonic() - self._began, tables=self._tables, tolerance=self.tolerance,
        )  # fmt: skip

    def _made(self, limits: Budget) -> Result:
        """The network of the first set."""
        if self._arms:
            return self._among(self._arms[:1], limits)
        result = shrink(self.model, self._prepared, limits, self.making, self._first)
        return with_verdict(result, self.goal.judge, self.tolerance)

    def _standing(self, limits: Budget) -> Result | None:
        """The network of the other sets that did not fail at this size."""
        size = limits.limits(self._first.dense)[self._axis]
        standing = self._standings.standing(size)
        try:
            return self._among(standing, limits) if standing else None
        except SpectrimError as error:
            self._standings.refused(standing, size, error.brief)
            return None

    def _not_made(self, error: SpectrimError) -> None:
        self._why = error.brief
        if not self._arms and not isinstance(error, SlowerError):
            self.refused = self._why

    def _holds(self, result: Result) -> bool:
        log.info("%s: %s", result.plan.costs, self.tolerance.said(verdict_of(result)))
        self._why = _late(result) if self.goal.budget is None else ""
        verdict = self.tolerance.holds(verdict_of(result)) and not self._why
        size = result.plan.costs[self._axis]
        self._standings.take(result.report.arms, size, verdict)
        if not verdict:
            self._fallen = min(self._fallen, size)
        return verdict

    def _concluded(self) -> Result:
        """The network with what became of all arms: whether any held, why none was smaller, when the search ended."""
        result, ended = self.best or self._dense(), self.goal.seconds if self._over() else None
        rest = "not tried: no network was left to improve on" if ended is None else not_tried(ended)
        untried = not self._standings.rows and bool(self._arms)
        why = self._why if self.best is None else self.refused
        notes = _said_of_search(None if untried else self.best is not None, ended, why)
        arms = self._standings.told(result.report.arms, rest)
        return result.reporting(arms=arms, notes=(*notes, *result.report.notes))

    def _dense(self) -> Result:
        """The dense network as it is made under an ample limit, with its own cost for a limit.

        A file tells of the plan, too, so that layers would pay for that text if the dense file had been the limit.
        """
        cost = self.goal.cost
        result = self._made(Budget(**{cost: Limit(_AMPLE * self._first.dense[cost])}))
        plan = dataclasses.replace(result.plan, budget={cost: result.plan.dense_costs[cost]})
        return dataclasses.replace(result, plan=plan).reporting(arms=(), plan=plan)


def _late(result: Result) -> str:
    """That a network takes longer than it was made for, as the clock says; empty if it does not."""
    plan, measured = result.plan, result.report.measured
    if not is_late(plan, measured):
        return ""
    return f"{measured['compressed'].quiet:.3g} ms measured for {asked_time(plan, measured):.3g} ms that were asked for"


def _said_of_search(any_holds: bool | None, ended: float | None, why: str) -> Iterator[str]:
    """What it rests on: whether any held, None if none was tried; seconds it ended after; why none is smaller."""
    if any_holds is None and ended is not None:
        yield f"no smaller network was tried, as {ended:g} s were over: this is the dense network. Give more seconds"
        return
    if any_holds:
        yield (
            "of the networks that were tried the smallest was taken that held on these samples, so that by chance it "
            "may lose more on others: measure it on samples that were used for nothing"
        )
    else:
        reason = f"could be had ({why})" if why else "that was tried holds the tolerance"
        yield f"no smaller network {reason}: this is the dense network"
    if ended is not None:
        yield f"the search ended after {ended:g} s"
    if any_holds and why:
        yield _LESS.format(why)


def _gate(budget: Budget, stated: Result, network: Result | None) -> str:
    """What is said of a budget that cannot be met within the tolerance."""
    tolerance, verdict = stated.report.tolerance, stated.report.verdict
    assert tolerance is not None
    assert verdict is not None
    if network is None:
        return f"with the budget {budget} {tolerance.said(verdict)}. No smaller network holds it: allow more"
    shares = ",".join(f"{c}={100 * network.plan.costs[c] / network.plan.dense_costs[c]:.3g}%" for c in budget.costs)
    return f"with the budget {budget} {tolerance.said(verdict)}. {shares} holds it: give that budget, or allow more"
