"""The ranks that a run of learned ranks went through, one record a C step: plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from spectrim.errors import PlanError
from spectrim.network.files import read_document, write_text

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


@dataclass(frozen=True)
class Trajectory:
    """Ranks over C steps.

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
        import msgspec

        if len(text) > LARGEST:
            raise PlanError(f"not a trajectory of ranks: more than {LARGEST:,} characters")
        try:
            raw = msgspec.json.decode(text)
            found = msgspec.convert(raw, cls)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise PlanError(f"not a trajectory of ranks: {error}") from error
        for record, known in [(raw, cls), *((each, Record) for each in raw.get("records", ()))]:
            unknown = sorted(set(record) - {each.name for each in fields(known)})
            if unknown:
                raise PlanError(f"not a trajectory of ranks: it has no field {unknown[0]!r}")
        return found

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
