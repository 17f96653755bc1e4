"""The strength of the low-rank penalty."""

from __future__ import annotations

import pytest

from spectrim.train import PAPER_SCHEDULES, Schedule


def test_the_strength_grows_by_a_factor_and_then_stays() -> None:
    schedule = Schedule(start=0.5, factor=2.0, steps=4)
    assert [schedule.mu(step) for step in range(6)] == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert [Schedule(3.0, 1, 2).mu(step) for step in range(3)] == [3.0] * 3
    assert Schedule(2.0, 5.0, 1).mu(9) == 2.0


def test_the_default_spans_three_decades() -> None:
    schedule = Schedule()
    assert schedule.mu(0) == 0.02
    assert 1e3 <= schedule.mu(schedule.steps - 1) / schedule.mu(0) < 1e4


@pytest.mark.parametrize(
    ("name", "start", "factor", "steps"),
    [
        # examples/cvpr2020/run_*.sh of UCMerced-ML/LC-model-compression, bf12c3c.
        ("lenet300", 1e-3, 1.1, 30),
        ("lenet5", 1e-4, 1.1, 30),
        ("vgg", 2e-5, 1.2, 60),
        ("resnet", 1e-3, 1.25, 50),
        ("nin", 2e-5, 1.2, 60),
    ],
)
def test_schedules_of_the_paper(name: str, start: float, factor: float, steps: int) -> None:
    schedule = PAPER_SCHEDULES[name]
    assert (schedule.start, schedule.factor, schedule.steps) == (start, factor, steps)
    assert schedule.mu(steps - 1) == pytest.approx(start * factor ** (steps - 1))
    assert len(PAPER_SCHEDULES) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.0}, r"start=0\.0 must be positive"),
        ({"start": -1.0}, "start=-1.0"),
        ({"start": float("inf")}, "start=inf"),
        ({"start": float("nan")}, "start=nan"),
        ({"factor": 0.99}, r"factor=0\.99 must be at least 1.*not weaken"),
        ({"factor": float("inf")}, "factor=inf"),
        ({"factor": float("nan")}, "factor=nan"),
        ({"steps": 0}, "steps=0 must be at least 1"),
    ],
)
def test_schedules_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**options)
