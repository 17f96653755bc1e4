"""Where a command writes: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from spectrim.cli.references import UsageError
from spectrim.errors import SpectrimError
from spectrim.network.printing import Grid
from spectrim.progress import bars, silent, switched

_PIPE = 160
"""Columns where nobody looks: a pipe has no width, and folded names are not what a reader greps for."""


@contextlib.contextmanager
def usage(option: str = "") -> Iterator[None]:
    """Values of the command line are checked inside: a ValueError there is a usage error, of ``option`` if named."""
    try:
        yield
    except SpectrimError:
        raise
    except ValueError as error:
        raise UsageError(f"{option}: {error}" if option else str(error)) from error


def terminal_columns(stream: TextIO) -> int:
    """How many columns there are: of the terminal, of ``COLUMNS`` elsewhere if it is set, or as many as one likes."""
    return shutil.get_terminal_size((80 if stream.isatty() else _PIPE, 24)).columns


@dataclass
class Output:
    """Where a command writes."""

    as_json: bool = False  # one JSON document in place of tables
    quiet: bool = False  # nothing on standard error but errors
    # The real standard output, which a command's own code cannot reach in JSON mode.
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    made: list[Path] = field(default_factory=list)  # folders that a command has made, the innermost first
    unwritten: OSError | None = None  # why standard output takes nothing
    left: str = ""  # what is there if the command is stopped now, and what goes on with it, in words

    @property
    def shows(self) -> bool:
        """Whether bars are shown: not in quiet, nor where the environment says so (``SPECTRIM_PROGRESS=0``)."""
        with usage():
            return not self.quiet and switched() is not False

    def say(self, text: str) -> None:
        """A remark for people."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """Part of the result, for people."""
        if not self.as_json:
            self._write(text)

    def _write(self, text: str) -> None:
        """Write to standard output. Where nothing can be written there, the work goes on, and its end tells."""
        try:
            print(text, file=self.stdout, flush=True)
        except OSError as error:
            self.unwritten = error
            # So does what comes later, and what is kept back of this: it would be tried again at the end.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stdout.fileno())

    def clear(self) -> None:
        """Remove the folders that were made for nothing."""
        for folder in self.made:
            with contextlib.suppress(OSError):  # one that holds something stays
                folder.rmdir()

    def document(self, values: Mapping[str, Any]) -> None:
        """The result, for programs."""
        if self.as_json:
            self._write(json.dumps(values, indent=1, allow_nan=False, default=str))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table for people; columns whose header starts with ``>`` are aligned to the right."""
        self.grid(Grid(columns, rows, title=title))

    def grid(self, grid: Grid) -> None:
        """The same with what stands around it."""
        self.print(f"{grid.text(terminal_columns(self.stdout))}\n")

    def prose(self, text: str, indent: str = "") -> None:
        """A sentence of the result, for people: in lines on a terminal."""
        self.print(
            textwrap.fill(
                text, terminal_columns(self.stdout), initial_indent=indent, subsequent_indent=indent and f"{indent}  ",
                break_long_words=False, break_on_hyphens=False,
            )
        )  # fmt: skip

    def written(self, folder: Path, files: Mapping[str, str]) -> None:
        """The names of files in a folder, with what they hold."""
        self.print(f"\nWritten to {folder}:")
        for name, holds in files.items():
            self.prose(f"{name:{max(map(len, files))}}  {holds}", "  ")

    def code(self, heading: str, text: str) -> None:
        """Lines to be copied, which are not wrapped."""
        self.print(f"\n{heading}")
        self.print(textwrap.indent(text, "  "))

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """A function ``(what, done, total)`` that draws bars on a terminal, and writes lines elsewhere."""
        if not self.shows:
            yield silent
            return
        with bars() as report:
            yield report
