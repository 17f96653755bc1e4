"""What figures of matplotlib have in common, which draw on no screen."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.network.files import replacing
from spectrim.report.measures import Score
from spectrim.selection.figures import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from spectrim.network.printing import tail
from spectrim.selection.figures import DENSE, PLANNED, gridded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MUTED = "#5b6570"


@dataclass(frozen=True)
class Measured:
    """A network that was built and evaluated, for the accuracy-cost figure.

    ``cost`` is in the cost's own unit, ``score`` in percent.
    """

    label: str
    cost: float
    score: float


def error_bars(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    """A bar of one standard error up and down, where the number of test samples is known."""
    known = [
        (at, score, error) for at, score in zip(x, y, strict=True) if (error := Score(score).standard_error) == error
    ]
    if known:
        at, score, error = zip(*known, strict=True)
        axes.errorbar(at, score, yerr=error, fmt="none", ecolor=colour, elinewidth=1.2, capsize=2, zorder=3)


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG with text as outlines: it looks the same everywhere and needs no font."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def write_figure(figure: Figure, file: Path) -> None:
    """Write a figure in the format that the file's name ends in: .svg, .png or .pdf; whole or not at all."""
    import matplotlib

    with replacing(file) as scratch:
        if file.suffix == ".svg":
            scratch.write_bytes(to_svg(figure))
            return
        with matplotlib.rc_context(STYLE):
            figure.savefig(scratch, dpi=200, metadata={"CreationDate": None} if file.suffix == ".pdf" else None)


@contextmanager
def blank_figure(width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches, in the style that all have."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def recommended_widths(channels: Mapping[str, int], widths: Mapping[str, Mapping[str, int]]) -> Figure:
    """A bar a group of channels, with what recipes recommend in it.

    Parameters
    ----------
    channels
        How many there are now, by the group.
    widths
        Recommended widths by recipe and group. The first recipe is a bar within the grey one, the others are marks, the
        darker the later.

    Raises
    ------
    ValueError
        If a recipe lacks a group, or there is no recipe.
    """
    names = list(channels)
    for recipe, sizes in widths.items():
        if missing := [name for name in names if name not in sizes]:
            raise ValueError(f"recipe {recipe!r} has no width for {missing[0]!r}; it has {', '.join(sizes) or 'none'}")
    if not widths:
        raise ValueError("no widths to draw; give those of one recipe at least")
    import matplotlib

    (first, bars), *marks = widths.items()
    colours = matplotlib.colormaps["Oranges"](np.linspace(0.3, 0.95, len(marks)))
    at = np.arange(len(names))
    with blank_figure(7.2, max(1.8, 0.21 * len(names) + 0.95)) as figure:
        axes = figure.subplots()
        drawn: list[Any] = [
            axes.barh(at, [channels[name] for name in names], height=0.78, color=DENSE, label="now"),
            axes.barh(at, [bars[name] for name in names], height=0.46, color=PLANNED, label=first),
        ]
        for (recipe, sizes), colour in zip(marks, colours, strict=True):
            drawn += axes.plot(
                [sizes[name] for name in names], at, "D", ms=4.2, color=colour, mec="white", mew=0.5, ls="none",
                label=recipe, zorder=3,
            )  # fmt: skip
        axes.set_yticks(at, [tail(name, 38) for name in names], fontsize=7 if len(names) <= 40 else 6.2)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.03 * max(channels.values(), default=1))
        axes.set_xlabel("channels")
        gridded(axes.xaxis)
        axes.tick_params(axis="y", length=0)
        figure.legend(handles=drawn, loc="outside upper left", ncols=len(marks) + 2, columnspacing=1.2)
    return figure
