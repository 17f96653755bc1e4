"""The table of candidates: what every choice at every site would lose and cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spectrim.network.choices import Choice
from spectrim.network.printing import Grid, Printed, count, flat
from spectrim.network.skipped import Skipped

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Option:
    """A row of the table: a choice, what it loses and what it costs.

    ``error`` is relative: the fraction of the site's energy lost. ``costs`` are the site's, in the cost's own unit.
    """

    choice: Choice
    error: float
    costs: Mapping[str, float]

    def __repr__(self) -> str:
        return f"Option({str(self.choice)!r}, error={self.error:.4g})"


@dataclass(frozen=True)
class Row(Printed):
    """One site of the table. ``print(row)`` shows the options that are worth choosing.

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
    missing
        Why methods that are for such a site offer nothing for it, for people; empty where nothing is to be told.
    """

    site: str
    kind: str
    options: tuple[Option, ...]
    scale: float = 1.0
    exponent: float = 1.0
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    of_channels: bool = False
    missing: str = ""

    @property
    def dense(self) -> Option:
        return self.options[0]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that its options are for."""
        return self.members or (self.site,)

    def loss(self, option: Option) -> float:
        return self.scale * max(option.error, 0.0) ** self.exponent if option.error > 0 else 0.0

    def left(self, cost: str, lost: float) -> float:
        """The share of a cost that remains of the site, at the least, where so much may be lost."""
        dense = self.dense.costs[cost]
        within = min(option.costs[cost] for option in self.options if option.error <= lost)
        return within / dense if dense else 1.0

    def worth(self, cost: str) -> tuple[Option, ...]:
        """The options that no other one beats in error and in one cost both, the dearest first."""
        best: list[Option] = []
        for option in sorted(self.options, key=lambda option: (option.costs[cost], option.error)):
            if not best or option.error < best[-1].error:
                best.append(option)
        return tuple(reversed(best))

    def _grid(self) -> Grid:
        from spectrim.selection.printed import row_grid

        return row_grid(self)

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": self.site, "kind": self.kind, "choice": str(option.choice), "method": option.choice.method,
                "lost": option.error, "members": list(self.members), **flat(option.costs, self.dense.costs),
            }
            for option in self.options
        ]  # fmt: skip

    def __repr__(self) -> str:
        return f"Row({self.site!r}, {self.kind}, {count(len(self.options), 'choice')})"


class TableRows(tuple[Row, ...]):
    """The rows of a table; called, all their options as plain values."""

    __slots__ = ()

    def __call__(self) -> list[dict[str, Any]]:
        """Every choice at every site, one dict a choice, the dense one first.

        Returns
        -------
        list of dict
            ``layer``, ``kind`` and ``choice`` in words; ``method`` that offers it; ``lost``, its relative error;
            ``members``, the layers of a group; each cost of the site by its name and, with ``_dense``, as it is now.
        """
        return [record for row in self for record in row._records()]


def printed_costs(costs: Iterable[str], limited: Iterable[str] = ()) -> list[str]:
    """The costs that a table for people has: limited ones, else time, MACs and parameters; two, and all that limit."""
    there = list(costs)
    usual = [cost for cost in dict.fromkeys([*limited, "latency", "macs", "parameters"]) if cost in there]
    return (usual or there)[: max(2, len([*limited]))]


@dataclass(frozen=True)
class Candidates(Printed):
    """All sites' options, and the cost of what no choice touches.

    ``print(table)`` and notebooks show it as a table, ``table.rows()`` and :meth:`to_pandas` give every option, and
    :meth:`plot` draws what is lost at which cost. It has a length, can be iterated, and is indexed by a site's name.

    Attributes
    ----------
    rows
        One a site, and one a group of sites after them. Either the group is chosen or its sites are. Called,
        ``table.rows()``, they are plain dicts, one an option: see :meth:`TableRows.__call__`.
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

    Examples
    --------
    >>> print(table)  # doctest: +SKIP
    >>> print(table["layer1.0.conv1"])  # doctest: +SKIP
    >>> table.plot("macs")  # doctest: +SKIP
    """

    rows: TableRows
    fixed: Mapping[str, float]
    unit: str
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.rows, TableRows):  # a plain tuple, which callers may give
            object.__setattr__(self, "rows", TableRows(self.rows))

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __contains__(self, site: object) -> bool:
        """Whether there is a row of this name."""
        return any(site in (row.site, row) for row in self.rows)

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
        """What was left alone, with its share of the dense network's cost: ``(name, kind, reason, share)``.

        Where layers can change, channels that stay are not among it: they cost nothing that their layers do not.
        """
        # Where channels can go, layers without a choice of their own get cheaper too.
        narrows = any(row.of_channels and len(row.options) > 1 for row in self.rows)
        grouped = {member for row in self.rows if len(row.options) > 1 for member in row.members}
        # Where channels were looked for and all stay, that is why; of a network that was not traced it is told once.
        stay = {each.name.removesuffix(":out"): each.reason for each in self.skipped if not each.costs}
        why = stay.get("", "no method offers anything cheaper for it")
        idle = [
            Skipped(row.site, row.kind, stay.get(row.site, row.missing or why), row.dense.costs)
            for row in self.singles
            if len(row.options) == 1 and not row.of_channels and not narrows and row.site not in grouped
        ]
        alone = skipped_shares([*self.skipped, *idle], cost, self.dense[cost])
        layers = any(len(row.options) > 1 and not row.of_channels for row in self.rows)
        return tuple(each for each in alone if each[3]) if layers else alone

    @property
    def singles(self) -> tuple[Row, ...]:
        """The rows of single sites, without the groups."""
        return tuple(row for row in self.rows if not row.members)

    def dense_at(self, sites: Collection[str]) -> Candidates:
        """The table without choices for these sites, and without the groups that they are in."""
        rows = [row for row in self.rows if not row.members or set(sites).isdisjoint(row.members)]
        rows = [dataclasses.replace(r, options=(r.dense,)) if r.site in sites else r for r in rows]
        return dataclasses.replace(self, rows=TableRows(rows))

    def _records(self) -> list[dict[str, Any]]:
        return self.rows()

    def plot(
        self, cost: str | None = None, *, layers: str | Sequence[str] | None = None, ax: Axes | None = None
    ) -> Axes:
        """Draw what every layer loses at which cost: a line a layer, through the choices that no other one beats.

        Parameters
        ----------
        cost
            By default milliseconds if they were measured, else MACs.
        layers
            Names of the rows to draw, all of them if None. Up to ten are told apart by a legend, more by their depth.
        ax
            Axes of matplotlib to draw on; new ones of a new figure if None.

        Raises
        ------
        KeyError
            For a layer that has no row.
        ModuleNotFoundError
            Without matplotlib.
        ValueError
            For a cost that the table does not have.
        """
        from spectrim.selection.figures import curves

        names = [layers] if isinstance(layers, str) else layers
        rows = self.rows if names is None else tuple(self[name] for name in names)
        return curves(rows, cost or printed_costs(self.costs)[0], self.unit, ax=ax)

    def _grid(self) -> Grid:
        from spectrim.selection.printed import table_grid

        return table_grid(self)

    def __repr__(self) -> str:
        options = sum(len(row.options) - 1 for row in self.rows)
        return f"Candidates({count(len(self.rows), 'row')}, {count(options, 'choice')}, costs {', '.join(self.costs)})"

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


def skipped_shares(skipped: Iterable[Skipped], cost: str, dense: float) -> tuple[tuple[str, str, str, float], ...]:
    """What was left alone as :class:`spectrim.InfeasibleBudgetError` tells it, most of a cost first."""
    layers = [(s.name, s.kind, s.reason, s.costs.get(cost, 0.0) / dense if dense else 0.0) for s in skipped]
    return tuple(sorted(layers, key=lambda each: -each[3]))
