"""Charts of a report as plain numbers: places in percent of a plot, which the templates draw as SVG.

What is drawn from them keeps its letters at one size from a phone to a printed page, and takes its colours from the
page around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from spectrim.errors import InfeasibleBudgetError
from spectrim.report.comparison import show
from spectrim.report.figures import Measured
from spectrim.report.labels import Label, placed
from spectrim.report.measures import Score
from spectrim.selection.budget import UNITS, Budget
from spectrim.selection.candidates import Candidates, Row
from spectrim.selection.forest import flattened
from spectrim.selection.plan import Entry, Plan
from spectrim.selection.selectors import lagrangian

_POINTS = 32  # of a spectrum, at most
_FLOOR = 1e-6  # of a spectrum
ASIDE = 9  # pixels between dots of one cost
COST_NAMES = {"macs": "MACs", "parameters": "Parameters", "bytes": "Weights", "latency": "Predicted latency"}


def cost_title(cost: str) -> str:
    """What a cost is called on the page."""
    return COST_NAMES.get(cost, cost)


def cost_text(cost: str, value: float) -> str:
    """An amount of a cost, for people."""
    return show(value, UNITS.get(cost, ""))


@dataclass(frozen=True)
class Axis:
    """From values to places in percent."""

    # Values at 0 and 100 percent.
    low: float
    high: float
    logarithmic: bool = False  # whether equal ratios are equally far apart

    @classmethod
    def of_powers(cls, values: Sequence[float]) -> Self:
        """A logarithmic axis over positive values, from one power of ten to another."""
        low, high = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
        return cls(10.0**low, 10.0 ** max(high, low + 1), logarithmic=True)

    def at(self, value: float) -> float:
        low, high, here = map(math.log10 if self.logarithmic else float, (self.low, self.high, value))
        return round(100 * min(max((here - low) / (high - low), 0.0), 1.0), 2)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Places of round values, and their texts."""
        if self.logarithmic:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            values = [10.0**power for power in powers][:: math.ceil(len(powers) / most) or 1]
        else:
            step = round_step((self.high - self.low) / most)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            values = [step * number for number in range(first, last + 1)]
        return [(self.at(value), _short(value)) for value in values]


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... and their tenths, hundredths, ... that is not below a number."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))


def _short(value: float) -> str:
    """A round number: ``0.5``, ``1e-4``."""
    return (
        f"{value:.6g}"
        if value == 0 or 1e-3 <= abs(value) < 1e6
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )


@dataclass(frozen=True)
class Dot:
    """A value that can be pointed at."""

    # Its place.
    x: float
    y: float
    text: str  # what it says when it is pointed at or reached by keyboard
    tone: str  # ``dense``, ``plan`` or ``choice``
    label: str = ""  # beside it, always seen
    # Ends of its error bar; NaN without one.
    low: float = math.nan
    high: float = math.nan
    aside: int = 0  # pixels that it stands to the right of its place, where another one is

    @property
    def barred(self) -> bool:
        return not math.isnan(self.low)


@dataclass(frozen=True)
class Polyline:
    """Lines through places; ``points`` are groups without a gap."""

    points: tuple[tuple[tuple[float, float], ...], ...]
    tone: str
    label: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Dots and curves over two axes, as places: y grows upwards."""

    x_label: str
    y_label: str
    x: Axis
    y: Axis
    dots: tuple[Dot, ...] = ()
    curves: tuple[Polyline, ...] = ()
    height: int = 220

    @property
    def labels(self) -> list[Label]:
        """Where the label of every dot stands."""
        return placed(self.dots, self.curves, self.height)


def predicted(candidates: Candidates, cost: str = "macs", points: int = 24) -> list[tuple[float, float]]:
    """``(cost, loss)`` of the best selection at budgets from the lowest reachable one to dense, in rising cost."""
    dense = candidates.dense[cost]
    rows = flattened(candidates, (cost,)).candidates
    lowest = sum(min(o.costs[cost] for o in row.options) for row in rows) + candidates.fixed[cost]
    losses: dict[float, float] = {}
    for fraction in np.linspace(max(lowest / dense, 1e-6) * (1 + 1e-9), 1.0, points):
        try:
            plan = lagrangian(candidates, Budget.of({cost: min(fraction, 1.0)}))
        except InfeasibleBudgetError:  # the cheapest option need not be one that selectors allow
            continue
        losses[plan.costs[cost]] = plan.loss
    return sorted(losses.items())


def loss_chart(predicted: Sequence[tuple[float, float]], candidates: Candidates, plan: Plan, cost: str) -> Chart | None:
    """What the table predicts to lose at each cost, and what the plan loses; None where it predicts nothing."""
    dense = candidates.dense[cost]
    # Losses span several powers of ten; the dense network, which loses nothing, has no place on such a scale.
    points = [(100 * c / dense, loss) for c, loss in predicted if loss > 0]
    chosen = [(100 * plan.costs[cost] / dense, plan.loss)] if cost in plan.costs and plan.loss > 0 else []
    if not points:
        return None
    x, y = Axis(0, 100), Axis.of_powers([loss for _, loss in points + chosen])
    dots = [
        Dot(x.at(at), y.at(loss), f"{name}: loss {loss:.3g} at {at:.1f} % of the {cost_title(cost)}", tone, label)
        for name, tone, label, places in (
            ("best selection", "plan", "", points),
            ("this plan", "choice", "this plan", chosen),
        )
        for at, loss in places
    ]
    curve = Polyline((tuple((x.at(at), y.at(loss)) for at, loss in points),), "plan")
    unit = f"predicted loss ({candidates.unit})" if candidates.unit else "predicted loss"
    return Chart(f"{cost_title(cost)}, % of dense", unit, x, y, tuple(dots), (curve,))


def score_chart(measured: Sequence[Measured], dense: float, cost: str, score: str) -> Chart:
    """Scores at their costs with a standard error each; the axis is as long as makes noise look small.

    ``dense`` is the cost of the dense network.
    """
    values = [each.score for each in measured]
    errors = [Score(value).standard_error for value in values]
    known = [error for error in errors if error == error]
    noise = max(known, default=0.0)
    room = max(1.4 * noise, 0.25 * (max(values) - min(values)), 1.0, 4 * noise - (max(values) - min(values)) / 2)
    x, y = Axis(0, 100), Axis(max(min(values) - room, 0), min(max(values) + room, 100 + 2 * noise))
    dots = []
    for each, error in zip(measured, errors, strict=True):
        share, value = 100 * each.cost / dense, each.score
        text = f"{each.label}: {value:.2f} % at {share:.1f} % of the {cost_title(cost)}"
        bar = {}
        if error == error:
            text += f", standard error {error:.2f} points on {Score(value).samples:,} samples"
            bar = {"low": y.at(value - error), "high": y.at(value + error)}
        tone = "dense" if share > 99.99 else "choice"
        aside = ASIDE * sum(dot.x == x.at(share) for dot in dots)
        dots.append(Dot(x.at(share), y.at(value), text, tone, f"{each.label} {value:.2f} %", aside=aside, **bar))
    return Chart(f"{cost_title(cost)}, % of dense", f"{score}, %", x, y, tuple(dots), height=190)


@dataclass(frozen=True)
class Bar:
    """A row of the picture of the network: what a layer costs, before and after.

    ``dense`` and ``kept`` are in percent of the widest bar.
    """

    name: str
    choice: str
    changed: bool
    dense: float
    kept: float
    text: str
    share: str


def network(plan: Plan, cost: str) -> list[Bar]:
    """A bar a layer, in the network's order, and one for what no choice touches."""
    # Coupled channels cost something in their layers, which have entries of their own.
    entries = [e for e in plan if e.dense_costs[cost] > 0 or not e.of_channels]
    rows = [(e.site, str(e.choice), e.dense_costs[cost], e.costs[cost]) for e in entries]
    rest = plan.dense_costs[cost] - sum(row[2] for row in rows)
    rest_now = plan.costs[cost] - sum(row[3] for row in rows)
    if rest > 1e-9 * plan.dense_costs[cost]:
        rows.append(("everything else", "", rest, rest_now))
    widest = max((max(row[2:]) for row in rows), default=1.0) or 1.0
    return [_bar(*row, widest, cost) for row in rows]


def _bar(name: str, choice: str, dense: float, now: float, widest: float, cost: str) -> Bar:
    changed = abs(dense - now) > 1e-9 * dense
    text = f"{cost_text(cost, dense)} \u2192 {cost_text(cost, now)}" if changed else cost_text(cost, dense)
    share = f"{now / dense:.0%}" if changed and dense else ""
    return Bar(name, choice, changed, round(100 * dense / widest, 2), round(100 * now / widest, 2), text, share)


@dataclass(frozen=True)
class Panel:
    """The spectrum of a layer: curves over its components, and where the plan cuts (in percent, or None)."""

    name: str
    choice: str
    curves: tuple[Polyline, ...]
    cut: float | None
    components: int


def spectra(candidates: Candidates, plan: Plan) -> list[Panel]:
    """A panel a site of the plan that has spectra, in the plan's order; then the rows that it does not name."""
    return [_panel(row, entry) for row, entry in _pairs(candidates, plan) if row.spectra]


def _pairs(candidates: Candidates, plan: Plan) -> Iterator[tuple[Row, Entry | None]]:
    rows = {row.site: row for row in candidates}
    yield from ((rows[entry.site], entry) for entry in plan if entry.site in rows)
    planned = {site for entry in plan for site in entry.sites}
    yield from ((row, None) for row in candidates.singles if row.site not in planned)


def _panel(row: Row, entry: Entry | None) -> Panel:
    how, rank = (None if entry is None else entry.choice.cut) or ("", None)
    # Rank 0 is no cut through a spectrum.
    chosen = f"{entry.choice.method}/{how}" if entry is not None and rank else ""
    longest = max(map(len, row.spectra.values()))
    x, y = Axis(0, max(longest, rank or 0)), Axis(_FLOOR, 1.0, logarithmic=True)
    curves = []
    for key, values in sorted(row.spectra.items(), key=lambda item: item[0] == chosen):
        index = np.unique(np.geomspace(1, len(values), min(_POINTS, len(values))).round().astype(int))
        shares = np.maximum(np.asarray(values, dtype=float)[index - 1], _FLOOR)
        places = tuple((x.at(float(i)), y.at(float(share))) for i, share in zip(index, shares, strict=True))
        curves.append(Polyline((places,), how if key == chosen else "pale"))
    choice = "not in the plan" if entry is None else str(entry.choice)
    return Panel(row.site, choice, tuple(curves), x.at(rank) if rank else None, longest)
