"""Claim A3, from the rows of the text detector, and the table of its tutorial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.run import claim

Row = Mapping[str, Any]
# Fifteen and eight times fewer bytes, four times fewer multiply-accumulates.
ASKED = ("bytes=6.7%", "bytes=12.5%", "macs=25%")
DROP, TRAINED_DROP, FASTER = 1.0, 0.3, 2.5


def claims(rows: Sequence[Row], times: Sequence[Row]) -> dict[str, Any]:
    """A3, if there is a row of the dense detector and one of those that are asked for."""
    found = list(chosen(rows))
    dense = next((row for row in rows if row["network"] == "craft" and row["arm"] == "dense"), None)
    if dense is None or all(row.get("steps") for row in found):
        return {}
    drops = [dense["value"] - row["value"] for row in found if not row.get("steps")]
    said = [_said(row, dense, times) for row in found]
    fast = [speed(row, times) for row in found if row["budget"].startswith("macs")]
    quick = any(each is not None and each["faster"] >= FASTER for each in fast)
    steps = [row for row in found if row.get("steps")]
    trained = bool(steps) and all(dense["value"] - row["value"] <= TRAINED_DROP for row in steps)
    missing = [budget for budget in ASKED if budget not in {row["budget"] for row in found}]
    note = "; ".join([*said, *(f"{budget} not run" for budget in missing)])
    if not steps:
        note += "; not trained"
    met = not missing and max(drops) <= DROP and quick and (trained or max(drops) <= TRAINED_DROP)
    return {
        "A3": claim(
            round(max(drops), 2), f"points of F-score lost at most without training, at {len(drops)} budgets",
            "within 1 point before and 0.3 after an hour of distillation; at 4x fewer MACs >= 2.5x faster", met, note,
        ) | {"command": "make headline"}
    }  # fmt: skip


def chosen(rows: Sequence[Row]) -> Iterator[Row]:
    """Of every budget that is asked for the row of ours that is best on held-out pages, untrained and trained."""
    for budget in ASKED:
        mine = [
            row for row in rows
            if row["network"] == "craft" and row["budget"] == budget and "failed" not in row
            and row["kind"] in ("auto", "ours", "trained")
        ]  # fmt: skip
        for some in ([row for row in mine if not row.get("steps")], [row for row in mine if row.get("steps")]):
            if some:
                yield max(some, key=lambda row: row["held_out"])


def speed(row: Row, times: Sequence[Row], batch: int = 1) -> Row | None:
    """The line of its time in eager mode, None if it was not timed."""
    same = (
        each for each in times
        if all(each[name] == row[name] for name in ("network", "budget", "arm"))
        and (each["runtime"], each["batch"]) == ("eager", batch) and "failed" not in each
    )  # fmt: skip
    return next(same, None)


def _said(row: Row, dense: Row, times: Sequence[Row]) -> str:
    timed = speed(row, times)
    return (
        f"{row['budget']}, {row['arm']}: {row['value']:.2f} % for {dense['value']:.2f} %, "
        f"{dense['file_bytes'] / row['file_bytes']:.1f}x fewer bytes, {dense['parameters'] / row['parameters']:.1f}x "
        f"fewer parameters, {dense['macs'] / row['macs']:.1f}x fewer MACs"
        + (f", {timed['faster']:.2f}x the speed in eager mode" if timed else ", not timed")
        + "".join(f", {each['faster']:.2f}x in {each['runtime']}" for each in _elsewhere(row, times))
        + (f" ({row['note']})" if row.get("steps") else "")
    )


def _elsewhere(row: Row, times: Sequence[Row]) -> Iterator[Row]:
    for each in times:
        mine = all(each[name] == row[name] for name in ("network", "budget", "arm"))
        if mine and each["batch"] == 1 and each["runtime"] != "eager" and "failed" not in each:
            yield each


def table(rows: Sequence[Row], times: Sequence[Row]) -> str:
    """In Markdown: the dense detector and what was chosen at every budget."""
    dense = [row for row in rows if row["network"] == "craft" and row["arm"] == "dense"]
    lines = [
        "| budget | methods | F-score, % | parameters | MACs a page | file | time a page, 1 thread |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [*dense, *chosen(rows)]:
        timed = speed(row, times)
        time = "" if timed is None else _time(timed)
        cells = (
            row["budget"] or "none", row["arm"], f"{row['value']:.1f} ± {row['error']:.1f}",
            f"{row['parameters'] / 1e6:.2f} M", f"{row['macs'] / 1e9:.1f} G", f"{row['file_bytes'] / 1e6:.1f} MB", time,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(timed: Row) -> str:
    seconds = f"{timed['ms'] / 1000:.2f} s for {timed['dense_ms'] / 1000:.2f} s dense"
    return f"{seconds} ({timed['low']:.1f} to {timed['high']:.1f}x)"
