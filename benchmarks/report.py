"""Tables and figures from the result files, written into README.md and docs/.

    python -m benchmarks.report

The same results give the same bytes. Only what stands between the two marks of a page is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.curves import LEARNED, PUBLISHED, Result, averaged, curves, networks
from benchmarks.environment import ROOT
from benchmarks.figures import figures

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NONE = "No results have been recorded yet."

TITLES = {
    "F1": "demo on digits, trained, compressed and fine-tuned",
    "F2": "ResNet-20 on CIFAR-10 without fine-tuning",
    "F3": "ResNet-20 on CIFAR-10, fine-tuned with the dense teacher",
    "F4": "ResNet-56 on CIFAR-10, fine-tuned with the dense teacher",
    "F5": "lead over Torch-Pruning 1.6.1, same loop",
    "F6": "time saved against MACs saved on the CPU",
    "F7": "latency budget of half the dense time",
    "F8": "seconds to analyse ResNet-50 at 224 x 224",
    "F9": "memory to analyse ResNet-50 at 224 x 224",
    "L1": "C step of learned ranks: its ranks, its time",
    "L2": "ranks over C steps at a multiplier given by hand",
    "L3": "ResNet-20 on CIFAR-10, learned ranks",
    "L4": "ResNet-56 on CIFAR-10, learned ranks",
    "L5": "VGG-16 on CIFAR-10 with learned ranks against ResNets",
    "L6": "lead of learned ranks over one-shot plans, same epochs",
    "L7": "stated budgets against finished networks",
    "J1": "ranks and compression factors of the joint decompositions",
    "J2": "FLOPs of the joint decompositions",
    "J3": "joint, separate and mixed tables at equal parameters",
    "J4": "ResNet-34 with shared factors on CIFAR-10",
    "J5": "latency of Bi-JSVD against LJSVD",
    "J6": "MiniLM: output error of shared against separate factors",
    "S1": "low-rank step without decompositions against the SVD",
    "S2": "planted low rank + sparse: support found again, failures told",
    "S3": "error on held-out images against calibration samples",
    "S4": "low rank + sparse against its parts, equal stored bytes",
    "S5": "VGG-16 on CIFAR-10, 15x fewer stored bytes",
    "S5 (pass)": "whole pass over networks of ImageNet's shapes",
    "S6": "linear layer as low rank + sparse: time, and choice of the kernel",
    "P1": "principal filter analysis against the published numbers",
    "P2": "ResNet-20, 30 % fewer MACs by removing filters, not trained",
    "P2 (ResNet-56)": "ResNet-56, 30 % fewer MACs by removing filters, not trained",
    "P3": "ResNet-56, 2.13x fewer MACs by removing filters, with the teacher",
    "P4": "VGG-16 on CIFAR-10, 8x fewer parameters by removing filters",
    "N6": "models of transformers ship",
    "P5": "filters kept for animals and for vehicles of CIFAR-10",
    "P6": "filters removed from many architectures",
    "P7": "time of principal filter analysis",
    "N2": "networks that strangers bring",
    "N3": "files with something changed in them",
    "N4": "commands and calls that write, killed",
    "R1": "the same images cut into batches of several sizes",
    "R2": "hidden channels in other units",
    "R3": "reconstruction against none, on data that was not fitted",
    "R4": "compress from end to end",
    "R5": "layer calls of apply, by depth",
    "R6": "calibration",
    "R7": "table with sensitivity",
    "R9": "CIFAR ResNets without training, default call, 1,024 images",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="folder that holds README.md, docs and benchmarks/results"
    )
    root = parser.parse_args(arguments).root
    for path in write(root):
        print(path.relative_to(root), file=sys.stderr)
    return 0


def load(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, by experiment."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def write(root: Path) -> list[Path]:
    """Bring README.md and docs/ in line with ``benchmarks/results``; the paths written."""
    results = load(root / "benchmarks" / "results")
    pictures = figures(results)
    folder = root / "docs" / "figures"
    written = []
    for path in sorted(folder.glob("*.svg")):
        if path.name not in pictures:
            path.unlink()
    for name, content in pictures.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        written.append(folder / name)
    for path, text in (
        (root / "README.md", readme(results)),
        (root / "docs" / "benchmarks.md", page(results, pictures)),
    ):
        path.write_text(placed(path.read_text(encoding="utf-8"), text), encoding="utf-8")
        written.append(path)
    return written


def placed(document: str, text: str) -> str:
    """A document with ``text`` between its marks.

    Raises
    ------
    ValueError
        If the document does not hold each mark once, in order.
    """
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"expected {BEGIN} and, after it, {END}, each once")
    head, _, rest = document.partition(BEGIN)
    return f"{head}{BEGIN}\n{text.strip()}\n{END}{rest.partition(END)[2]}"


# Pages.


def readme(results: Sequence[Result]) -> str:
    """The short form: a row for each claim, and accuracies."""
    found = claims(results)
    if not found:
        return NONE
    rows = [(key, TITLES.get(key, name), claim["target"], _measured(claim), _met(claim)) for key, name, claim in found]
    parts = [table(("", "what", "target", "measured", "met"), rows)]
    parts += [accuracies(results)] if accuracies(results) else []
    return "\n\n".join(parts)


def _measured(claim: dict[str, Any]) -> str:
    """The value, or the figures behind it where one number stands for several."""
    if claim.get("note") and (";" in claim["unit"] or "above target" in claim["unit"]):
        return claim["note"]
    return f"{show(claim['value'])} {claim['unit']}"


def page(results: Sequence[Result], pictures: Iterable[str] = ()) -> str:
    """The long form: claims with commands, figures, and every table of every result."""
    if not results:
        return NONE
    rows = [
        (key, TITLES.get(key, name), claim["target"], show(claim["value"]), claim["unit"], _met(claim),
         claim.get("note", ""), f"`{claim['command']}`")
        for key, name, claim in claims(results)
    ]  # fmt: skip
    parts = ["## Claims", table(("", "what", "target", "value", "unit", "met", "details", "command"), rows)]
    if accuracies(results):
        parts += ["## Accuracy", accuracies(results)]
    parts += [f"![{name.removesuffix('.svg').replace('-', ' ')}](figures/{name})" for name in pictures]
    for result in results:
        parts += _section(result)
    return "\n\n".join(parts)


def _section(result: Result) -> list[str]:
    machine, code = result["environment"], result["code"]
    where = machine.get("gpu") or machine.get("cpu")
    commit = (code.get("commit") or "no commit")[:12] + (" with changes" if code.get("changed") else "")
    facts = [
        ("date", result["date"]),
        ("wall time", f"{show(result['wall_seconds'])} s"),
        ("seeds", ", ".join(map(str, result.get("seeds", []))) or "none"),
        ("machine", f"{where}, {machine.get('cores')} cores, load {machine.get('load_average')} at the start"),
        (
            "software",
            f"Python {machine.get('python')}, torch {machine.get('torch')}, spectrim {code.get('spectrim')}, {commit}",
        ),
    ]
    parts = [f"## {result['experiment'].replace('_', ' ')}", table(("", ""), facts)]
    parts += ["\n".join(f"- {note}" for note in result["notes"])] if result.get("notes") else []
    for name, rows in result.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            parts += [] if name == "rows" else [f"### {result['experiment'].replace('_', ' ')}: {name}"]
            parts.append(records(rows))
    return parts


def claims(results: Sequence[Result]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """``(id, experiment, claim)`` of all results, by letter and number of the id."""

    def order(item: tuple[str, str, Any]) -> tuple[Any, ...]:
        letters, digits = re.match(r"(\D*)(\d*)", item[0]).groups()  # type: ignore[union-attr]
        return letters, int(digits or 0), item[0], item[1]

    found = [(key, r["experiment"], claim) for r in results for key, claim in r.get("claims", {}).items()]
    return sorted(found, key=order)


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
    """A value for people: counts of MACs and parameters in millions, other numbers to five digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and key.startswith(("macs", "parameters")) and abs(value) >= 1e4:
        return f"{value / 1e6:.2f} M"
    if isinstance(value, float):
        return f"{value:.2f}" if "accuracy" in key or "held_out" in key else f"{value:.5g}"
    return str(value)


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
