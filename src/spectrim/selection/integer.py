"""HiGHS by way of SciPy, without what it prints by itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

# HiGHS has lines in it that no option turns off; each begins with the name of the class it is in.
_OWN = b"Highs"
# Standard output belongs to the process: two threads that hold it back would put each other's in its place.
_ONE_AT_A_TIME = threading.RLock()


def milp(*arguments: Any, **options: Any) -> Any:
    """As :func:`scipy.optimize.milp`, with standard output free of the solver's own lines."""
    from scipy import optimize

    with _ONE_AT_A_TIME, _quiet():
        return optimize.milp(*arguments, **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what is written to the process's standard output, and let go of all but the solver's lines.

    The solver writes past Python, to the file descriptor. What other threads write meanwhile comes later.
    """
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (AttributeError, OSError, ValueError):
        # No standard output to keep clean.
        yield
        return
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 1)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, 1)
            os.close(kept)
            output.seek(0)
            with open(1, "wb", closefd=False) as out:
                out.writelines(line for line in output if not line.startswith(_OWN))


def _flush() -> None:
    """Write out what C code has in its buffers, and Python's threads in theirs."""
    with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        (ctypes.CDLL(None) if os.name == "posix" else ctypes.cdll.msvcrt).fflush(None)
