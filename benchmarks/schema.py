"""The one form of the files in ``benchmarks/results``: what each holds, and how it is read and checked.

``benchmarks/README.md`` says the same in words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

# Objects that a file may hold beside the fields below, by key. Lists of records are tables, whatever their key.
FURTHER = {
    "measured": "figures behind the claims, or what each claim was measured on, by name",
    "notes_by_claim": "notes of a file whose claims are measured one at a time, by claim",
    "trajectory": "ranks over the steps of learning, in the form of spectrim's files of ranks",
    "versions": "of further libraries, by name",
}


class Claim(msgspec.Struct, forbid_unknown_fields=True):
    """One figure that was asked for, and what came out."""

    value: float | None
    unit: str
    target: str
    met: bool
    command: str
    note: str = ""


class Environment(msgspec.Struct, forbid_unknown_fields=True):
    """The machine at the start."""

    cpu: str
    cores: int
    gpu: str | None
    system: str
    python: str
    torch: str
    torch_threads: int
    load_average: float


class Code(msgspec.Struct, forbid_unknown_fields=True):
    """The library and the commit of the repository."""

    spectrim: str
    commit: str
    changed: bool | None


class Result(msgspec.Struct):
    """What every file holds."""

    experiment: str
    config: dict[str, Any]
    date: str
    wall_seconds: float | None  # None where a file was put together from several runs
    environment: Environment
    code: Code
    claims: dict[str, Claim]
    rows: list[dict[str, Any]]
    seeds: list[int]
    notes: list[str] = []


def checked(path: Path) -> dict[str, Any]:
    """The content of a result file; ValueError names the file and the place if it has another form."""
    try:
        held: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        known = msgspec.convert(held, Result)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if known.experiment != path.stem:
        raise ValueError(f"{path.name}: the experiment is {known.experiment!r}; expected the name of the file")
    for key in held.keys() - set(Result.__struct_fields__):
        if not _is_table(held[key]) and not (key in FURTHER and isinstance(held[key], dict)):
            raise ValueError(f"{path.name}: {key} is neither a list of records nor one of {', '.join(FURTHER)}")
    return held


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)
