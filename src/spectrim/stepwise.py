"""Plans that remove channels: costs do not add up there, so they are made in a few steps toward the budget.

A layer costs what its inputs times its outputs cost, and a removal may cut both. A table can only say what each removal
saves by itself. Every step therefore goes a part of the way under such a table, in which the other methods are on offer
too, carries out the removals it chose on the sites (in closed form, :mod:`spectrim.narrowing`), and makes the next table of
what is left. What the network really costs is counted from the layers as they would be, and the last step meets the
budget in that count. The other methods' choices are made last, for the layers that remain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spectrim import costs as counted
from spectrim.api import Progress, tabulate
from spectrim.budget import UNITS, Budget
from spectrim.coupling import Coupling
from spectrim.errors import InfeasibleBudgetError
from spectrim.factors import KeptChannels
from spectrim.latency import Latency
from spectrim.methods import Method
from spectrim.narrowing import costs, narrowed, specs
from spectrim.plan import DENSE, Candidates, Choice, Entry, Plan, Row
from spectrim.selectors import exact, select
from spectrim.sites import Sites

Costs = dict[str, float]
Selector = Callable[[Candidates, Budget], Plan]

# Halvings of the interval in which the limit of a step's table lies.
_HALVINGS = 7
_SLACK = 1e-9


def select_in_steps(
    sites: Sites,
    methods: Sequence[Method],
    budget: Budget,
    *,
    steps: int = 4,
    selector: Selector = exact,
    latency: Latency | None = None,
    dense_latency: float | None = None,
    guard: bool = False,
    progress: Progress | None = None,
) -> tuple[Plan, Candidates]:
    """Choose channels to remove, and what to do with the layers that remain.

    Parameters
    ----------
    sites
        Coupled (:func:`spectrim.couple`) and calibrated.
    methods
        At least one that removes channels; others compete with it in every step.
    budget
        For the whole network.
    steps
        Tables on the way. One is enough, and taken, where no layer loses channels on both sides.
    latency, dense_latency, guard
        As for :func:`spectrim.tabulate`.

    Returns
    -------
    plan, table
        A plan for the dense network, and the first table. The plan's ``facts`` hold the number of steps.

    Raises
    ------
    InfeasibleBudgetError
        If the budget cannot be met; carries the lowest cost that the last table reaches.
    """
    removers = [method for method in methods if method.removes_channels]
    others = [method for method in methods if not method.removes_channels]
    count = _Count(sites, methods, latency, dense_latency)
    dense = count.of(sites)
    limits = budget.limits(dense)
    steps = steps if others or _shares_layers(sites.couplings) else 1
    state = _State.start(sites)
    first: Candidates | None = None
    for step in range(steps):
        table = tabulate(
            state.sites, methods, latency=latency, dense_latency=dense_latency, guard=guard, progress=progress
        )
        first = first or table
        now = count.of(state.sites)
        # Equal ratios from what it costs now to what it may cost.
        share = 1 / (steps - step)
        goals = {c: min(now[c], now[c] * (limits[c] / now[c]) ** share) for c in limits}
        picks = _within(table, goals, selector, lambda plan: count.planned(state.sites, plan))
        if step == steps - 1 and not others:
            picks = _spent(table, picks, goals, state.sites, count)
        state = state.after(picks, table)
    assert first is not None
    plan = _finished(state, others, budget, limits, dense, count, selector, latency, dense_latency, guard)
    records = {method.name: method.record() for method in removers}
    name = getattr(selector, "__name__", str(selector))
    return (
        dataclasses.replace(
            plan,
            selector=f"{name}, {steps} step{'s' if steps > 1 else ''}",
            methods={**plan.methods, **{key: records[key] for key in state.used(records)}},
            facts={**plan.facts, "steps": steps},
            unit=first.unit,
        ),
        first,
    )


@dataclass(eq=False)
class _Count:
    """What the network really costs, with channels removed and layers replaced."""

    sites: Sites
    methods: Sequence[Method]
    latency: Latency | None
    dense_latency: float | None
    functions: dict[str, counted.Cost] = field(init=False)
    beyond: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.functions = {"parameters": counted.parameters, "bytes": counted.size_bytes}
        if self.sites.seen:
            self.functions["macs"] = counted.macs
        if self.latency is not None:
            self.functions["latency"] = self.latency
            if self.dense_latency is not None:
                # What the layers do not explain stays.
                self.beyond = max(0.0, self.dense_latency - costs(self.sites, {}, self.functions)["latency"])

    def of(self, sites: Sites, numbers: Mapping[str, int] | None = None) -> Costs:
        found = costs(sites, numbers or {}, self.functions)
        if "latency" in found:
            found["latency"] += self.beyond
        return found

    def planned(self, sites: Sites, plan: Plan) -> Costs:
        """Of a plan made from a table of these sites."""
        numbers = {e.site: len(e.choice["kept"]) for e in plan if e.choice.kind == KeptChannels.kind}
        found = self.of(sites, numbers)
        makers = {method.name: method for method in self.methods}
        left: dict[str, dict[str, int]] = {}
        for coupling in sites.couplings:
            gone = coupling.channels - numbers.get(coupling.name, coupling.channels)
            for side in coupling.sides:
                axes = left.setdefault(side.name, {})
                axes[side.axis] = axes.get(side.axis, side.size) - gone * side.positions.shape[1]
        for entry in plan:
            if entry.choice.is_dense or entry.choice.kind == KeptChannels.kind:
                continue
            site = sites[entry.site]
            layers = tuple(s.narrowed(left[s.name]) if s.name in left else s for s in site.layers)
            after = makers[entry.choice.method].layers(dataclasses.replace(site, layers=layers), entry.choice)
            for name, cost in self.functions.items():
                found[name] += cost(after) - sum(cost((layer,)) for layer in layers)
        return found


@dataclass(frozen=True, eq=False)
class _State:
    """The network on the way: its sites, and which of the dense network's channels they still have."""

    dense: Sites
    sites: Sites
    kept: Mapping[str, tuple[int, ...]]
    choices: Mapping[str, Choice]
    losses: Mapping[str, float]
    scales: Mapping[str, float]

    @classmethod
    def start(cls, sites: Sites) -> _State:
        everything = {c.name: tuple(range(c.channels)) for c in sites.couplings}
        return cls(sites, sites, everything, {}, {}, {})

    def after(self, plan: Plan, table: Candidates) -> _State:
        rows = {row.site: row for row in table.rows}
        taken = {e.site: e for e in plan if e.choice.kind == KeptChannels.kind}
        kept, losses = dict(self.kept), dict(self.losses)
        for name, entry in taken.items():
            kept[name] = tuple(self.kept[name][c] for c in entry.choice["kept"])
            losses[name] = losses.get(name, 0.0) + rows[name].scale * max(entry.error, 0.0)
        scales = self.scales or {row.site: row.scale for row in table.rows}
        choices = {**self.choices, **{name: entry.choice for name, entry in taken.items()}}
        here = {name: entry.choice["kept"] for name, entry in taken.items()}
        return _State(self.dense, narrowed(self.sites, here), kept, choices, losses, scales)

    def used(self, names: Mapping[str, Any]) -> list[str]:
        return [name for name in names if any(choice.method == name for choice in self.choices.values())]

    def entries(self, count: _Count) -> list[Entry]:
        """What was done to the coupled channels, in the dense network's numbers."""
        found = []
        for site in self.dense.coupled():
            assert site.coupling is not None
            coupling = site.coupling
            kept = self.kept[coupling.name]
            choice = DENSE
            if coupling.name in self.choices:
                settings = {"kept": kept, "of": coupling.channels, "sides": coupling.written()}
                choice = Choice(KeptChannels.kind, self.choices[coupling.name].method, settings)
            scale = self.scales.get(coupling.name, 0.0)
            error = self.losses.get(coupling.name, 0.0) / scale if scale > 0 else 0.0
            before, after = (
                {name: float(sum(cost((s,)) for s in specs(site, n))) for name, cost in count.functions.items()}
                for n in (coupling.channels, len(kept))
            )
            found.append(Entry(coupling.name, f"{coupling.channels} channels", choice, error, after, before))
        return found


def _within(table: Candidates, goals: Costs, selector: Selector, real: Callable[[Plan], Costs]) -> Plan:
    """The plan that uses most of the goals, counted as the network really is."""

    def at(scale: float) -> Plan | None:
        try:
            return select(table, _absolute({c: goals[c] * scale for c in goals}), selector)
        except InfeasibleBudgetError:
            return None

    plan = at(1.0)
    if plan is not None and _fits(real(plan), goals):
        return plan
    # A table counts what two removals save in one layer twice, so that its plans cost more than it says.
    low, high, best = 0.0, 1.0, None
    for halving in range(_HALVINGS):
        middle = 0.6 if not halving else (low + high) / 2
        plan = at(middle)
        if plan is not None and not _fits(real(plan), goals):
            high = middle
        else:
            low = middle
            best = plan or best
            if plan is None:
                # Not even the table goes so low.
                low = middle
    if best is None:
        return _cheapest(table, goals, real)
    return best


def _cheapest(table: Candidates, goals: Costs, real: Callable[[Plan], Costs]) -> Plan:
    """The plan that costs least in the table; an error if that is not within the goals."""
    from spectrim.plan import make_plan

    first = next(iter(goals))
    picks = [min(range(len(row.options)), key=lambda k: row.options[k].costs[first]) for row in table.rows]
    plan = make_plan(table, picks, budget=goals, selector="cheapest")
    found = real(plan)
    for cost, limit in goals.items():
        if found[cost] > limit * (1 + _SLACK):
            raise InfeasibleBudgetError(cost, limit, found[cost], table.dense[cost])
    return plan


def _spent(table: Candidates, plan: Plan, goals: Costs, sites: Sites, count: _Count) -> Plan:
    """Give channels back as long as the budget allows, those first that gain most for what they cost."""
    rows = {row.site: row for row in table.rows if row.kind.endswith("channels")}
    picks = {e.site: next(o for o in rows[e.site].options if o.choice == e.choice) for e in plan if e.site in rows}
    numbers = {name: _width(rows[name], option.choice) for name, option in picks.items()}
    while True:
        now = count.of(sites, numbers)
        best: tuple[float, str, Any] | None = None
        for name, option in picks.items():
            for other in rows[name].options:
                width = _width(rows[name], other.choice)
                gain = rows[name].loss(option) - rows[name].loss(other)
                if width <= numbers[name] or gain <= 0:
                    continue
                then = count.of(sites, {**numbers, name: width})
                if not _fits(then, goals):
                    continue
                price = max(sum((then[c] - now[c]) / goals[c] for c in goals), 1e-12)
                if best is None or gain / price > best[0]:
                    best = gain / price, name, other
        if best is None:
            break
        picks[best[1]] = best[2]
        numbers[best[1]] = _width(rows[best[1]], best[2].choice)
    entries = tuple(
        dataclasses.replace(e, choice=picks[e.site].choice, error=float(picks[e.site].error), costs=picks[e.site].costs)
        if e.site in picks
        else e
        for e in plan
    )
    return dataclasses.replace(plan, entries=entries)


def _width(row: Row, choice: Choice) -> int:
    return int(row.kind.split()[0]) if choice.is_dense else len(choice["kept"])


def _finished(
    state: _State,
    others: Sequence[Method],
    budget: Budget,
    limits: Costs,
    dense: Costs,
    count: _Count,
    selector: Selector,
    latency: Latency | None,
    dense_latency: float | None,
    guard: bool,
) -> Plan:
    """The plan of the layers that remain, with the removals before it."""
    table = tabulate(state.sites, others, latency=latency, guard=guard)
    fixed = dict(table.fixed)
    if "latency" in fixed:
        fixed["latency"] += count.beyond
    table = dataclasses.replace(table, fixed=fixed)
    plan = select(table, _absolute(limits), selector)
    removals = state.entries(count)
    shown = [dataclasses.replace(e, dense_costs=_dense_of(e, state.dense, count)) for e in plan]
    return dataclasses.replace(
        plan,
        entries=(*shown, *removals),
        dense_costs=dense,
        budget=limits,
        loss=plan.loss + sum(state.losses.values()),
        bound=None,
    )


def _dense_of(entry: Entry, sites: Sites, count: _Count) -> Costs:
    layers = [spec for name in entry.sites for spec in sites[name].layers]
    return {name: float(sum(cost((spec,)) for spec in layers)) for name, cost in count.functions.items()}


def _fits(found: Mapping[str, float], goals: Mapping[str, float]) -> bool:
    return all(found[c] <= goals[c] * (1 + _SLACK) for c in goals)


def _absolute(limits: Mapping[str, float]) -> Budget:
    """Limits in their units, whatever their size."""
    text = {"parameters": "{:.17g}k", "macs": "{:.17g}k", "bytes": "{:.17g}kb", "latency": "{:.17g}ms"}
    scaled = {c: v if UNITS[c] == "ms" else v / 1e3 for c, v in limits.items()}
    return Budget(**{c: text[c].format(v) for c, v in scaled.items()})


def _shares_layers(couplings: Sequence[Coupling]) -> bool:
    """Whether a layer loses channels of two kinds."""
    touched = [name for c in couplings for name in {side.name for side in c.sides}]
    both = any(len({s.axis for s in c.sides if s.name == side.name}) > 1 for c in couplings for side in c.sides)
    return both or len(touched) != len(set(touched))
