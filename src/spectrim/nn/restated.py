"""A plan that was edited, with the costs of the choices that it has now."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from spectrim.cost import counted
from spectrim.cost.counted import Cost
from spectrim.cost.whole import Layered, Network
from spectrim.network.choice import Choice
from spectrim.network.sites import Sites
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan

_TELLING = ("parameters", "macs")  # what is counted alike wherever a plan was made


def restated(
    plan: Plan,
    sites: Sites,
    methods: Sequence[Layered],
    table: Candidates | None = None,
    costs: Mapping[str, Cost] | None = None,
) -> tuple[Plan, tuple[str, ...]]:
    """A plan that says what its choices cost, and what is to be said of the one that was given.

    A plan whose choices, and whose dense network, cost what it says is returned as it is, and so is one that does not
    fit: carrying it out says why. Of one that was edited, what nothing counts here, as milliseconds, is left out. What
    new choices lose is told as the ``table`` has it.
    """
    groups = MappingProxyType({entry.site: entry.members for entry in plan if entry.members})
    try:
        network = Network(dataclasses.replace(sites, groups=groups), counted.known(sites, costs), methods)
        offers = () if table is None else table.rows
        return _restated(plan, network, {(row.site, o.choice): o.error for row in offers for o in row.options})
    except (KeyError, ValueError):
        return plan, ()


def _restated(
    plan: Plan, network: Network, offered: Mapping[tuple[str, Choice], float]
) -> tuple[Plan, tuple[str, ...]]:
    picks = {entry.site: entry.choice for entry in plan if not entry.choice.is_dense}
    total, dense_total = network.cost(picks), network.cost()
    wrong, dense_wrong = _differing(plan.costs, total), _differing(plan.dense_costs, dense_total)
    if not wrong and not dense_wrong:
        return plan, ()
    entries, unknown, why = [], [], "it was edited, or made for other inputs"
    for entry in plan:
        now = {} if entry.of_channels else network.counted(entry.site, picks)
        error = entry.error
        if _differing(entry.costs, now):
            error = offered.get((entry.site, entry.choice), error)
            unknown += [] if (entry.site, entry.choice) in offered else [entry.site]
        dense = network.counted(entry.site) if now else entry.dense_costs
        there, here = (costs.get("parameters", 0.0) for costs in (entry.dense_costs, dense))
        if there and not _same(there, here):
            other = f"in which {entry.site!r} has {there:,.0f} parameters and not {here:,.0f}"
            why = f"it was made for another network, {other}"
        entries.append(dataclasses.replace(entry, costs=now or entry.costs, dense_costs=dense, error=error))
    told = [
        *((name, plan.costs, ", its choices come to", total) for name in wrong),
        *((name, plan.dense_costs, " of its dense network, this one has", dense_total) for name in dense_wrong),
    ]
    notes = [
        f"the plan said {said[name]:,.0f} {name}{what} {now[name]:,.0f}: {why}, and what is told here was counted anew"
        for name, said, what, now in told
    ]
    if unknown:
        notes.append(f"what {', '.join(unknown[:3])} loses is not known: told is what the plan says, which was edited")
    return dataclasses.replace(plan, entries=tuple(entries), costs=total, dense_costs=dense_total), tuple(notes)


def _differing(told: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """Costs of which something else is told than was counted."""
    return [name for name in _TELLING if name in now and not _same(told.get(name, now[name]), now[name])]


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=0.5)
