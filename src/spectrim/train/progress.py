"""A progress bar where rich is installed and somebody watches; elsewhere lines, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

Update = Callable[[int, str], None]

_SECONDS = 10.0  # between two lines


@contextmanager
def bar(total: int | None, *, done: int = 0, shown: bool | None = None) -> Iterator[Update]:
    """A function ``update(done, text)`` that moves a bar of ``total`` steps on standard error.

    Parameters
    ----------
    total
        Steps in all, None if unknown.
    done
        Steps done before.
    shown
        None shows the bar if standard error is a terminal. Without rich or a terminal there are lines in place of it.
    """
    watched = sys.stderr.isatty() and find_spec("rich") is not None
    if not (watched if shown is None else shown):
        yield lambda done, text: None
        return
    if not watched:
        yield _lines(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("fine-tune"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda done, text: progress.update(task, completed=done, description=text)


def _lines(total: int | None) -> Update:
    """Lines on standard error: at most one in ten seconds, and one at the end."""
    last = time.monotonic()

    def update(done: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _SECONDS:
            last = now
            print(f"fine-tune: {done}{'' if total is None else f' of {total}'}, {text}", file=sys.stderr, flush=True)

    return update
