"""How the program shows its help, and how it says that a command line cannot be read."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from spectrim.cli.common import PrintOptions
from spectrim.errors import did_you_mean
from spectrim.selection.budget import COSTS, OTHER_NAMES

_STACKED = 60
"""Columns of a terminal below which what an option means stands under it and not beside it: a phone's."""
_WIDEST = 80
# What stands for the value of an option that does not say so itself, by its type.
_KINDS = {"int": " N", "float": " NUMBER", "path": " PATH", "list": " TEXT", "str": " TEXT"}
# What is limited is a value of --budget, and no option of its own.
_BUDGETED = {f"--{cost}": "--budget" for cost in (*COSTS, *OTHER_NAMES)}
# What click raises for command lines that it cannot read; its module differs between versions of typer.
_Unread: Any = typer.BadParameter.__base__


class Command(TyperCommand):
    """A command whose help is in sections, one for each group of options, and ends with examples."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.width = _width()
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = getattr(parameter, "rich_help_panel", None)
                title = title or ((PrintOptions.__doc__ or "") if parameter.name == "help" else "Options")
                kinds = _KINDS if parameter.param_type_name == "option" else {}
                name = re.sub(r" ?<(\w+)[^>]*>", lambda found, kinds=kinds: kinds.get(found[1], ""), record[0])
                sections.setdefault(title, []).append((name, record[1]))
        for title, records in sections.items():
            _section(formatter, title, records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                formatter.write("\n".join(f"  {line}" for line in _examples(self.epilog, formatter.width - 2)) + "\n")


class Program(TyperGroup):
    """The program: lists its commands in whole sentences, and refuses a command line in one."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.width = _width()
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        _section(formatter, "Commands", [(name, (each.help or "").split("\n\n")[0]) for name, each in commands])
        records = [parameter.get_help_record(ctx) for parameter in self.get_params(ctx)]
        _section(formatter, "Options", [record for record in records if record is not None])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            pairs = [tuple(line.split(maxsplit=1)) for line in self.epilog.splitlines()]
            _section(formatter, "Exit codes", pairs)  # type: ignore[arg-type]

    def main(self, args: Sequence[str] | None = None, *more: Any, standalone_mode: bool = True, **named: Any) -> Any:
        if not standalone_mode:
            return super().main(args, *more, standalone_mode=False, **named)
        given = sys.argv[1:] if args is None else args
        try:
            _check_texts(given)
            code = super().main(args, *more, standalone_mode=False, **named)
        except _Unread as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # of click and of what typer holds of it
                print(error.ctx.get_help(), file=sys.stderr)
                sys.exit(error.exit_code)
            path = error.ctx.command_path if error.ctx is not None else "spectrim"
            # On one line and without a full stop.
            said = " ".join(_quoted(error, given).split()).rstrip(".")
            see = " See" if said.endswith("?") else "; see"
            print(f"spectrim: error: {said}{see} {path} --help", file=sys.stderr)
            if "--json" in given:
                document = {"type": "UsageError", "message": said, "exit_code": error.exit_code}
                print(json.dumps({"error": document}, indent=1))
            sys.exit(error.exit_code)
        except typer.Abort:
            sys.exit(130)
        sys.exit(code if isinstance(code, int) else 0)


def _check_texts(args: Sequence[str]) -> None:
    """Refuse an empty value, which as a folder would be the one where one is, and what no path and no name holds."""
    for before, each in itertools.pairwise(["spectrim", *args]):
        if "\0" in each:
            raise _Unread(f"{each!r} holds a NUL, which no path and no name does: write it without")
        if not each or (each.startswith("--") and each.endswith("=")):
            place = f"behind {before}" if not each else f"behind {each[:-1]}"
            raise _Unread(f"nothing stands {place}: is a variable of the shell empty?")


def _quoted(error: Any, args: Sequence[str]) -> str:
    """What click says, with the value that cannot be read beside the option that it stands behind."""
    if (option := getattr(error, "option_name", None)) and error.ctx:  # what click asks shares a few letters only
        known = [name for parameter in error.ctx.command.params for name in parameter.opts]
        return f"{error.message.rstrip('.')}.{did_you_mean(option, known, _BUDGETED)}".rstrip(".")
    message, parameter = error.format_message(), getattr(error, "param", None)
    _, colon, reason = message.partition(": ")
    for option in getattr(parameter, "opts", ()) if colon else ():
        values = [after for before, after in itertools.pairwise(args) if before == option]
        values += [each.partition("=")[2] for each in args if each.startswith(f"{option}=")]
        if values:
            # Of several the last one counts, and is what was read.
            return f"{option} {values[-1]!r}: {reason.partition(', unable')[0]}"
    return message


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST) - 2


def _section(formatter: Any, title: str, records: Sequence[tuple[str, str]]) -> None:
    with formatter.section(title.rstrip(".")):
        if formatter.width >= _STACKED:
            formatter.write_dl(records)
            return
        for name, text in records:
            wrapped = textwrap.wrap(text, formatter.width - 6, break_long_words=False, break_on_hyphens=False)
            formatter.write("\n".join([f"  {name}", *(f"      {line}" for line in wrapped)]) + "\n")


def _examples(text: str, width: int) -> list[str]:
    """Lines as they are; commands, which begin with ``$``, go on as a shell takes them, an option beside its value."""
    lines: list[str] = []
    for line in text.splitlines():
        first, *parts = re.split(r" (?=-)", line)
        lines.append(first)
        for part in parts:
            if len(lines[-1]) + len(part) + 3 <= width:
                lines[-1] += f" {part}"
            else:
                lines[-1] += " \\"
                lines.append(f"    {part}")
    return lines
