"""The numbers at the top of a report: accuracy and agreement beside costs, times and bytes, never gains alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectrim.report.charts import cost_text, cost_title
from spectrim.report.comparison import Comparison, Measure
from spectrim.report.side_by_side import agreement_lines
from spectrim.selection.plan import Plan

if TYPE_CHECKING:
    from spectrim.nn.agreement import Agreement


@dataclass(frozen=True)
class Tile:
    """A number at the top. ``good`` is ``yes``, ``no`` or ``unknown``."""

    name: str
    value: str
    detail: str
    good: str


def tiles(plan: Plan, comparison: Comparison | None, agreement: Agreement | None, *, stored: bool) -> list[Tile]:
    """What was measured where there is a measurement, or what was planned; what the network is worth first."""
    scores = [] if comparison is None else [row for row in comparison.rows if row.better == "higher"]
    measured = [_tile(row) for row in scores] or [
        Tile("accuracy", "not measured", "no test samples with labels", "unknown")
    ]
    if agreement is not None:
        same = "" if agreement.top1 is None else f"the same class first in {agreement.top1:.2%}"
        measured.append(Tile("outputs differ by", f"{agreement.error:.2%}", same or _samples(agreement), "yes"))
    if comparison is None:
        return measured + [_planned(plan, cost) for cost in plan.dense_costs]
    wanted = {"MACs", "parameters", "latency p50", *(("file size",) if stored else ())}
    return measured + [_tile(row) for row in comparison.rows if row.metric in wanted]


def _planned(plan: Plan, cost: str) -> Tile:
    change = f"{cost_text(cost, plan.dense_costs[cost])} \u2192 {cost_text(cost, plan.costs[cost])}"
    good = "yes" if plan.ratio(cost) >= 1 else "no"
    return Tile(f"{cost_title(cost)} (planned)", f"{plan.ratio(cost):.2f}x", change, good)


def _tile(row: Measure) -> Tile:
    detail = f"{row.show(row.dense)} \u2192 {row.show(row.compressed)}{row.uncertainty and f' ({row.uncertainty})'}"
    return Tile(row.metric, "within noise" if row.is_noise else row.change, detail, "yes" if _holds(row) else "no")


def _holds(row: Measure) -> bool:
    """Whether a line is no loss: half a point of a score is within what people accept."""
    if row.is_noise or (row.speed is not None and not row.speed.differs):
        return True
    return row.compressed >= row.dense - 0.5 if row.better == "higher" else row.compressed <= row.dense


def rows(plan: Plan, comparison: Comparison | None, agreement: Agreement | None) -> Iterator[tuple[str, ...]]:
    """``(metric, dense, compressed, change)`` of a table: scores, agreement, then costs, memory and times."""
    lines = [] if comparison is None else list(zip(comparison.rows, comparison.to_rows(), strict=True))
    yield from (texts for row, texts in lines if row.better == "higher")
    if agreement is not None:
        yield from ((f"{name}, {_samples(agreement)}", *cells, "") for name, *cells in agreement_lines([agreement]))
    yield from (texts for row, texts in lines if row.better != "higher")
    if comparison is None:
        for cost, dense in plan.dense_costs.items():
            now = plan.costs[cost]
            yield (
                f"{cost_title(cost)} (planned)",
                cost_text(cost, dense),
                cost_text(cost, now),
                f"{plan.ratio(cost):.2f}x",
            )


def _samples(agreement: Agreement) -> str:
    return f"{agreement.samples:,} {'held-out ' * agreement.held_out}samples"
