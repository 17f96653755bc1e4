"""The picture of a sweep."""

from __future__ import annotations

from spectrim.report.charts import Axis
from spectrim.report.sweep_page import _bar


def test_an_error_bar_of_a_share_ends_at_all_of_it() -> None:
    y = Axis(90, 110)
    assert _bar(y, 98.0, 5.0, 100.0) == (y.at(93.0), y.at(100.0))
    assert _bar(y, 98.0, 1.0, 100.0) == (y.at(97.0), y.at(99.0))
