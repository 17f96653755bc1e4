"""Puts what the program really says into ``docs/command-line.md``: ``python -m benchmarks.command_line``.

Between ``<!-- run: ARGUMENTS -->`` and ``<!-- end -->`` stands a command with its output at 80 columns, made again each
time; a test sees that the page is in step.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import tempfile
import textwrap
from pathlib import Path

from benchmarks.environment import ROOT

PAGE = ROOT / "docs" / "command-line.md"
NET = (
    "from torch import nn\n\n\ndef build(classes=10):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
)
COLUMNS = 80
_RUN = re.compile(r"<!-- run: (?P<arguments>.*?) -->.*?<!-- end -->", re.DOTALL)


def written(text: str) -> str:
    """The page with every command run again, in a folder with a model in ``net.py`` and an empty folder ``photos``."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("net.py").write_text(NET, encoding="utf-8")
        Path("photos").mkdir()
        return _RUN.sub(lambda found: _ran(found["arguments"]), text)


def _ran(arguments: str) -> str:
    """A block with a command and what it prints, whichever stream it goes to; the exit code where it is not 0."""
    from typer.testing import CliRunner

    from spectrim.cli.app import app

    done = CliRunner().invoke(app, shlex.split(arguments), prog_name="spectrim", env={"COLUMNS": str(COLUMNS)})
    code = f"\n$ echo $?\n{done.exit_code}" if done.exit_code else ""
    # Errors are one line, which a terminal breaks where it ends.
    lines = (wrapped for line in done.output.strip().split("\n") for wrapped in textwrap.wrap(line, COLUMNS) or [""])
    said = "\n".join(lines) if done.exit_code else done.output.strip()
    shown = f"$ spectrim {arguments}\n{said}{code}"
    return f"<!-- run: {arguments} -->\n```text\n{shown}\n```\n<!-- end -->"


def main() -> None:
    """Write the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(written(text), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", str(COLUMNS))
    main()
