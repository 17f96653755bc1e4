"""How the strength of the low-rank penalty grows over a run of learned ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The strength ``mu`` of the penalty: ``start * factor ** j`` at C step ``j = 0 .. steps - 1``.

    The default spans three decades in 64 steps, for runs of a few epochs with several C steps in each: the closer they
    are, the less the penalty holds back what training changes within the low-rank weights. The schedules of the paper's
    scripts, with some 15 epochs between two C steps, are in :data:`PAPER_SCHEDULES`.

    Attributes
    ----------
    start, factor
        Above 0; a factor of at least 1.
    steps
        C steps, the first of them before any training.
    """

    start: float = 0.02
    factor: float = 1.12
    steps: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.start < float("inf"):
            raise ValueError(f"start={self.start!r} must be positive and finite")
        if not 1 <= self.factor < float("inf"):
            raise ValueError(f"factor={self.factor!r} must be at least 1: the penalty must not weaken")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps!r} must be at least 1")

    def mu(self, step: int) -> float:
        return self.start * self.factor ** min(step, self.steps - 1)


PAPER_SCHEDULES: Mapping[str, Schedule] = {
    "lenet300": Schedule(1e-3, 1.1, 30),
    "lenet5": Schedule(1e-4, 1.1, 30),
    "vgg": Schedule(2e-5, 1.2, 60),
    "resnet": Schedule(1e-3, 1.25, 50),
    "nin": Schedule(2e-5, 1.2, 60),
}
"""Schedules of the scripts released with Idelbayev and Carreira-Perpinan (CVPR 2020), by family of networks."""
