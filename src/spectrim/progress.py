"""Telling how far a long call has come: to a function of the caller's, as bars, or to nobody."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done, and how much there is (None if unknown)."""

Steps = Callable[[int, int | None], None]
"""The same of a call that does one thing."""


def silent(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def lines(seconds: float = 10.0) -> Progress:
    """Lines on standard error: at most one in so many seconds, and one when something is done."""
    last = time.monotonic()

    def report(what: str, done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= seconds:
            last = now
            print(f"{what}: {done}" if total is None else f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return report


@contextmanager
def bars() -> Iterator[Progress]:
    """Bars on standard error, one for everything that is done; without rich or a terminal lines (:func:`lines`)."""
    if find_spec("rich") is None or not sys.stderr.isatty():
        yield lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as drawn:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = drawn.add_task(what, total=total)
            drawn.update(tasks[what], completed=done, total=total)

        yield report


@contextmanager
def reporting(progress: Progress | bool | None) -> Iterator[Progress]:
    """What a verb tells its progress to: bars for True, nobody for False and None, or the caller's function.

    Raises
    ------
    TypeError
        For anything else.
    """
    if progress is True:
        with bars() as report:
            yield report
    elif progress is None or progress is False:
        yield silent
    elif callable(progress):
        yield progress
    else:
        raise TypeError(
            f"progress is {progress!r}: expected True for a bar, False or None for none, or a function "
            "(what, done, total)"
        )


def reports(verb: Callable[P, R]) -> Callable[P, R]:
    """Let a verb's ``progress`` be True, False or None too: it always gets a function."""

    @functools.wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with reporting(kwargs.get("progress")) as report:  # type: ignore[arg-type]
            return verb(*args, **kwargs | {"progress": report})  # type: ignore[arg-type]

    return call


def told(progress: Callable[P, None] | bool | None) -> Callable[P, None]:
    """The function that a verb's ``progress`` is once :func:`reports` or :func:`reports_steps` has seen to it."""
    assert callable(progress)
    return progress


def reports_steps(verb: Callable[P, R]) -> Callable[P, R]:
    """The same for a verb that does one thing, whose function takes ``(done, total)``."""

    @functools.wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        asked: Any = kwargs.get("progress")
        if callable(asked):
            return verb(*args, **kwargs)
        with reporting(asked) as report:
            told = functools.partial(report, verb.__name__)
            return verb(*args, **kwargs | {"progress": told})  # type: ignore[arg-type]

    return call
