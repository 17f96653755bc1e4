"""How networks are made, whatever their budget: what methods have on offer, what is planned, what the clock says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from spectrim.cost.counted import Cost
from spectrim.cost.latency import Latency
from spectrim.methods import Method
from spectrim.network.groups import group
from spectrim.network.sites import Sites
from spectrim.nn.timing import Speed, Timing
from spectrim.preparation import Prepared
from spectrim.progress import Progress, silent
from spectrim.search.arms import Arm
from spectrim.search.floors import Floor
from spectrim.search.measured import Trials, is_late, meet_latency, put_back, surely_timed
from spectrim.search.remaining import asked_once
from spectrim.search.stepwise import BY_TABLE, Judging
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import Selector, exact
from spectrim.tables import default_methods, merged, parted, tabulate


@dataclass(frozen=True)
class Making:
    """What a caller says but the network, its data and the budget; each as for :func:`spectrim.compress`."""

    # What may be chosen; where sets of them compete, those of each set take their place.
    methods: Sequence[Method] | None = None
    reconstruct: bool = True
    guard: bool = False
    costs: Mapping[str, Cost] | None = None
    selector: Selector = exact
    forward: Callable[[nn.Module, Any], Any] | None = None
    progress: Progress = silent

    def floor(self, known: Prepared) -> Floor:
        """The least that the methods can leave of a network that is prepared."""
        facts = {} if known.latency is None else known.latency.facts()
        return Floor(known.sites, default_methods(known.sites) if self.methods is None else self.methods, facts)

    def priced(self, known: Prepared) -> dict[str, Any]:
        """How choices for a network that is prepared are priced and told of, for :func:`spectrim.tabulate`."""
        return {
            "latency": known.latency, "dense_latency": known.dense_latency, "costs": self.costs, "guard": self.guard,
            "progress": self.progress,
        }  # fmt: skip


@dataclass
class Tables:
    """What methods offer, tabulated once for all arms that have them."""

    prepared: Prepared  # with sites that share nothing
    arms: Sequence[Arm]  # all that compete
    making: Making  # how they are made
    _known: dict[tuple[bool, str], Candidates] = field(default_factory=dict, init=False)
    _floors: dict[str, Floor] = field(default_factory=dict, init=False)

    @cached_property
    def _grouped(self) -> Sites:
        return group(self.prepared.sites)

    def sites(self, arm: Arm) -> Sites:
        """The sites of an arm, with groups if its layers may share factors."""
        return self._grouped if arm.groups else self.prepared.sites

    def methods(self, arm: Arm) -> list[Method]:
        """What an arm has on offer."""
        return default_methods(self.sites(arm)) if arm.methods is None else list(arm.methods)

    def floor(self, arm: Arm) -> Floor:
        """The least that an arm can leave of the network."""
        if arm.name not in self._floors:
            making = replace(self.making, methods=self.methods(arm))
            self._floors[arm.name] = making.floor(replace(self.prepared, sites=self.sites(arm)))
        return self._floors[arm.name]

    def of(self, arm: Arm, trial: Judging = BY_TABLE) -> Candidates:
        """The table of an arm. Raises OutOfTimeError where the trial's time is over first."""
        known = {name for grouped, name in self._known if grouped == arm.groups}
        wanted = {method.name: method for method in self.methods(arm)}
        # Layers are measured together, so that their times are comparable.
        others = self.arms if self.prepared.latency is not None else ()
        more = [m for other in others if other.groups == arm.groups for m in self.methods(other)]
        missing = {m.name: m for m in (*wanted.values(), *more) if m.name not in known}
        if missing:
            priced = self.making.priced(self.prepared)
            priced["progress"] = trial.ending(priced["progress"])
            curve = asked_once(self.prepared.curves, {})
            table = tabulate(self.sites(arm), list(missing.values()), curve=curve, **priced)
            self._known |= {(arm.groups, name): parted(table, name) for name in missing}
        return merged([self._known[arm.groups, name] for name in wanted])


# A share of the dense time above the share of its MACs that a user is told.
_APART = 0.25


@dataclass(frozen=True)
class Draft:
    """A network that is planned, and not carried out yet."""

    # The plan, the table it was selected from, and the sites that both are about.
    plan: Plan
    table: Candidates
    sites: Sites
    budget: Budget  # as it is met: of a limit in bytes the number
    making: Making  # how it was planned, and is carried out
    again: Callable[[Candidates, Budget], Plan]  # selects from the table under another budget
    file: float | None = None  # bytes of the dense network's file, if bytes are limited


def met(
    model: nn.Module, draft: Draft, example: Any, latency: Latency
) -> tuple[Plan, Mapping[str, Timing], tuple[str, ...]]:
    """The plan of a network that meets its limits by the clock, its times beside dense, and what is said of them.

    Where time is limited or guarded, layers that lose time in the finished network are dense again.

    Raises
    ------
    SlowerError
        If the network is slower than dense, and may not be: under ``guard``, and where it misses a limit on its time.
    """
    budget, trials = draft.budget, Trials(model, draft.sites, example, latency, draft.making.methods)

    def correct(table: Candidates, plan: Plan) -> tuple[Plan, Mapping[str, Timing]]:
        return meet_latency(trials, table, plan, budget, selector=draft.again)

    def again(names: Sequence[str]) -> tuple[Plan, Mapping[str, Timing]]:
        table = draft.table.dense_at(names)
        return correct(table, draft.again(table, budget))

    plan, measured = correct(draft.table, draft.plan)
    said: tuple[str, ...] = ()
    if draft.making.guard or budget.latency is not None:
        plan, measured, restored = put_back(trials, plan, measured, again)
        said = tuple(restored.sentences)
    if draft.making.guard or is_late(plan, measured):
        measured = surely_timed(trials, plan, measured)
    return plan, measured, (*said, *_said_of_time(plan, measured))


def _said_of_time(plan: Plan, measured: Mapping[str, Timing]) -> Iterator[str]:
    """What a user should know of measured times."""
    dense, small = measured["dense"], measured["compressed"]
    if (speed := Speed.of(dense, small)).differs and speed.ratio < 1:
        yield f"the compressed model is SLOWER than dense: {small.quiet:.3f} ms against {dense.quiet:.3f} ms"
    runtime = plan.facts.get("runtime", "eager")
    if "macs" in plan.costs and 1 / speed.high > plan.costs["macs"] / plan.dense_costs["macs"] + _APART:
        share = plan.costs["macs"] / plan.dense_costs["macs"]
        yield (
            f"MACs and milliseconds disagree: {share:.0%} of the MACs take {small.quiet / dense.quiet:.0%} of the time "
            f"in {runtime} at batch {plan.facts.get('batch', 1)}"
            f"{'' if 'latency' in plan.budget else '; a budget such as latency=60% limits the time'}"
        )
