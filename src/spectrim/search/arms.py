"""Sets of methods that compete: all are planned, those that promise most make networks, and a judge takes the best.

A plan says what it is predicted to lose. That decides what is worth carrying out, and nothing else: of the networks
that were made the one is taken that lost least.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from spectrim.errors import InfeasibleBudgetError, SpectrimError
from spectrim.methods import ActivationCP, LowRankPlusSparse, Method, PrincipalFilters
from spectrim.network.printing import Grid, cost_name, share
from spectrim.network.sites import Sites
from spectrim.progress import Progress, silent
from spectrim.search.judge import Verdict
from spectrim.search.stepwise import Judging, OutOfTimeError, TooMuchLostError
from spectrim.selection.plan import Plan
from spectrim.tables import default_methods

log = logging.getLogger(__name__)
# What a sparse part or a shared factor saves, and hardly any time.
STORED = frozenset({"parameters", "bytes"})
# A plan predicted to lose so many times what another one is predicted to lose is not carried out. Where that removes
# channels it says nothing: what it loses is predicted too low, of few samples by far.
HOPELESS = 1.5
# Share of the seconds after which nothing further is planned, so that some are left to carry a plan out.
_PLANNING = 0.5


@dataclass(frozen=True)
class Arm:
    """One set of methods."""

    name: str  # for people
    methods: tuple[Method, ...] | None = None  # on offer; None for what :func:`spectrim.tabulate` offers by itself
    groups: bool = False  # whether layers may share factors

    @property
    def removes_channels(self) -> bool:
        """Whether channels are removed, too."""
        return any(method.removes_channels for method in self.methods or ())


@dataclass(frozen=True)
class Tried:
    """What became of an arm.

    Attributes
    ----------
    name
        The arm's.
    loss
        What the finished network lost by the judge, smaller is better; infinite if there is none.
    seconds
        That planning and carrying out took.
    note
        Why there is no network, or why it was chosen before one that lost less; else empty.
    standard_error
        Of the loss, over the samples that judged; None where it is not known.
    predicted
        What the plan loses by its table; infinite if there is none.
    costs, dense_costs
        Of the plan and of the dense network.
    chosen
        Whether its network is the one that was returned.
    """

    name: str
    loss: float = math.inf
    seconds: float = 0.0
    note: str = ""
    standard_error: float | None = None
    predicted: float = math.inf
    costs: Mapping[str, float] = field(default_factory=dict)
    dense_costs: Mapping[str, float] = field(default_factory=dict)
    chosen: bool = False

    @property
    def judged(self) -> str:
        """The loss with its standard error, in words; empty if there is no network."""
        if self.loss == math.inf:
            return ""
        return f"{self.loss:.4g}" + ("" if self.standard_error is None else f" \u00b1 {self.standard_error:.2g}")

    @property
    def outcome(self) -> str:
        """What became of it, in words."""
        return "; ".join(text for text in ("chosen" if self.chosen else "", self.note) if text)

    def record(self) -> dict[str, Any]:
        """As plain values."""
        known = {"loss": self.loss, "predicted": self.predicted}
        return {
            "arm": self.name, **{name: value if math.isfinite(value) else None for name, value in known.items()},
            "standard_error": self.standard_error, "costs": dict(self.costs), "seconds": self.seconds,
            "chosen": self.chosen, "note": self.note,
        }  # fmt: skip

    def __str__(self) -> str:
        told = f"{self.judged} in {self.seconds:.1f} s" if self.judged else ""
        return f"{self.name}: {'; '.join(text for text in (told, self.outcome) if text)}"


def arms_grid(tried: Sequence[Tried], cost: str) -> Grid:
    """A table of what became of arms."""
    rows = [
        [
            each.name, each.judged, share(each.costs[cost], each.dense_costs[cost]) if cost in each.costs else "",
            f"{each.seconds:.1f}", each.outcome,
        ]
        for each in tried
    ]  # fmt: skip
    heads = ["methods that competed", ">network lost", f">{cost_name(cost)} left", ">seconds", "outcome"]
    return Grid(heads, rows, notes=(_LOST,) if rows else ())


_LOST = (
    "network lost: by how much the metric is worse where one was given, else how far outputs diverge from the dense "
    "network's on samples that were held out (scores of classes in nats, others relative), with its standard error"
)


def usual(limited: Iterable[str], sites: Sites) -> list[Arm]:
    """The arms that fit the costs that are limited and the layers there are, the simplest first.

    Low rank is in each of them as it is on offer by default for these sites, which should be calibrated.
    """
    low_rank = tuple(default_methods(replace(sites, groups={})))
    kernels = any(math.prod(site.spec.kernel) > 1 for site in sites)
    chains = [Arm("low rank, chains", (*low_rank, ActivationCP()))] if kernels else []
    filters = [Arm("filters", (PrincipalFilters(),)), Arm("filters, then low rank", (PrincipalFilters(), *low_rank))]
    if STORED.isdisjoint(limited):
        return [Arm("low rank", low_rank), *chains, *filters]
    return [
        Arm("low rank, shared factors", groups=True),
        *chains,
        Arm("low rank + sparse", (*low_rank, LowRankPlusSparse())),
        *filters,
        Arm("filters, then all", (PrincipalFilters(), *low_rank, LowRankPlusSparse())),
    ]


class Drafted(Protocol):
    """A network that is planned."""

    @property
    def plan(self) -> Plan: ...


P = TypeVar("P", bound=Drafted)
R = TypeVar("R")


@dataclass(frozen=True)
class Contest(Generic[P, R]):
    """How arms become networks, and how these are compared."""

    # The plan of an arm, which may be refused where it loses more than the trial lets it. A :class:`SpectrimError`
    # refuses it.
    planned: Callable[[Arm, Judging], P]
    made: Callable[[Arm, P], R]  # the network of a plan, with the same error
    judged: Callable[[R], Verdict]  # what it lost
    size: Callable[[R], float] = lambda _: 0.0  # of networks that lost the same, the one with the smallest is taken
    enough: Callable[[R], bool] = lambda _: False  # whether a network is so good that no other one is made

    def best(
        self, arms: Sequence[Arm], *, seconds: float | None = None, spent: float = 0.0, progress: Progress = silent
    ) -> tuple[R, tuple[Tried, ...]]:
        """The network that loses least of those that are made; of those that lose no more by chance, the simplest.

        Parameters
        ----------
        arms
            The simplest first.
        seconds
            After which nothing further is begun, and no plan is looked for any longer; the first that can be carried
            out always is.
        spent
            Seconds of these that are over already.

        Raises
        ------
        SpectrimError
            If all are refused: of the arm that comes closest to the budget where it cannot be met, else of the first.
        """
        clock = _Clock(math.inf if seconds is None else float(seconds), spent)
        tried, drafts, faults = self._plans(arms, clock, progress)
        finished: dict[str, R] = {}
        order = sorted(drafts, key=lambda name: drafts[name].plan.loss)
        by_name = {arm.name: arm for arm in arms}
        for number, name in enumerate(order):
            if note := self._passed_over(name, drafts, finished, clock):
                tried[name] = replace(tried[name], note=note)
                continue
            progress(f"{name}: carry out", number, len(order))
            start = time.monotonic()
            try:
                finished[name] = self.made(by_name[name], drafts[name])
                verdict = self.judged(finished[name])
            except SpectrimError as error:
                finished.pop(name, None)
                faults[name] = error
                tried[name] = replace(tried[name], note=f"refused, {error.brief}")
            else:
                note = "" if math.isfinite(verdict.loss) else "its metric is infinite"
                tried[name] = replace(tried[name], loss=verdict.loss, standard_error=verdict.standard_error, note=note)
            took = tried[name].seconds + time.monotonic() - start
            tried[name] = replace(tried[name], seconds=took)
            log.info("arm %s", tried[name])
            if name in finished and self.enough(finished[name]):
                return finished[name], _told(tried, name, "not needed: another network is good enough")
        if not finished:
            raise _telling([faults[arm.name] for arm in arms if arm.name in faults])
        return self._chosen(finished, tried)

    def _plans(
        self, arms: Sequence[Arm], clock: _Clock, progress: Progress
    ) -> tuple[dict[str, Tried], dict[str, P], dict[str, SpectrimError]]:
        """What is planned, by the name of the arm."""
        tried: dict[str, Tried] = {}
        drafts: dict[str, P] = {}
        faults: dict[str, SpectrimError] = {}
        for number, arm in enumerate(arms):
            bar, other = _bar({name: draft.plan for name, draft in drafts.items()})
            trial = Judging(most=bar, over=functools.partial(clock.over, _PLANNING), needed=not drafts)
            outcome = Tried(arm.name)
            if not trial.needed and trial.over():
                tried[arm.name] = replace(outcome, note=clock.note)
                continue
            progress(f"{arm.name}: plan", number, len(arms))
            start = time.monotonic()
            try:
                draft = drafts[arm.name] = self.planned(arm, trial)
            except OutOfTimeError:
                outcome = replace(outcome, note=clock.note)
            except TooMuchLostError as error:
                outcome = replace(outcome, note=_hopeless(error.loss, drafts[other].plan, other), predicted=error.loss)
            except SpectrimError as error:
                faults[arm.name] = error
                outcome = replace(outcome, note=f"refused, {error.brief}")
            else:
                plan = draft.plan
                outcome = replace(outcome, predicted=plan.loss, costs=plan.costs, dense_costs=plan.dense_costs)
            tried[arm.name] = replace(outcome, seconds=time.monotonic() - start)
        if not drafts:
            raise _telling(list(faults.values()))
        return tried, drafts, faults

    def _passed_over(self, name: str, drafts: Mapping[str, P], finished: Mapping[str, R], clock: _Clock) -> str:
        """Why a plan is not carried out; empty if it is."""
        if not finished:
            return ""
        plan = drafts[name].plan
        for other in finished:
            if _changes(plan) == _changes(drafts[other].plan):
                return f"skipped: the same plan as {other}"
        bar, other = _bar({other: drafts[other].plan for other in finished})
        if plan.loss > bar:
            return _hopeless(plan.loss, drafts[other].plan, other)
        return clock.note if clock.over() else ""

    def _chosen(self, finished: Mapping[str, R], tried: dict[str, Tried]) -> tuple[R, tuple[Tried, ...]]:
        """The network that lost least, or a simpler one that lost no more by chance."""
        least = min(finished, key=lambda name: tried[name].loss)
        verdict = self.judged(finished[least])
        # In the order of the arms, so that of equals the first is taken.
        like = [name for name in tried if name in finished and self.judged(finished[name]).like(verdict)]
        name = min(like or [least], key=lambda name: self.size(finished[name]))
        if name != least and tried[name].loss > tried[least].loss:
            why = f"{least} lost less, within the standard error, and is not simpler"
            tried[name] = replace(tried[name], note=why)
        return finished[name], _told(tried, name, "")


def _telling(faults: Sequence[SpectrimError]) -> SpectrimError:
    """What tells most of why there is no network: how low a budget may be, of those that say so the lowest."""
    low = [fault for fault in faults if isinstance(fault, InfeasibleBudgetError)]
    return min(low, key=lambda fault: fault.lowest / max(fault.budget, 1e-300), default=faults[0])


def not_tried(seconds: float) -> str:
    """What is said of an arm for which no time was left, of the seconds that were asked for."""
    return f"not tried, as {seconds:g} s were over"


@dataclass
class _Clock:
    """When a search is to end."""

    seconds: float
    spent: float = 0.0
    began: float = field(default_factory=lambda: time.monotonic())

    def over(self, part: float = 1.0) -> bool:
        """Whether a part of the time that there was is over."""
        return time.monotonic() - self.began >= part * (self.seconds - self.spent)

    @property
    def note(self) -> str:
        return not_tried(self.seconds)


def _bar(plans: Mapping[str, Plan]) -> tuple[float, str]:
    """The predicted loss above which a plan is hopeless beside these, and the name of the one that sets it."""

    def removes(plan: Plan) -> bool:
        return any(entry.of_channels and not entry.choice.is_dense for entry in plan)

    bars = ((plan.loss * HOPELESS, name) for name, plan in plans.items() if not removes(plan))
    return min(bars, default=(math.inf, ""))


def _hopeless(loss: float, plan: Plan, other: str) -> str:
    """What is said of a plan that is predicted to lose too much beside another one."""
    if not plan.loss:
        return f"skipped: {other} is predicted to lose nothing"
    return f"skipped: its table predicts {loss / plan.loss:.2g} times the loss of {other}"


def _changes(plan: Plan) -> frozenset[tuple[str, str, str]]:
    """What a plan changes."""
    return frozenset((e.site, e.choice.method, repr(e.choice)) for e in plan if not e.choice.is_dense)


def _told(tried: Mapping[str, Tried], name: str, rest: str) -> tuple[Tried, ...]:
    """What became of all, in the order they were planned in, where one was chosen."""
    left = {
        each: outcome if outcome.note or math.isfinite(outcome.loss) else replace(outcome, note=rest)
        for each, outcome in tried.items()
    }
    left[name] = replace(left[name], chosen=True)
    return tuple(left.values())
