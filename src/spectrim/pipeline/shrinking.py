"""A network that is prepared is compressed: to a budget, within a tolerance, or by the best of several arms."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from spectrim.application import carry_out
from spectrim.errors import PlanError, SlowerError, SpectrimError, ToleranceError
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
from spectrim.search.arms import Arm, Contest, not_tried
from spectrim.search.file_size import within_file
from spectrim.search.judge import Judge, Verdict
from spectrim.search.measured import asked_time, is_late
from spectrim.search.remaining import asked_once
from spectrim.search.standings import Standings
from spectrim.search.stepwise import BY_TABLE, Judging, select_in_steps
from spectrim.search.tolerance import Tolerance, smaller, smallest, tightest
from spectrim.selection.budget import Budget, Limit
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import select
from spectrim.tables import tabulate

log = logging.getLogger(__name__)


# A share of a cost in what was left alone above which a user is told.
_MUCH = 0.1
# Agreement below which a network cannot be expected to be better than the dense one.
_UNLIKE = 0.75
# Times what the dense network costs: a limit that lets it be as it is.
_AMPLE = 100.0
# Samples, at least, on which plans that mix methods are compared before they are carried out.
_TRIAL = 128
_LESS = (
    "these methods make no network of a size that was tried ({}): methods='auto' (--method auto) has other sets "
    "compete, which may hold the tolerance with less"
)


def shrink(
    model: nn.Module, prepared: Prepared, budget: Budget, making: Making, table: Candidates | None = None
) -> Result:
    """Compress a network that is prepared: tabulate, select, measure and correct, apply. As for :func:`compress`.

    A ``table`` that was made for another budget is selected from again.
    """
    return carried(model, prepared, drafted(model, prepared, budget, making, table))


def drafted(
    model: nn.Module,
    prepared: Prepared,
    budget: Budget,
    making: Making,
    table: Candidates | None,
    trial: Judging = BY_TABLE,
) -> Draft:
    """The network as it is planned by counted and tabulated costs.

    Raises
    ------
    TooMuchLostError
        If plans that remove channels can be expected to lose more than the ``trial`` lets them.
    """
    sites, batches, methods = prepared.sites, prepared.batches, making.methods
    assert batches is not None
    priced = making.priced(prepared)

    untried = dataclasses.replace(sites, shaped=None)  # what is run anyway needs no proof on noise
    outputs = DenseOutputs(model, batches, _TRIAL, prepared.sampling.mask, making.forward)

    def judged(plan: Plan) -> float:
        return outputs.missed(network_of(model, untried, plan, methods=methods))

    def planned(sites: Sites, table: Candidates, limits: Budget) -> tuple[Plan, Candidates]:
        if any(method.removes_channels for method in methods or ()):
            return select_in_steps(
                sites,
                methods or (),
                limits,
                selector=making.selector,
                table=table,
                curves=prepared.curves,
                trial=dataclasses.replace(trial, judge=judged),
                **priced,
            )
        return select(table, limits, making.selector), table

    def again(table: Candidates, limits: Budget) -> Plan:
        return planned(sites, table, limits)[0]

    if table is None:
        table = tabulate(sites, methods, curve=asked_once(prepared.curves, {}), **priced)
    if budget.bytes is None:
        plan, table = planned(sites, table, budget)
        return Draft(plan, table, sites, budget, making, again)
    file = table.dense["bytes"] + header_bytes(model)
    sites, plan, table, budget = within_file(model, sites, table, budget, planned)
    return Draft(plan, table, sites, budget, making, again, file)


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
        # Of bytes the header is known with the plan only: the table is made, so that what is told can be reached.
        if counted := budget.among(cost for cost in budget.costs if cost != "bytes"):
            tables.check(arm, counted)
        known = dataclasses.replace(prepared, sites=tables.sites(arm))
        theirs = dataclasses.replace(making, methods=tables.methods(arm), progress=_telling(making.progress, arm))
        return drafted(model, known, budget, theirs, tables.of(arm, trial), trial)

    def made(arm: Arm, draft: Draft) -> Result:
        return with_verdict(carried(model, prepared, draft), judge, tolerance)

    contest = Contest(
        planned, made, _verdict, _size, lambda result: tolerance is not None and tolerance.holds(_verdict(result))
    )
    result, tried = contest.best(arms, seconds=seconds, spent=spent, progress=making.progress)
    return result.reporting(arms=tried)


def _telling(progress: Progress, arm: Arm) -> Progress:
    """Progress that says which arm is carried out."""
    return lambda what, done, total: progress(f"{arm.name}: {what}", done, total)


def _verdict(result: Result) -> Verdict:
    assert result.report.verdict is not None
    return result.report.verdict


def _size(result: Result) -> float:
    """Milliseconds where they were measured, else how many layers run one after the other."""
    if result.report.measured:
        return result.report.measured["compressed"].quiet
    return float(sum(any(True for _ in module.parameters(recurse=False)) for module in result.model.modules()))


def shrink_within(
    model: nn.Module,
    prepared: Prepared,
    budget: Budget | None,
    tolerance: Tolerance,
    judge: Judge,
    making: Making,
    *,
    arms: Sequence[Arm] = (),
    seconds: float | None = None,
    cost: str = "macs",
) -> Result:
    """Compress a network that is prepared as far as a tolerance lets it, or to a budget that must hold it.

    Parameters
    ----------
    budget
        None for the smallest network, by ``cost``.
    judge
        That knows the dense network.
    arms, seconds
        Sets of methods, the simplest first; none for those of ``making``. The first is searched in full, the others
        from the size that it reached on. No size is tried after the seconds.
    """
    began = time.monotonic()
    only = Arm("", None if making.methods is None else tuple(making.methods))
    simplest = arms[0] if arms else only
    tables = Tables(prepared, arms or (only,), making)
    first = tables.of(simplest)
    standings, axis = Standings(arms), cost if budget is None else next(iter(budget.costs))
    why = ""  # the last network could not be had, if it was not for the tolerance
    least = ""  # the methods make no network of a size that was tried

    def over() -> bool:
        return seconds is not None and time.monotonic() - began >= seconds

    def among(arms: Sequence[Arm], limits: Budget) -> Result:
        return shrink_best(
            model, prepared, limits, arms, judge, making, seconds=seconds, spent=time.monotonic() - began,
            tables=tables, tolerance=tolerance,
        )  # fmt: skip

    def made(limits: Budget) -> Result:
        if arms:
            return among((simplest,), limits)
        return with_verdict(shrink(model, prepared, limits, making, first), judge, tolerance)

    def refused(error: SpectrimError) -> None:
        nonlocal why, least
        why = error.brief
        if not arms and not isinstance(error, SlowerError):
            least = why

    def holds(result: Result) -> bool:
        nonlocal why
        log.info("%s: %s", result.plan.costs, tolerance.said(_verdict(result)))
        why = _late(result) if budget is None else ""
        verdict = tolerance.holds(_verdict(result)) and not why
        standings.take(result.report.arms, result.plan.costs[axis], verdict)
        return verdict

    def others(limits: Budget) -> Result | None:
        size = limits.limits(first.dense)[axis]
        standing = standings.standing(size)
        try:
            return among(standing, limits) if standing else None
        except SpectrimError as error:
            standings.refused(standing, size, error.brief)
            return None

    if budget is not None and holds(stated := among(arms, budget) if arms else made(budget)):
        return stated
    limits = tightest(cost, first.dense) if budget is None else budget.limits(first.dense)
    best = smallest(limits, first.dense, made, holds, over, refused=refused, progress=making.progress)
    if best is not None:
        standings.take(best.report.arms, best.plan.costs[axis], holds=True)
    best = smaller(limits, first.dense if best is None else best.plan.costs, others, holds, over) or best
    if budget is not None:
        raise ToleranceError(_gate(budget, stated, best), best)
    result = best or _left_dense(made(Budget(**{cost: Limit(_AMPLE * first.dense[cost])})), cost)
    why = why if best is None else least
    return _concluded(result, standings, best is not None, seconds if over() else None, why)


def _late(result: Result) -> str:
    """That a network takes longer than it was made for, as the clock says; empty if it does not."""
    plan, measured = result.plan, result.report.measured
    if not is_late(plan, measured):
        return ""
    return f"{measured['compressed'].quiet:.3g} ms measured for {asked_time(plan, measured):.3g} ms that were asked for"


def _left_dense(result: Result, cost: str) -> Result:
    """The dense network as it was made under an ample limit, with its own cost for a limit.

    A file tells of the plan, too, so that layers would pay for that text if the dense file had been the limit.
    """
    plan = dataclasses.replace(result.plan, budget={cost: result.plan.dense_costs[cost]})
    return dataclasses.replace(result, plan=plan).reporting(arms=(), plan=plan)


def _concluded(result: Result, standings: Standings, any_holds: bool, ended: float | None, why: str) -> Result:
    """The network with what became of all arms: whether any held, why none was smaller; seconds it took."""
    rest = "not tried: no network was left to improve on" if ended is None else not_tried(ended)
    untried = not standings.rows and bool(standings.arms)
    notes = (*_said_of_search(None if untried else any_holds, ended, why), *result.report.notes)
    return result.reporting(arms=standings.told(result.report.arms, rest), notes=notes)


def _said_of_search(any_holds: bool | None, ended: float | None, why: str) -> Iterator[str]:
    """What it rests on: whether any held, None if none was tried; seconds it ended after; why none is smaller."""
    if any_holds is None and ended is not None:
        yield f"no smaller network was tried, as {ended:g} s were over: this is the dense network. Give more seconds"
        return
    if any_holds:
        yield (
            "of the networks that were tried the smallest was taken that held on these samples, so that by chance it "
            "may lose more on others: measure it on samples that were used for nothing"
        )
    else:
        reason = f"could be had ({why})" if why else "that was tried holds the tolerance"
        yield f"no smaller network {reason}: this is the dense network"
    if ended is not None:
        yield f"the search ended after {ended:g} s"
    if any_holds and why:
        yield _LESS.format(why)


def _gate(budget: Budget, stated: Result, network: Result | None) -> str:
    """What is said of a budget that cannot be met within the tolerance."""
    tolerance, verdict = stated.report.tolerance, stated.report.verdict
    assert tolerance is not None
    assert verdict is not None
    if network is None:
        return f"with the budget {budget} {tolerance.said(verdict)}. No smaller network holds it: allow more"
    shares = ",".join(f"{c}={100 * network.plan.costs[c] / network.plan.dense_costs[c]:.3g}%" for c in budget.costs)
    return f"with the budget {budget} {tolerance.said(verdict)}. {shares} holds it: give that budget, or allow more"


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
