"""The command line: one file a command."""

import io
import os
import sys


def main() -> None:
    """Entry point of the program, which also says what is missing where the package was installed without it."""
    _open_streams()
    try:
        from spectrim.cli.app import main as run

        run()
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.exit(f"spectrim: the command line needs {error.name}, which is not installed: pip install 'spectrim[cli]'")
    except KeyboardInterrupt:
        print("spectrim: stopped", file=sys.stderr)
        sys.exit(130)


def _open_streams() -> None:
    """Have standard streams take what is written to them: closed ones lead nowhere, and letters that one lacks are
    escaped, as are those of names of files that are no UTF-8."""
    # In this order, since what is opened gets the lowest number that is free.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for as long as it runs)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
