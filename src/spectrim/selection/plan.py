"""Plans: one choice a site, as plain values.

``select`` turns a table of candidates and a budget into a :class:`Plan`, and ``apply`` carries the plan out. A plan is
a small JSON document that can be read, edited, compared and replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from spectrim.errors import PlanError
from spectrim.network.choices import Choice, read_choice
from spectrim.network.files import converted, read_document, record_of, write_text
from spectrim.network.printing import Grid, Printed, count, flat, percent, total
from spectrim.network.skipped import Skipped
from spectrim.selection.candidates import Candidates, printed_costs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERSION = 1
LARGEST = 16 * 2**20
"""Bytes of a plan's text. A plan of a thousand layers has one of them; what is larger is no plan."""


# What a choice loses may be below zero by so much.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Entry:
    """One site of a plan, or one group of sites: what was chosen, what it loses and what it costs.

    Attributes
    ----------
    kind
        What the site is, for people to read.
    members
        The sites of a group, in the order of its factors.
    of_channels
        Whether it is about coupled channels, in place of layers. A plan's file says so by the kind alone.
    """

    site: str
    kind: str
    choice: Choice
    error: float
    costs: Mapping[str, float]
    dense_costs: Mapping[str, float]
    members: tuple[str, ...] = ()
    of_channels: bool = field(default=False, compare=False)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that the choice is for."""
        return self.members or (self.site, *self.choice.others)

    @property
    def narrower(self) -> bool:
        """Whether a layer for which nothing is chosen loses channels."""
        return self.choice.is_dense and self.costs.get("parameters") != self.dense_costs.get("parameters")

    def __str__(self) -> str:
        lost = "" if self.choice.is_dense else f", {percent(self.error)} lost"
        costs = "".join(f"; {total(cost, dense, self.costs[cost])}" for cost, dense in self.dense_costs.items())
        return f"{self.site} ({self.kind}): {self.choice}{lost}{costs}"

    def __repr__(self) -> str:
        return f"Entry({self.site!r}, {str(self.choice)!r}, error={self.error:.4g})"


@dataclass(frozen=True)
class Plan(Printed):
    """One choice a site or group of sites.

    ``print(plan)`` and notebooks show it as a table, :meth:`rows` and :meth:`to_pandas` give all of it. It has
    a length, can be iterated, and is indexed by the name of a site.

    Attributes
    ----------
    entries
        In the network's order; a group stands where its first site does.
    costs, dense_costs
        Of the whole network as planned, and dense.
    budget
        Absolute limits that were asked for.
    unit
        Unit of the errors.
    selector
        Name of the selector.
    loss
        What the selector minimised.
    bound
        A proven lower bound of that loss under the same budget, where the selector has one.
    multipliers
        Loss that one unit of each limited cost is worth, where the selector knows it.
    methods
        How to make the methods again.
    facts
        Device, dtype, threads and batch of measured costs, and library versions.
    skipped
        What was left alone when the plan was made, and why. A plan's file does not hold it.

    Examples
    --------
    >>> print(plan)  # doctest: +SKIP
    >>> plan["layer1.0.conv1"].choice  # doctest: +SKIP
    >>> worst = max(plan.rows(), key=lambda row: row["lost"])  # doctest: +SKIP
    """

    entries: tuple[Entry, ...]
    costs: Mapping[str, float]
    dense_costs: Mapping[str, float]
    budget: Mapping[str, float] = field(default_factory=dict)
    unit: str = ""
    selector: str = ""
    loss: float = 0.0
    bound: float | None = None
    multipliers: Mapping[str, float] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION
    skipped: tuple[Skipped, ...] = field(default=(), compare=False)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        """How many entries there are."""
        return len(self.entries)

    def __contains__(self, site: object) -> bool:
        """Whether there is an entry for a site of this name, for itself or in a group."""
        return any(site in (entry.site, entry, *entry.members) for entry in self.entries)

    def __getitem__(self, site: str) -> Entry:
        for entry in self.entries:
            if entry.site == site or site in entry.members:
                return entry
        raise KeyError(f"no site {site!r} in the plan; there are {', '.join(repr(e.site) for e in self.entries)}")

    def ratio(self, cost: str) -> float:
        """Dense over planned."""
        return self.dense_costs[cost] / self.costs[cost]

    def rows(self) -> list[dict[str, Any]]:
        """The plan as plain values, one dict an entry and one for each thing that was left alone.

        Returns
        -------
        list of dict
            ``layer``, ``kind`` and ``choice`` in words; ``method`` that offered the choice; ``lost``, its relative
            error; ``members``, the layers of a group; each cost by its name and, with ``_dense``, as it was before;
            ``skipped``, why a layer was left alone, else empty. A network's costs are in :attr:`costs`.
        """
        rows: list[dict[str, Any]] = [
            {
                "layer": entry.site, "kind": entry.kind, "choice": str(entry.choice), "method": entry.choice.method,
                "lost": entry.error, "members": list(entry.members), **flat(entry.costs, entry.dense_costs),
                "skipped": "",
            }
            for entry in self
        ]  # fmt: skip
        for each in self.skipped:
            costs = {cost: each.costs.get(cost, 0.0) for cost in self.dense_costs}
            rows.append(
                {
                    "layer": each.name, "kind": each.kind, "choice": "", "method": "", "lost": 0.0, "members": [],
                    **flat(costs, costs), "skipped": each.reason,
                }
            )  # fmt: skip
        return rows

    _records = rows

    def plot(self, cost: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Draw a pair of bars a site: its cost dense and as planned, with the rest of the network last.

        Parameters
        ----------
        cost
            By default the one that the budget limits, or MACs.
        ax
            Axes of matplotlib to draw on; new ones of a new figure if None.

        Raises
        ------
        ModuleNotFoundError
            Without matplotlib.
        ValueError
            For a cost that the plan does not have.
        """
        from spectrim.selection.figures import cost_bars

        return cost_bars(self, cost or self.printed_costs[0], ax=ax)

    @property
    def printed_costs(self) -> list[str]:
        """The costs that the printed table has: limited and measured ones first, at most three."""
        return printed_costs([cost for cost in self.dense_costs if cost in self.costs], self.budget)

    @property
    def changed(self) -> int:
        """How many layers are not as they were: those with another choice than dense, and those that lose channels."""
        return sum(len(e.sites) for e in self if not e.of_channels and (not e.choice.is_dense or e.narrower))

    def _grid(self) -> Grid:
        from spectrim.selection.printed import plan_grid

        return plan_grid(self)

    def __repr__(self) -> str:
        costs = "".join(f", {total(cost, self.dense_costs[cost], self.costs[cost])}" for cost in self.printed_costs[:1])
        return f"Plan({count(len(self), 'site')}, {self.changed:,} changed{costs})"

    def diff(self, other: Plan) -> tuple[tuple[str, Choice | None, Choice | None], ...]:
        """Sites where two plans differ: ``(site, mine, theirs)``, None where a plan does not have the site."""
        mine = {site: e.choice for e in self.entries for site in e.sites}
        theirs = {site: e.choice for e in other.entries for site in e.sites}
        names = list(dict.fromkeys([*mine, *theirs]))
        return tuple((n, mine.get(n), theirs.get(n)) for n in names if mine.get(n) != theirs.get(n))

    def to_json(self, *, lines: bool = True) -> str:
        """The plan as JSON text, in lines or as short as can be; equal plans give equal text."""
        entries = [{**_written(entry), "choice": entry.choice.record()} for entry in self]
        document = {**_written(self), "entries": entries}
        text = msgspec.json.encode(document, order="sorted")
        return (msgspec.json.format(text, indent=1) if lines else text).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a plan.

        Raises
        ------
        PlanError
            If the text is not a plan of a version this library reads; the message says where.
        """
        raw = record_of(text, "a plan", LARGEST)
        # Of a choice this is what all choices have; its kind says the type of the rest.
        plan = converted(raw, cls, "a plan")
        if plan.version != VERSION:
            raise PlanError(f"plan has version {plan.version}; this library reads version {VERSION}")
        for record, known in [(raw, cls), *((entry, Entry) for entry in raw["entries"])]:
            unknown = sorted(set(record) - set(_fields(known)))
            if unknown:
                raise PlanError(f"a plan's {known.__name__.lower()} has no field {unknown[0]!r}")
        for names in ([e.site for e in plan.entries], [site for e in plan.entries for site in e.sites]):
            if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
                raise PlanError(f"a plan names each site once; this one has {twice!r} twice: leave one of them out")
        for whose, costs in [("it", plan.costs), *((repr(e.site), e.costs) for e in plan.entries)]:
            if wrong := next((cost for cost, amount in costs.items() if not amount >= 0), None):
                raise PlanError(f"a plan's costs are at least 0; this one says that {whose} has {costs[wrong]} {wrong}")
        if wrong := next((e for e in plan.entries if not e.error >= -_ROUNDING), None):
            raise PlanError(f"what a choice loses is at least 0; this plan has {wrong.error} for {wrong.site!r}")
        entries = zip(plan.entries, raw["entries"], strict=True)
        return dataclasses.replace(plan, entries=tuple(_entry(entry, record["choice"]) for entry, record in entries))

    def write(self, path: str | Path) -> None:
        """Write the plan's text, whole or not at all.

        Raises
        ------
        OSError
            If the file cannot be written: there is no such folder, or it is full or read-only.
        """
        write_text(path, self.to_json() + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a file that :meth:`write` wrote, or that was written by hand.

        Raises
        ------
        OSError
            If there is no such file.
        PlanError
            As :meth:`from_json`; the message names the file.
        """
        return read_document(path, cls.from_json, LARGEST)


def make_plan(
    candidates: Candidates,
    picks: Sequence[int] | Mapping[int, int],
    *,
    budget: Mapping[str, float],
    selector: str,
    bound: float | None = None,
) -> Plan:
    """A plan from the index of the option picked in each row.

    With groups in the table, ``picks`` maps the numbers of the rows that are chosen, which cover every site once, to
    the indices of their options.
    """
    numbers = picks if isinstance(picks, Mapping) else dict(enumerate(picks))
    order = {row.site: number for number, row in enumerate(candidates.rows)}
    chosen = [(row := candidates.rows[number], row.options[pick]) for number, pick in numbers.items()]
    chosen.sort(key=lambda pair: min(order[site] for site in pair[0].sites))
    covered = [site for row, _ in chosen for site in row.sites]
    if sorted(covered) != sorted(row.site for row in candidates.singles):
        raise ValueError("a plan covers every site once; the picked rows do not")
    entries = tuple(
        Entry(
            row.site, row.kind, option.choice, float(option.error), _plain(option.costs), _plain(row.dense.costs),
            row.members, row.of_channels,
        )
        for row, option in chosen
    )  # fmt: skip
    used = {e.choice.method for e in entries}
    return Plan(
        entries=entries,
        costs=_plain(candidates.total(option for _, option in chosen)),
        dense_costs=_plain(candidates.dense),
        budget=_plain(budget),
        unit=candidates.unit,
        selector=selector,
        loss=float(sum(row.loss(option) for row, option in chosen)),
        bound=None if bound is None else float(bound),
        methods={name: dict(record) for name, record in candidates.methods.items() if name in used},
        facts=dict(candidates.facts),
        skipped=candidates.skipped,
    )


def _fields(known: type[Plan] | type[Entry]) -> tuple[str, ...]:
    """The fields that a file has."""
    return tuple(f.name for f in dataclasses.fields(known) if f.name not in ("of_channels", "skipped"))


def _written(record: Plan | Entry) -> dict[str, Any]:
    return {name: getattr(record, name) for name in _fields(type(record))}


def _entry(entry: Entry, choice: object) -> Entry:
    """An entry from a file, with its choice."""
    try:
        of_channels = entry.kind.endswith((" channels", " heads"))
        return dataclasses.replace(entry, choice=read_choice(choice), of_channels=of_channels)
    except PlanError as error:
        raise PlanError(f"site {entry.site!r}: {error}") from error


def _plain(costs: Mapping[str, float]) -> dict[str, float]:
    """Python floats, which is what plans are written with; a cost may have come as a numpy number."""
    return {name: float(value) for name, value in costs.items()}
