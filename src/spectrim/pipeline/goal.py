"""What a network is to be."""

from __future__ import annotations

from dataclasses import dataclass

from spectrim.search.judge import Judge
from spectrim.search.tolerance import Tolerance
from spectrim.selection.budget import Budget


@dataclass(frozen=True)
class Goal:
    """How small a network is to be, and how good."""

    budget: Budget | None  # none for the smallest network within the tolerance
    tolerance: Tolerance | None  # what may be lost, if that is limited
    judge: Judge  # what tells what is lost; it knows the dense network
    cost: str = "macs"  # what the smallest network has least of
    seconds: float | None = None  # after which nothing further is begun where sets compete

    @property
    def limited(self) -> tuple[str, ...]:
        """The costs that are to be small."""
        return (self.cost,) if self.budget is None else self.budget.costs
