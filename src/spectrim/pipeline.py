"""The one call: from a trained model, calibration batches and a budget to a smaller, faster model."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from spectrim.application import Applied, apply, carry_out
from spectrim.cost import counted
from spectrim.cost.counted import Cost
from spectrim.cost.latency import Latency
from spectrim.errors import PlanError, SpectrimError, ToleranceError, called_as
from spectrim.methods import Method, on_offer
from spectrim.network.choices import ChannelsChoice
from spectrim.network.groups import group
from spectrim.network.printing import Grid, Printed, amount, cost_name, count, reasons, share, total
from spectrim.network.sites import Sites
from spectrim.nn.agreement import Agreement, agreement, check_comparable, output_error
from spectrim.nn.checkpoint import header_bytes
from spectrim.nn.find import Which, check_model
from spectrim.nn.timing import Speed, Timing, as_run
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.calibrate import few_rows
from spectrim.nn.watch.layout import Where
from spectrim.nn.watch.nesting import begun, checked_batches, listed, reads_once
from spectrim.nn.watch.reconstruct import Errors
from spectrim.nn.watch.sampling import Mask, Sampling
from spectrim.nn.watch.work import uncounted_work
from spectrim.preparation import Prepared, check_options, locate, prepare
from spectrim.preparation import one_batch as one_batch  # its former place, until version 0.3
from spectrim.progress import Progress, reports, silent, told
from spectrim.search.arms import Arm, Tried, best, usual
from spectrim.search.file_size import within_file
from spectrim.search.judge import Evaluate, Judge, Verdict
from spectrim.search.measured import CLOSE, meet_latency, wanted_time
from spectrim.search.stepwise import select_in_steps
from spectrim.search.tolerance import Tolerance, smallest, tightest
from spectrim.selection.budget import COSTS, Budget, BudgetLike, Limit
from spectrim.selection.candidates import Candidates
from spectrim.selection.front import Better
from spectrim.selection.plan import Plan
from spectrim.selection.printed import plan_grid
from spectrim.selection.selectors import Selector, exact, select
from spectrim.tables import tabulate

log = logging.getLogger(__name__)

# Nine in ten runs that take more than others by this share are told to be disturbed.
_SPREAD = 0.25
# Layers that a printed result has at most.
_LAYERS = 16
# A share of a cost in what was left alone above which a user is told.
_MUCH = 0.1


@dataclass(frozen=True)
class Report(Printed):
    """What compression did, in numbers and words. ``print(report)`` and notebooks show it as a table.

    Attributes
    ----------
    plan
        With the counted costs before and after.
    skipped
        ``(layer, kind, reason)`` of every layer left alone.
    samples
        Calibration samples.
    measured
        Milliseconds of the dense and the compressed network, measured side by side, if latency was asked for.
    notes
        What a user should know, such as a model measured slower than dense.
    fits
        What layers that were reconstructed miss of the dense network's answers, by the layer.
    held_out
        Samples that they were not fitted to.
    agreement
        How far the outputs are from the dense network's on these samples; None where they cannot be compared. It is
        that of the model as it was returned: after training call :func:`spectrim.agreement` again.
    verdict
        What the network lost by ``evaluate``, or by its outputs, where either was asked for.
    tolerance
        What it may lose, if that was stated.
    arms
        What became of each set of methods that competed, with ``methods="auto"``.
    """

    plan: Plan
    skipped: tuple[tuple[str, str, str], ...]
    samples: int
    measured: Mapping[str, Timing] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fits: Mapping[str, Errors] = field(default_factory=dict)
    held_out: int = 0
    agreement: Agreement | None = None
    verdict: Verdict | None = None
    tolerance: Tolerance | None = None
    arms: tuple[Tried, ...] = ()

    @property
    def speed(self) -> Speed | None:
        """How the measured times compare, round by round; None if there are none."""
        if not self.measured:
            return None
        unchanged = all(entry.choice.is_dense for entry in self.plan)
        how = Speed.of_equals if unchanged else Speed.of
        return how(self.measured["dense"], self.measured["compressed"])

    def rows(self) -> list[dict[str, Any]]:
        """Costs of the whole network as plain values, one dict a cost, those that the budget limits first.

        Returns
        -------
        list of dict
            ``cost``; ``dense`` and ``compressed``, in the cost's own unit; ``ratio`` of the two; ``measured``, whether
            it was measured of the finished networks, and not counted.
        """
        plan = self.plan
        order = [cost for cost in dict.fromkeys([*plan.budget, *plan.dense_costs]) if cost in plan.dense_costs]
        found = [(cost, plan.dense_costs[cost], plan.costs[cost], False) for cost in order]
        if self.measured:
            found.append(("measured ms", self.measured["dense"].p50, self.measured["compressed"].p50, True))
        return [
            {
                "cost": cost, "dense": dense, "compressed": small, "ratio": dense / small if small else math.nan,
                "measured": measured,
            }
            for cost, dense, small, measured in found
        ]  # fmt: skip

    _records = rows

    def _grid(self) -> Grid:
        lines = []
        for row in self.rows():
            unit = "latency" if row["measured"] else row["cost"]
            fewer = str(self.speed) if row["measured"] else f"{row['ratio']:.2f}x"
            name = cost_name(row["cost"])
            lines.append(
                [name, *(amount(unit, row[key]) for key in ("dense", "compressed")),
                 share(row["compressed"], row["dense"]), fewer]
            )  # fmt: skip
        return Grid(["", ">dense", ">compressed", ">of dense", ">ratio"], lines, notes=(*self._done(), *self._left()))

    def _done(self) -> Iterator[str]:
        """What was done, in sentences."""
        removals = [entry.choice for entry in self.plan if isinstance(entry.choice, ChannelsChoice)]
        layers = sum(len(entry.sites) for entry in self.plan if not entry.of_channels)
        yield f"{self.plan.changed:,} of {layers:,} layers changed, {self.samples:,} calibration samples"
        if removals:
            gone = sum(choice.gone for choice in removals)
            yield f"{gone:,} channels removed from {count(len(removals), 'group')}"
        if shared := [entry for entry in self.plan if entry.members]:
            many = sum(len(entry.members) for entry in shared)
            yield f"{many} layers share factors in {count(len(shared), 'group')}"
        if self.held_out and self.fits:
            fitted, unseen = (
                sum(values) / len(values)
                for values in ([e.fitted for e in self.fits.values()], [e.held_out or 0.0 for e in self.fits.values()])
            )
            yield (
                f"reconstructed layers miss {fitted:.2%} of their dense answers on the samples they were fitted to, "
                f"{unseen:.2%} on {self.held_out:,} held out"
            )
        yield from self.sentences

    def _left(self) -> Iterator[str]:
        return reasons(self.skipped, "report.skipped")

    def __repr__(self) -> str:
        costs = [total(cost, dense, self.plan.costs[cost]) for cost, dense in self.plan.dense_costs.items()]
        return f"Report({'; '.join(costs)})"

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was lost, how far outputs agree with dense ones, whether a latency budget is met, and the notes."""
        agreed = () if self.agreement is None else (str(self.agreement),)
        arms = (
            (f"methods that competed, by what the network lost: {'; '.join(map(str, self.arms))}",) if self.arms else ()
        )
        return (*self._tolerated(), *arms, *agreed, *self._time_asked_for(), *self.notes)

    def _tolerated(self) -> Iterator[str]:
        """Whether the tolerance is met, or what the metric is."""
        verdict = self.verdict
        if verdict is not None and self.tolerance is not None:
            yield self.tolerance.said(verdict)
        elif verdict is not None and verdict.metric is not None:
            yield f"evaluate gives {verdict.metric:.6g}, {verdict.dense:.6g} for the dense network"

    def _time_asked_for(self) -> Iterator[str]:
        """Whether a latency budget is met by the measured times, and what a busy machine has to do with it."""
        limit = (self.plan.budget or {}).get("latency")
        if limit is None or not self.measured:
            return
        small = self.measured["compressed"]
        wanted = wanted_time(limit, self.measured, self.plan.dense_costs["latency"])
        share = wanted / self.measured["dense"].quiet
        met = "is met" if small.quiet <= wanted * (1 + CLOSE) else "is NOT met"
        said = (
            f"the latency budget {met}: {small.quiet:.3f} ms measured, {wanted:.3f} ms ({share:.0%} of dense) asked for"
        )
        if small.p90 > small.quiet * (1 + _SPREAD):
            said += (
                f"; the machine was busy: nine in ten runs took up to {small.p90:.3f} ms and half of them up to "
                f"{small.p50:.3f} ms, so measure again when it is idle"
            )
        yield said


@dataclass(frozen=True)
class Result(Printed):
    """What :func:`compress` returns. ``print(result)`` and notebooks show what was done, to the network and its layers.

    Attributes
    ----------
    model
        The compressed model, a new module of plain layers.
    plan
        One choice a site.
    report
        Costs before and after, skipped layers, measured times.
    candidates
        The table, to select from again under another budget.
    sites
        The calibrated sites, to apply another plan.
    """

    model: nn.Module
    plan: Plan
    report: Report
    candidates: Candidates
    sites: Sites

    def rows(self) -> list[dict[str, Any]]:
        """What happened to every layer, as plain values: :meth:`spectrim.Plan.rows`."""
        return self.plan.rows()

    _records = rows

    def _grid(self) -> Grid:
        return self.report._grid()

    def _layers(self) -> Grid:
        """The layers, the middle of many folded."""
        grid = plan_grid(self.plan, _LAYERS, "result.rows()")
        return dataclasses.replace(grid, title="", notes=())

    def __str__(self) -> str:
        return f"{self._grid().text()}\n\n{self._layers().text()}"

    def _repr_html_(self) -> str:
        return f"{self._grid().html()}{self._layers().html()}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {self.plan!r})"


@reports
@called_as(
    "Write compress(model, batches, 'macs=50%') with batches of inputs like those of training; without any, "
    "find(model), tabulate(sites, WeightSVD()), select(table, 'parameters=50%') and apply(model, sites, plan) do with "
    "the weights alone"
)
def compress(
    model: nn.Module,
    calibration: Iterable[Any],
    budget: BudgetLike | None = None,
    *,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    evaluate: Evaluate | None = None,
    better: Better = "higher",
    cost: str = "macs",
    methods: Method | Sequence[Method] | Literal["auto"] | None = None,
    seconds: float | None = None,
    skip: Which | Iterable[Which] = (),
    only: Which | Iterable[Which] = (),
    groups: bool | Mapping[str, Sequence[str]] | None = None,
    sensitivity: bool = True,
    reconstruct: bool = True,
    latency: Latency | None = None,
    guard: bool = False,
    costs: Mapping[str, Cost] | None = None,
    selector: Selector = exact,
    rows: int | str | None = "auto",
    positions: int | None = None,
    mask: Mask = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    samples: Where = None,
    progress: Progress | bool | None = None,
) -> Result:
    """Compress a trained model to a budget, or to a tolerance: find, calibrate, tabulate, select, apply.

    Parameters
    ----------
    model
        Left untouched.
    calibration
        Batches of training inputs, a thousand samples or more; labels are not used. An iterator is read into a list.
    budget
        For the whole network; also as text, ``"macs=50%"``. With a tolerance it may be left out, and the smallest
        network is looked for.
    max_drop
        A tolerance: how much worse the number that ``evaluate`` returns may be than the dense network's.
    min_agreement
        A tolerance without labels: the share of held-out calibration samples whose class is to be the dense network's,
        as 0.99, or 1 - relative error for outputs that are no scores of classes.
    evaluate
        Function of a model alone, in evaluation mode and without gradients, to the number that it is judged by: it
        holds the data itself, which the model should not have been calibrated on.
    better
        Whether a ``higher`` or a ``lower`` number is good.
    cost
        What the smallest network has least of, where there is a tolerance and no budget.
    methods
        What may be chosen at each site; as for :func:`spectrim.tabulate` by default. With one that removes channels,
        these are found first (:func:`spectrim.couple`), the plan is made in steps
        (:func:`spectrim.search.stepwise.select_in_steps`), and of plans that mix methods the one is taken whose
        outputs are closest to the dense network's. ``"auto"`` lets sets of them compete (:mod:`spectrim.search.arms`):
        each makes a whole network from one calibration, and the one that lost least on held-out samples, or by
        ``evaluate``, is returned.
    seconds
        With ``methods="auto"``: no further set is tried after so long.
    skip, only
        Layers to leave alone or keep to; see :func:`spectrim.find`.
    groups
        Sites that may share factors: True finds them (:func:`spectrim.group`), a mapping names them. None finds them if
        the budget limits parameters or bytes, which is what sharing saves, and no methods are given.
    sensitivity
        Weigh errors by the gradients that reach each layer (one backward pass over 1,024 samples).
    reconstruct
        Fit each layer to the dense responses for the inputs that its compressed predecessors deliver.
    latency
        How time is measured. Made for the model's device and dtype if the budget limits latency or ``guard`` is set.
        Where it is given or made, the kernels of sparse layers are chosen for it (:func:`spectrim.choose_kernels`).
        If its memory format is ``channels_last``, both models are measured in it and the result is returned in it.
    guard
        Choose no option that is measured slower than dense, and measure the finished model.
    costs
        Further costs of your own, functions of layers by name, which the budget may limit.
    selector
        How choices are made; exact by default.
    rows, positions, mask
        How many input patches the statistics rest on, and which tokens are data; see :func:`spectrim.calibrate`.
    forward, samples
        How the model is run on a batch, and where a batch's samples are; see :func:`spectrim.calibrate`. By default
        both are seen from the first batch and the model's ``forward``, and the report tells what is not plain.

    Returns
    -------
    Result

    Raises
    ------
    InfeasibleBudgetError
        If the budget cannot be met; carries the lowest reachable cost.
    ToleranceError
        If the budget can be met, but not within the tolerance; says which budget can, and carries its ``result``.
    TypeError, ValueError
        For arguments that cannot be meant, and groups beside a method that removes channels; before any work.

    Notes
    -----
    With a latency budget the plan is made from measured layer times, built, measured end to end beside the dense
    network and corrected, up to eight times, until it is within 3 % of the budget.

    With a tolerance and no budget up to eight networks are selected from one table, carried out and judged, and the
    smallest that held is returned. That it held is measured on the samples that it was chosen by: on others the drop
    differs by chance, the more the fewer samples there are. Where none holds, the dense network is returned.
    """
    check_model(model)
    judge = Judge.of(evaluate, better)
    tolerance = Tolerance.of(max_drop, min_agreement, judge)
    if budget is None and tolerance is None:
        raise TypeError(
            "how small is not said: give a budget, as compress(model, batches, 'macs=50%'), or a tolerance, as "
            "max_drop=0.5 with evaluate=, or min_agreement=0.99"
        )
    budget, goal = Budget.of({cost: 1.0} if budget is None else budget), budget
    budget.check([*COSTS, *counted.further(costs)])
    if not callable(selector):
        raise TypeError(
            f"selector is {selector!r}: expected a function of a table and a budget, such as those of "
            "spectrim.selection.selectors"
        )
    sampling = Sampling(rows, positions, mask)
    feed = Feed.of(forward, samples)
    batches = listed(calibration) if reads_once(checked_batches(calibration)) else calibration
    if seconds is not None and not (isinstance(seconds, Real) and seconds >= 0):
        raise ValueError(f"seconds is {seconds!r}: expected a number of at least 0")
    if methods == "auto":
        if tolerance is not None or groups is not None:
            raise ValueError(
                "methods='auto' lets several sets of methods compete under a budget: give a tolerance or groups with "
                "methods=None or one list of methods"
            )
        arms = usual(budget.costs)
        sites = _coupled(model, batches, skip, only, feed)
        prepared = prepare(
            model, sites, batches, sensitivity=sensitivity, forward=feed, progress=told(progress),
            latency=latency or guard or budget.latency is not None, sampling=sampling,
        )  # fmt: skip
        return _best(
            model, prepared, budget, arms, judge.knowing(model), math.inf if seconds is None else float(seconds),
            reconstruct=reconstruct, guard=guard, costs=costs, selector=selector, forward=feed, progress=told(progress),
        )  # fmt: skip
    if groups is None:
        groups = methods is None and not {"parameters", "bytes"}.isdisjoint(budget.costs)
    check_options(groups, latency)
    methods = None if methods is None else on_offer(methods, groups=bool(groups))
    channels = any(method.removes_channels for method in methods or ())
    if channels and groups:
        raise ValueError(
            "layers that share factors would lose different channels: remove channels without groups, or share factors "
            "in the network that is left"
        )
    if channels and len(methods or ()) > 1:
        check_comparable(model, begun(batches)[0], feed)
    sites = locate(model, batches, skip=skip, only=only, channels=channels, forward=feed)
    prepared = prepare(
        model, sites, batches, sensitivity=sensitivity, groups=groups, forward=feed, progress=told(progress),
        latency=latency or guard or budget.latency is not None, sampling=sampling,
    )  # fmt: skip
    options: dict[str, Any] = {
        "methods": methods, "reconstruct": reconstruct, "guard": guard, "costs": costs, "selector": selector,
        "forward": feed, "progress": told(progress),
    }  # fmt: skip
    judge = judge.knowing(model)
    if tolerance is None:
        return _judged(shrink(model, prepared, budget, **options), judge, None)
    return shrink_within(model, prepared, None if goal is None else budget, tolerance, judge, cost=cost, **options)


def _coupled(
    model: nn.Module, batches: Iterable[Any], skip: Which | Iterable[Which], only: Which | Iterable[Which], feed: Feed
) -> Sites:
    """The sites of a model, with the channels that can be removed where these can be found."""
    try:
        check_comparable(model, begun(batches)[0], feed)
        return locate(model, batches, skip=skip, only=only, channels=True, forward=feed)
    except SpectrimError as error:
        log.info("no channels are removed: %s", error)
        return locate(model, batches, skip=skip, only=only, forward=feed)


def _best(
    model: nn.Module,
    prepared: Prepared,
    budget: Budget,
    arms: Sequence[Arm],
    judge: Judge,
    seconds: float,
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
        verdict = judge.verdict(result.model, result.report.agreement)
        return dataclasses.replace(result, report=dataclasses.replace(result.report, verdict=verdict))

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
        return _judged(result, judge, tolerance)

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


def _judged(result: Result, judge: Judge, tolerance: Tolerance | None) -> Result:
    """The result with what was lost in its report, where that was asked for."""
    if judge.evaluate is None and tolerance is None:
        return result
    verdict = judge.verdict(result.model, result.report.agreement)
    return dataclasses.replace(result, report=dataclasses.replace(result.report, verdict=verdict, tolerance=tolerance))


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
    notes = (*_said_of_rest(table, budget), *(_said_of_time(measured) if measured else ()))
    report = reported(
        model, small, sites, plan, done, batches, mask=prepared.sampling.mask, forward=forward, measured=measured,
        notes=notes,
    )  # fmt: skip
    return Result(small, plan, report, table, sites)


def reported(
    model: nn.Module,
    small: nn.Module,
    sites: Sites,
    plan: Plan,
    done: Applied,
    batches: Iterable[Any] | None,
    *,
    mask: Mask = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    measured: Mapping[str, Timing] = MappingProxyType({}),
    notes: Sequence[str] = (),
    trained: bool = False,
) -> Report:
    """What a plan that was carried out did; where there are batches, how far the outputs agree.

    Of a network that was trained since, no samples are held out.
    """
    held = () if trained else done.held
    agreed = None if batches is None else agreement(model, small, batches, held, mask=mask, forward=forward)
    notes = (*sites.notes, *few_rows(sites), *uncounted_work(sites), *notes, *_said_of_layers(done), *done.notes)
    for note in notes:
        log.warning("%s", note)
    skipped = tuple((s.name, s.kind, s.reason) for s in sites.skipped)
    report = Report(plan, skipped, sites.samples, measured, notes, done.errors, done.held_out, agreed)
    for said in report._time_asked_for():
        log.info("%s", said)
    return report


def _said_of_layers(done: Applied) -> Iterator[str]:
    """What a user should know of layers that could not be reconstructed."""
    if done.unseen:
        names = ", ".join(done.unseen[:5]) + (", ..." if len(done.unseen) > 5 else "")
        yield (
            f"{len(done.unseen)} layers were not fitted to what the layers before them deliver, since no forward pass "
            f"stopped at them in both networks: {names}"
        )


def _said_of_rest(table: Candidates, budget: Budget) -> Iterator[str]:
    """How much of the limited costs lies where nothing is chosen, if that is much."""
    for cost in budget.costs:
        alone = table.left_alone(cost)
        share = sum(each[3] for each in alone)
        if share > _MUCH:
            name, kind, _, most = alone[0]
            yield f"{share:.1%} of {cost} is in what was left alone, most in {name or 'the model'} ({kind}, {most:.1%})"


def _said_of_time(measured: Mapping[str, Timing]) -> Iterator[str]:
    """What a user should know of measured times."""
    dense, small = measured["dense"], measured["compressed"]
    if (speed := Speed.of(dense, small)).differs and speed.ratio < 1:
        yield f"the compressed model is SLOWER than dense: {small.p50:.3f} ms against {dense.p50:.3f} ms"


def find_some(model: nn.Module, skip: Which | Iterable[Which], only: Which | Iterable[Which]) -> Sites:
    """The former name of :func:`spectrim.preparation.locate`, until version 0.3."""
    return locate(model, (), skip=skip, only=only)
