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
from spectrim.selection.budget import UNITS, Budget
from spectrim.selection.candidates import Candidates, Row
from spectrim.selection.forest import flattened
from spectrim.selection.plan import Entry, Plan
from spectrim.selection.selectors import lagrangian

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE, PLANNED, CHOSEN, PALE, INK = "#a3adb8", "#2563c9", "#d9480f", "#d5dae0", "#1d2733"
UNFOLDINGS = {"channel": PLANNED, "input": "#0f8a6d", "height-first": "#8a3ffc", "width-first": "#b5127d"}
_OTHER = "#5b6570"
_POINTS = 48  # a spectrum is drawn with at most this many points
_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 7.5,
    "axes.labelsize": 8,
    "axes.edgecolor": "#8792a0",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.color": "#4a5561",
    "ytick.color": "#4a5561",
    "text.color": INK,
    "axes.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a layer name is no formula
    "svg.fonttype": "path",
    "svg.hashsalt": "spectrim",
}


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
    _known(plan.dense_costs, cost)
    # Coupled channels cost something in their layers, which have entries of their own.
    entries = [e for e in plan if e.dense_costs[cost] > 0 or not e.of_channels]
    names = [e.site for e in entries]
    dense = [e.dense_costs[cost] for e in entries]
    now = [e.costs[cost] for e in entries]
    fixed = plan.dense_costs[cost] - sum(dense)
    if fixed > 1e-9 * plan.dense_costs[cost]:
        names, dense, now = [*names, "(not touched)"], [*dense, fixed], [*now, fixed]
    scale, unit = _scale(max(dense, default=1.0), cost)
    at = np.arange(len(names))
    with _figure(7.2, max(1.6, 0.19 * len(names) + 0.85)) as figure:
        axes = figure.subplots()
        axes.barh(at, np.asarray(dense) / scale, height=0.78, color=DENSE, label="dense")
        axes.barh(at, np.asarray(now) / scale, height=0.46, color=PLANNED, label="planned")
        room = max(dense, default=1.0) / scale
        for y, before, after in zip(at, dense, now, strict=True):
            if after < before:
                axes.text(
                    before / scale + 0.008 * room, y, f"{after / before:.0%}", va="center", fontsize=6.5, color=PLANNED
                )
        axes.set_yticks(at, [_short(n, 38) for n in names], fontsize=7 if len(names) <= 40 else 6.2)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, room * 1.07)
        axes.set_xlabel(f"{_label(cost)} [{unit}]" if unit else _label(cost))
        axes.xaxis.grid(True, color="#e8ebef", lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def tradeoff(
    candidates: Candidates, plan: Plan | None = None, *, cost: str = "macs", measured: Sequence[Measured] = ()
) -> Figure:
    """What the table predicts to lose at each cost, and what was measured.

    The predicted curve is a selection at many budgets. Measured scores have a panel of their own above it, since
    percent of accuracy and lost energy are different things.
    """
    _known(candidates.dense, cost)
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
        axes.set_xlabel(f"{_label(cost)}, % of dense")
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
    # Labels alternate above and below, so that two points of nearly equal cost stay readable.
    for number, (left, up, m) in enumerate(zip(x, y, measured, strict=True)):
        axes.annotate(
            f"{m.label}: {m.score:.2f} %", (left, up), textcoords="offset points", fontsize=7.5,
            xytext=(-6 if left > 60 else 7, 7 if number % 2 == 0 else -12), ha="right" if left > 60 else "left",
        )  # fmt: skip
    axes.margins(y=0.25)
    axes.set_ylabel("measured score [%]")


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

    with matplotlib.rc_context(_STYLE):
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def to_data_uri(figure: Figure) -> str:
    """The figure as a data URI for an ``img``, which runs no script and shares no names with the page around it."""
    return "data:image/svg+xml;base64," + base64.b64encode(to_svg(figure)).decode()


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
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


def _known(held: Any, cost: str) -> None:
    if cost not in held:
        raise ValueError(f"no cost {cost!r} here; there are {', '.join(held)}")


def _short(name: str, length: int) -> str:
    """Module paths differ at their end; keep that."""
    return name if len(name) <= length else "\u2026" + name[-(length - 1) :]


def _label(cost: str) -> str:
    return {"macs": "MACs", "parameters": "parameters", "bytes": "size", "latency": "latency"}.get(cost, cost)


def _scale(largest: float, cost: str) -> tuple[float, str]:
    unit = UNITS.get(cost, "")
    if cost == "latency":
        return 1.0, unit
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= factor:
            return factor, prefix + unit.removeprefix("MAC")
    return 1.0, unit.removeprefix("MAC")
