"""Plans are built and timed end to end: a limit in milliseconds is met, and layers that lose time are put back."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectrim.application import carry_out
from spectrim.cost.latency import Latency
from spectrim.errors import InfeasibleBudgetError, SlowerError
from spectrim.methods import Method
from spectrim.network.choices import DENSE, Choice
from spectrim.network.sites import Sites
from spectrim.nn.timing import Speed, Timing, as_run, as_timed, measure_latency
from spectrim.selection.budget import Budget, Limit
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Entry, Plan
from spectrim.selection.selectors import Selector, exact, select

log = logging.getLogger(__name__)

# A latency plan is selected, built, measured and corrected at most so often.
_ROUNDS = 8
# Networks that are built and timed to find the layers that lose time, beside those that meet a limit; so many at once
# and so many seconds at once.
_TRIALS, _BESIDE, _SECONDS = 12, 6, 20.0
# Seconds, at least, that networks are timed beside each other; whether one is slower than dense is told in more.
_LEAST, _SURELY = 0.5, 2.0
# ... until the measured time is within this share of the budget.
CLOSE = 0.03


def wanted_time(limit: float, measured: Mapping[str, Timing], dense: float) -> float:
    """A limit on latency, which was read against the dense time of a table, rescaled to the dense time of a run."""
    return limit * measured["dense"].quiet / dense


def asked_time(plan: Plan, measured: Mapping[str, Timing]) -> float | None:
    """Milliseconds that the network of a plan may take in this run; None if time has no limit or was not measured."""
    limit = (plan.budget or {}).get("latency")
    return None if limit is None or not measured else wanted_time(limit, measured, plan.dense_costs["latency"])


def is_late(plan: Plan, measured: Mapping[str, Timing]) -> bool:
    """Whether a limit on time is missed as measured, by more than it is corrected to.

    What differs between the dense network and a plan that changes nothing is noise.
    """
    asked = asked_time(plan, measured)
    return asked is not None and measured["compressed" if plan.changed else "dense"].quiet > asked * (1 + CLOSE)


def meet_latency(
    trials: Trials,
    table: Candidates,
    plan: Plan,
    budget: Budget,
    *,
    selector: Selector = exact,
    close: float = CLOSE,
) -> tuple[Plan, Mapping[str, Timing]]:
    """Build, measure and select again until the measured latency meets the budget.

    Layer times do not add up exactly: caches, threads and the layers in between differ. The ratio of measured to
    planned time of one round corrects the limit of the next.

    Parameters
    ----------
    plan
        The first to try, selected from ``table`` under ``budget``.
    close
        Share of the budget that may stay unused.

    Returns
    -------
    plan, timings
        The plan that came closest from below, and its times beside the dense network's. A budget without latency
        leaves the plan as it is.
    """
    limit = budget.limits(table.dense).get("latency")
    best: tuple[tuple[bool, float], Plan, Mapping[str, Timing]] | None = None
    known: dict[tuple[Choice, ...], Mapping[str, Timing]] = {}
    asked, too_fast, too_slow = limit, 0.0, math.inf
    for number in range(_ROUNDS):
        key = tuple(entry.choice for entry in plan)
        if key not in known:
            known[key] = trials.beside({"dense": plan, "compressed": plan}, seconds=math.inf)
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


@dataclass(frozen=True)
class PutBack:
    """What was found of layers that lose time in the finished network."""

    layers: tuple[str, ...] = ()  # dense again, since the network is faster so
    needed: tuple[str, ...] = ()  # they lose time too, and without them no plan meets the budget, or a slower one does
    # How many were built and timed for it, and how long that took.
    networks: int = 0
    seconds: float = 0.0

    @property
    def sentences(self) -> Iterator[str]:
        """For the report."""
        spent = f"{self.networks} networks were timed to find out, in {self.seconds:.0f} s"
        if self.layers:
            yield f"dense again, since time was lost in the finished network: {', '.join(self.layers)} ({spent})"
        if self.needed:
            yield f"time is lost in the finished network, and the budget needs it: {', '.join(self.needed)} ({spent})"


@dataclass(frozen=True)
class Trials:
    """Builds plans for one dense network and times them in turns, as ``latency`` says.

    ``example`` is a batch as the network is timed with, from :func:`spectrim.preparation.one_batch`.
    """

    model: nn.Module
    sites: Sites
    example: Any
    latency: Latency
    methods: Sequence[Method] | None = None

    def beside(
        self, plans: Mapping[str, Plan], seconds: float = _SECONDS, least: float = _LEAST
    ) -> Mapping[str, Timing]:
        """Times of the networks of plans, and of the dense one where a plan is named so."""
        untried = dataclasses.replace(self.sites, shaped=None)  # what is run anyway needs no proof on noise
        built = {
            name: as_timed(self.model, self.latency)
            if name == "dense"
            else as_run(carry_out(self.model, untried, plan, methods=self.methods).model, self.example, self.latency)
            for name, plan in plans.items()
        }
        return measure_latency(
            built, self.example, threads=self.latency.threads, runtime=self.latency.runtime, seconds=seconds,
            least=least,
        )  # fmt: skip

    def losing(self, plan: Plan, groups: list[list[Entry]], left: int) -> tuple[list[Entry], int]:
        """The choices of a plan without which its network is surely faster, and how many networks were timed.

        The groups are swapped back to dense one at a time, as many as may be timed; a group that loses time is then
        looked into in the same way, and counts whole if none of its parts surely does.
        """
        groups = groups[:left]
        if not groups:
            return [], 0
        trials = {str(number): with_dense(plan, group) for number, group in enumerate(groups)}
        times = self.beside({"as planned": plan, **trials})
        slower: list[Entry] = []
        taken = len(trials) + 1
        for name, group in zip(trials, groups, strict=True):
            speed = Speed.of(times["as planned"], times[name])
            log.info("%s dense again: %s", ", ".join(entry.site for entry in group), speed)
            if speed.differs and speed.ratio > 1:
                parts, more = self.losing(plan, in_groups(group), left - taken) if len(group) > 1 else ([], 0)
                slower += parts or group
                taken += more
        return slower, taken


def with_dense(plan: Plan, group: Sequence[Entry]) -> Plan:
    """A plan with some of its layers left dense, to be timed."""
    sites = {entry.site for entry in group}
    entries = [
        dataclasses.replace(e, choice=DENSE, error=0.0, costs=e.dense_costs) if e.site in sites else e for e in plan
    ]
    costs = {
        name: total + sum(e.dense_costs.get(name, 0.0) - e.costs.get(name, 0.0) for e in group)
        for name, total in plan.costs.items()
    }
    return dataclasses.replace(plan, entries=tuple(entries), costs=costs)


def in_groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries in order in up to :data:`_BESIDE` groups of nearly equal size."""
    count = min(_BESIDE, len(entries))
    edges = [round(number * len(entries) / count) for number in range(count + 1)]
    return [list(entries[a:b]) for a, b in itertools.pairwise(edges)]


def put_back(
    trials: Trials,
    plan: Plan,
    measured: Mapping[str, Timing],
    again: Callable[[Sequence[str]], tuple[Plan, Mapping[str, Timing]]],
) -> tuple[Plan, Mapping[str, Timing], PutBack]:
    """Leave layers dense whose replacement loses time in the finished network, within the budget of the plan.

    Times of layers do not add up: what a layer alone gained may be lost in the network. Where the network gains at
    least what its layers do together, nothing is looked for. Else layers are swapped back, those that gain the least by
    the table first, and timed beside the network as planned. Only what differs beyond noise counts.

    Parameters
    ----------
    plan, measured
        From :func:`meet_latency`.
    again
        The plan under the same budget, and its times, where these layers are to stay dense.

    Returns
    -------
    plan, measured, found
        As given if nothing is put back, and where methods remove channels: there a layer's time depends on others.
    """
    start = time.perf_counter()
    changed = [entry for entry in plan if not entry.choice.is_dense]
    speed = Speed.of(measured["compressed"], measured["dense"])
    planned = plan.costs["latency"] / plan.dense_costs["latency"]
    removing = any(method.removes_channels for method in trials.methods or ())
    if not changed or speed.low <= planned or removing:
        return plan, measured, PutBack()
    changed.sort(key=lambda entry: -entry.costs["latency"] / max(entry.dense_costs["latency"], 1e-9))
    losing, networks = trials.losing(plan, in_groups(changed), _TRIALS)
    names = tuple(site for entry in losing for site in entry.sites)

    def outcome(**kinds: tuple[str, ...]) -> PutBack:
        return PutBack(networks=networks, seconds=time.perf_counter() - start, **kinds)

    if not names:
        return plan, measured, outcome()
    try:
        other, times = again(names)
    except InfeasibleBudgetError:
        return plan, measured, outcome(needed=names)
    networks += 1
    kept = trials.beside({"as planned": plan, "put back": other})
    networks += 2
    if (change := Speed.of(kept["as planned"], kept["put back"])).differs and change.ratio < 1:
        return plan, measured, outcome(needed=names)
    return other, times, outcome(layers=names)


def surely_timed(trials: Trials, plan: Plan, measured: Mapping[str, Timing]) -> Mapping[str, Timing]:
    """Times of the network of a plan beside dense, taken for longer where they leave open whether it is slower.

    Raises
    ------
    SlowerError
        If it is slower, twice.
    """
    if Speed.of(measured["dense"], measured["compressed"]).low >= 1 or all(entry.choice.is_dense for entry in plan):
        return measured
    times = measured
    for _ in range(2):
        times = trials.beside({"dense": plan, "compressed": plan}, least=_SURELY)
        speed = Speed.of(times["dense"], times["compressed"])
        if not (speed.differs and speed.ratio < 1):
            return times
    cost, limit = next(iter(plan.budget.items()))
    said = (
        f"{times['compressed'].quiet:.3g} ms for {times['dense'].quiet:.3g} ms, run by {trials.latency.runs.name} at "
        f"batch {trials.latency.batch}"
    )
    raise SlowerError(cost, limit, plan.dense_costs[cost], said)
