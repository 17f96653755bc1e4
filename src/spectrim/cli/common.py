"""What the commands share: options, how they are run, and exit codes.

With ``--json`` one document is all that standard output gets. Exit codes are in :data:`EXIT_CODES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO, get_type_hints

import typer

from spectrim.cli.output import Output as Output
from spectrim.cli.output import usage as usage
from spectrim.cli.references import UsageError
from spectrim.errors import CheckpointError, InfeasibleBudgetError, PlanError, SpectrimError, ToleranceError
from spectrim.network.files import SPELLED

FAILED, USAGE, INFEASIBLE, STOPPED, TERMINATED = 1, 2, 3, 130, 143
EXIT_CODES = {
    0: "Done.",
    FAILED: "It failed, or was refused while it ran: a model cannot be run, a file cannot be written.",
    USAGE: "The command line, or a file that it names, cannot be used; nothing is lost.",
    INFEASIBLE: "The budget cannot be met; the message says what can be.",
    STOPPED: "Stopped by Ctrl-C; a training goes on with the same call.",
    TERMINATED: "The same by SIGTERM, as kill, timeout and batch systems send it.",
}
REQUIRED: Any = dataclasses.MISSING
LARGEST = 2**31 - 1
"""Of the numbers that options take: torch counts samples, threads and places in so many bits, or twice as many."""


def option(
    meaning: str,
    metavar: str | None = None,
    default: Any = None,
    *,
    flags: Sequence[str] = (),
    check: Callable[[Any], object] | None = None,
    kind: Callable[..., Any] = typer.Option,
    **more: Any,
) -> Any:
    """A field of a group of options, with its help.

    Parameters
    ----------
    flags
        As it is written, where that is not ``--`` and the name of the field.
    check
        Refuses values that cannot be used, of a group that is :class:`Checked`.
    kind, more
        ``typer.Option`` or ``typer.Argument``, and what it takes.
    """
    shown = kind(*flags, metavar=metavar, help=meaning, **more)
    return field(default=default, metadata={"shown": shown, "check": check})


class Checked:
    """A group of options whose values are checked when it is made."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            check, value = each.metadata["check"], getattr(self, each.name)
            if check is not None and value is not None:
                check(value)


@dataclass(frozen=True)
class PrintOptions:
    """What is printed."""

    as_json: bool = option(
        "Print one JSON document on standard output, and nothing else there.", default=False, flags=("--json",)
    )
    quiet: bool = option("No progress and no remarks on standard error.", default=False, flags=("--quiet", "-q"))
    debug: bool = option("Show the traceback of an error.", default=False, flags=("--debug",))


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM stop what runs here, and mean afterwards what they did; the numbers of those that came.

    They are kept because what they raise may not arrive: a library that is being loaded makes an ImportError of it, or
    goes on. Who ignored them (``nohup``) goes on ignoring them.
    """
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    heard = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]
    try:
        before = {each: signal.signal(each, stop) for each in heard}
    except ValueError:  # of a thread that is not the main one
        before = {}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_FORWARD = re.compile(r"([Pp])ass forward=, a function \(model, batch\) that ((runs|returns)( \w+)+)")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command from a function whose first parameter is its :class:`Output`.

    A parameter whose type is a dataclass stands for a group of options, one a field; its docstring's first line is
    their heading in the help. Adds :class:`PrintOptions`, turns errors into one line and an exit code, and keeps what
    the docstring has under ``Examples`` for the end of the help.
    """
    _, *parameters = inspect.signature(function, eval_str=True).parameters.values()
    groups: dict[str, Any] = {p.name: p.annotation for p in parameters if dataclasses.is_dataclass(p.annotation)}
    text, _, examples = (inspect.getdoc(function) or "").partition("\n\nExamples\n--------\n")

    def run(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
        with _stoppable() as came, _kept_apart() if as_json else contextlib.nullcontext(sys.stdout) as stdout:
            out = Output(as_json, quiet, stdout)
            try:
                options = {name: _home(value) for name, value in options.items()}
                _check_numbers(options)
                for name, group in groups.items():
                    options[name] = group(**{each.name: options.pop(each.name) for each in dataclasses.fields(group)})
                function(out, **options)
                if came:
                    raise KeyboardInterrupt
                if out.unwritten is not None:
                    raise out.unwritten
            except KeyboardInterrupt:
                raise _stopped(out, came) from None
            except Exception as error:
                end = _stopped(out, came) if came else _failed(out, error, debug)
                if end is None:
                    raise
                raise end from None

    run.__name__, run.__doc__ = function.__name__, text
    run.__annotations__ = {}
    run.examples = examples  # type: ignore[attr-defined]
    flat = [option for p in parameters for option in (_options(p.annotation) if p.name in groups else [p])]
    flat += _options(PrintOptions)
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in flat]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return run


def _home(value: Any) -> Any:
    """A path that begins with ``~`` as shells give it, which they do not behind ``=``; other values as they are."""
    if isinstance(value, list):
        return list(map(_home, value))
    with contextlib.suppress(RuntimeError):  # there is no such user
        return value.expanduser() if isinstance(value, Path) else value
    return value


def _failed(out: Output, error: Exception, debug: bool) -> typer.Exit | None:
    """The end of a command that failed, told in one line; None where the traceback is to be seen."""
    out.clear()
    if out.unwritten is not None and error is out.unwritten:
        return _unwritten(out.unwritten)
    if debug or not _is_told(error):
        return None
    code, told = exit_code(error), for_command_line(sentence(error))
    # On a full disk it matters what is whole already.
    told += f"; {out.left}" if out.left and isinstance(error, OSError) else ""
    print(f"spectrim: error: {told}", file=sys.stderr)
    out.document({"error": {"type": type(error).__name__, "message": told, "exit_code": code}})
    return typer.Exit(code)


def _check_numbers(options: Mapping[str, Any]) -> None:
    """Refuse numbers that are too large to be meant."""
    for name, value in options.items():
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UsageError(f"--{name.replace('_', '-')} {value} is too large: write at most {LARGEST:,}")


def _unwritten(error: OSError) -> typer.Exit:
    """The end of a command whose results could not be printed; who stopped reading them, as ``head``, knows."""
    if not isinstance(error, BrokenPipeError):
        why = error.strerror or error
        print(f"spectrim: error: standard output cannot be written: {why}; all else is done", file=sys.stderr)
    return typer.Exit(FAILED)


def _stopped(out: Output, came: Sequence[int]) -> typer.Exit:
    """The end of a command that was stopped, told."""
    out.clear()
    print(f"spectrim: stopped{out.left and '; '}{out.left}", file=sys.stderr)
    return typer.Exit(TERMINATED if signal.SIGTERM in came[:1] else STOPPED)


def _options(group: type) -> Iterator[inspect.Parameter]:
    """The parameters of a command that the fields of a group are."""
    hints = get_type_hints(group)
    title = (group.__doc__ or "").splitlines()[0]
    for each in dataclasses.fields(group):
        shown = each.metadata["shown"]
        shown.rich_help_panel = title
        default = inspect.Parameter.empty if each.default is REQUIRED else each.default
        annotation = Annotated[hints[each.name], shown]
        yield inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@contextlib.contextmanager
def _kept_apart() -> Iterator[TextIO]:
    """Standard output for the document alone: what a model, data or a C library prints goes to standard error."""
    document = sys.stdout
    try:
        number, other = document.fileno(), sys.stderr.fileno()
    except (OSError, ValueError):  # no files but buffers, as tests have
        with contextlib.redirect_stdout(sys.stderr):
            yield document
        return
    document.flush()
    kept = os.dup(number)
    os.dup2(other, number)
    try:
        with (
            open(kept, "w", encoding="utf-8", errors=SPELLED, closefd=False) as file,
            contextlib.redirect_stdout(sys.stderr),
        ):
            yield file
    finally:
        os.dup2(kept, number)
        os.close(kept)


def sentence(error: BaseException) -> str:
    """What an error says; of one of the system without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{str(error.filename)!r}: {error.strerror}"
    if not isinstance(error, SpectrimError) and is_of_memory(error):
        asked = re.search(r"(?:allocate|allocate memory: you tried to allocate) ([\d.]+ \w+)", str(error))
        much = f" for {asked[1]}" if asked else ""
        return f"there is not enough memory{much}: give fewer or smaller samples (--input, --batch, ?batch=)"
    return str(error)


def is_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported for it
    return named or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _is_told(error: BaseException) -> bool:
    """Whether an error is one for people, in one sentence; others are faults, whose traceback is of use."""
    return isinstance(error, SpectrimError | OSError | FloatingPointError) or is_of_memory(error)


def for_command_line(text: str) -> str:
    """What the library says, where the cure that it names is no option: a function that runs the model."""
    return _FORWARD.sub(
        lambda found: (
            f"{'L' if found[1] == 'P' else 'l'}et MODEL name a module of yours whose forward(batch) "
            f"{found[2].replace('the model', 'the network')}, as docs/model-references.md shows"
        ),
        text.replace("; or say so, samples=lambda batch: 1", ""),
    )


def exit_code(error: BaseException) -> int:
    """The exit code of an error."""
    if isinstance(error, UsageError | PlanError | CheckpointError):  # the latter are of files that were named
        return USAGE
    return INFEASIBLE if isinstance(error, InfeasibleBudgetError | ToleranceError) else FAILED


def refuse(context: typer.Context, parameters: Collection[str], why: str) -> None:
    """Refuse options, by the names of their parameters, that stand on the command line."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in parameters and source is not None and source.name == "COMMANDLINE":
            value = context.params[parameter.name]
            given = (parameter.secondary_opts if value is False else parameter.opts)[0]
            shown = " ".join(value) if isinstance(value, list) else value
            raise UsageError(f"{given}{'' if isinstance(value, bool) else f' {shown}'} {why}")
