"""Learned ranks over C steps as plain numbers, for the page: a row a site, and below it costs, distance and metric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from spectrim.report.charts import Axis, Chart, Dot, Polyline, cost_title
from spectrim.report.rank_panels import left_dense, share_of_dense, shown_costs
from spectrim.selection.trajectory import Trajectory

_TONES = ("plan", "choice", "input", "height-first")


@dataclass(frozen=True)
class Stretch:
    """C steps in which a rank stays: ``strength`` is 0 for rank 0 and 1 for the full rank, on a square root scale."""

    start: int
    steps: int
    strength: float
    dense: bool
    text: str


@dataclass(frozen=True)
class RankRow:
    """A site: its ranks, and the last of them in words."""

    name: str
    runs: tuple[Stretch, ...]
    last: str


def rank_rows(trajectory: Trajectory) -> list[RankRow]:
    """A row a site, in the network's order."""
    dense = [left_dense(record) for record in trajectory.records]
    rows = []
    for number, (name, full) in enumerate(zip(trajectory.sites, trajectory.full, strict=True)):
        ranks = [(record.ranks[number], left[number]) for record, left in zip(trajectory.records, dense, strict=True)]
        rows.append(RankRow(name, tuple(_runs(ranks, full)), _words(*ranks[-1], full)))
    return rows


def _runs(ranks: Sequence[tuple[int, bool]], full: int) -> Iterator[Stretch]:
    start = 0
    for (rank, dense), same in groupby(ranks):
        steps = len(list(same))
        which = f"C step {start + 1}" + (f" to {start + steps}" if steps > 1 else "")
        yield Stretch(start, steps, round(math.sqrt(rank / full), 2), dense, f"{which}: {_words(rank, dense, full)}")
        start += steps


def _words(rank: int, dense: bool, full: int) -> str:
    return "dense" if dense else f"{rank} of {full}"


def rank_charts(trajectory: Trajectory) -> list[Chart]:
    """Costs as shares of dense, the distance to low rank, and the metric if it was recorded."""
    x, charts = Axis(1, max(len(trajectory), 2)), []
    if costs := shown_costs(trajectory):
        charts.append(_cost_chart(trajectory, costs, x))
    # The scale is logarithmic: a network left dense, at distance 0, has no place on it.
    distances = [record.distance if record.distance > 0 else None for record in trajectory.records]
    if positive := [value for value in distances if value]:
        charts.append(_line_chart("distance of weights to low rank", x, Axis.of_powers(positive), distances))
    metrics = [record.metric for record in trajectory.records]
    if known := [value for value in metrics if value is not None]:
        room = max(0.15 * (max(known) - min(known)), 0.01 * abs(max(known)), 1e-6)
        y = Axis(min(known) - room, max(known) + room)
        charts.append(_line_chart("metric of the low-rank copies", x, y, metrics))
    return charts


def _cost_chart(trajectory: Trajectory, costs: Sequence[str], x: Axis) -> Chart:
    lines = [[100 * share_of_dense(trajectory, record, cost) for record in trajectory.records] for cost in costs]
    limits = [100 * trajectory.budget[c] / trajectory.dense_costs[c] for c in costs if c in trajectory.budget]
    y, last = Axis(0, max(100.0, *limits, *map(max, lines))), len(trajectory)
    named = [(cost_title(cost), line, tone) for cost, line, tone in zip(costs, lines, _TONES, strict=False)]
    curves = [_curve(x, y, line, tone, name) for name, line, tone in named]
    across = [Polyline((((0.0, y.at(limit)), (100.0, y.at(limit))),), "choice", "budget", True) for limit in limits]
    dots = [
        Dot(x.at(last), y.at(line[-1]), f"C step {last}: {name} {line[-1]:.1f} % of dense", tone)
        for name, line, tone in named
    ]
    return Chart("C step", "cost, % of dense", x, y, tuple(dots), (*curves, *across[:1]), 150)


def _line_chart(label: str, x: Axis, y: Axis, values: Sequence[float | None]) -> Chart:
    return Chart("C step", label, x, y, (), (_curve(x, y, values, "plan"),), 130)


def _curve(x: Axis, y: Axis, values: Sequence[float | None], tone: str, label: str = "") -> Polyline:
    """A line through values at 1, 2, ..., with gaps where there are none."""
    groups: list[list[tuple[float, float]]] = [[]]
    for number, value in enumerate(values, 1):
        if value is None:
            groups.append([])
        else:
            groups[-1].append((x.at(number), y.at(value)))
    return Polyline(tuple(tuple(group) for group in groups if group), tone, label)
