"""Telling how far a long call has come: to a function of the caller's, as bars, or to nobody.

Every verb takes ``progress=``. Where it is None the environment variable ``SPECTRIM_PROGRESS`` decides, whenever a verb
is called: 1 shows bars everywhere, 0 nowhere. If that is not set either, training shows a bar where somebody watches,
and the other verbs show none.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done, and how much there is (None if unknown)."""

Steps = Callable[[int, int | None], None]
"""The same of a call that does one thing."""


Update = Callable[[int, str], None]
"""Called by training with the steps done and what is known of them."""

SWITCH = "SPECTRIM_PROGRESS"
_SECONDS = 10.0  # between two lines, where there are no bars
# Whether a verb that shows its progress is at work: those that it calls show none of their own.
_TELLING: ContextVar[bool] = ContextVar("telling", default=False)


def switched() -> bool | None:
    """What the environment says of bars; None if nothing.

    Raises
    ------
    ValueError
        If the variable is neither 1 nor 0.
    """
    said = os.environ.get(SWITCH, "").strip()
    if said not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} is {said!r}: expected 1 to show bars, 0 to show none, or no such variable")
    return bool(int(said)) if said else None


def silent(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def lines(seconds: float = _SECONDS) -> Callable[..., None]:
    """Lines on standard error: at most one in so many seconds, and one when something is done."""
    last = time.monotonic()

    def report(what: str, done: int, total: int | None, text: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= seconds:
            last = now
            of = "" if total is None else f" of {total}"
            print(f"{what}: {done}{of}{text and f', {text}'}", file=sys.stderr, flush=True)

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
    """What a verb tells its progress to: bars for True, nobody for False, or the caller's function; see above for None.

    Raises
    ------
    TypeError
        For anything else.
    """
    if progress is None:
        progress = not _TELLING.get() and switched() is True
    if progress is True:
        with bars() as report, _telling():
            yield report
    elif progress is False:
        yield silent
    elif callable(progress):
        with _telling():
            yield progress
    else:
        raise TypeError(
            f"progress is {progress!r}: expected True for a bar, False or None for none, or a function "
            "(what, done, total)"
        )


@contextmanager
def _telling() -> Iterator[None]:
    before = _TELLING.set(True)
    try:
        yield
    finally:
        _TELLING.reset(before)


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


@contextmanager
def training_bar(total: int | None, *, done: int = 0, shown: bool | None = None) -> Iterator[Update]:
    """A function ``update(done, text)`` that moves a bar of ``total`` steps on standard error.

    Parameters
    ----------
    total
        Steps in all, None if unknown.
    done
        Steps done before.
    shown
        None shows the bar as the environment says, else if standard error is a terminal. Without rich or a terminal
        there are lines in place of it.
    """
    watched = sys.stderr.isatty() and find_spec("rich") is not None
    if shown is None:
        shown = switched()
    if not (watched if shown is None else shown):
        yield lambda done, text: None
        return
    if not watched:
        report = lines()
        yield lambda done, text: report("fine-tune", done, total, text)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("fine-tune"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as drawn:
        task = drawn.add_task("", total=total, completed=done)
        yield lambda done, text: drawn.update(task, completed=done, description=text)
