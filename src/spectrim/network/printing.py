"""How values are printed: units, tables that fit a width, the same as HTML, and what the words in them mean.

Plans, tables of candidates, sites, results, comparisons and the command line all make a :class:`Grid` of what they have
to say, and nothing else lays out text.
"""

from __future__ import annotations

import html
import re
import textwrap
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from spectrim.errors import first_few

T = TypeVar("T")

WIDTH = 96
"""Columns that a printed table has at most."""
MOST = 28
"""Rows that a printed table has at most; of more the middle is folded."""
ROOM = 12  # columns that a cell is not folded below, where its words leave it
# A number that begins a word is one piece.
_PIECE = re.compile(r"(?<!\S)[^\w\s]*\d+\.\d[^\s./_-]*[./_-]*|[^\s./_-]*[./_-]+|[^\s./_-]+|\s+")
_BINARY = ((2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki"))
_DECIMAL = ((1e9, "G"), (1e6, "M"), (1e3, "k"))

# Words of choices, the pattern of choices that they stand in, and what they mean; in the order they are explained.
_WORDS = (
    ("dense", r"\bdense\b", "its weight stays as it is"),
    ("rank r", r"\brank \d", "two thinner layers with r channels between them take the layer's place"),
    ("channel", r"\bchannel, rank", "the whole kernel first, then 1 x 1; of a linear layer two linear layers"),
    ("input", r"\binput, rank", "1 x 1 first, then the whole kernel"),
    ("height-first", r"\bheight-first", "a column of the kernel (k x 1) first, then a row (1 x k)"),
    ("width-first", r"\bwidth-first", "a row of the kernel (1 x k) first, then a column (k x 1)"),
    ("...-first", r"\b(length|depth|\w+\+\w+)-first", "the first of the two layers has these axes of the kernel"),
    ("Tucker-2", r"\bTucker-2,", "1 x 1 to the first number of channels, the kernel to the second, and 1 x 1"),
    ("CP", r"\bCP,", "1 x 1 to so many channels, the kernel on each of them (depthwise), and 1 x 1"),
    ("kernel by axes", r"\bkernel by axes", "one depthwise layer for every axis of the kernel"),
    ("first factor shared", r"first factor shared", "the pairs of the group have their first layer in common"),
    ("second factor shared", r"second factor shared", "they have their second layer in common"),
    ("both factors shared", r"both factors shared", "(a + b): a of the rank shares the first layer, b the second"),
    ("computed once", r"computed once", "all layers of the group see one input, so the common layer runs once"),
    ("n % pattern", r"\d % \S+", "so much of a sparse weight is stored, at positions of this pattern; zeros are not"),
    ("unstructured", r"\bunstructured", "single weights, wherever they are large"),
    ("n:m", r"\b\d+:\d+\b", "of every m weights in a row at most n are stored"),
    ("taps", r"\btaps-", "a part of the kernel is stored: its size, and the corner where it begins"),
    ("n of m channels", r"\d+ of \d+ channels", "the others are removed from all layers that hold them"),
    ("n of m heads", r"\d+ of \d+ heads", "the other heads of attention are removed from all layers around it"),
    ("zero", r"\bzero\b", "the weight is dropped, the bias stays"),
)  # fmt: skip


def show(value: float, unit: str) -> str:
    """A value in a size that people read: ``show(2.4e6, "MAC")`` is ``2.40 M``, since its name says what is counted."""
    unit = unit if unit != "MAC" else ""
    if unit in {"%", "ms"}:
        digits = 2 if unit == "%" or abs(value) >= 1 else 3
        return f"{value:.{digits}f} {unit}"
    for size, prefix in _BINARY if unit == "B" else _DECIMAL:
        if abs(value) >= size:
            return f"{value / size:.2f} {prefix}{unit}"
    return (f"{value:.0f} {unit}" if float(value).is_integer() else f"{value:.3f} {unit}").strip()


def cost_name(cost: str) -> str:
    """A cost as people call it; one of a user's own has its own name."""
    return {"macs": "MACs", "latency": "ms"}.get(cost, cost)


def amount(cost: str, value: float) -> str:
    """What something costs, in three digits, for a column that is named by the cost: ``2.36 M``, ``442 k``."""
    if cost == "latency":
        return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"
    for size, prefix in _BINARY if cost == "bytes" else _DECIMAL:
        if abs(value) >= 0.9995 * size:
            return f"{_three(value / size)} {prefix}{'B' if cost == 'bytes' else ''}"
    text = f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"
    return f"{text} B" if cost == "bytes" else text


def _three(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def change(cost: str, before: float, after: float) -> str:
    """``2.36 M -> 1.20 M``, or the one value where nothing changes."""
    texts = [amount(cost, before), amount(cost, after)]
    return texts[1] if before == after else " -> ".join(texts)


def total(cost: str, before: float, after: float) -> str:
    """A cost of a whole network in a sentence: ``40.6 M -> 17.4 M MACs (43.0 %)``."""
    name = cost_name(cost)
    name = "" if cost in {"latency", "bytes"} else f" {name}"  # their units tell them
    return f"{change(cost, before, after)}{name} ({share(after, before)})"


def share(part: float, whole: float) -> str:
    """A part of a whole: ``42.9 %``."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def percent(lost: float) -> str:
    """A share that is lost: ``0.42 %``, ``12.3 %``, ``< 0.01 %``."""
    value = 100 * lost
    if 0 < value < 0.01:
        return "< 0.01 %"
    return f"{value:.2f} %" if value < 10 else f"{value:.1f} %"


def tail(name: str, length: int = 36) -> str:
    """A module path in so many columns; paths differ at their end, which is kept, from a dot on if there is one."""
    if len(name) <= length:
        return name
    kept = name[3 - length :]
    whole = kept.partition(".")[2]
    return "..." + (whole if 2 * len(whole) >= length else kept)


def count(number: int, noun: str) -> str:
    """``1 layer``, ``1,200 layers``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names for people, the first few of many."""
    return first_few([tail(name, 48) for name in names], most)


def folded(rows: Sequence[T], rest: Callable[[Sequence[T]], T], most: int = MOST) -> list[T]:
    """Rows with the middle of many replaced by one row, ``rest`` of those that are left out."""
    if len(rows) <= most:
        return list(rows)
    first, last = (most + 1) // 2, (most - 1) // 2
    return [*rows[:first], rest(rows[first : len(rows) - last]), *rows[len(rows) - last :]]


def legend(choices: Iterable[str]) -> list[tuple[str, str]]:
    """Words with what they mean, as far as they occur in choices."""
    text = "\n".join(choices)
    return [(word, meaning) for word, pattern, meaning in _WORDS if re.search(pattern, text)]


def reasons(skipped: Iterable[tuple[str, str, str]], where: str, most: int = 5, names: int = 3) -> Iterator[str]:
    """``(name, kind, reason)`` of what is left alone as lines, those of one reason together, the first few of both."""
    grouped: dict[str, list[str]] = {}
    kinds: dict[str, list[str]] = {}
    for name, kind, reason in skipped:
        grouped.setdefault(reason, []).append(name or kind)
        kinds.setdefault(reason, []).append(kind)
    for reason, among in [*grouped.items()][:most]:
        what = [*dict.fromkeys(kinds[reason])]
        yield f"left alone: {listed(among, names)} ({listed(what, 2)}): {reason}"
    if len(grouped) > most:
        yield f"left alone: {sum(map(len, [*grouped.values()][most:])):,} more for other reasons, see {where}"


@dataclass(frozen=True)
class Grid:
    """A table for people."""

    columns: Sequence[str]  # heads; those of columns that are aligned to the right begin with ``>``
    rows: Sequence[Sequence[str]]  # cells as text
    totals: Sequence[Sequence[str]] = ()  # rows below a line
    title: str = ""  # a line or more above the table
    notes: Sequence[str] = ()  # sentences beneath it
    words: Sequence[tuple[str, str]] = ()  # words of the table with what they mean

    def text(self, width: int = WIDTH) -> str:
        """The table in lines of at most ``width`` characters, stacked where columns of numbers leave no room."""
        room = max((len(word) for word, _ in self.words), default=0) + 2
        parts = [
            textwrap.wrap(self.title, width),
            [*self._lines(width)] if self.rows or self.totals else [],
            [line for note in self.notes for line in textwrap.wrap(note, width, subsequent_indent="  ")],
            [
                line
                for word, meaning in self.words
                for line in textwrap.wrap(f"{word:{room}}{meaning}", width, subsequent_indent=" " * room)
            ],
        ]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    def _lines(self, width: int) -> Iterator[str]:
        heads = [column.removeprefix(">") for column in self.columns]
        gap, widths = self._widths(heads, width)
        if sum(widths) + gap * (len(widths) - 1) > width:
            yield from self._stacked(heads, width)
            return

        def line(cells: Sequence[str]) -> Iterator[str]:
            folds = [_folded(cell, w) for cell, w in zip(cells, widths, strict=True)]
            for number in range(max(map(len, folds), default=0)):
                texts = [fold[number] if number < len(fold) else "" for fold in folds]
                yield (
                    (" " * gap)
                    .join(
                        text.rjust(w) if column.startswith(">") else text.ljust(w)
                        for text, w, column in zip(texts, widths, self.columns, strict=True)
                    )
                    .rstrip()
                )

        rule = (" " * gap).join("-" * w for w in widths)
        if any(heads):
            yield from line(heads)
            yield rule
        for row in self.rows:
            yield from line(row)
        if self.totals and self.rows:
            yield rule
        for row in self.totals:
            yield from line(row)

    def _widths(self, heads: Sequence[str], width: int) -> tuple[int, list[int]]:
        """Spaces between columns, and the columns: as the cells need them, those of words narrower without room."""
        cells = [heads, *self.rows, *self.totals]
        widths = [max(len(line) for row in cells for line in row[place].split("\n")) for place in range(len(heads))]
        words = [number for number, column in enumerate(self.columns) if not column.startswith(">")]
        least = [max(ROOM, *(len(p) for row in cells for p in _PIECE.findall(row[n]))) for n in range(len(heads))]
        gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= width else 1
        while sum(widths) + gap * (len(widths) - 1) > width:
            roomy = [number for number in words if widths[number] > least[number]]
            if not roomy:
                break
            widths[max(roomy, key=lambda number: widths[number])] -= 1
        return gap, widths

    def _stacked(self, heads: Sequence[str], width: int) -> Iterator[str]:
        """Rows where there is no room for columns, as on a phone: the first cell, and under it the others by name."""
        for first, *rest in [*self.rows, *self.totals]:
            yield from textwrap.wrap(first, width)
            held = [(" ".join(h.split()), " ".join(c.split())) for h, c in zip(heads[1:], rest, strict=True) if c]
            pairs = [f"{head} {cell}".strip() for head, cell in held]
            # A number stays beside its unit and its name.
            text = "; ".join(p.replace(" ", "\N{NO-BREAK SPACE}") if len(p) < width - 2 else p for p in pairs)
            indented = textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
            yield from (line.replace("\N{NO-BREAK SPACE}", " ") for line in indented)

    def html(self) -> str:
        """The table as HTML that takes fonts and colours from where it stands, and gives none to anything else."""

        def row(cells: Sequence[str], tag: str = "td", style: str = "") -> str:
            made = (
                f'<{tag} style="text-align:{"right" if column.startswith(">") else "left"};{style}">'
                f"{_marked(cell)}</{tag}>"
                for cell, column in zip(cells, self.columns, strict=True)
            )
            return f"<tr>{''.join(made)}</tr>"

        heads = [column.removeprefix(">") for column in self.columns]
        head = f"<thead>{row(heads, 'th')}</thead>" if any(heads) else ""
        body = "".join(row(cells) for cells in self.rows)
        foot = "".join(row(cells, style="font-weight:bold") for cells in self.totals)
        table = f"<table>{head}<tbody>{body}{foot}</tbody></table>" if self.rows or self.totals else ""
        title = f"<p>{_marked(self.title)}</p>" if self.title else ""
        notes = "".join(f'<p style="margin:0;font-size:smaller">{_marked(note)}</p>' for note in self.notes)
        words = "".join(f"<dt>{_marked(word)}</dt><dd>{_marked(meaning)}</dd>" for word, meaning in self.words)
        folded = f"<details><summary>what the words mean</summary><dl>{words}</dl></details>" if words else ""
        return f"<div>{title}{table}{notes}{folded}</div>"


def _folded(cell: str, width: int) -> list[str]:
    """A cell in lines of at most so many characters, broken between words, or in a name at its dots and dashes."""
    lines: list[str] = []
    for whole in cell.split("\n"):
        lines.append("")
        for part in _PIECE.findall(whole):
            if len(lines[-1] + part.rstrip()) > width:
                lines.append("")
            lines[-1] = (lines[-1] + part).lstrip()
    return [line.rstrip() for line in lines]


def _marked(text: str) -> str:
    return html.escape(text.replace(" -> ", " \u2192 "))


class Printed:
    """What prints as a table: ``str`` is the table, notebooks show it, and ``to_pandas`` has all of it."""

    @abstractmethod
    def _grid(self) -> Grid:
        """The table that is printed."""

    @abstractmethod
    def _records(self) -> list[dict[str, Any]]:
        """All of it as plain values, one dict a row."""

    def __str__(self) -> str:
        return self._grid().text()

    def _repr_html_(self) -> str:
        return self._grid().html()

    def to_pandas(self) -> Any:
        """All rows as a ``pandas.DataFrame``, one column a key of ``rows()``.

        Raises
        ------
        ModuleNotFoundError
            Without pandas; the rows themselves need none.
        """
        try:
            import pandas  # pyright: ignore[reportMissingImports]  (no extra of ours installs it)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_pandas() needs pandas, which is not installed: pip install pandas, or take the plain rows"
            ) from error
        return pandas.DataFrame(self._records())


def flat(costs: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, float]:
    """Costs as columns: ``macs`` and ``macs_dense`` beside it, for every cost."""
    return {key: value for cost in dense for key, value in ((cost, costs[cost]), (f"{cost}_dense", dense[cost]))}
