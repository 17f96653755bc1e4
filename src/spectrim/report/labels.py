"""Where the labels of a chart stand, so that none lies on a dot, an error bar or another label.

They are placed for the narrowest page: letters keep their size where the page is wider, and places move apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectrim.report.charts import Dot, Polyline

_WIDTH = 266  # pixels of a plot on a page of 390
_LETTER, _ABOVE, _BELOW = 7.5, 10.0, 3.0  # pixels of a letter, and of a line around its foot
_MARGIN = 12.0  # right of the plot
_RADIUS, _BAR, _STROKE = 5.0, 3.0, 1.0
_BETWEEN = 8  # places of a line from one dot to the next that labels keep clear of

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


@dataclass(frozen=True)
class Label:
    """A label beside its dot: pixels from the dot to its foot, and which end of it stands there."""

    dx: float = 0.0
    dy: float = 0.0
    anchor: str = "start"


def placed(dots: Sequence[Dot], curves: Sequence[Polyline], height: float) -> list[Label]:
    """A place for the label of every dot, each where it covers least of what is drawn and of those before it.

    Parameters
    ----------
    dots, curves
        In percent of the plot; dots without a label are kept clear of.
    height
        Of the plot in pixels.
    """
    drawn = [box for dot in dots for box in _boxes(dot, height)]
    drawn += [box for curve in curves for group in curve.points for box in _along(group, height)]
    found = []
    for dot in dots:
        best = min(_places(dot, height), key=lambda place: _covered(_box(dot, place, height), drawn, height))
        found.append(best)
        if dot.label:
            drawn.append(_box(dot, best, height))
    return found


def _at(dot: Dot, height: float) -> tuple[float, float]:
    return _WIDTH * dot.x / 100 + dot.aside, height * (1 - dot.y / 100)


def _boxes(dot: Dot, height: float) -> Iterator[Box]:
    x, y = _at(dot, height)
    yield x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS
    if dot.barred:
        yield x - _BAR, height * (1 - dot.high / 100), x + _BAR, height * (1 - dot.low / 100)


def _along(group: Sequence[tuple[float, float]], height: float) -> Iterator[Box]:
    for (x0, y0), (x1, y1) in itertools.pairwise(group):
        for step in range(_BETWEEN):
            x = _WIDTH * (x0 + (x1 - x0) * step / _BETWEEN) / 100
            y = height * (1 - (y0 + (y1 - y0) * step / _BETWEEN) / 100)
            yield x - _STROKE, y - _STROKE, x + _STROKE, y + _STROKE


def _places(dot: Dot, height: float) -> Iterator[Label]:
    """Beside the dot, where its page has more room first; then over and under its error bar."""
    right, left = (9.0, "start"), (-9.0, "end")
    sides = (left, right) if dot.x > 55 else (right, left)
    for dy in (-9.0, 18.0, 4.0, -23.0, 32.0):
        yield from (Label(dx, dy, anchor) for dx, anchor in sides)
    over, under = (dot.high - dot.y, dot.low - dot.y) if dot.barred else (0.0, 0.0)
    for dy in (-height * over / 100 - 8, -height * under / 100 + 16):
        yield from (Label(dx, dy, anchor) for dx, anchor in ((0.0, "middle"), (3.0, "end"), (-3.0, "start")))


def _box(dot: Dot, place: Label, height: float) -> Box:
    x, y = _at(dot, height)
    width = _LETTER * len(dot.label)
    left = x + place.dx - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[place.anchor]
    return left, y + place.dy - _ABOVE, left + width, y + place.dy + _BELOW


def _covered(box: Box, drawn: Sequence[Box], height: float) -> float:
    """Square pixels of a label that lie on something, or outside the plot."""
    left, top, right, bottom = box
    inside = _overlap(box, (0.0, -_ABOVE, _WIDTH + _MARGIN, height))
    return (right - left) * (bottom - top) - inside + sum(_overlap(box, each) for each in drawn)


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(high, 0.0)
