"""What a network is to be, and which sets of methods may make it: decided here, whoever asks."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from spectrim.errors import InfeasibleBudgetError
from spectrim.pipeline.making import Making
from spectrim.pipeline.report import Result
from spectrim.pipeline.shrinking import shrink, shrink_best, shrink_within, with_verdict
from spectrim.preparation import Prepared
from spectrim.search.arms import usual
from spectrim.search.judge import Judge
from spectrim.search.tolerance import Tolerance
from spectrim.selection.budget import Budget

log = logging.getLogger(__name__)
# Share of outputs that agree with dense ones, below which a user is told what else there is.
_POOR = 0.9
_OTHER_SETS = (
    "without training the budget costs this network much: fine_tune (--train) wins most of it back; methods='auto' "
    "(--method auto) has other sets of methods compete, which takes several times as long and may choose layers that "
    "run slower"
)
_WIDENED = "{}: so other sets of methods competed, which takes several times as long"


class Sets(enum.Enum):
    """Which sets of methods may make the network."""

    NAMED = "the one that was named"
    OPEN = "the default, and all that fit where its methods cannot meet the budget"
    ALL = "all that fit compete"

    @classmethod
    def of(cls, *, auto: bool, said: bool) -> Sets:
        """Those for what a user says: ``auto``, or anything else on what layers may become."""
        return cls.ALL if auto else cls.NAMED if said else cls.OPEN


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


class Preparing(Protocol):
    """Prepares the dense network: with the channels that can go, or without; its time is taken over if known."""

    def __call__(self, *, competing: bool, known: Prepared | None = None) -> Prepared: ...


def reached(
    model: nn.Module,
    goal: Goal,
    making: Making,
    sets: Sets,
    prepared: Preparing,
    told: Callable[[str], None] = lambda why: log.info("%s: sets of methods compete", why),
) -> Result:
    """The network that is asked for, by the sets of methods that may make it.

    Parameters
    ----------
    making
        With the methods of the one set; where all compete they bring their own.
    prepared
        Prepares the network; called again, with what is known of its time, where all compete after the default.
    told
        Why all compete after the default, in words.
    """
    known, why = None, ""
    if sets is not Sets.ALL:
        known = prepared(competing=False)
        try:
            if goal.tolerance is not None:
                return shrink_within(model, known, goal.budget, goal.tolerance, goal.judge, making, cost=goal.cost)
            assert goal.budget is not None
            result = shrink(model, known, goal.budget, making)
            if sets is Sets.OPEN and _is_poor(result):
                log.warning("%s", _OTHER_SETS)
                result = result.reporting(notes=(*result.report.notes, _OTHER_SETS))
            return result if goal.judge.evaluate is None else with_verdict(result, goal.judge)
        except InfeasibleBudgetError as error:
            if sets is Sets.NAMED:
                raise
            why = error.brief
            told(why)
    known = prepared(competing=True, known=known)
    arms = usual(goal.limited, known.sites)
    if goal.tolerance is not None:
        result = shrink_within(
            model, known, goal.budget, goal.tolerance, goal.judge, making, arms=arms, seconds=goal.seconds,
            cost=goal.cost,
        )  # fmt: skip
    else:
        assert goal.budget is not None
        result = shrink_best(model, known, goal.budget, arms, goal.judge, making, seconds=goal.seconds)
    notes = (_WIDENED.format(why),) if why else ()
    return result.reporting(notes=(*notes, *result.report.notes))


def _is_poor(result: Result) -> bool:
    agreement = result.report.agreement
    return agreement is not None and agreement.agreed < _POOR
