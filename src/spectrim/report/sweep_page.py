"""One self-contained HTML page about a sweep over budgets, in the style of the report about one compression."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectrim.network.files import write_text
from spectrim.network.printing import count
from spectrim.report.charts import Axis, Chart, Curve, Dot, cost_name
from spectrim.report.machine import machine_facts
from spectrim.report.origin import Origin
from spectrim.report.page import style, template
from spectrim.report.words import glossary
from spectrim.selection.front import Sweep
from spectrim.selection.point import Judged, Point

_LABELS = 4  # on a front, at most


@dataclass(frozen=True)
class SweepPage:
    """What a page about a sweep tells.

    Attributes
    ----------
    title
        Heading, for example the model's name.
    sweep
        The networks.
    notes
        Sentences above the figure.
    facts
        Machine and versions; of this machine if empty.
    origin
        When, by which command and from what it was made, and how a plan of it is carried out.
    """

    title: str
    sweep: Sweep
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)

    def html(self) -> str:
        """The page as text."""
        sweep = self.sweep
        heads, lines = sweep.table()
        costs = [sweep.cost, *(["milliseconds"] if "milliseconds" in sweep.shown_costs else [])]
        choices = [str(entry.choice) for point in sweep for entry in point.plan]
        said = "; ".join(
            ["dense", "held out", *heads, *sweep.sentences, *(cell for line in lines for cell in line[1:])]
        )
        return template("sweep.html.jinja").render(
            title=self.title, origin=self.origin, css=style(), notes=[*sweep.sentences, *self.notes],
            count=count(len(sweep), "network"), best=str(len(sweep.front())) if len(sweep) else "0",
            curves=[front_chart(sweep, cost) for cost in dict.fromkeys(costs) if len(sweep)], heads=heads, lines=lines,
            plans=[(point.asked, list(_changes(point))) for point in sweep], words=list(glossary(said, choices)),
            facts=dict(self.facts) or machine_facts(),
        )  # fmt: skip

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all, and return where it is.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        write_text(path, self.html())
        return Path(path)


def _changes(point: Point) -> Iterator[tuple[str, str, str]]:
    for entry in point.plan:
        if not entry.choice.is_dense:
            yield entry.site, str(entry.choice), f"{entry.error:.2%}"


def front_chart(sweep: Sweep, cost: str) -> Chart:
    """A dot a network, of another tone once it is trained, and a line through the front.

    Raises
    ------
    ValueError
        For a cost that the points do not have.
    """
    best = sweep.front(cost)
    name = "measured time" if cost == "milliseconds" else cost_name(cost)
    judged = [
        (point, each, tone)
        for point in sweep
        for each, tone in ((point.carried_out, "plan"), (point.tuned, "choice"))
        if each is not None and not math.isnan(sweep.quality(each))
    ]
    values = [sweep.quality(each) for _, each, _ in judged]
    exact = sweep.quality(Judged(sweep.dense, 1.0, 0.0))
    spreads = [0.0 if math.isnan(spread := sweep.uncertainty(each)) else spread for _, each, _ in judged]
    low = min([exact, *(v - spread for v, spread in zip(values, spreads, strict=True))])
    # No share lies above 100 %, whatever its standard error.
    most = 100.0 if sweep.dense is None else math.inf
    high = max([exact, *(min(v + spread, most) for v, spread in zip(values, spreads, strict=True))])
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    x, y = Axis(0, max(100, *(_share(point, cost) for point in sweep))), Axis(low - room, high + room)
    dots = [Dot(x.at(100), y.at(exact), f"dense: {_text(sweep, exact)}", "dense", "dense")]
    for point, each, tone in judged:
        value, at = sweep.quality(each), _share(point, cost)
        shown = f"{point.asked}: {_text(sweep, value)}, at {at:.1f} % of the {name}"
        shown += ", fine-tuned" if tone == "choice" else ""
        if not math.isnan(spread := sweep.uncertainty(each)):
            shown += f", standard error {spread:.2g}"
        # Many labels would lie on each other on a phone.
        named = best if len(best) <= _LABELS else (best[0], best[-1])
        label = point.asked if point in named and each is point.judged else ""
        dots.append(Dot(x.at(at), y.at(value), shown, tone, label, *_bar(y, value, sweep.uncertainty(each), most)))
    line = tuple((x.at(_share(p, cost)), y.at(sweep.quality(p.judged))) for p in reversed(best))
    curves = [Curve((line,), "plan", "without training")]
    if any(tone == "choice" for *_, tone in judged):
        curves = [Curve((line,), "pale")]
        curves += [Curve((), "plan", "without training"), Curve((), "choice", "fine-tuned")]
    unit = "" if sweep.dense is not None else ", %"
    return Chart(f"{name}, % of dense", f"{sweep.judged_by}{unit}", x, y, tuple(dots), tuple(curves), 260)


def _bar(y: Axis, value: float, spread: float, most: float) -> tuple[float, float]:
    """The ends of an error bar, as places."""
    return (math.nan, math.nan) if math.isnan(spread) else (y.at(value - spread), y.at(min(value + spread, most)))


def _share(point: Point, cost: str) -> float:
    return 100 * point.costs[cost] / point.dense_costs[cost]


def _text(sweep: Sweep, value: float) -> str:
    return f"{sweep.judged_by} {value:.4g}" + ("" if sweep.dense is not None else " %")
