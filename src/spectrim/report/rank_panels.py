"""The panels of the figure of learned ranks, one below the other on one axis of C steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spectrim.network.printing import tail
from spectrim.report.charts import round_step
from spectrim.report.figures import MUTED
from spectrim.selection.figures import CHOSEN, DENSE, INK, PLANNED, cost_label
from spectrim.selection.trajectory import Record, Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MU = "\u03bc"
# Steepest where ranks that pay are: they seldom exceed half the full rank, and the scale is a square root.
_RAMP = ((0.0, "#e0f3c8"), (0.35, "#62c6b4"), (0.65, PLANNED), (1.0, "#0d2250"))
_LINES = (PLANNED, INK, CHOSEN, MUTED)
_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)


def check_recorded(trajectory: Trajectory) -> None:
    """Raise ValueError if there is no C step to draw."""
    if not trajectory.records:
        raise ValueError("the trajectory has no C step to draw: pass that of a run that has taken one")


def heat_map(figure: Figure, axes: Axes, trajectory: Trajectory) -> None:
    """A line a site, a column a C step, coloured by rank / full rank; ``mu`` above, the last ranks at the right."""
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap, PowerNorm
    from matplotlib.patches import Patch

    records, sites = trajectory.records, trajectory.sites
    share = np.array([record.ranks for record in records], dtype=float).T / np.array(trajectory.full)[:, None]
    dense = np.array([left_dense(record) for record in records]).T
    low = share[~dense & (share > 0)]
    norm = PowerNorm(0.5, 1e-6, 1.0)
    ramp = LinearSegmentedColormap.from_list("ranks", _RAMP).with_extremes(under="white")
    edges = np.arange(len(records) + 1) + 0.5, np.arange(len(sites) + 1) - 0.5
    axes.pcolormesh(*edges, share, cmap=ramp, norm=norm, rasterized=True)
    axes.pcolormesh(*edges, np.ma.masked_where(~dense, share), cmap=ListedColormap([DENSE]), rasterized=True)
    axes.spines[["top", "right"]].set_visible(True)
    axes.set_ylim(len(sites) - 0.5, -0.5)
    axes.hlines(np.arange(len(sites) - 1) + 0.5, 0.5, len(records) + 0.5, color="white", lw=0.5)
    size = 7 if len(sites) <= 12 else 5.8
    axes.set_yticks(range(len(sites)), [tail(name, 34) for name in sites], fontsize=size)
    axes.tick_params(axis="both", length=0, labelbottom=False)
    last = axes.secondary_yaxis("right")
    last.set_yticks(range(len(sites)), _last(trajectory), fontsize=size)
    last.tick_params(length=0)
    last.set_ylabel("last / full rank", fontsize=7)
    ticks = step_ticks(len(records))
    above = axes.secondary_xaxis("top")
    above.set_xticks(ticks, [f"{records[tick - 1].mu:.2g}" for tick in ticks])
    above.tick_params(length=2)
    above.set_xlabel(MU)
    shares = [part for part in _SHARES if low.min(initial=1.0) <= part <= low.max(initial=0.0)] or sorted({*low})
    shades = [shares[round(at)] for at in np.linspace(0, len(shares) - 1, min(5, len(shares)))]
    handles = [Patch(facecolor=ramp(norm(part)), label=f"{100 * part:.3g} %") for part in shades]
    if (share == 0).any():
        handles.insert(0, Patch(facecolor="white", edgecolor="#8792a0", lw=0.6, label="rank 0"))
    if dense.any():
        handles.append(Patch(facecolor=DENSE, label="left dense"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), title="rank as a share of full rank",
                  title_fontsize=8, alignment="left", columnspacing=1.4, handlelength=1.4)  # fmt: skip


def _last(trajectory: Trajectory) -> list[str]:
    record = trajectory.records[-1]
    return [
        "dense" if dense else f"{rank} / {full}"
        for dense, rank, full in zip(left_dense(record), record.ranks, trajectory.full, strict=True)
    ]


def cost_lines(axes: Axes, trajectory: Trajectory) -> None:
    """Costs in percent of dense, which is the grey line; budgets are dashed."""
    from matplotlib.ticker import MultipleLocator

    highest = 100.0
    axes.axhline(100, color=DENSE, lw=1.0)
    for cost, colour in zip(shown_costs(trajectory), _LINES, strict=False):
        percent = [100 * share_of_dense(trajectory, record, cost) for record in trajectory.records]
        label = cost_label(cost)
        if cost in trajectory.budget:
            limit = 100 * trajectory.budget[cost] / trajectory.dense_costs[cost]
            axes.axhline(limit, color=colour, lw=0.9, ls=(0, (4, 3)))
            label += f" (budget {limit:.3g} %)"
            highest = max(highest, limit)
        _line(axes, percent, colour, label)
        highest = max(highest, *percent)
    axes.set_ylim(0, 1.07 * highest)
    axes.yaxis.set_major_locator(MultipleLocator(50))
    axes.set_ylabel("cost,\n% of dense")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, borderaxespad=0, fontsize=7)


def distance_line(axes: Axes, trajectory: Trajectory) -> None:
    """``||W - Delta|| / ||W||``, logarithmic."""
    # The scale is logarithmic: a network left dense, at distance 0, has no place on it.
    distances = [record.distance if record.distance > 0 else math.nan for record in trajectory.records]
    positive = [value for value in distances if value > 0]
    _line(axes, distances, PLANNED)
    axes.set_ylabel("distance\nto low rank")
    if not positive:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "0 at every C step", ha="center", va="center", color=MUTED, transform=axes.transAxes)
        return
    high = math.ceil(math.log10(max(positive)))
    low = min(math.floor(math.log10(min(positive))), high - 1)
    axes.set_yscale("log")
    axes.set_ylim(10.0**low * 0.8, 10.0**high * 1.25)
    axes.set_yticks([10.0**power for power in range(low, high + 1, math.ceil((high - low) / 3))])
    # The default formatters write formulas, which are switched off here.
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def metric_line(axes: Axes, trajectory: Trajectory) -> None:
    """What was measured of the nested network; steps without a measurement are gaps."""
    _line(axes, [math.nan if record.metric is None else record.metric for record in trajectory.records], PLANNED)
    axes.margins(y=0.15)
    axes.set_ylabel("metric at\nlow rank")


def _line(axes: Axes, values: Sequence[float], colour: str, label: str = "") -> None:
    size = 6 if len(values) <= 20 else 3
    axes.plot(range(1, len(values) + 1), values, color=colour, lw=1.3, marker=".", ms=size, label=label, clip_on=False)


def left_dense(record: Record) -> list[bool]:
    """For every site, whether it was left dense: its rank alone, which is the full one, does not tell."""
    return [choice == "dense" for choice in record.choices]


def shown_costs(trajectory: Trajectory) -> list[str]:
    """The costs that matter in this run: budgeted ones, or the one with a multiplier and the usual ones."""
    wanted = trajectory.budget or [*trajectory.records[-1].multipliers, "macs", "parameters"]
    return [cost for cost in dict.fromkeys(wanted) if trajectory.dense_costs.get(cost, 0) > 0]


def share_of_dense(trajectory: Trajectory, record: Record, cost: str) -> float:
    """A cost of one C step as a share of the dense network's."""
    return record.costs[cost] / trajectory.dense_costs[cost]


def step_ticks(count: int) -> list[int]:
    """The first C step and round ones after it."""
    stride = int(round_step(max(1.0, count / 10)))
    return sorted({1, *range(stride, count + 1, stride)})
