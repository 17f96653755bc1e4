"""What a checkpoint says beside its tensors: its version, its plans, and tables of what the tensors are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from spectrim.errors import CheckpointError
from spectrim.selection.plan import Plan

FORMAT = "spectrim"
# Of files that hold sparse weights packed, and of those with plans before the last, quantised weights, or modules that
# nn.Linear layers stand for. All others are of the first.
VERSIONS = _FIRST, _PACKED, _AGAIN = "1", "2", "3"
# What tables are, and how that is told.
_TABLES: Mapping[str, tuple[Any, str]] = {
    "earlier": (list[str], "a list of plans"),
    "shared": (dict[str, str], "a table of names"),
    "values": (dict[str, Any], "a table of records"),
    "linear": (list[str], "a list of names"),
    "packed": (list[tuple[str, str]], "a table of pairs of names"),
}
# Those that are read in files of a version.
_READ = {_FIRST: ("shared",), _PACKED: ("shared", "packed"), _AGAIN: tuple(_TABLES)}


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors."""

    plans: Sequence[Plan]  # in the order they were carried out
    shared: Mapping[str, str]  # owners of tensors that are the same memory, by their names
    packed: Sequence[Sequence[str]]  # names ``[weight, mask]`` of what is packed
    values: Mapping[str, Any]  # records of what is no plain tensor
    linear: Sequence[str]  # modules that nn.Linear layers stand for (spectrim.nn.linears)

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Header:
        """Read the texts of a file. Raises CheckpointError, or PlanError, for those of no checkpoint."""
        if metadata.get("format") != FORMAT or "plan" not in metadata:
            raise CheckpointError("a safetensors file, but not a Spectrim checkpoint (it holds no plan)")
        version = metadata.get("format_version")
        if version not in VERSIONS:
            first, second, third = map(repr, VERSIONS)
            raise CheckpointError(f"format version {version!r}; this library reads {first}, {second} and {third}")
        plans = [Plan.from_json(text) for text in (*_table(metadata, version, "earlier"), metadata["plan"])]
        names = ("shared", "values", "linear", "packed")
        return cls(plans, **{name: _table(metadata, version, name) for name in names})

    def metadata(self) -> dict[str, str]:
        """The texts of a file."""
        *before, plan = [plan.to_json(lines=False) for plan in self.plans]
        tables = {"packed": self.packed, "earlier": before, "values": self.values, "linear": self.linear}
        version = _AGAIN if before or self.values or self.linear else _PACKED if self.packed else _FIRST
        return {
            "format": FORMAT,
            "format_version": version,
            "plan": plan,
            "shared": json.dumps(self.shared, sort_keys=True),
            **{name: json.dumps(table) for name, table in tables.items() if table},
        }


def _table(metadata: Mapping[str, str], version: str, name: str) -> Any:
    kind, what = _TABLES[name]
    if name not in metadata and (name, version) == ("packed", _PACKED):
        raise CheckpointError(f"the table of {name} tensors is missing")
    if name not in metadata or name not in _READ[version]:
        return kind()
    try:
        return msgspec.convert(json.loads(metadata[name]), kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"the table of {name} tensors is not {what}: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"the table of {name} tensors cannot be read: {error}") from error
