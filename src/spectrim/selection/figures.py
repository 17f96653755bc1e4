"""Tables and plans as figures of matplotlib, and the style that all figures have.

Colours mean the same everywhere: grey is dense, blue is the plan, orange is the choice made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spectrim.network.printing import tail
from spectrim.selection.budget import UNITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectrim.selection.candidates import Row
    from spectrim.selection.front import Sweep
    from spectrim.selection.plan import Plan

DENSE, PLANNED, CHOSEN, PALE, INK = "#a3adb8", "#2563c9", "#d9480f", "#d5dae0", "#1d2733"
GRID = "#e8ebef"
STYLE: Any = {
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
_LEAST = 0.01  # percent lost below which nobody looks
_NAMED = 10  # lines that a legend can tell apart


def cost_bars(plan: Plan, cost: str, *, ax: Axes | None = None) -> Axes:
    """A pair of bars an entry: its cost dense and as planned, with the rest of the network last."""
    check_cost(plan.dense_costs, cost)
    # Coupled channels cost something in their layers, which have entries of their own.
    entries = [e for e in plan if e.dense_costs[cost] > 0 or not e.of_channels]
    names = [e.site for e in entries]
    dense, now = [e.dense_costs[cost] for e in entries], [e.costs[cost] for e in entries]
    fixed = plan.dense_costs[cost] - sum(dense)
    if fixed > 1e-9 * plan.dense_costs[cost]:
        names, dense, now = [*names, "(all else)"], [*dense, fixed], [*now, plan.costs[cost] - sum(now)]
    most = max(dense, default=1.0)
    factor, unit = cost_scale(most, cost)
    at = range(len(names))
    with drawn_on(ax, 7.2, max(1.6, 0.19 * len(names) + 0.85)) as axes:
        axes.barh(at, [value / factor for value in dense], height=0.78, color=DENSE, label="dense")
        axes.barh(at, [value / factor for value in now], height=0.46, color=PLANNED, label="planned")
        for y, before, after in zip(at, dense, now, strict=True):
            if after < before:
                x = (before + 0.008 * most) / factor
                axes.text(x, y, f"{after / before:.0%}", va="center", fontsize=6.5, color=PLANNED)
        axes.set_yticks(at, [tail(name, 38) for name in names], fontsize=7 if len(names) <= 40 else 6.2)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.07 * most / factor)
        axes.set_xlabel(f"{cost_label(cost)} [{unit}]" if unit else cost_label(cost))
        gridded(axes.xaxis)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return axes


def curves(rows: Sequence[Row], cost: str, unit: str, *, ax: Axes | None = None) -> Axes:
    """A line a row through the options that no other one beats: what is lost against what is left of a cost."""
    for row in rows:
        check_cost(row.dense.costs, cost)
    drawn = [row for row in rows if row.dense.costs[cost] > 0 and len(row.options) > 1]
    with drawn_on(ax, 7.2, 3.6) as axes:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable

        colours = colormaps["viridis"].resampled(max(2, len(drawn)))
        for number, row in enumerate(drawn):
            worth = [option for option in row.worth(cost) if option.error > 0]
            x = [100 * option.costs[cost] / row.dense.costs[cost] for option in worth]
            y = [100 * option.error for option in worth]
            axes.plot(x, y, color=colours(number), lw=1, marker=".", ms=3, label=tail(row.site, 38))
        axes.set_xlabel(f"{cost_label(cost)} left, % of the layer's")
        axes.set_ylabel(f"lost, % of the layer's {unit}" if unit else "lost, %")
        gridded(axes)
        if not drawn:
            axes.text(0.5, 0.5, "no choices in the table", ha="center", transform=axes.transAxes)
            return axes
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], _LEAST))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if len(drawn) <= _NAMED:
            axes.legend(loc="best")
        else:
            bar = axes.figure.colorbar(ScalarMappable(cmap=colours), ax=axes, ticks=[0, 1])
            bar.ax.set_yticklabels([tail(row.site, 24) for row in (drawn[0], drawn[-1])])
    return axes


def points(sweep: Sweep, cost: str, *, ax: Axes | None = None) -> Axes:
    """A dot a network, its quality over its cost, of another colour once it is trained; the front as a line.

    Bars, and the band around the dense network, are one standard error to either side, where it is known.
    """
    best = sweep.front(cost)
    with drawn_on(ax, 6.4, 3.6) as axes:
        for tuned, colour, label in ((False, PLANNED, "without training"), (True, CHOSEN, "fine-tuned")):
            judged = [(point, point.tuned if tuned else point.carried_out) for point in sweep]
            drawn = [
                (100 * p.costs[cost] / p.dense_costs[cost], sweep.quality(j), sweep.uncertainty(j))
                for p, j in judged
                if j is not None
            ]
            if drawn:
                x, y, error = zip(*drawn, strict=True)
                axes.plot(x, y, "o", ms=5, color=colour, label=label, zorder=3)
                axes.errorbar(x, y, error, fmt="none", elinewidth=0.9, ecolor=colour, zorder=3)
        line = [(100 * p.costs[cost] / p.dense_costs[cost], sweep.quality(p.judged)) for p in best]
        if line:
            axes.plot(*zip(*line, strict=True), color=INK, lw=0.9, label="front", zorder=2)
        if sweep.dense is not None:
            axes.axhline(sweep.dense, color=DENSE, lw=0.9, ls="--", label="dense", zorder=1)
            if not math.isnan(error := sweep.uncertainty(sweep.itself)):
                axes.axhspan(sweep.dense - error, sweep.dense + error, color=PALE, alpha=0.5, lw=0, zorder=0)
        for point in best:
            at = (100 * point.costs[cost] / point.dense_costs[cost], sweep.quality(point.judged))
            # The front falls to the right where less is better: names stand on the side that it leaves free.
            offset = (4, -9) if sweep.higher_is_better else (4, 4)
            axes.annotate(point.asked, at, offset, textcoords="offset points", fontsize=6.5, color=INK)
        axes.set_xlim(0, 105)
        axes.set_xlabel(f"{'measured time' if cost == 'milliseconds' else cost_label(cost)}, % of dense")
        axes.set_ylabel(f"{sweep.judged_by}, {sweep.judged_in}".rstrip(", "))
        gridded(axes)
        axes.legend(loc="best")
    return axes


@contextmanager
def drawn_on(ax: Axes | None, width: float, height: float) -> Iterator[Axes]:
    """The axes to draw on in the common style; new ones of a new figure of pyplot if there are none.

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot() needs matplotlib, which is not installed: pip install matplotlib, or 'spectrim[report]'"
        ) from error
    with matplotlib.rc_context(STYLE):
        if ax is None:
            ax = pyplot.subplots(figsize=(width, height), layout="constrained")[1]
        yield ax


def gridded(lines: Any) -> None:
    """Pale lines behind what is drawn, across axes or one of them."""
    lines.grid(True, color=GRID, lw=0.6)
    getattr(lines, "axes", lines).set_axisbelow(True)


def check_cost(costs: Mapping[str, float], cost: str) -> None:
    """Raise ValueError unless there is such a cost."""
    if cost not in costs:
        raise ValueError(f"no cost {cost!r} here; there are {', '.join(costs)}")


def cost_label(cost: str) -> str:
    """A cost as an axis calls it."""
    return {"macs": "MACs", "parameters": "parameters", "bytes": "size", "latency": "latency"}.get(cost, cost)


def cost_scale(largest: float, cost: str) -> tuple[float, str]:
    """What to divide values of a cost by, and the unit they have then."""
    unit = UNITS.get(cost, "")
    if cost == "latency":
        return 1.0, unit
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= factor:
            return factor, prefix + unit.removeprefix("MAC")
    return 1.0, unit.removeprefix("MAC")
