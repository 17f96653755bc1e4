"""A progress bar where rich is installed and somebody watches, and nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

Update = Callable[[int, str], None]


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
        None shows the bar if standard error is a terminal. Without rich there is no bar.
    """
    if shown is None:
        shown = sys.stderr.isatty()
    if not shown or find_spec("rich") is None:
        yield lambda done, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("fine-tune"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda done, text: progress.update(task, completed=done, description=text)
