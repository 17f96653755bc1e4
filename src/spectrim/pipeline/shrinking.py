"""A network that is prepared is compressed to a budget: by one set of methods, or by the best of several."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from spectrim.application import carry_out
from spectrim.errors import InfeasibleBudgetError, PlanError
from spectrim.methods import Method
from spectrim.network.choices import CPChoice, TuckerChoice
from spectrim.network.printing import count
from spectrim.network.sites import Sites
from spectrim.nn.agreement import DenseOutputs
from spectrim.nn.checkpoint import check_size, header_bytes
from spectrim.nn.timing import Timing, as_run
from spectrim.pipeline.making import Draft, Making, Tables, met
from spectrim.pipeline.report import Result, reported
from spectrim.preparation import Prepared
from spectrim.progress import Progress
from spectrim.search.arms import Arm, Contest
from spectrim.search.file_size import on_file, within_file
from spectrim.search.floors import Floor
from spectrim.search.judge import Judge, Verdict
from spectrim.search.remaining import asked_once
from spectrim.search.stepwise import BY_TABLE, Judging, select_in_steps
from spectrim.search.tolerance import Tolerance
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import select
from spectrim.tables import Asked, own_curve, tabulate, unfitted_curve

log = logging.getLogger(__name__)


# A share of a cost in what was left alone above which a user is told.
_MUCH = 0.1
# Agreement below which a network cannot be expected to be better than the dense one.
_UNLIKE = 0.75
# Headers of the dense network's file that one with a plan may have, and the ratio to a limit from which on a file that
# was found with next to nothing fitted tells that there is none.
_HEADERS, _SURELY = 12, 1.05
# Samples, at least, on which plans that mix methods are compared before they are carried out.
_TRIAL = 128


def shrink(
    model: nn.Module, prepared: Prepared, budget: Budget, making: Making, table: Candidates | None = None
) -> Result:
    """Compress a network that is prepared: tabulate, select, measure and correct, apply. As for :func:`compress`.

    A ``table`` that was made for another budget is selected from again.
    """
    if table is None:
        check_floor(model, prepared, budget, making, making.floor(prepared))
    return carried(
        model, prepared, drafted(model, prepared, budget, making, table, by_outputs(model, prepared, making))
    )


def check_floor(model: nn.Module, prepared: Prepared, budget: Budget, making: Making, floor: Floor) -> None:
    """Raise InfeasibleBudgetError where not even what costs least meets the budget: nothing is fitted but removals.

    Of bytes it carries the size of a file that can be made.
    """
    if counted := budget.among(cost for cost in budget.costs if cost != "bytes"):
        floor.check(counted)
    if budget.bytes is None:
        return
    limit = Budget(bytes=budget.bytes)
    if not floor.is_near(on_file(model, limit), _HEADERS * header_bytes(model)):
        return
    known = dataclasses.replace(prepared, latency=None, curves={})
    alone = dataclasses.replace(making, guard=False, costs=None)
    try:
        drafted(model, known, limit, alone, None, ask=unfitted_curve)
    except InfeasibleBudgetError as error:
        # What is fitted has choices between these, whose text in the file is a little shorter or longer.
        if error.cost == "bytes" and error.lowest > _SURELY * error.budget:
            raise


def drafted(
    model: nn.Module,
    prepared: Prepared,
    budget: Budget,
    making: Making,
    table: Candidates | None,
    trial: Judging = BY_TABLE,
    ask: Asked = own_curve,
) -> Draft:
    """The network as it is planned by counted and tabulated costs.

    Raises
    ------
    TooMuchLostError
        If plans that remove channels can be expected to lose more than the ``trial`` lets them.
    """
    sites, methods, priced = prepared.sites, making.methods, making.priced(prepared)
    asking = functools.partial(asked_once, prepared.curves, ask=ask)

    def chosen(table: Candidates, limits: Budget) -> Plan:
        return select(table, limits, making.selector)

    def planned(sites: Sites, table: Candidates, limits: Budget) -> tuple[Plan, Candidates]:
        if any(method.removes_channels for method in methods or ()):
            return select_in_steps(
                sites,
                methods or (),
                limits,
                selector=making.selector,
                table=table,
                asking=asking,
                trial=trial,
                **priced,
            )
        return chosen(table, limits), table

    def again(table: Candidates, limits: Budget) -> Plan:
        return planned(sites, table, limits)[0]

    if table is None:
        table = tabulate(sites, methods, curve=asking({}), **priced)
    if budget.bytes is None:
        plan, table = planned(sites, table, budget)
        return Draft(plan, table, sites, budget, making, again)
    file = table.dense["bytes"] + header_bytes(model)
    sites, plan, table, budget = within_file(model, sites, table, budget, planned, chosen)
    return Draft(plan, table, sites, budget, making, again, file)


def by_outputs(model: nn.Module, prepared: Prepared, making: Making, trial: Judging = BY_TABLE) -> Judging:
    """The trial with plans compared by how far outputs of their networks are from the dense one's."""
    assert prepared.batches is not None
    untried = dataclasses.replace(prepared.sites, shaped=None)  # what is run anyway needs no proof on noise
    outputs = DenseOutputs(model, prepared.batches, _TRIAL, making.forward)

    def judged(plan: Plan) -> float:
        return outputs.missed(network_of(model, untried, plan, methods=making.methods))

    return dataclasses.replace(trial, judge=judged)


def network_of(
    model: nn.Module,
    sites: Sites,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    methods: Sequence[Method] | None = None,
) -> nn.Module:
    """The network of a plan alone, its layers fitted to the batches if there are any."""
    return carry_out(model, sites, plan, batches, methods=methods).model


def carried(model: nn.Module, prepared: Prepared, draft: Draft) -> Result:
    """The finished network of a plan, which is corrected by measured times where these are limited."""
    plan, measured, said = draft.plan, {}, ()
    if prepared.latency is not None:
        plan, measured, said = met(model, draft, prepared.example, prepared.latency)
    if draft.file is not None:
        # The header that the table counts is that of the compressed network's file.
        plan = dataclasses.replace(plan, dense_costs={**plan.dense_costs, "bytes": draft.file})
    notes = (*_said_of_rest(draft.table, draft.budget), *(said if measured else _said_of_chains(plan)))
    known = dataclasses.replace(prepared, sites=draft.sites)
    result = finished(model, known, plan, draft.table, draft.making, measured=measured, notes=notes)
    if draft.file is not None:
        check_size(result.model, plan.budget["bytes"])
    return result


def finished(
    model: nn.Module,
    prepared: Prepared,
    plan: Plan,
    table: Candidates,
    making: Making,
    *,
    measured: Mapping[str, Timing] = MappingProxyType({}),
    notes: Sequence[str] = (),
) -> Result:
    """What comes of carrying out a plan, as it is run where time is measured, with what is to be said of it."""
    sites, batches, sampling = prepared.sites, prepared.batches, prepared.sampling
    done = carry_out(
        model, sites, plan, batches, methods=making.methods, reconstruct=making.reconstruct, forward=making.forward,
        sampling=sampling, progress=making.progress,
    )  # fmt: skip
    small = done.model if prepared.latency is None else as_run(done.model, prepared.example, prepared.latency)
    report = reported(
        model, small, sites, plan, done, batches, sampling=sampling, forward=making.forward, measured=measured,
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
            f"{count(many, 'layer')} became {'a chain' if many == 1 else 'chains'} of three or more thin layers, which "
            "may take longer than a layer of more MACs. Time had no part in the choice: guard=True (--guard) offers "
            "what is measured faster only, and a budget may limit milliseconds, as latency=80%"
        )


def shrink_best(
    model: nn.Module,
    prepared: Prepared,
    budget: Budget,
    arms: Sequence[Arm],
    judge: Judge,
    making: Making,
    *,
    seconds: float | None = None,
    spent: float = 0.0,
    tables: Tables | None = None,
    tolerance: Tolerance | None = None,
) -> Result:
    """The network of the best of several arms, from one calibration and one table a method.

    With a ``tolerance`` the first that holds it. Of the ``seconds`` some may be ``spent`` already.
    """
    tables = tables or Tables(prepared, arms, making)

    def planned(arm: Arm, trial: Judging) -> Draft:
        if arm.removes_channels and not prepared.sites.couplings:
            raise PlanError("no channels were found that can be removed")
        known = dataclasses.replace(prepared, sites=tables.sites(arm))
        theirs = dataclasses.replace(making, methods=tables.methods(arm), progress=_telling(making.progress, arm))
        check_floor(model, known, budget, theirs, tables.floor(arm))
        return drafted(model, known, budget, theirs, tables.of(arm, trial), by_outputs(model, known, theirs, trial))

    def made(arm: Arm, draft: Draft) -> Result:
        return with_verdict(carried(model, prepared, draft), judge, tolerance)

    contest = Contest(
        planned, made, verdict_of, _size, lambda result: tolerance is not None and tolerance.holds(verdict_of(result))
    )
    result, tried = contest.best(arms, seconds=seconds, spent=spent, progress=making.progress)
    return result.reporting(arms=tried)


def _telling(progress: Progress, arm: Arm) -> Progress:
    """Progress that says which arm is carried out."""
    return lambda what, done, total: progress(f"{arm.name}: {what}", done, total)


def verdict_of(result: Result) -> Verdict:
    """What was lost, of a network that was judged."""
    assert result.report.verdict is not None
    return result.report.verdict


def _size(result: Result) -> float:
    """Milliseconds where they were measured, else how many layers run one after the other."""
    if result.report.measured:
        return result.report.measured["compressed"].quiet
    return float(sum(any(True for _ in module.parameters(recurse=False)) for module in result.model.modules()))


def with_verdict(result: Result, judge: Judge, tolerance: Tolerance | None = None) -> Result:
    """The result with what was lost in its report."""
    verdict = judge.verdict(result.model, result.report.agreement)
    notes = (*result.report.notes, *_said_of_metric(verdict, judge, tolerance))
    return result.reporting(verdict=verdict, tolerance=tolerance, notes=notes)


def _said_of_metric(verdict: Verdict, judge: Judge, tolerance: Tolerance | None) -> Iterator[str]:
    """That a metric calls a network as good as it is to be that hardly does what the dense one does."""
    if verdict.drop is None or verdict.agreed is None or verdict.agreed >= _UNLIKE:
        return
    said, dense, apart = (
        f"{verdict.name} {verdict.metric:.6g}",
        f"{verdict.dense:.6g}",
        f"agree in {verdict.agreed:.0%}",
    )
    if verdict.drop < 0:
        other = "lower" if judge.better == "higher" else "higher"
        yield (
            f"{said}, called better than the dense network's {dense}, though outputs {apart} only: if a {other} number "
            f"is good, give better={other!r}"
        )
    elif verdict.drop == 0:
        yield f"{said}, as for the dense network, though outputs {apart} only: does evaluate run the model it is given?"
    elif tolerance is not None and tolerance.max_drop is not None and tolerance.holds(verdict):
        yield (
            f"{said}, within {tolerance.max_drop:.6g} of the dense network's {dense}, though outputs {apart} only: "
            "max_drop is in the metric's own unit, as 0.01 where 1 is best"
        )
