"""Files that are there whole or not at all, whenever a process dies."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside another one, to be written in its place: it takes it at the end, and is removed after an error.

    Readers see the old file or the new one, never a part. Each thread of each process has a file of its own.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
