"""A network that is prepared is compressed: to a budget, within a tolerance, or by the best of several arms."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from spectrim.application import apply, carry_out
from spectrim.cost.counted import Cost
from spectrim.errors import PlanError, ToleranceError
from spectrim.methods import Method
from spectrim.network.choices import CPChoice, TuckerChoice
from spectrim.network.groups import group
from spectrim.network.sites import Sites
from spectrim.nn.agreement import output_error
from spectrim.nn.checkpoint import header_bytes
from spectrim.nn.timing import Speed, Timing, as_run
from spectrim.pipeline.report import Result, reported
from spectrim.preparation import Prepared
from spectrim.preparation import one_batch as one_batch  # its former place, until version 0.3
from spectrim.progress import Progress, silent
from spectrim.search.arms import Arm, best
from spectrim.search.file_size import within_file
from spectrim.search.judge import Judge
from spectrim.search.measured import meet_latency
from spectrim.search.stepwise import select_in_steps
from spectrim.search.tolerance import Tolerance, smallest, tightest
from spectrim.selection.budget import Budget, Limit
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import Selector, exact, select
from spectrim.tables import tabulate

log = logging.getLogger(__name__)


# A share of a cost in what was left alone above which a user is told.
_MUCH = 0.1


def shrink(
    model: nn.Module,
    prepared: Prepared,
    budget: Budget,
    *,
    methods: Sequence[Method] | None = None,
    reconstruct: bool = True,
    guard: bool = False,
    costs: Mapping[str, Cost] | None = None,
    selector: Selector = exact,
    table: Candidates | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: Progress = silent,
) -> Result:
    """Compress a network that is prepared: tabulate, select, measure and correct, apply. As for :func:`compress`.

    A ``table`` that was made for another budget is selected from again.
    """
    sites, batches, latency = prepared.sites, prepared.batches, prepared.latency
    assert batches is not None
    making: dict[str, Any] = {
        "latency": latency, "dense_latency": prepared.dense_latency, "costs": costs, "guard": guard,
        "progress": progress,
    }  # fmt: skip

    def judged(plan: Plan) -> float:
        trial = apply(model, sites, plan, methods=methods)
        return output_error(model, trial, batches, mask=prepared.sampling.mask, forward=forward)

    def planned(sites: Sites, table: Candidates | None, limits: Budget) -> tuple[Plan, Candidates]:
        if any(method.removes_channels for method in methods or ()):
            return select_in_steps(sites, methods or (), limits, selector=selector, table=table, judge=judged, **making)
        table = tabulate(sites, methods, **making) if table is None else table
        return select(table, limits, selector), table

    plan, table = planned(sites, table, budget)
    file = 0.0
    if budget.bytes is not None:
        file = table.dense["bytes"] + header_bytes(model)
        sites, plan, table, budget = within_file(model, sites, plan, table, budget, planned)
    measured: Mapping[str, Timing] = {}
    if latency is not None:
        plan, measured = meet_latency(
            model, sites, table, plan, budget, prepared.example, latency,
            selector=lambda table, limits: planned(sites, table, limits)[0], methods=methods,
        )  # fmt: skip
    if budget.bytes is not None:
        # The header that the table counts is that of the compressed network's file.
        plan = dataclasses.replace(plan, dense_costs={**plan.dense_costs, "bytes": file})
    done = carry_out(
        model, sites, plan, batches, methods=methods, reconstruct=reconstruct, forward=forward,
        sampling=prepared.sampling, progress=progress,
    )  # fmt: skip
    small = done.model
    if latency is not None:
        small = as_run(small, prepared.example, latency)
    notes = (*_said_of_rest(table, budget), *(_said_of_time(measured) if measured else _said_of_chains(plan)))
    report = reported(
        model, small, sites, plan, done, batches, mask=prepared.sampling.mask, forward=forward, measured=measured,
        notes=notes,
    )  # fmt: skip
    return Result(small, plan, report, table, sites)


def _said_of_rest(table: Candidates, budget: Budget) -> Iterator[str]:
    """How much of the limited costs lies where nothing is chosen, if that is much."""
    for cost in budget.costs:
        alone = table.left_alone(cost)
        share = sum(each[3] for each in alone)
        if share > _MUCH:
            name, kind, _, most = alone[0]
            yield f"{share:.1%} of {cost} is in what was left alone, most in {name or 'the model'} ({kind}, {most:.1%})"


def _said_of_chains(plan: Plan) -> Iterator[str]:
    """That fewer MACs need not be less time, where that is likely."""
    many = sum(isinstance(entry.choice, CPChoice | TuckerChoice) for entry in plan)
    if many:
        yield (
            f"{many} layers became chains of three or more thin layers, which may take longer than a layer of more "
            "MACs. Time was not measured: guard=True offers what is measured faster only, and a budget may limit "
            "milliseconds, as latency=80%"
        )


def _said_of_time(measured: Mapping[str, Timing]) -> Iterator[str]:
    """What a user should know of measured times."""
    dense, small = measured["dense"], measured["compressed"]
    if (speed := Speed.of(dense, small)).differs and speed.ratio < 1:
        yield f"the compressed model is SLOWER than dense: {small.p50:.3f} ms against {dense.p50:.3f} ms"


def shrink_best(
    model: nn.Module,
    prepared: Prepared,
    budget: Budget,
    arms: Sequence[Arm],
    judge: Judge,
    seconds: float | None,
    *,
    progress: Progress,
    **options: Any,
) -> Result:
    """The network of the best of several arms, from one calibration."""

    def made(arm: Arm) -> Result:
        if arm.removes_channels and not prepared.sites.couplings:
            raise PlanError("no channels were found that can be removed")
        sites = group(prepared.sites) if arm.groups else prepared.sites
        known = dataclasses.replace(prepared, sites=sites)
        result = shrink(model, known, budget, methods=arm.methods, progress=progress, **options)
        return with_verdict(result, judge)

    def loss(result: Result) -> float:
        return math.inf if result.report.verdict is None else result.report.verdict.loss

    result, tried = best(arms, made, loss, seconds=seconds, progress=progress)
    return dataclasses.replace(result, report=dataclasses.replace(result.report, arms=tried))


def shrink_within(
    model: nn.Module,
    prepared: Prepared,
    budget: Budget | None,
    tolerance: Tolerance,
    judge: Judge,
    *,
    cost: str = "macs",
    progress: Progress = silent,
    **options: Any,
) -> Result:
    """Compress a network that is prepared as far as a tolerance lets it, or to a budget that must hold it.

    Parameters
    ----------
    budget
        None for the smallest network, by ``cost``.
    judge
        That knows the dense network.
    **options
        As for :func:`shrink`.
    """
    table = tabulate(
        prepared.sites, options.get("methods"), latency=prepared.latency, dense_latency=prepared.dense_latency,
        costs=options.get("costs"), guard=options.get("guard", False), progress=progress,
    )  # fmt: skip

    def made(limits: Budget) -> Result:
        result = shrink(model, prepared, limits, table=table, progress=progress, **options)
        return with_verdict(result, judge, tolerance)

    def holds(result: Result) -> bool:
        verdict = result.report.verdict
        assert verdict is not None
        log.info("%s: %s", result.plan.costs, tolerance.said(verdict))
        return tolerance.holds(verdict)

    if budget is not None and holds(stated := made(budget)):
        return stated
    limits = tightest(cost, table.dense) if budget is None else budget.limits(table.dense)
    found = smallest(limits, table.dense, made, holds)
    if budget is not None:
        raise ToleranceError(_gate(budget, stated, found), found)
    if found is None:
        found = made(Budget(**{cost: Limit(1.0, relative=True)}))
        said = "no smaller network that was tried holds the tolerance: this is the dense network"
        found = dataclasses.replace(found, report=dataclasses.replace(found.report, notes=(said, *found.report.notes)))
    return found


def _gate(budget: Budget, stated: Result, found: Result | None) -> str:
    """What is said of a budget that cannot be met within the tolerance."""
    tolerance, verdict = stated.report.tolerance, stated.report.verdict
    assert tolerance is not None
    assert verdict is not None
    if found is None:
        return f"with the budget {budget} {tolerance.said(verdict)}. No smaller network holds it: allow more"
    shares = ",".join(f"{c}={100 * found.plan.costs[c] / found.plan.dense_costs[c]:.3g}%" for c in budget.costs)
    return f"with the budget {budget} {tolerance.said(verdict)}. {shares} holds it: give that budget, or allow more"


def with_verdict(result: Result, judge: Judge, tolerance: Tolerance | None = None) -> Result:
    """The result with what was lost in its report."""
    verdict = judge.verdict(result.model, result.report.agreement)
    return dataclasses.replace(result, report=dataclasses.replace(result.report, verdict=verdict, tolerance=tolerance))
