"""Tables and figures from the result files, written into README.md and docs/.

    python -m benchmarks.report

The same results give the same bytes. Only what stands between the two marks of a page is replaced. Words come from
:mod:`benchmarks.questions`, and every number from a result.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import schema
from benchmarks.curves import LEARNED, PUBLISHED, Result, averaged, curves, networks
from benchmarks.environment import ROOT
from benchmarks.figures import figures
from benchmarks.headline import detector
from benchmarks.headline.tables import HEAD, beside_others
from benchmarks.printed import output_of
from benchmarks.questions import CAPTIONS, NARROW, NO_NETWORK, QUESTIONS, WORDS, Question, Words

NONE = "No results have been recorded yet."
_CELL = 140  # characters of a cell that is still read


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="folder that holds README.md, docs and benchmarks/results"
    )
    parser.add_argument("--example", action="store_true", help="run the README's example too and keep what it prints")
    options = parser.parse_args(arguments)
    root = options.root
    if options.example:
        readme = root / "README.md"
        readme.write_text(placed(readme.read_text("utf-8"), example_output(readme), "output"), encoding="utf-8")
    for path in write(root):
        print(path.relative_to(root), file=sys.stderr)
    return 0


def load(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, by experiment."""
    return [schema.checked(path) for path in sorted(folder.glob("*.json"))]


def write(root: Path) -> list[Path]:
    """Bring README.md and docs/ in line with ``benchmarks/results``; the paths written."""
    results = load(root / "benchmarks" / "results")
    pictures = figures(results)
    folder = root / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.svg")):
        if path.name not in pictures:
            path.unlink()
    written = []
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
        written.append(folder / name)
    rows, count = front_rows(results), counted(results)
    readme, docs = root / "README.md", root / "docs"
    landing = {"headline": headline(results), "example": example(readme), "rows": rows, "claims": count}
    for path, texts in (
        (readme, {"rows": rows, "claims": count}),
        (docs / "index.md", landing),
        (docs / "claims.md", {"results": ledger(results)}),
        (docs / "benchmarks.md", {"results": page(results, pictures)}),
        (docs / "tutorials" / "text-detector.md", {"results": _detector(results)}),
    ):
        document = path.read_text(encoding="utf-8")
        for name, text in texts.items():
            document = placed(document, text, name)
        path.write_text(document, encoding="utf-8")
        written.append(path)
    return written


def _detector(results: Sequence[Result]) -> str:
    held = next((result for result in results if result["experiment"] == "headline"), None)
    return detector.table(held["rows"], held.get("times", [])) if held else NONE


def marks(name: str = "results") -> tuple[str, str]:
    """The comments between which a generated part of a page stands."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def placed(document: str, text: str, name: str = "results") -> str:
    """A document with ``text`` between its marks; ValueError if it does not hold each mark once, in order."""
    begin, end = marks(name)
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"expected {begin} and, after it, {end}, each once")
    head, _, rest = document.partition(begin)
    return f"{head}{begin}\n{text.strip()}\n{end}{rest.partition(end)[2]}"


# The README and the landing page.

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def example_output(readme: Path) -> str:
    """What the first code of the README prints, as a block."""
    import torch

    code = _BLOCK.search(readme.read_text(encoding="utf-8"))
    assert code, f"{readme} holds no code"
    torch.manual_seed(0)
    return f"```text\n{output_of(code[1], str(readme), {}).rstrip()}\n```"


def example(readme: Path) -> str:
    """The first code of the README with what it prints."""
    text = readme.read_text(encoding="utf-8")
    code = _BLOCK.search(text)
    begin, end = marks("output")
    return f"{code[0] if code else ''}\n\n{text.partition(begin)[2].partition(end)[0].strip()}"


def headline(results: Sequence[Result]) -> str:
    """The picture in one sentence, at the budget where the arms are well apart."""
    found = next((result for result in results if result["experiment"] == "front_neighbours"), None)
    if found is None:
        return NONE
    dense, *rows = found["rows"]
    budget = min({row["macs"] for row in rows if row["arm"] == "Spectrim"}, key=lambda macs: abs(macs - 17.4e6))
    best: dict[str, float] = {}
    for row in rows:
        if abs(row["macs"] - budget) < 0.03 * budget:
            best[row["arm"]] = max(row["test_accuracy"], best.get(row["arm"], 0))
    others = ", ".join(f"{arm} {value:.1f} %" for arm, value in best.items() if arm != "Spectrim")
    return (
        f"**{best['Spectrim']:.1f} %** of the test images right with **{budget / dense['macs']:.0%} of the work** and "
        f"no training (ResNet-20 on CIFAR-10; dense {dense['test_accuracy']:.1f} %; {others})."
    )


def front_rows(results: Sequence[Result]) -> str:
    """What one call did to networks that people know: a row each."""
    found = next((result for result in results if result["experiment"] == "front_rows"), None)
    if found is None:
        return NONE
    head = ("network", "budget", "metric", "file, MB", "milliseconds (batch)", "minutes")
    rows = [
        (
            row["network"],
            _budget(row["budget"]),
            f"{row['metric']}: {_figure(row['metric_before'])} → {_figure(row['metric_after'])}",
            f"{row['file_mb_before']:.1f} → {row['file_mb_after']:.1f}",
            f"{row['ms_before']:.1f} → {row['ms_after']:.1f} ({row['batch']})",
            f"{row['minutes']:.1f}",
        )
        for row in found["rows"]
    ]
    machine = found["environment"]
    threads = found["config"]["threads"]
    said = (
        f"One call each, at full width and without training. Milliseconds on {machine['cpu']}, "
        f"{threads} thread{'s' if threads > 1 else ''}; "
        f"minutes are those of the call ({found['date']})."
    )
    return f"{table(head, rows)}\n\n{said}"


def _budget(text: str) -> str:
    cost, _, value = text.partition("=")
    return f"{value} of the {({'macs': 'work', 'latency': 'time'}).get(cost, cost)}"


def _figure(value: float) -> str:
    """Percents to one digit, shares of one to three."""
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"


def counted(results: Sequence[Result]) -> str:
    """The claims in one line."""
    found = [claim["met"] for _, _, claim in claims(results)]
    if not found:
        return NONE
    missed = len(found) - sum(found)
    return f"Of {len(found)} claims that were set before measuring, {sum(found)} are met and {missed} are not."


# The ledger of claims.


def ledger(results: Sequence[Result]) -> str:
    """Every claim, by question: in plain words, what was asked for, what was measured, and why it was missed."""
    found = claims(results)
    if not found:
        return NONE
    parts = [counted(results)]
    for question in [*QUESTIONS, _others(found)]:
        mine = {key: [(r, c) for k, r, c in found if k == key] for key in question.claims}
        if any(mine.values()):
            parts += [f"## {question.title}", question.text]
        for key, entries in mine.items():
            parts += _entry(key, entries) if entries else []
    return "\n\n".join(part for part in parts if part)


def _entry(key: str, entries: Sequence[tuple[Result, Mapping[str, Any]]]) -> list[str]:
    words = WORDS.get(key, Words(key, ""))
    met = [claim["met"] for _, claim in entries]
    state = "met" if all(met) else "missed" if not any(met) else f"met in {sum(met)} of {len(met)}"
    parts = [f"### {key}. {words.title}", f"**{state.capitalize()}.** {words.what}"]
    for result, claim in entries:
        where = f" ({narrow})" if (narrow := _narrow(key, result)) else ""
        # Claims of one file may be measured on several days.
        on = {**result, **result.get("measured", {}).get(key, {})}
        lines = [
            f"- asked for: {_plain(claim['target'])}",
            *_listed(f"- measured{where}:", _worded(claim, words)),
            f"- by `{claim['command']}` on {on['environment']['cpu']}, {on['date']}",
        ]
        if len(entries) > 1:
            named = result["experiment"].replace("_", " ")
            lines = [f"- {named}: {'met' if claim['met'] else 'missed'}", *(f"    {line}" for line in lines)]
        parts.append("\n".join(lines))
    if words.missed and not all(met):
        parts.append(f"Why: {words.missed}")
    return parts


def _worded(claim: Mapping[str, Any], words: Words) -> Mapping[str, Any]:
    """A claim whose value below zero is told in words for that, if there are any."""
    if not words.below_zero or claim["value"] >= 0:
        return claim
    return {**claim, "value": -claim["value"], "unit": words.below_zero}


def _value_and_figures(claim: Mapping[str, Any]) -> tuple[str, str]:
    """The value, and the figures behind it; these alone where one number stands for several."""
    note = claim.get("note", "")
    if note and (";" in claim["unit"] or "above target" in claim["unit"] or "lost above" in claim["unit"]):
        return "", note
    return f"{show(claim['value'])} {claim['unit']}", "" if note.startswith("{") else note


def _measured(claim: Mapping[str, Any]) -> str:
    """Both in one line."""
    value, figures = _value_and_figures(claim)
    return f"{value} ({figures})" if value and figures else value or figures


def _listed(head: str, claim: Mapping[str, Any]) -> list[str]:
    """What was measured behind its head; of many figures each by itself."""
    text, (value, figures) = _measured(claim), _value_and_figures(claim)
    pieces = re.split(r"; |(?<=\D)\. (?=\w)", figures)
    if len(text) <= 2 * _CELL or len(pieces) < 3:
        return [f"{head} {_plain(text)}"]
    return [f"{head} {_plain(value)}".rstrip(), *(f"    - {_plain(piece)}" for piece in pieces)]


def _narrow(key: str, result: Result) -> str:
    """That a claim was measured on narrower networks than it names; empty if it was not."""
    return "" if key in NO_NETWORK else NARROW.get(result["experiment"], "")


def _short(claim: Mapping[str, Any]) -> str:
    """The same in a cell: a note of some length is left to the page of claims."""
    measured = _measured(claim)
    value = f"{show(claim['value'])} {claim['unit']}"
    return measured if len(measured) <= _CELL else value


def _plain(text: str) -> str:
    """Text in which Markdown sees no markup."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_").replace("|", "\\|")


def _others(found: Sequence[tuple[str, Result, Any]]) -> Question:
    known = {key for question in QUESTIONS for key in question.claims}
    return Question("Other results", "", tuple(dict.fromkeys(key for key, _, _ in found if key not in known)), ())


# The page of benchmarks.


def page(results: Sequence[Result], pictures: Iterable[str] = ()) -> str:
    """A section for each question: figures with captions, the figures at a glance, and all tables, folded."""
    if not results:
        return NONE
    pictures, found = set(pictures), claims(results)
    known = {name for question in QUESTIONS for name in question.results}
    rest = tuple(result["experiment"] for result in results if result["experiment"] not in known)
    parts: list[str] = []
    for question in [*QUESTIONS, dataclasses.replace(_others(found), results=rest)]:
        tables = [result for name in question.results for result in results if result["experiment"] == name]
        if not tables and not any(key in question.claims for key, _, _ in found):
            continue
        parts += [f"## {question.title}", question.text]
        parts += [
            figure(name, schemes=f"{name}-dark.svg" in pictures)
            for name in question.figures
            if f"{name}.svg" in pictures
        ]
        parts += [glance] if (glance := _glance(question, results)) else []
        parts += [folded(result) for result in tables]
    return "\n\n".join(part for part in parts if part)


def figure(name: str, *, schemes: bool = True) -> str:
    """A figure with its caption; of one that has a dark form, the one that goes with the page."""
    caption = CAPTIONS[name]
    files = (f"{name}.svg#only-light", f"{name}-dark.svg#only-dark") if schemes else (f"{name}.svg",)
    shown = "\n".join(f"![{caption.alternative}](figures/{file})" for file in files)
    return f'<figure markdown="1">\n\n{shown}\n\n<figcaption markdown="1">{caption.text}</figcaption>\n\n</figure>'


def _glance(question: Question, results: Sequence[Result]) -> str:
    """Short tables of a section, before the raw ones."""
    parts = []
    if "front_rows" in question.results and (rows := front_rows(results)) != NONE:
        parts.append(rows)
    held = next((result for result in results if result["experiment"] == "headline"), None)
    if held and "headline" in question.results and (lines := beside_others(held["rows"])):
        parts.append(table(HEAD, lines))
    if "resnet20_finetune" in question.results and accuracies(results):
        parts.append(accuracies(results))
    rows = [
        (
            f"[{key}](claims.md#{_anchor(key)})",
            WORDS.get(key, Words(key, "")).title + (f" ({narrow})" if (narrow := _narrow(key, result)) else ""),
            _plain(claim["target"]),
            _plain(_short(_worded(claim, WORDS.get(key, Words(key, ""))))),
            _met(claim),
        )
        for key, result, claim in claims(results)
        if key in question.claims
    ]
    if rows:
        parts.append(table(("claim", "what", "asked for", "measured", "met"), rows))
    return "\n\n".join(parts)


def _anchor(key: str) -> str:
    """Where the claim stands on the page of claims: the slug of its heading."""
    heading = f"{key}. {WORDS.get(key, Words(key, '')).title}"
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def folded(result: Result) -> str:
    """Everything of one result under a line to open: how it came about, and its tables."""
    machine, code, experiment = result["environment"], result["code"], result["experiment"]
    title = experiment.replace("_", " ")
    where = machine.get("gpu") or machine.get("cpu")
    commit = (code.get("commit") or "no commit")[:12] + (" with changes" if code.get("changed") else "")
    narrow = f", {NARROW[experiment]}" if experiment in NARROW else ""
    facts = (
        f"{result['date']}, {show(result['wall_seconds'])} s, seeds {', '.join(map(str, result['seeds'])) or 'none'}; "
        f"{where}, {machine.get('cores')} cores, load {machine.get('load_average')} at the start; Python "
        f"{machine.get('python')}, torch {machine.get('torch')}, spectrim {code.get('spectrim')}, {commit}."
    )
    parts = [facts]
    parts += ["\n".join(f"- {_plain(note)}" for note in result["notes"])] if result.get("notes") else []
    lists = {k: v for k, v in result.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    for name, rows in lists.items():
        parts += [] if name == "rows" else [f"**{name.replace('_', ' ')}**"]
        parts.append(records([_said(row, experiment) for row in rows]))
    count = sum(len(rows) for rows in lists.values())
    inside = "\n\n".join(parts)
    return (
        f'<details markdown="1">\n<summary>{title}{narrow}: {count} row{"s" if count != 1 else ""}'
        f", how and when they were measured</summary>\n\n{inside}\n\n</details>"
    )


def _said(row: Mapping[str, Any], experiment: str) -> dict[str, Any]:
    """A row whose network says that it is narrower than its name."""
    if experiment in NARROW and "network" in row and "width" in NARROW[experiment]:
        return {**row, "network": f"{row['network']} ({NARROW[experiment]})"}
    return dict(row)


def claims(results: Sequence[Result]) -> list[tuple[str, Result, Mapping[str, Any]]]:
    """``(id, result, claim)`` of all results, by letter and number of the id."""

    def order(item: tuple[str, Result, Any]) -> tuple[Any, ...]:
        letters, digits = re.match(r"(\D*)(\d*)", item[0]).groups()  # type: ignore[union-attr]
        return letters, int(digits or 0), item[0], item[1]["experiment"]

    return sorted(((key, r, claim) for r in results for key, claim in r.get("claims", {}).items()), key=order)


def _met(claim: Mapping[str, Any]) -> str:
    return "yes" if claim["met"] else "**no**"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *(line(row) for row in rows)])


def records(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of records: their keys in the order they first appear."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return table([key.replace("_", " ") for key in keys], [[show(row.get(key), key) for key in keys] for row in rows])


def show(value: Any, key: str = "") -> str:
    """A value for people: MACs and parameters in millions (M) or billions (G), other numbers to five digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and key.startswith(("macs", "parameters")) and abs(value) >= 1e4:
        return f"{value / 1e9:.2f} G" if abs(value) >= 1e9 else f"{value / 1e6:.2f} M"
    if isinstance(value, float):
        return f"{value:.2f}" if "accuracy" in key or "held_out" in key else f"{value:.5g}"
    return str(value).replace("<", "&lt;")


# Accuracy against MACs.


def accuracies(results: Sequence[Result]) -> str:
    """Test accuracy in percent by network and MACs, one column a way of getting there; empty without results."""
    blocks = []
    for network in networks(results):
        found = curves(results, network)
        # Everything at a budget stands in one line, although a method may stay a little below it.
        budgets = [x for x, _ in averaged([p for points in found.values() for p in points])]
        found[LEARNED] = [p for p in PUBLISHED[network] if any(abs(p[0] - b) < 0.03 * p[0] for b in budgets)]
        columns = [label for label in found if label != "dense"]
        rows = []
        for budget in budgets:
            near = {
                label: next((y for x, y in found[label] if abs(x - budget) < 0.03 * budget), None) for label in found
            }
            cells = ["-" if near[label] is None else f"{near[label]:.2f}" for label in columns]
            if near.get("dense") is not None:
                rows.append((f"{budget:.2f} (dense: {near['dense']:.2f} %)", *cells))
            else:
                rows.append((f"{budget:.2f}", *cells))
        blocks.append(table((f"{network.replace('resnet', 'ResNet-')}, MMAC", *columns), rows))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    sys.exit(main())
