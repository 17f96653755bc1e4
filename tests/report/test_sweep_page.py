"""The picture of a sweep."""

from __future__ import annotations

from typing import Any, cast

import pytest

from spectrim.report.sweep_page import _Mark


@pytest.mark.parametrize(("spread", "ends"), [(5.0, (93.0, 100.0)), (1.0, (97.0, 99.0)), (float("nan"), (98.0, 98.0))])
def test_an_error_bar_of_a_share_ends_at_all_of_it(spread: float, ends: tuple[float, float]) -> None:
    mark = _Mark(cast(Any, None), cast(Any, None), "plan", 98.0, spread, 100.0)
    assert (mark.low, mark.high) == ends
