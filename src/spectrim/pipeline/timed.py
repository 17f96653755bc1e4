"""A network as it is planned, and what the clock says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectrim.cost.latency import Latency
from spectrim.network.sites import Sites
from spectrim.nn.timing import Speed, Timing
from spectrim.pipeline.making import Making
from spectrim.search.measured import Trials, meet_latency, put_back, surely_timed
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan

# A share of the dense time above the share of its MACs that a user is told.
_APART = 0.25


@dataclass(frozen=True)
class Draft:
    """A network that is planned, and not carried out yet."""

    # The plan, the table it was selected from, and the sites that both are about.
    plan: Plan
    table: Candidates
    sites: Sites
    budget: Budget  # as it is met: of a limit in bytes the number
    making: Making  # how it was planned, and is carried out
    again: Callable[[Candidates, Budget], Plan]  # selects from the table under another budget
    file: float | None = None  # bytes of the dense network's file, if bytes are limited


def met(
    model: nn.Module, draft: Draft, example: Any, latency: Latency
) -> tuple[Plan, Mapping[str, Timing], tuple[str, ...]]:
    """The plan of a network that meets its limits by the clock, its times beside dense, and what is said of them.

    Where time is limited or guarded, layers that lose time in the finished network are dense again.

    Raises
    ------
    SlowerError
        If the network is slower than dense, and may not be.
    """
    budget, trials = draft.budget, Trials(model, draft.sites, example, latency, draft.making.methods)

    def correct(table: Candidates, plan: Plan) -> tuple[Plan, Mapping[str, Timing]]:
        return meet_latency(trials, table, plan, budget, selector=draft.again)

    def again(names: Sequence[str]) -> tuple[Plan, Mapping[str, Timing]]:
        table = draft.table.dense_at(names)
        return correct(table, draft.again(table, budget))

    plan, measured = correct(draft.table, draft.plan)
    said: tuple[str, ...] = ()
    if draft.making.guard or budget.latency is not None:
        plan, measured, restored = put_back(trials, plan, measured, again)
        said = tuple(restored.sentences)
    if draft.making.guard:
        measured = surely_timed(trials, plan, measured)
    return plan, measured, (*said, *_said_of_time(plan, measured))


def _said_of_time(plan: Plan, measured: Mapping[str, Timing]) -> Iterator[str]:
    """What a user should know of measured times."""
    dense, small = measured["dense"], measured["compressed"]
    if (speed := Speed.of(dense, small)).differs and speed.ratio < 1:
        yield f"the compressed model is SLOWER than dense: {small.quiet:.3f} ms against {dense.quiet:.3f} ms"
    runtime = plan.facts.get("runtime", "eager")
    if "macs" in plan.costs and 1 / speed.high > plan.costs["macs"] / plan.dense_costs["macs"] + _APART:
        share = plan.costs["macs"] / plan.dense_costs["macs"]
        yield (
            f"MACs and milliseconds disagree: {share:.0%} of the MACs take {small.quiet / dense.quiet:.0%} of the time "
            f"in {runtime} at batch {plan.facts.get('batch', 1)}; a budget such as latency=60% limits the time"
        )
