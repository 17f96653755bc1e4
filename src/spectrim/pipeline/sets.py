"""Which sets of methods may make the network that is asked for: decided here, whoever asks."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

from spectrim.errors import InfeasibleBudgetError
from spectrim.pipeline.goal import Goal
from spectrim.pipeline.making import Making
from spectrim.pipeline.report import Result
from spectrim.pipeline.shrinking import shrink, shrink_best, with_verdict
from spectrim.pipeline.within import Within
from spectrim.preparation import Prepared
from spectrim.search.arms import Arm, usual

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
    OPEN = "the default, and all that fit where its methods cannot go as low as is asked for"
    ALL = "all that fit compete"

    @classmethod
    def of(cls, *, auto: bool, said: bool) -> Sets:
        """Those for what a user says: ``auto``, or anything else on what layers may become."""
        return cls.ALL if auto else cls.NAMED if said else cls.OPEN


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
    if sets is Sets.ALL:
        known = prepared(competing=True)
        return _among(model, goal, making, known, usual(goal.limited, known.sites))
    known = prepared(competing=False)

    def others(why: str) -> tuple[Prepared, list[Arm]]:
        told(why)
        again = prepared(competing=True, known=known)
        return again, usual(goal.limited, again.sites)

    try:
        if goal.tolerance is None:
            return _by_one(model, goal, making, known, sets)
        within = Within(model, goal, goal.tolerance, making, known)
        result = within.reached(None if sets is Sets.NAMED else others)
        return _widened(result, within.widened) if within.widened else result
    except InfeasibleBudgetError as error:
        if sets is Sets.NAMED:
            raise
        return _widened(_among(model, goal, making, *others(error.brief)), error.brief)


def _by_one(model: nn.Module, goal: Goal, making: Making, known: Prepared, sets: Sets) -> Result:
    """The network that meets a budget by one set of methods."""
    assert goal.budget is not None
    result = shrink(model, known, goal.budget, making)
    agreement = result.report.agreement
    if sets is Sets.OPEN and agreement is not None and agreement.agreed < _POOR:
        log.warning("%s", _OTHER_SETS)
        result = result.reporting(notes=(*result.report.notes, _OTHER_SETS))
    return result if goal.judge.evaluate is None else with_verdict(result, goal.judge)


def _among(model: nn.Module, goal: Goal, making: Making, known: Prepared, arms: Sequence[Arm]) -> Result:
    """The network by several sets."""
    if goal.tolerance is not None:
        return Within(model, goal, goal.tolerance, making, known, arms).reached()
    assert goal.budget is not None
    return shrink_best(model, known, goal.budget, arms, goal.judge, making, seconds=goal.seconds)


def _widened(result: Result, why: str) -> Result:
    """The result, with why all sets competed after the default."""
    return result.reporting(notes=(_WIDENED.format(why), *result.report.notes))
