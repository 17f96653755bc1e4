"""The table of candidates: what every choice at every site would lose and cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from spectrim.network.choices import Choice
from spectrim.network.skipped import Skipped


@dataclass(frozen=True)
class Option:
    """A row of the table: a choice, what it loses and what it costs.

    ``error`` is relative: the fraction of the site's energy lost. ``costs`` are the site's, in the cost's own unit.
    """

    choice: Choice
    error: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One site of the table.

    Attributes
    ----------
    options
        The first is always the dense one.
    scale, exponent
        Sensitivity: choosing an option adds ``scale * error ** exponent`` to the loss that selectors minimise.
    spectra
        For figures: singular values or eigenvalue energies by ``method/unfolding``, normalised, at most 256 of each.
    members
        For a group of sites that may share factors: the sites, whose own rows it is on offer in place of.
    of_channels
        Whether it is about coupled channels, in place of layers.
    """

    site: str
    kind: str
    options: tuple[Option, ...]
    scale: float = 1.0
    exponent: float = 1.0
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    of_channels: bool = False

    @property
    def dense(self) -> Option:
        return self.options[0]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that its options are for."""
        return self.members or (self.site,)

    def loss(self, option: Option) -> float:
        return self.scale * max(option.error, 0.0) ** self.exponent if option.error > 0 else 0.0


@dataclass(frozen=True)
class Candidates:
    """All sites' options, and the cost of what no choice touches.

    Attributes
    ----------
    rows
        One a site, and one a group of sites after them. Either the group is chosen or its sites are.
    fixed
        Cost of the rest of the network.
    unit
        ``output energy`` or ``weight energy``: the two never meet in one table.
    methods
        How to make each method that offered something again: name to its recorded type and options.
    facts
        Where measured costs come from: device, dtype, threads, batch.
    skipped
        What was left alone, with what it costs.
    """

    rows: tuple[Row, ...]
    fixed: Mapping[str, float]
    unit: str
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, site: str) -> Row:
        for row in self.rows:
            if row.site == site:
                return row
        raise KeyError(f"no site {site!r} in the table; there are {', '.join(repr(r.site) for r in self.rows)}")

    @property
    def costs(self) -> tuple[str, ...]:
        """Names of the costs that every option has."""
        return tuple(self.fixed)

    @property
    def dense(self) -> dict[str, float]:
        """Cost of the dense network."""
        return self.total(row.dense for row in self.singles)

    def total(self, options: Iterable[Option]) -> dict[str, float]:
        """Cost of the network with these options, which are for every site once, and the rest."""
        chosen = tuple(options)
        return {c: self.fixed[c] + sum(option.costs[c] for option in chosen) for c in self.costs}

    def left_alone(self, cost: str) -> tuple[tuple[str, str, str, float], ...]:
        """What was left alone, with its share of the dense network's cost: ``(name, kind, reason, share)``."""
        # Where channels can go, layers without a choice of their own get cheaper too.
        narrows = any(row.of_channels and len(row.options) > 1 for row in self.rows)
        idle = [
            Skipped(row.site, row.kind, "no method offers anything cheaper for it", row.dense.costs)
            for row in self.singles
            if len(row.options) == 1 and not row.of_channels and not narrows
        ]
        dense = self.dense[cost]
        return shares([*self.skipped, *idle], cost, dense)

    @property
    def singles(self) -> tuple[Row, ...]:
        """The rows of single sites, without the groups."""
        return tuple(row for row in self.rows if not row.members)

    def weighted(self, sensitivity: Mapping[str, tuple[float, float]]) -> Candidates:
        """The same table with ``(scale, exponent)`` of the named sites replaced."""
        unknown = sorted(set(sensitivity) - {row.site for row in self.rows})
        if unknown:
            raise KeyError(f"sensitivity names unknown sites {unknown}")
        rows = tuple(
            dataclasses.replace(row, scale=sensitivity[row.site][0], exponent=sensitivity[row.site][1])
            if row.site in sensitivity
            else row
            for row in self.rows
        )
        return dataclasses.replace(self, rows=rows)


def shares(skipped: Iterable[Skipped], cost: str, dense: float) -> tuple[tuple[str, str, str, float], ...]:
    """What was left alone as :class:`spectrim.InfeasibleBudgetError` tells it, most of a cost first."""
    found = [(s.name, s.kind, s.reason, s.costs.get(cost, 0.0) / dense if dense else 0.0) for s in skipped]
    return tuple(sorted(found, key=lambda each: -each[3]))
