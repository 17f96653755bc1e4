"""The headline as a table: what a user gets, and what they would have got otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.headline.claims import best_of_each_kind
from benchmarks.headline.network import Metric, names, plugin
from spectrim.network.printing import amount
from spectrim.selection.budget import Budget

HEAD = ("network and budget", "best peer", "best single method", "auto", "MACs of auto", "file of auto, MB")


def beside_others(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line a network and budget, with what is best by the test data; empty without rows."""
    found: list[tuple[str, ...]] = []
    for name in (each for each in dict.fromkeys(row["network"] for row in rows) if each in names()):
        kind = plugin(name)
        for budget in _budgets(row["budget"] for row in rows if row["network"] == name):
            best = best_of_each_kind(rows, name, budget)
            if dense := best.get("dense"):
                said = f"**{kind.title}**: {_judged(kind.metric)}. Dense:"
                found.append((said, "", "", _value(kind.metric, dense), *_sizes(dense)))
                continue
            auto = best.get("auto")
            cells = [_cell(kind.metric, best.get(which)) for which in ("peer", "ours")]
            cells += [_value(kind.metric, auto), *_sizes(auto)] if auto else [_why_none(rows, name, budget), "", ""]
            found.append((f"`{budget}`", *cells))
    return found


def _budgets(written: Iterable[str]) -> list[str]:
    """Each budget once, as it was written first: 9M and 9.0M are one. The empty one is the dense network's."""
    once: dict[Budget | None, str] = {}
    for text in written:
        once.setdefault(Budget.of(text) if text else None, text)
    return list(once.values())


def _why_none(rows: Sequence[Mapping[str, Any]], network: str, budget: str) -> str:
    """Why there is no network of auto."""
    same = (row for row in rows if (row["network"], row["budget"], row["arm"]) == (network, budget, "auto"))
    return next((row["failed"] for row in same if "failed" in row), "not run")


def _judged(metric: Metric) -> str:
    """What a network is judged by, in which unit, and which numbers are good."""
    return ", ".join(part for part in (metric.name, metric.unit, f"{metric.better} is better") if part)


def _sizes(row: Mapping[str, Any]) -> tuple[str, str]:
    return amount("macs", row["macs"]), f"{row['file_bytes'] / 1e6:.2f}"


def _cell(metric: Metric, row: Mapping[str, Any] | None) -> str:
    return f"{_value(metric, row)} ({row['arm']})" if row else "not run"


def _value(metric: Metric, row: Mapping[str, Any]) -> str:
    """Percents to one digit, others to three, with the standard error."""
    digits = 1 if metric.unit == "%" else 3
    return f"{row['value']:.{digits}f} ± {row['error']:.{digits}f}"
