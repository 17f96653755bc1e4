"""The command line: one file a command."""

import sys


def main() -> None:
    """Entry point of the program, which also says what is missing where the package was installed without it."""
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
