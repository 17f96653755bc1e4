"""Figures of learned ranks: how they move over C steps, still and animated, and the accuracy-cost curve of a run.

A site left dense is grey here as everywhere. In the map of ranks, low ones are pale green, high ones dark blue, and
rank 0 is white.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectrim.network.files import replacing
from spectrim.network.printing import tail
from spectrim.report.figures import MUTED, Measured, blank_figure, error_bars
from spectrim.report.rank_panels import (
    MU,
    check_recorded,
    cost_lines,
    distance_line,
    heat_map,
    left_dense,
    metric_line,
    share_of_dense,
    shown_costs,
    step_ticks,
)
from spectrim.selection.figures import DENSE, INK, PALE, PLANNED, cost_label, cost_scale, gridded
from spectrim.selection.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

_FRAMES = 80  # of an animation, at most
_NAMES = 64  # below its bars, at most


def rank_paths(trajectory: Trajectory) -> Figure:
    """The ranks of all sites over C steps, with the costs, the distance and the metric below.

    Parameters
    ----------
    trajectory
        Of a run of :class:`spectrim.train.LearnedRanks`.

    Returns
    -------
    Figure
        On top a map with a line a site and a column a C step, coloured by the rank as a share of the full rank; the
        rank of the last step is at the right. Below it, on the same axis: costs as shares of dense, budgets dashed;
        the distance ``||W - Delta|| / ||W||`` of weights to their low-rank copies; and the metric of the low-rank
        copies, if it was recorded.

    Raises
    ------
    ValueError
        If no C step is recorded.
    """
    check_recorded(trajectory)
    records = trajectory.records
    count = len(trajectory.sites)
    drawn = [cost_lines] if shown_costs(trajectory) else []
    drawn.append(distance_line)
    if any(record.metric is not None for record in records):
        drawn.append(metric_line)
    tall = max(0.9, (0.24 if count <= 12 else 0.125) * count)
    with blank_figure(7.2, tall + 0.95 * len(drawn) + 1.0) as figure:
        figure.set_dpi(200)  # of the map, which is an image within the SVG: thousands of paths would be a large file
        heat, *below = figure.subplots(
            1 + len(drawn), 1, sharex=True, squeeze=False, height_ratios=[tall, *(0.8 for _ in drawn)]
        ).ravel()
        heat_map(figure, heat, trajectory)
        for axes, draw in zip(below, drawn, strict=True):
            draw(axes, trajectory)
            gridded(axes.yaxis)
        ticks = step_ticks(len(records))
        below[-1].set_xticks(ticks, [str(tick) for tick in ticks])
        below[-1].set_xlim(0.5, len(records) + 0.5)
        below[-1].set_xlabel("C step")
        figure.align_ylabels(below)
    return figure


def animate_ranks(trajectory: Trajectory, path: str | Path, *, seconds: float = 6.0) -> Path:
    """Write a GIF of the ranks of all sites, C step by C step.

    Parameters
    ----------
    trajectory
        Of a run of :class:`spectrim.train.LearnedRanks`.
    path
        A file that ends in ``.gif``.
    seconds
        Of one round. The last C step is held for a fifth of it. Of a run with more than 80 C steps, 80 are shown.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ValueError
        If no C step is recorded, for another kind of file, or a duration that is not positive.
    """
    from PIL import Image

    check_recorded(trajectory)
    records, path = trajectory.records, Path(path)
    if path.suffix.lower() != ".gif":
        raise ValueError(f"an animation is written to a file that ends in .gif, not {path.name!r}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds={seconds!r} must be positive and finite")
    steps = [round(step) for step in np.linspace(0, len(records) - 1, min(len(records), _FRAMES))]
    # One palette for all frames: with a palette each, colours flicker and the file is several times as large.
    palette = Image.new("P", (1, 1))
    palette.putpalette(_palette())
    first, *rest = (
        Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.NONE)
        for pixels in _pixels(trajectory, steps)
    )
    durations = [800 * seconds / len(steps)] * len(steps)
    durations[-1] += 200 * seconds
    with replacing(path) as scratch:
        first.save(scratch, save_all=True, append_images=rest, duration=[round(each) for each in durations], loop=0)
    return path


def _palette() -> list[int]:
    """Red, green and blue of all colours of the animation; those of letters in steps to white, for their edges."""
    from matplotlib.colors import to_rgb

    steps = np.linspace(0, 1, 14)[:, None]
    letters = [(1 - steps) * np.array(to_rgb(colour)) + steps for colour in (INK, MUTED)]
    colours = np.concatenate([*letters, [to_rgb(colour) for colour in (PLANNED, PALE, DENSE)]])
    return (255 * colours).round().astype(int).ravel().tolist()


def _pixels(trajectory: Trajectory, steps: Sequence[int]) -> Iterator[np.ndarray]:
    """Pixels of each step. What stands still is drawn once, for site names take most of the time."""
    with blank_figure(min(9.6, max(6.0, 0.152 * len(trajectory.sites) + 1.0)), 3.8) as figure:
        axes = figure.subplots()
        bars = _bars(axes, trajectory)
        axes.set_title(" ", fontsize=9)  # keeps the place of the moving titles free
        place = {"y": 1.02, "s": "", "va": "bottom", "fontsize": 9, "transform": axes.transAxes, "animated": True}
        titles = axes.text(0, ha="left", **place), axes.text(1, ha="right", **place)
        figure.canvas.draw()
        still = figure.canvas.copy_from_bbox(figure.bbox)
        for step in steps:
            figure.canvas.restore_region(still)
            _show_step(bars, titles, trajectory, step)
            for artist in (*bars, *titles):
                axes.draw_artist(artist)
            yield np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _bars(axes: Axes, trajectory: Trajectory) -> Any:
    """Pale bars of the full ranks, and those before them that will move."""
    from matplotlib.patches import Patch

    at = np.arange(len(trajectory.sites))
    axes.bar(at, trajectory.full, width=0.8, color=PALE)
    bars = axes.bar(at, trajectory.full, width=0.8, color=PLANNED, animated=True)
    axes.set_xlim(-0.7, len(at) - 0.3)
    axes.set_ylim(0, 1.02 * max(trajectory.full))
    named = at[:: math.ceil(len(at) / _NAMES)]
    axes.set_xticks(named, [tail(trajectory.sites[number], 24) for number in named],
                    fontsize=7 if len(at) <= 12 else 6, rotation=0 if len(at) <= 5 else 90)  # fmt: skip
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("rank")
    labels = {PLANNED: "rank", PALE: "full rank", DENSE: "left dense"}
    if not any(any(left_dense(record)) for record in trajectory.records):
        del labels[DENSE]
    axes.figure.legend(
        handles=[Patch(facecolor=colour, label=label) for colour, label in labels.items()],
        loc="outside upper right", ncols=len(labels), fontsize=7,
    )  # fmt: skip
    return bars


def _show_step(bars: Any, titles: tuple[Text, Text], trajectory: Trajectory, step: int) -> None:
    record = trajectory.records[step]
    for bar, rank, dense in zip(bars, record.ranks, left_dense(record), strict=True):
        bar.set_height(rank)
        bar.set_facecolor(DENSE if dense else PLANNED)
    facts = [f"{cost_label(cost)} {share_of_dense(trajectory, record, cost):.1%}" for cost in shown_costs(trajectory)]
    facts = [f"{', '.join(facts)} of dense"] if facts else []
    if record.metric is not None:
        facts.append(f"metric {record.metric:.4g}")
    titles[0].set_text(f"C step {step + 1} of {len(trajectory)},  {MU} = {record.mu:.3g}")
    titles[1].set_text(",  ".join(facts))


def cost_curve(points: Sequence[Measured], dense: Measured | None = None, *, cost: str = "macs") -> Figure:
    """The score at each cost, for the networks of a budget path.

    Parameters
    ----------
    points
        Costs in the cost's own unit, scores in percent; in any order.
    dense
        The uncompressed network, in grey.
    cost
        Which cost it is: ``"macs"``, ``"parameters"``, ``"bytes"``, ``"latency"`` or a name of one's own.

    Returns
    -------
    Figure
        Costs are on a logarithmic axis, as budgets of a path differ by factors. A score that knows how many samples it
        rests on (:class:`~spectrim.report.measures.Score`) has a bar of one standard error.

    Raises
    ------
    ValueError
        If there is no point, or a cost that is not positive.
    """
    points = sorted(points, key=lambda point: point.cost)
    everything = [*points, *([dense] if dense is not None else [])]
    if not points:
        raise ValueError("no points: give one Measured a budget")
    if bad := next((point for point in everything if not point.cost > 0), None):
        raise ValueError(f"cost {bad.cost!r} of {bad.label!r} must be positive: costs are on a logarithmic axis")
    scale, unit = cost_scale(max(point.cost for point in everything), cost)
    with blank_figure(7.2, 3.2) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        x, y = [point.cost / scale for point in points], [point.score for point in points]
        axes.plot(x, y, color=PLANNED, lw=1.3, marker="o", ms=5, zorder=4)
        error_bars(axes, x, y, PLANNED)
        for number, point in enumerate(points):
            # Below and above in turn, so that neighbours do not meet. The curve rises, mostly: there is room below it
            # at the right, and above it at the left.
            below = number % 2 == 0
            _name(axes, point, scale, below=below, right=below or y[number - 1] > y[number])
        if dense is not None:
            axes.axhline(dense.score, color=DENSE, lw=0.9, ls=(0, (4, 3)), zorder=1)
            axes.plot(dense.cost / scale, dense.score, "o", color=DENSE, ms=6, zorder=4)
            error_bars(axes, [dense.cost / scale], [dense.score], DENSE)
            _name(axes, dense, scale, colour=MUTED)
        axes.margins(x=0.12, y=0.3)
        _cost_ticks(axes)
        axes.set_xlabel(f"{cost_label(cost)} [{unit}]" if unit else cost_label(cost))
        axes.set_ylabel("measured score [%]")
        gridded(axes)
    return figure


def _name(
    axes: Axes, point: Measured, scale: float, *, below: bool = False, right: bool = False, colour: str = INK
) -> None:
    axes.annotate(
        f"{point.label}\n{point.score:.2f} %", (point.cost / scale, point.score), textcoords="offset points",
        xytext=(4 if right else -4, -4 if below else 4), ha="left" if right else "right",
        va="top" if below else "bottom", fontsize=7, color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
    )  # fmt: skip


def _cost_ticks(axes: Axes) -> None:
    """Round numbers within the view: a logarithmic axis by itself has powers of ten only."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 1.5, 2, 3, 5, 7)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 3:  # points close to each other
        ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
