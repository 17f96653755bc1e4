"""Plans and tables as people read them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from spectrim.network.printing import (
    MOST,
    Grid,
    amount,
    change,
    cost_name,
    count,
    folded,
    legend,
    listed,
    percent,
    reasons,
    share,
    tail,
    total,
)
from spectrim.selection.candidates import Candidates, Row, printed_costs
from spectrim.selection.plan import Entry, Plan

# Losses that a printed table tells what remains at.
_LOSSES = (0.01, 0.05)
_NAME = 32  # columns of a layer's name beside its choice
_HEADER = [
    (
        "(all else)",
        "holds the header of the file, too, which tells of the layers that are new and of the plan, at its largest: "
        "the file may be a KiB or two smaller",
    )
]
_LOST = {
    "output energy": "share of the energy of a layer's outputs, around their mean, on the calibration samples",
    "weighted output energy": "share of the energy of a layer's outputs, weighed by what they do to the network's",
    "weight energy": "share of a layer's squared weights",
}


def _lost(unit: str) -> list[tuple[str, str]]:
    """What errors of this unit are a share of."""
    return [("lost", _LOST.get(unit, f"share of {unit}"))] if unit else []


def _heads(costs: Sequence[str]) -> list[str]:
    return [f">{cost_name(cost)}" for cost in costs]


@dataclass(frozen=True)
class _Line:
    """One line of a printed plan."""

    name: str
    choice: str
    costs: Mapping[str, float]
    dense_costs: Mapping[str, float]
    lost: str = ""

    @classmethod
    def of(cls, entry: Entry) -> _Line:
        dense = entry.choice.is_dense
        lost = "" if dense else percent(entry.error)
        return cls(tail(entry.site, _NAME), str(entry.choice), entry.costs, entry.dense_costs, lost)

    @classmethod
    def together(cls, where: str, lines: Sequence[_Line]) -> _Line:
        """The lines that a long plan leaves out, as one."""
        costs, dense = (
            {cost: sum(each.get(cost, 0.0) for each in of) for cost in of[0]}
            for of in ([line.costs for line in lines], [line.dense_costs for line in lines])
        )
        return cls(f"... {len(lines):,} more", f"see {where}", costs, dense)

    def cells(self, shown: Sequence[str]) -> list[str]:
        costs = [change(cost, self.dense_costs.get(cost, 0.0), self.costs.get(cost, 0.0)) for cost in shown]
        return [self.name, self.choice, self.lost, *costs]


def plan_grid(plan: Plan, most: int = MOST, where: str = "plan.rows()") -> Grid:
    """A plan with a line an entry, at most so many, and the whole network beneath; ``where`` tells all of it."""
    shown = plan.printed_costs
    lines = folded([_Line.of(entry) for entry in plan], functools.partial(_Line.together, where), most)
    rest = _Line("(all else)", "", _beside(plan, dense=False), _beside(plan, dense=True))
    if any(rest.dense_costs[cost] or rest.costs[cost] for cost in shown):
        lines.append(rest)
    whole = _Line("whole network", "", plan.costs, plan.dense_costs)
    grown = "bytes" in shown and rest.costs["bytes"] > rest.dense_costs["bytes"]
    left = ["of dense", "", "", *(share(plan.costs[cost], plan.dense_costs[cost]) for cost in shown)]
    layers = sum(len(entry.sites) for entry in plan if not entry.of_channels)
    title = [f"{plan.changed:,} of {count(layers, 'layer')} changed"]
    title += [total(cost, plan.dense_costs[cost], plan.costs[cost]) for cost in shown[:1]]
    return Grid(
        ["layer", "choice", ">lost", *_heads(shown)],
        [line.cells(shown) for line in lines],
        [whole.cells(shown), left],
        title="; ".join(title),
        notes=tuple(_plan_notes(plan, where)),
        words=[*(_lost(plan.unit) if plan.changed else []), *legend(line.choice for line in lines), *_HEADER[:grown]],
    )


def _beside(plan: Plan, *, dense: bool) -> dict[str, float]:
    """What a network costs beside the entries; what is rounding is nothing."""
    remainder = {}
    for cost, whole in (plan.dense_costs if dense else plan.costs).items():
        rest = whole - sum((e.dense_costs if dense else e.costs).get(cost, 0.0) for e in plan)
        remainder[cost] = rest if abs(rest) > 1e-9 * whole else 0.0
    return remainder


def _plan_notes(plan: Plan, where: str) -> Iterator[str]:
    """What stands beneath a printed plan."""
    limits = ", ".join(f"{cost_name(cost)} <= {amount(cost, limit)}" for cost, limit in plan.budget.items())
    chosen = f"chosen by {plan.selector}" if plan.selector else ""
    if plan.bound is not None and plan.loss > 0:
        gap = max(0.0, 1 - plan.bound / plan.loss)
        less = "nothing within the budget" if gap < 1e-6 else f"no other choice, by more than {100 * gap:.2g} %,"
        chosen += f": proven that {less} loses less in all"
    if limits or chosen:
        yield "; ".join(part for part in (limits and f"budget: {limits}", chosen) if part)
    groups = [entry for entry in plan if entry.members]
    for entry in groups[:5]:
        yield f"{tail(entry.site)}: {listed(entry.members, 4)}"
    if len(groups) > 5:
        yield f"{len(groups) - 5} more groups, see {where}"
    yield from reasons(((each.name, each.kind, each.reason) for each in plan.skipped), where)


def row_grid(row: Row) -> Grid:
    """The options of one site that no other one beats."""
    shown = printed_costs(row.dense.costs)
    main, worth, dense = shown[0], row.worth(shown[0]), row.dense.costs
    rows = [
        [
            str(option.choice),
            option.choice.method,
            "" if option.choice.is_dense else percent(option.error),
            *(amount(cost, option.costs[cost]) for cost in shown),
            share(option.costs[main], dense[main]),
        ]
        for option in worth
    ]
    beaten = len(row.options) - len(worth)
    name = cost_name(main)
    notes = [f"not shown: {count(beaten, 'choice')} that others beat both in what is lost and in {name}"]
    return Grid(
        ["choice", "method", ">lost", *_heads(shown), f">{name} left"],
        folded(rows, lambda rest: [f"({len(rest)} more, see row.options)", *[""] * (3 + len(shown))]),
        title=f"{row.site} ({row.kind}): {count(len(row.options), 'choice')}",
        notes=notes if beaten else [],
        words=legend(cells[0] for cells in rows),
    )


def table_grid(table: Candidates) -> Grid:
    """What could be chosen, a line a layer or group: what it costs, and what remains where little may be lost."""
    shown = printed_costs(table.costs)
    main = shown[0]

    def line(name: str, kind: str, choices: str, costs: Mapping[str, float], left: Sequence[str]) -> list[str]:
        return [name, kind, choices, *(amount(cost, costs[cost]) for cost in shown), *left]

    def more(rows: Sequence[list[str]]) -> list[str]:
        return ["...", f"({len(rows):,} more)", *[""] * (len(rows[0]) - 2)]

    none = [""] * len(_LOSSES)
    lines = []
    for row in table:
        left = [share(row.left(main, lost), 1.0) for lost in _LOSSES] if len(row.options) > 1 else none
        lines.append(line(tail(row.site), row.kind, str(len(row.options) - 1), row.dense.costs, left))
    lines = folded(lines, more)
    # Coupled channels cost something in layers that have rows of their own.
    layers = [row for row in table.singles if not row.of_channels]
    rest = {cost: table.dense[cost] - sum(row.dense.costs[cost] for row in layers) for cost in shown}
    if any(abs(rest[cost]) > 1e-9 * table.dense[cost] for cost in shown):
        lines.append(line("(all else)", "", "", rest, none))
    return Grid(
        ["layer", "kind", ">choices", *_heads(shown), *(f">at {100 * lost:g} % lost" for lost in _LOSSES)],
        lines,
        [line("whole network", "", "", table.dense, none)],
        title=f"{sum(len(row.options) - 1 for row in table):,} choices for {count(len(layers), 'layer')}",
        notes=tuple(_table_notes(table)),
        words=[
            ("at n % lost", f"what remains of the layer's {cost_name(main)} where it may lose so much"),
            *_lost(table.unit),
        ],
    )


def _table_notes(table: Candidates) -> Iterator[str]:
    """What stands beneath a printed table."""
    groups = len(table) - len(table.singles)
    if groups:
        yield f"{count(groups, 'row')} of groups that may share factors, each on offer in place of its layers"
    yield "print(table[name]) shows the choices of a layer, table.rows() gives all"
    yield from reasons(((each.name, each.kind, each.reason) for each in table.skipped), "table.skipped")
