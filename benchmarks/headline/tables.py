"""The headline as a table: what a user gets, and what they would have got otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.headline.claims import best_of_each_kind
from benchmarks.headline.network import Metric, names, plugin
from spectrim.network.printing import amount

HEAD = ("network", "budget", "best peer", "best single method", "auto", "MACs of auto", "file of auto, kB")


def beside_others(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line a network and budget, with what is best by the test data; empty without rows."""
    found: list[tuple[str, ...]] = []
    for name in (each for each in dict.fromkeys(row["network"] for row in rows) if each in names()):
        kind = plugin(name)
        for budget in dict.fromkeys(row["budget"] for row in rows if row["network"] == name):
            best = best_of_each_kind(rows, name, budget)
            if dense := best.get("dense"):
                said = f"**{kind.title}**, {kind.metric.name}", "dense", "", "", _value(kind.metric, dense)
                found.append((*said, amount("macs", dense["macs"]), f"{dense['file_bytes'] / 1e3:.0f}"))
                continue
            auto = best.get("auto")
            sizes = (amount("macs", auto["macs"]), f"{auto['file_bytes'] / 1e3:.0f}") if auto else ("-", "-")
            cells = [_cell(kind.metric, best.get(which)) for which in ("peer", "ours")]
            found.append((kind.title, budget, *cells, _value(kind.metric, auto) if auto else "-", *sizes))
    return found


def _cell(metric: Metric, row: Mapping[str, Any] | None) -> str:
    return f"{_value(metric, row)} ({row['arm']})" if row else "-"


def _value(metric: Metric, row: Mapping[str, Any]) -> str:
    """Percents to one digit, others to three, with the standard error."""
    digits = 1 if metric.unit == "%" else 3
    return f"{row['value']:.{digits}f} ± {row['error']:.{digits}f}"
