"""Labels of charts: none on another, on a dot or on an error bar, where there is room."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spectrim.report import labels
from spectrim.report.charts import Dot, Polyline


def covered(dots: list[Dot], height: float) -> float:
    """Square pixels of labels on anything, all together."""
    places = labels.placed(dots, (), height)
    boxes = [labels._box(dot, place, height) for dot, place in zip(dots, places, strict=True) if dot.label]
    drawn = [box for dot in dots for box in labels._boxes(dot, height)]
    pairs = [*itertools.combinations(boxes, 2), *itertools.product(boxes, drawn)]
    return sum(labels._overlap(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    "dots",
    [
        [Dot(100, 50, "", "dense", "dense 96.75 %", 40, 60), Dot(49, 50, "", "choice", "learned 96.75 %", 40, 60)],
        [Dot(100, 50, "", "dense", "dense 96.75 %", 40, 60), Dot(79, 50, "", "choice", "compressed 96.75 %", 40, 60)],
        [Dot(20 * n, 50, "", "plan", f"macs={20 * n}%", 30, 70) for n in range(1, 5)],
    ],
)  # fmt: skip
def test_labels_of_neighbours_lie_on_nothing(dots: list[Dot]) -> None:
    assert covered(dots, 200) == 0


def test_every_label_stays_in_the_plot_and_takes_the_best_place() -> None:
    how = np.random.default_rng(0)
    for _ in range(20):
        dots = [Dot(x, y, "", "plan", "macs=50%", y - 8, y + 8) for x, y in how.uniform(10, 90, (4, 2))]
        for dot, place in zip(dots, labels.placed(dots, (), 200), strict=True):
            left, top, right, bottom = labels._box(dot, place, 200)
            assert left >= 0
            assert right <= labels._WIDTH + labels._MARGIN
            assert top >= -labels._ABOVE
            assert bottom <= 200
        alone = dots[:1]
        assert covered(alone, 200) == 0


def test_lines_are_kept_clear_of() -> None:
    dot = Dot(50, 50, "", "choice", "this plan")
    falling = Polyline((((0, 100), (50, 50), (100, 0)),), "plan")
    (place,) = labels.placed([dot], [falling], 200)
    box = labels._box(dot, place, 200)
    assert sum(labels._overlap(box, each) for each in labels._along(falling.points[0], 200)) == 0
