"""Whether sets of methods can meet a budget at all, told by the choices that cost least: nothing is fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from spectrim.cost.counted import known
from spectrim.cost.whole import Network
from spectrim.errors import InfeasibleBudgetError
from spectrim.methods import Method
from spectrim.network.sites import Sites
from spectrim.search.stepwise import check_reachable
from spectrim.selection.budget import Budget, Limit
from spectrim.selection.budgeted import Budgeted
from spectrim.selection.candidates import Candidates
from spectrim.tables import leanest


@dataclass(frozen=True)
class Floor:
    """The least that a set of methods can leave of a network, in the costs that the library counts."""

    sites: Sites  # whose input shapes are known
    methods: Sequence[Method]  # on offer together
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the machine that choices are made for

    @cached_property
    def _table(self) -> Candidates | None:
        return leanest(self.sites, self.methods, known(self.sites), self.facts)

    def is_near(self, limit: Budget, room: float) -> bool:
        """Whether a file may be too large for a limit on bytes, a number, with so much room for what is no number."""
        if self._table is None:
            return False
        left = limit.limits(self._table.dense)["bytes"] - room
        try:
            self.check(Budget(bytes=Limit(max(1.0, left))))
        except InfeasibleBudgetError:
            return True
        return False

    def check(self, budget: Budget) -> None:
        """Raise InfeasibleBudgetError if a limit lies below it.

        Times and costs of the user's own are not bounded: they need not grow with ranks.
        """
        table = self._table
        if table is None:
            return
        part = budget.among(cost for cost, amount in table.dense.items() if amount)
        if part is None:
            return
        if any(method.removes_channels for method in self.methods):
            network = Network(self.sites, known(self.sites), self.methods)
            check_reachable(table, network, part.limits(table.dense))
        else:
            Budgeted.of(table, part)
