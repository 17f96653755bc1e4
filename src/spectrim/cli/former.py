"""Options of methods that were options of commands: they work in 0.2, with a note of the new spelling.

To go with version 0.3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from spectrim.cli.common import Output
from spectrim.cli.methods import LOW_RANK
from spectrim.cli.references import UsageError


@dataclass(frozen=True)
class Former:
    """An option as it was written, and the method and the method's option that it is now; without one, ``low-rank``
    beside the method."""

    flag: str
    method: str
    option: str = ""


FORMER = {
    "pattern": Former("--pattern", "low-rank-plus-sparse", "patterns"),
    "low_rank_share": Former("--low-rank-share", "low-rank-plus-sparse", "share"),
    "rule": Former("--rule", "principal-filters", "rule"),
    "pooling": Former("--pooling", "principal-filters", "pooling"),
    "with_low_rank": Former("--with-low-rank", "principal-filters"),
    "rank_epochs": Former("--rank-epochs", "learned-ranks", "rank_epochs"),
    "rank_lr": Former("--rank-lr", "learned-ranks", "rank_lr"),
    "c_steps": Former("--c-steps", "learned-ranks", "c_steps"),
    "energy": Former("--energy", "learned-ranks", "energy"),
    "multiplier": Former("--multiplier", "learned-ranks", "multiplier"),
    "cost": Former("--cost", "learned-ranks", "cost"),
}


def formerly(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command with a parameter ``method`` take former options, which are not in its help."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(out: Output, *, method: list[str] | None, **options: Any) -> None:
            given = {name: options.pop(name) for name in names}
            function(out, method=with_former_options(out, method, given), **options)

        signature = inspect.signature(function, eval_str=True)
        hidden = []
        for name in names:
            kind: Any = (list[str] | None) if FORMER[name].option else bool
            kind = Annotated[kind, typer.Option(FORMER[name].flag, hidden=True)]
            default = None if FORMER[name].option else False
            hidden.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        parameters = [*signature.parameters.values(), *hidden]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def with_former_options(
    out: Output, method: Sequence[str] | None, given: Mapping[str, Sequence[str] | bool | None]
) -> list[str]:
    """The values of ``--method`` with those of former options among their own."""
    methods, were = list(method or ()), []
    for name, value in given.items():
        if not value:
            continue
        former, values = FORMER[name], [] if isinstance(value, bool) else list(value)
        written = " ".join((former.flag, *values))
        places = [n for n, text in enumerate(methods) if text.partition(":")[0] == former.method]
        if not places:
            asked = " --method ".join(methods or (LOW_RANK,))
            raise UsageError(f"{written} is for --method {former.method}, not for --method {asked}")
        if former.option:
            methods[places[0]] += f"{',' if ':' in methods[places[0]] else ':'}{former.option}={'+'.join(values)}"
        else:
            methods.append(LOW_RANK)
        were.append(written)
    if were:
        now = " ".join(f"--method {text}" for text in methods)
        out.say(f"spectrim: note: {' '.join(were)} goes with the next release: write {now}")
    return methods
