"""The program ``spectrim``: its commands and nothing else.

Importing this module loads typer and no torch, so that ``--help`` answers at once; a command imports what it needs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from spectrim.cli.common import EXIT_CODES
from spectrim.cli.compare import compare
from spectrim.cli.compress import compress
from spectrim.cli.demo import demo
from spectrim.cli.doctor import doctor
from spectrim.cli.evaluate import evaluate
from spectrim.cli.export import export
from spectrim.cli.help import Command, Program
from spectrim.cli.path import path
from spectrim.cli.profile import profile
from spectrim.cli.sweep import sweep

app = typer.Typer(
    name="spectrim",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (profile, compress, sweep, path, evaluate, compare, export, demo, doctor):
    app.command(cls=Command, epilog=_command.examples)(_command)  # type: ignore[attr-defined]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("spectrim"))
        raise typer.Exit


@app.callback(epilog="\n".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()))
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make trained PyTorch networks smaller and faster by trimming spectra."""


def main() -> None:
    """Entry point of the program."""
    app()
