"""Figures of tables and plans. Each function returns a matplotlib figure that draws on no screen.

Colours mean the same everywhere: grey is dense, blue is the plan, orange is the choice made, and every unfolding has
its own colour.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spectrim.errors import InfeasibleBudgetError
from spectrim.network.choices import Choice
from spectrim.report.measures import Score
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates, Row
from spectrim.selection.figures import CHOSEN, PALE, PLANNED, STYLE, bars, check_cost, cost_label
from spectrim.selection.figures import DENSE as DENSE
from spectrim.selection.forest import flattened
from spectrim.selection.plan import Entry, Plan
from spectrim.selection.selectors import lagrangian

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNFOLDINGS = {"channel": PLANNED, "input": "#0f8a6d", "height-first": "#8a3ffc", "width-first": "#b5127d"}
_OTHER = "#5b6570"
_POINTS = 48  # a spectrum is drawn with at most this many points


@dataclass(frozen=True)
class Measured:
    """A network that was built and evaluated, for the accuracy-cost figure.

    ``cost`` is in the cost's own unit, ``score`` in percent.
    """

    label: str
    cost: float
    score: float


def spectra(candidates: Candidates, plan: Plan | None = None) -> Figure:
    """One small panel a site: the share of energy of each component, and where the plan cuts.

    Layers that share a factor in the plan have one panel, of their weights or responses together; groups that the plan
    does not use have none. Every method and unfolding is a pale line; the one the plan uses is coloured by its
    unfolding, its kept part filled and its rank marked. A sparse part is written below the rank: its density and
    pattern. A panel of a site left dense says so.
    """
    rows = [row for row in _shown(candidates, plan) if row.spectra]
    columns = min(4, max(1, len(rows)))
    lines = max(1, math.ceil(len(rows) / columns))
    with _figure(7.2, 1.28 * lines + 0.55) as figure:
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes, row in zip(grid, rows, strict=False):
            _spectrum(axes, row, _entry(plan, row.site))
        for axes in grid[len(rows) :]:
            axes.remove()
        if not rows:
            figure.text(0.5, 0.5, "no spectra in the table", ha="center")
            return figure
        for number, axes in enumerate(grid[: len(rows)]):
            if number % columns == 0:
                axes.set_ylabel("energy", fontsize=7)
            if number + columns >= len(rows):
                axes.set_xlabel("component", fontsize=7)
        _spectrum_legend(figure, rows, plan)
    return figure


def _spectrum(axes: Axes, row: Row, entry: Entry | None) -> None:
    how, rank = (None if entry is None else entry.choice.cut) or ("", None)
    # Rank 0 is no cut through a spectrum.
    chosen = f"{entry.choice.method}/{how}" if entry is not None and rank else ""
    axes.set_yscale("log")
    longest = 1
    for key, values in sorted(row.spectra.items(), key=lambda item: item[0] == chosen):
        index = np.unique(np.geomspace(1, len(values), min(_POINTS, len(values))).round().astype(int))
        shares = np.maximum(np.asarray(values, dtype=float)[index - 1], 1e-12)
        longest = max(longest, len(values))
        if key != chosen:
            axes.plot(index, shares, color=PALE, lw=0.8, zorder=1)
            continue
        colour = UNFOLDINGS.get(how, _OTHER)
        axes.plot(index, shares, color=colour, lw=1.3, zorder=3)
        kept = index <= (rank or 0)
        axes.fill_between(index[kept], shares[kept], 1e-12, color=colour, alpha=0.14, lw=0, zorder=2)
    axes.set_ylim(1e-6, 2.0)
    axes.set_yticks([1e-6, 1e-3, 1.0], ["1e-6", "1e-3", "1"])
    axes.minorticks_off()
    if rank:
        axes.axvline(rank, color=CHOSEN, lw=1.1, zorder=4)
    if entry is not None:
        colour = _OTHER if rank is None else CHOSEN
        clear = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}
        axes.text(
            0.97, 0.93, _lines(entry.choice), color=colour, ha="right", va="top", fontsize=7, transform=axes.transAxes,
            bbox=clear, zorder=5,
        )  # fmt: skip
    axes.set_xlim(0, max(longest, rank or 0) * 1.03)
    axes.set_title(_short(row.site, 26), loc="left", pad=3)


def _spectrum_legend(figure: Figure, rows: Sequence[Row], plan: Plan | None) -> None:
    from matplotlib.lines import Line2D

    entries = [e for e in (_entry(plan, row.site) for row in rows) if e is not None]
    names = {cut[0] for e in entries if (cut := e.choice.cut) and cut[1]}
    used = sorted(names, key=lambda how: (how not in UNFOLDINGS, how))
    handles = [Line2D([], [], color=UNFOLDINGS.get(how, _OTHER), lw=1.6, label=f"{how} (chosen)") for how in used]
    if used:
        handles.append(
            Line2D([], [], color=CHOSEN, lw=1.1, label="chosen rank" if used != ["responses"] else "chosen width")
        )
    handles.append(Line2D([], [], color=PALE, lw=1.4, label="other candidates" if used else "candidates"))
    # Six names are wider than the figure.
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles) if len(handles) < 6 else 3)


def _lines(choice: Choice) -> str:
    """A choice in short lines."""
    return str(choice).replace(", ", "\n").replace(" + ", "\n+ ")


def costs(plan: Plan, cost: str = "macs") -> Figure:
    """A pair of bars a site: its cost dense and as planned, with the rest of the network last."""
    check_cost(plan.dense_costs, cost)
    with _figure(7.2, max(1.6, 0.19 * (len(plan) + 1) + 0.85)) as figure:
        bars(plan, cost, ax=figure.subplots())
    return figure


def tradeoff(
    candidates: Candidates, plan: Plan | None = None, *, cost: str = "macs", measured: Sequence[Measured] = ()
) -> Figure:
    """What the table predicts to lose at each cost, and what was measured.

    The predicted curve is a selection at many budgets. Measured scores have a panel of their own above it, since
    percent of accuracy and lost energy are different things.
    """
    check_cost(candidates.dense, cost)
    # Losses span several powers of ten; the dense network, which loses nothing, has no place on such a scale.
    # Where channels are removed costs do not add up, and no selection from one table is a prediction.
    adds_up = not any(row.of_channels for row in candidates)
    points = [(c, loss) for c, loss in predicted(candidates, cost) if loss > 0] if adds_up else []
    dense = candidates.dense[cost]
    with _figure(7.2, 4.6 if measured else 2.7) as figure:
        panels = figure.subplots(2 if measured else 1, 1, sharex=True, squeeze=False).ravel()
        if measured:
            _scores(panels[0], measured, dense)
        axes = panels[-1]
        if points:
            axes.plot([100 * c / dense for c, _ in points], [loss for _, loss in points], color=PLANNED, lw=1.5,
                      marker=".", ms=4, label="best selection at each budget")  # fmt: skip
        if plan is not None and cost in plan.costs and plan.loss > 0:
            axes.plot(100 * plan.costs[cost] / dense, plan.loss, "o", color=CHOSEN, ms=7, label="this plan", zorder=3)
        axes.set_xlabel(f"{cost_label(cost)}, % of dense")
        axes.set_ylabel(f"predicted loss\n({candidates.unit})" if candidates.unit else "predicted loss")
        if points or plan is not None:
            axes.set_yscale("log")
            # The default formatters write formulas, which are switched off here.
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlim(0, 103)
        axes.legend(loc="upper right")
        for each in panels:
            each.grid(True, color="#e8ebef", lw=0.6)
            each.set_axisbelow(True)
    return figure


def _scores(axes: Axes, measured: Sequence[Measured], dense: float) -> None:
    x = [100 * m.cost / dense for m in measured]
    y = [m.score for m in measured]
    axes.plot(x, y, "o", color=CHOSEN, ms=6)
    error_bars(axes, x, y, CHOSEN)
    # Labels alternate above and below, so that two points of nearly equal cost stay readable.
    for number, (left, up, m) in enumerate(zip(x, y, measured, strict=True)):
        axes.annotate(
            f"{m.label}: {m.score:.2f} %", (left, up), textcoords="offset points", fontsize=7.5,
            xytext=(-6 if left > 60 else 7, 7 if number % 2 == 0 else -12), ha="right" if left > 60 else "left",
        )  # fmt: skip
    axes.margins(y=0.25)
    axes.set_ylabel("measured score [%]")


def error_bars(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    """A bar of one standard error up and down, where the number of test samples is known."""
    known = [
        (at, score, error) for at, score in zip(x, y, strict=True) if (error := Score(score).standard_error) == error
    ]
    if known:
        at, score, error = zip(*known, strict=True)
        axes.errorbar(at, score, yerr=error, fmt="none", ecolor=colour, elinewidth=1.2, capsize=2, zorder=3)


def predicted(candidates: Candidates, cost: str = "macs", points: int = 24) -> list[tuple[float, float]]:
    """``(cost, loss)`` of the best selection at budgets from the lowest reachable one to dense, in rising cost."""
    dense = candidates.dense[cost]
    rows = flattened(candidates, (cost,)).candidates
    lowest = sum(min(o.costs[cost] for o in row.options) for row in rows) + candidates.fixed[cost]
    found: dict[float, float] = {}
    for fraction in np.linspace(max(lowest / dense, 1e-6) * (1 + 1e-9), 1.0, points):
        try:
            plan = lagrangian(candidates, Budget.of({cost: min(fraction, 1.0)}))
        except InfeasibleBudgetError:  # the cheapest option need not be one that selectors allow
            continue
        found[plan.costs[cost]] = plan.loss
    return sorted(found.items())


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG with text as outlines: it looks the same everywhere and needs no font."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def to_data_uri(figure: Figure) -> str:
    """The figure as a data URI for an ``img``, which runs no script and shares no names with the page around it."""
    return "data:image/svg+xml;base64," + base64.b64encode(to_svg(figure)).decode()


def _short(name: str, length: int) -> str:
    """Module paths differ at their end; keep that."""
    return name if len(name) <= length else "\u2026" + name[-(length - 1) :]


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def _entry(plan: Plan | None, site: str) -> Entry | None:
    return None if plan is None else next((e for e in plan if e.site == site), None)


def _shown(candidates: Candidates, plan: Plan | None) -> list[Row]:
    """The rows that a plan is made of, in its order; all of them without a plan."""
    if plan is None:
        return list(candidates)
    rows = {row.site: row for row in candidates}
    known = [rows[e.site] for e in plan if e.site in rows]
    planned = {site for e in plan for site in e.sites}
    # A plan may be for fewer sites than the table has.
    return known + [row for row in candidates.singles if row.site not in planned]
