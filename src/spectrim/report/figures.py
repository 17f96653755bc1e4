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
