"""A limit in milliseconds is met by the clock: plans are built, measured end to end and corrected."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from spectrim.application import apply
from spectrim.cost.latency import Latency
from spectrim.errors import InfeasibleBudgetError
from spectrim.methods import Method
from spectrim.network.choices import Choice
from spectrim.network.sites import Sites
from spectrim.nn.timing import Timing, as_run, as_timed, measure_latency
from spectrim.selection.budget import Budget, Limit
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import Selector, exact, select

log = logging.getLogger(__name__)

# A latency plan is selected, built, measured and corrected at most so often.
_ROUNDS = 8
# ... until the measured time is within this share of the budget.
CLOSE = 0.03


def wanted_time(limit: float, measured: Mapping[str, Timing], dense: float) -> float:
    """A limit on latency, which was read against the dense time of a table, rescaled to the dense time of a run."""
    return limit * measured["dense"].quiet / dense


def meet_latency(
    model: nn.Module,
    sites: Sites,
    table: Candidates,
    plan: Plan,
    budget: Budget,
    example: Any,
    latency: Latency,
    *,
    selector: Selector = exact,
    methods: Sequence[Method] | None = None,
    close: float = CLOSE,
) -> tuple[Plan, Mapping[str, Timing]]:
    """Build, measure and select again until the measured latency meets the budget.

    Layer times do not add up exactly: caches, threads and the layers in between differ. The ratio of measured to
    planned time of one round corrects the limit of the next.

    Parameters
    ----------
    plan
        The first to try, selected from ``table`` under ``budget``.
    example
        A batch as the network is timed with, from :func:`spectrim.preparation.one_batch`.
    close
        Share of the budget that may stay unused.

    Returns
    -------
    plan, timings
        The plan that came closest from below, and its times beside the dense network's. A budget without latency
        leaves the plan as it is.
    """
    limit = budget.limits(table.dense).get("latency")
    dense = as_timed(model, latency)
    best: tuple[tuple[bool, float], Plan, Mapping[str, Timing]] | None = None
    known: dict[tuple[Choice, ...], Mapping[str, Timing]] = {}
    asked, too_fast, too_slow = limit, 0.0, math.inf
    for number in range(_ROUNDS):
        key = tuple(entry.choice for entry in plan)
        if key not in known:
            trial = as_run(apply(model, sites, plan, methods=methods), example, latency)
            known[key] = measure_latency(
                {"dense": dense, "compressed": trial}, example, threads=latency.threads, runtime=latency.runtime
            )
        measured = known[key]
        if limit is None or asked is None:
            return plan, measured
        wanted = wanted_time(limit, measured, table.dense["latency"])
        ratio = measured["compressed"].quiet / wanted
        log.info("round %d: %.3f of %.3f ms", number + 1, measured["compressed"].quiet, wanted)
        # Meeting the budget comes first; among plans that do, the one that uses most of it.
        score = (ratio > 1, abs(ratio - 1))
        if best is None or score < best[0]:
            best = (score, plan, measured)
        if 1 - close <= ratio <= 1:
            break
        if ratio > 1:
            too_slow = min(too_slow, asked)
        else:
            too_fast = max(too_fast, asked)
        # Follow the ratio, but never out of the interval that earlier rounds leave.
        asked = asked / ratio * (0.99 if ratio > 1 else 1.0)
        if not too_fast < asked < too_slow:
            asked = (too_fast + too_slow) / 2 if too_slow < math.inf else too_fast * 1.2
        try:
            plan = select(table, budget.replace(latency=Limit(asked)), selector)
        except InfeasibleBudgetError:
            break
    assert best is not None
    # The plan says what was asked for, not the corrected limit that led there.
    return dataclasses.replace(best[1], budget=budget.limits(table.dense)), best[2]
