"""Several compressed networks beside the dense one: a column a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spectrim.network.printing import Grid, Printed, cost_name, count
from spectrim.report.comparison import Comparison, Measure
from spectrim.selection.budget import UNITS
from spectrim.selection.plan import Plan

if TYPE_CHECKING:
    from spectrim.nn.agreement import Agreement


@dataclass(frozen=True)
class SideBySide(Printed):
    """Comparisons of several networks with one dense network. ``print`` and notebooks show a table.

    Attributes
    ----------
    comparisons
        By the network's name. Lines that a network lacks are left empty.
    agreements
        How far outputs are from the dense network's, by the network's name, as :func:`spectrim.agreement` tells it;
        None where outputs cannot be compared.
    """

    comparisons: Mapping[str, Comparison]
    agreements: Mapping[str, Agreement | None] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Comparison:
        if name not in self.comparisons:
            raise KeyError(f"no network {name!r}; there are {', '.join(map(repr, self.comparisons))}")
        return self.comparisons[name]

    def __len__(self) -> int:
        return len(self.comparisons)

    def _metrics(self) -> list[Measure]:
        """One line of each metric, which knows the dense network's value."""
        rows = [row for comparison in self.comparisons.values() for row in comparison.rows]
        return list({row.metric: row for row in reversed(rows)}.values())[::-1]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and cells for people: a line a metric."""
        lines = []
        for known in self._metrics():
            cells = [known.show(known.dense)]
            for comparison in self.comparisons.values():
                rows = [row for row in comparison.rows if row.metric == known.metric]
                cells.append("".join(f"{row.show(row.compressed)} ({row.change})" for row in rows))
            lines.append([known.metric, *cells])
        agreed = agreement_lines([self.agreements.get(name) for name in self.comparisons])
        return ["", ">dense", *(f">{name}" for name in self.comparisons)], [*agreed, *lines]

    def rows(self) -> list[dict[str, Any]]:
        """The networks as plain values, one dict a network.

        Returns
        -------
        list of dict
            ``name``; each metric by its name and, with ``_dense``, of the dense network, in its own unit, None where it
            is not known; ``top1``, ``error`` and ``samples`` of the agreement.
        """
        rows = []
        for name, comparison in self.comparisons.items():
            row: dict[str, Any] = {"name": name}
            for known in self._metrics():
                there = known.metric in comparison
                row[known.metric] = comparison[known.metric].compressed if there else None
                row[f"{known.metric}_dense"] = comparison[known.metric].dense if there else None
            agreed = self.agreements.get(name)
            row |= {part: getattr(agreed, part, None) for part in ("top1", "error", "samples")}
            rows.append(row)
        return rows

    _records = rows

    def _grid(self) -> Grid:
        heads, lines = self.table()
        return Grid(heads, lines, notes=self.sentences)

    @property
    def sentences(self) -> tuple[str, ...]:
        """On what outputs were compared."""
        on: dict[int, list[str]] = {}
        for name, each in self.agreements.items():
            if each is not None:
                on.setdefault(each.samples, []).append(name)
        said = [count(n, "sample") + (f" ({', '.join(names)})" if len(on) > 1 else "") for n, names in on.items()]
        return (f"outputs are compared with the dense network's on {' and '.join(said)}",) if on else ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values. Numbers are in the unit of each row, not rounded."""
        return {name: comparison.to_dict() for name, comparison in self.comparisons.items()}

    def __repr__(self) -> str:
        return f"SideBySide({count(len(self), 'network')}: {', '.join(self.comparisons)})"


def agreement_lines(agreements: Sequence[Agreement | None]) -> Iterator[list[str]]:
    """Cells of a line a measure of how far outputs are from the dense network's: its name, dense, and each network."""
    for measure, dense, part in (("same class first", 1.0, "top1"), ("outputs differ", 0.0, "error")):
        shares = [getattr(each, part, None) for each in agreements]
        if any(share is not None for share in shares):
            yield [measure, *("" if share is None else f"{100 * share:.2f} %" for share in (dense, *shares))]


def planned(plan: Plan) -> Comparison:
    """What a plan says of its network: costs that were counted when it was made, or measured."""
    # Bytes are those of the weights alone, but where they are limited: then the header of the file counts.
    names = {} if "bytes" in plan.budget else {"bytes": "weights"}
    return Comparison(
        tuple(
            Measure(f"{names.get(cost, cost_name(cost))} (planned)", UNITS.get(cost, ""), dense, plan.costs[cost])
            for cost, dense in plan.dense_costs.items()
            if cost in plan.costs
        )
    )
