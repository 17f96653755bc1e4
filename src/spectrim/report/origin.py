"""Where a compressed network comes from, how it is used again, and what was not measured of it."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from spectrim.network.file_kinds import path_of
from spectrim.network.state_values import plain_tensors
from spectrim.network.tensor_files import digest_of_tensors

if TYPE_CHECKING:
    from spectrim.nn.agreement import Agreement
    from spectrim.report.comparison import Comparison

_LOAD = """import spectrim
dense = ...  # the network as it was made before compression; its weights do not matter
model = spectrim.load(dense, "model.safetensors")"""


@dataclass(frozen=True)
class Part:
    """Something that went into a compression or came out of it.

    Attributes
    ----------
    role
        ``model``, ``weights``, ``calibration data``, ...
    name
        As it was given: a reference, a path.
    digest
        SHA-256 in hexadecimal; empty if there is none.
    of
        What the digest is of: ``2 files``, ``tensors``; or why there is none.
    """

    role: str
    name: str
    digest: str = ""
    of: str = ""

    @classmethod
    def of_files(cls, role: str, name: str, path: str | Path) -> Part:
        """With the digest of a file, or of the names and contents of all files of a folder."""
        path = path_of(path)
        files = [path] if not path.is_dir() else sorted(file for file in path.rglob("*") if file.is_file())
        digest = hashlib.sha256()
        for file in files:
            if path.is_dir():
                digest.update(os.fsencode(file.relative_to(path).as_posix()) + b"\0")
            with file.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
        return cls(role, name, digest.hexdigest(), "the file" if not path.is_dir() else f"{len(files):,} files")

    @classmethod
    def of_model(cls, role: str, name: str, model: nn.Module) -> Part:
        """With the digest of the tensors of a model: names, types, shapes and bytes."""
        plain = plain_tensors(model.state_dict())
        return cls(role, name, digest_of_tensors(plain), f"{len(plain):,} tensors")


def _now() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")


def _command() -> str:
    """What the running program was called with."""
    program, *arguments = sys.argv or [""]
    return shlex.join([Path(program).name, *arguments]) if program not in ("", "-c") else "an interactive session"


@dataclass(frozen=True)
class Origin:
    """Where a compressed network comes from and how it is used again.

    Attributes
    ----------
    command
        The command or call; by default that of the running program.
    parts
        What went in and what came out, with digests.
    seeds
        By what they are for.
    load
        Lines of code that load the compressed network.
    date
        With the time and its distance to UTC; by default now.
    """

    command: str = field(default_factory=_command)
    parts: tuple[Part, ...] = ()
    seeds: Mapping[str, int] = field(default_factory=dict)
    load: str = _LOAD
    date: str = field(default_factory=_now)


def not_measured(comparison: Comparison | None, agreement: Agreement | None) -> Iterator[str]:
    """Sentences about what the numbers of a compression do not tell."""
    scores = [] if comparison is None else [row for row in comparison.rows if row.better == "higher"]
    if not scores:
        yield "Accuracy, or any other score: there were no batches with labels to test on."
    if agreement is None:
        yield "How far outputs agree with the dense network's."
    if comparison is None:
        yield "Time, memory and the size of the file: costs are counted from shapes."
        return
    for row in scores:
        if row.standard_error != row.standard_error:
            yield f"The standard error of {row.metric}: the number of test samples is not known."
    if not any(row.unit == "ms" for row in comparison.rows):
        yield "Time: a count of multiplications does not tell it."
        return
    threads = comparison.facts.get("threads", "")
    batch = f"a batch of {comparison.batch}" if comparison.batch > 1 else "one sample a batch"
    yield (
        f"Times with other batches than {batch}, "
        + (f"with other numbers of threads than {threads}, " if threads else "")
        + "on other machines, or in another runtime than torch."
    )
