"""What sets of methods have on offer in a network that is prepared: one table a method, whoever asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from spectrim.methods import Method
from spectrim.network.groups import group
from spectrim.network.sites import Sites
from spectrim.pipeline.making import Making
from spectrim.preparation import Prepared
from spectrim.search.arms import Arm
from spectrim.search.floors import Floor
from spectrim.search.remaining import asked_once
from spectrim.search.stepwise import BY_TABLE, Judging
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates
from spectrim.tables import default_methods, merged, parted, tabulate


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

    def check(self, arm: Arm, budget: Budget) -> None:
        """Raise InfeasibleBudgetError where not even what costs least in an arm meets the budget; nothing is fitted."""
        latency = self.prepared.latency
        facts = {} if latency is None else latency.facts()
        if arm.name not in self._floors:
            self._floors[arm.name] = Floor(self.sites(arm), self.methods(arm), facts)
        self._floors[arm.name].check(budget)

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
