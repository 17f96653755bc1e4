"""One self-contained HTML page about a sweep over budgets, in the style of the report about one compression."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spectrim.network.printing import count
from spectrim.report.charts import ASIDE, Axis, Chart, Dot, Polyline, cost_title
from spectrim.report.machine import machine_facts
from spectrim.report.origin import Origin
from spectrim.report.page import Written
from spectrim.report.side_page import LABELS, changes
from spectrim.report.words import glossary
from spectrim.selection.front import Sweep
from spectrim.selection.point import Judged, Point


@dataclass(frozen=True)
class SweepPage(Written):
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
        best = len(sweep.front()) if len(sweep) else 0
        caption = "A dot is a network; the line goes through those that no other one beats."
        curves = [
            ("And against measured time" if number else "What is lost at every size", front_chart(sweep, cost), caption)
            for number, cost in enumerate(dict.fromkeys(costs))
        ]
        return self._rendered(
            "networks.html.jinja", kind="sweep by Spectrim", notes=[*sweep.sentences, *self.notes],
            said=f"{count(len(sweep), 'network')}, {best} on the front: no other one is as cheap and as good.",
            curves=curves if len(sweep) else [], heads=heads, lines=lines,
            legend="* on the front. Percentages beside costs are of the dense network.",
            plans=[(point.asked, changes(point.plan)) for point in sweep], words=list(glossary(said, choices)),
            load="The smallest network of the front" if len(sweep) else "Carry one out",
            facts=dict(self.facts) or machine_facts(),
        )  # fmt: skip


def front_chart(sweep: Sweep, cost: str) -> Chart:
    """A dot a network, of another tone once it is trained, and a line through the front.

    Raises ValueError for a cost that the points do not have.
    """
    best = sweep.front(cost)
    dense = _Mark.of(sweep, None, sweep.itself, "dense")
    marks = [dense, *(mark for mark in _marks(sweep) if not math.isnan(mark.value))]
    low, high = min(mark.low for mark in marks), max(mark.high for mark in marks)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    x, y = Axis(0, max(100, *(_share(point, cost) for point in sweep))), Axis(low - room, high + room)
    # Many labels would lie on each other on a phone.
    named = best if len(best) <= LABELS else (best[0], best[-1])
    dots: list[Dot] = []
    for mark in marks:
        at = x.at(mark.share(cost))
        shown = mark is dense or any(mark.judged is point.judged for point in named)
        bar = (math.nan, math.nan) if math.isnan(mark.spread) else (y.at(mark.low), y.at(mark.high))
        aside = ASIDE * sum(dot.x == at for dot in dots)
        label = mark.name if shown else ""
        dots.append(Dot(at, y.at(mark.value), _text(sweep, mark, cost), mark.tone, label, *bar, aside=aside))
    line = tuple((x.at(_share(p, cost)), y.at(sweep.quality(p.judged))) for p in reversed(best))
    curves = [Polyline((line,), "plan", "without training")]
    if any(mark.tone == "choice" for mark in marks):
        curves = [Polyline((line,), "pale")]
        curves += [Polyline((), "plan", "without training"), Polyline((), "choice", "fine-tuned")]
    label = f"{sweep.judged_by}, {sweep.judged_in}".rstrip(", ")
    return Chart(f"{_cost_name(cost)}, % of dense", label, x, y, tuple(dots), tuple(curves), 260)


@dataclass(frozen=True)
class _Mark:
    """A network as it was judged: its value, and how far that is off; NaN where it is not known.

    ``point`` is None for the dense network.
    """

    point: Point | None
    judged: Judged
    tone: str
    value: float
    spread: float
    most: float

    @classmethod
    def of(cls, sweep: Sweep, point: Point | None, judged: Judged, tone: str) -> _Mark:
        # No share lies above 100 %, whatever its standard error.
        most = 100.0 if sweep.judged_in == "%" else math.inf
        return cls(point, judged, tone, sweep.quality(judged), sweep.uncertainty(judged), most)

    @property
    def name(self) -> str:
        return "dense" if self.point is None else self.point.asked

    def share(self, cost: str) -> float:
        """Percent of the dense network's cost."""
        return 100.0 if self.point is None else _share(self.point, cost)

    @property
    def low(self) -> float:
        return self.value if math.isnan(self.spread) else self.value - self.spread

    @property
    def high(self) -> float:
        return min(self.value if math.isnan(self.spread) else self.value + self.spread, self.most)


def _marks(sweep: Sweep) -> Iterator[_Mark]:
    # The later of two at one cost stands aside, and the line goes through what was trained.
    for point in sweep:
        if point.tuned is not None:
            yield _Mark.of(sweep, point, point.tuned, "choice")
        yield _Mark.of(sweep, point, point.carried_out, "plan")


def _share(point: Point, cost: str) -> float:
    return 100 * point.costs[cost] / point.dense_costs[cost]


def _cost_name(cost: str) -> str:
    return "measured time" if cost == "milliseconds" else cost_title(cost)


def _text(sweep: Sweep, mark: _Mark, cost: str) -> str:
    """What a network says when it is pointed at."""
    judged = f"{sweep.judged_by} {mark.value:#.4g} {sweep.judged_in}".rstrip()
    text = f"{mark.name}: {judged}, at {mark.share(cost):.1f} % of the {_cost_name(cost)}"
    text += ", fine-tuned" * (mark.tone == "choice")
    return text if math.isnan(mark.spread) else f"{text}, standard error {mark.spread:.2g}"
