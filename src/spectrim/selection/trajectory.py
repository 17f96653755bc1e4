"""The ranks that a run of learned ranks went through, one record a C step: plain values."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from spectrim.errors import PlanError
from spectrim.network.files import converted, read_document, record_of, write_text
from spectrim.network.printing import Grid, Printed, change, cost_name, count, folded

LARGEST = 32 * 2**20
"""Bytes of the text of a trajectory."""


@dataclass(frozen=True)
class Record:
    """One C step.

    Attributes
    ----------
    mu
        Strength of the penalty it was taken at.
    multipliers
        Loss that one unit of each cost was worth: given, or the dual of the budget.
    ranks
        Rank of every site; 0 for a layer dropped, its full rank for a layer left dense.
    choices
        What was chosen at every site, in words.
    costs
        Of the whole network with these ranks.
    distance
        ``||W - Delta|| / ||W||`` over all sites.
    metric
        What ``evaluate`` returned for the nested network, or None.
    seconds
        Duration of the C step, evaluation not counted.
    """

    mu: float
    multipliers: Mapping[str, float]
    ranks: tuple[int, ...]
    choices: tuple[str, ...]
    costs: Mapping[str, float]
    distance: float
    metric: float | None = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        return f"Record(mu={self.mu:.3g}, sum of ranks {sum(self.ranks):,}, distance={self.distance:.3g})"


@dataclass(frozen=True)
class Trajectory(Printed):
    """Ranks over C steps. ``print(trajectory)`` and notebooks show it as a table, a line a C step.

    Attributes
    ----------
    sites
        Names, in the network's order.
    full
        Full rank of every site: the largest over its unfoldings.
    dense_costs
        Of the dense network.
    budget
        Absolute limits that were asked for; empty if a multiplier was given.
    records
        One a C step.
    """

    sites: tuple[str, ...]
    full: tuple[int, ...]
    dense_costs: Mapping[str, float]
    budget: Mapping[str, float] = field(default_factory=dict)
    records: tuple[Record, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def settled(self) -> int:
        """C steps at the end that changed no choice."""
        count = 0
        for earlier, later in zip(self.records[-2::-1], self.records[:0:-1], strict=True):
            if earlier.choices != later.choices:
                break
            count += 1
        return count

    def rows(self) -> list[dict[str, Any]]:
        """The C steps as plain values, one dict a step.

        Returns
        -------
        list of dict
            ``step``, from 1; ``mu``; ``distance`` of the weights to their low-rank copies; ``ranks``, their sum;
            ``changed``, choices that are not those of the step before; ``metric`` or None; ``seconds``; each cost of
            the network by its name.
        """
        earlier = (None, *self.records)
        return [
            {
                "step": number, "mu": record.mu, "distance": record.distance, "ranks": sum(record.ranks),
                "changed": 0 if before is None else sum(map(operator.ne, before.choices, record.choices)),
                "metric": record.metric, "seconds": record.seconds, **record.costs,
            }
            for number, (before, record) in enumerate(zip(earlier, self.records, strict=False), 1)
        ]  # fmt: skip

    _records = rows

    def _grid(self) -> Grid:
        shown = [cost for cost in dict.fromkeys([*self.budget, "macs", "parameters"]) if cost in self.dense_costs][:2]
        metric = any(record.metric is not None for record in self.records)
        lines = [
            [
                str(row["step"]), f"{row['mu']:.3g}", f"{row['distance']:.3g}", f"{row['ranks']:,}",
                str(row["changed"] or ""), *(change(cost, self.dense_costs[cost], row[cost]) for cost in shown),
                *(["" if row["metric"] is None else f"{row['metric']:.4g}"] if metric else []),
            ]
            for row in self.rows()
        ]  # fmt: skip
        columns = [
            ">C step",
            ">mu",
            ">distance",
            ">ranks",
            ">changed",
            *(f">{cost_name(cost)}" for cost in shown),
        ]
        return Grid(
            [*columns, *([">metric"] if metric else [])],
            folded(lines, lambda rest: ["...", *[""] * (len(rest[0]) - 1)]),
            title=f"{count(len(self), 'C step')} of {count(len(self.sites), 'layer')}, "
            f"the last {self.settled:,} without a change",
            words=[
                ("C step", "ranks are chosen anew for the weights as they are then"),
                ("mu", "how strongly training pulls the weights towards low rank"),
                ("distance", "of the weights to their low-rank copies, relative"),
                ("ranks", f"their sum over all layers, of {sum(self.full):,} in full"),
                ("changed", "layers with another choice than at the step before"),
            ],
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Trajectory({count(len(self), 'C step')}, {count(len(self.sites), 'layer')})"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Trajectory:
        """Read what :meth:`to_json` returned.

        Raises
        ------
        PlanError
            If the text is something else; the message says where.
        """
        raw = record_of(text, "a trajectory of ranks", LARGEST)
        trajectory = converted(raw, cls, "a trajectory of ranks")
        for record, known in [(raw, cls), *((each, Record) for each in raw.get("records", ()))]:
            unknown = sorted(set(record) - {each.name for each in fields(known)})
            if unknown:
                raise PlanError(f"not a trajectory of ranks: it has no field {unknown[0]!r}")
        return trajectory

    def write(self, path: str | Path) -> None:
        """Write the text, whole or not at all.

        Raises
        ------
        OSError
            If the file cannot be written: there is no such folder, or it is full or read-only.
        """
        write_text(path, self.to_json() + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Trajectory:
        """Read a file that :meth:`write` wrote.

        Raises
        ------
        OSError
            If there is no such file.
        PlanError
            As :meth:`from_json`; the message names the file.
        """
        return read_document(path, cls.from_json, LARGEST)
