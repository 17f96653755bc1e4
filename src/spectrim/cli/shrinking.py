"""``spectrim compress`` by methods that are carried out at once, when the command line has been read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.cli import steps
from spectrim.cli.common import Output, usage
from spectrim.cli.filters import (
    filter_notes,
    filter_values,
    planned_methods,
    recommended,
    removals,
    sample_notes,
    with_channels,
)
from spectrim.cli.methods import AUTO, Methods
from spectrim.cli.models import load_compressed
from spectrim.cli.options import SELECTORS, FileOptions, GoalOptions, SharingOptions
from spectrim.cli.preprocessing import tell_preprocessing
from spectrim.cli.references import UsageError
from spectrim.cli.results import Outcome, write_result
from spectrim.cli.steps import (
    NONE_ALIKE,
    Wanted,
    check_patterns,
    fastest,
    kernel_notes,
    kernel_values,
    planned_groups,
    table_of,
    wanted_groups,
)
from spectrim.cli.subject import Subject
from spectrim.cli.unfinished import ONE_SHOT, TUNING, UNFINISHED, RunFolder
from spectrim.cli.values import read_budget, read_costs, recipe_share
from spectrim.errors import MissingMomentsError
from spectrim.methods import Method, PrincipalFilters, from_record
from spectrim.network.sites import Sites
from spectrim.network.state_values import plain_tensors
from spectrim.network.tensor_files import digest_of_tensors
from spectrim.nn.agreement import agreement
from spectrim.nn.checkpoint import check_savable, read_plan, save
from spectrim.nn.restated import restated
from spectrim.nn.watch.samples import contents, read_again
from spectrim.pipeline import Result
from spectrim.pipeline.goal import Goal
from spectrim.pipeline.making import Making
from spectrim.pipeline.sets import Sets, reached
from spectrim.pipeline.shrinking import finished
from spectrim.preparation import Prepared, coupled
from spectrim.progress import Progress, silent
from spectrim.search.judge import Judge
from spectrim.search.tolerance import Tolerance
from spectrim.search.widths import KL, Energy
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import Selector, energy, exact, greedy, lagrangian, select, uniform
from spectrim.train import Recipe, fine_tune

SELECTOR_OF: dict[str, Callable[[Candidates, Budget], Plan]] = dict(
    zip(SELECTORS, (exact, lagrangian, greedy, energy, uniform), strict=True)
)


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    methods: list[Method]  # on offer
    costs: Mapping[str, Callable[[Any], float]]  # functions of layers of the user's own, by the cost
    # One of them says how small the network gets.
    budget: Budget | None
    recipe: Energy | KL | None
    plan: Plan | None
    groups: Wanted  # layers that may share factors
    awaited: bool  # whether there should be such groups, since they were asked for by name
    goal: GoalOptions  # how small, as it was said
    sets: Sets  # which sets of methods may make the network

    def making(self, work: Subject, progress: Progress = silent) -> Making:
        """How a network is made, with the methods that were asked for."""
        return Making(
            self.methods, guard=self.goal.guard, costs=self.costs, selector=self.selector, forward=work.feed,
            progress=progress,
        )  # fmt: skip

    @classmethod
    def read(
        cls, methods: Methods, goal: GoalOptions, sharing: SharingOptions, *, calibrated: bool, multiple_of: int | None
    ) -> Request:
        """Read the values of options."""
        costs = read_costs(goal.cost)
        budget = read_budget(goal.budget, costs) if goal.budget else None
        recipe = None
        if goal.recipe is not None:
            share = recipe_share(goal.recipe)
            recipe = KL() if share is None else Energy(share)
        groups = wanted_groups(sharing, methods, budget.costs if budget is not None else ())
        chosen = methods.chosen(calibrated, multiple_of=multiple_of, share=groups is not False)
        plan = Plan.read(goal.plan) if goal.plan is not None else None
        awaited = plan is None and wanted_groups(sharing, methods) is True
        said = methods.said or multiple_of is not None or sharing != SharingOptions()
        sets = Sets.of(auto=AUTO in methods or goal.compete, said=said)
        return cls(chosen, costs, budget, recipe, plan, groups, awaited, goal, sets)

    @property
    def selector(self) -> Selector:
        return SELECTOR_OF[self.goal.selector]

    @property
    def sought(self) -> bool:
        """Whether a budget or a tolerance says how small, and not a plan or a recipe."""
        return self.plan is None and self.recipe is None

    @property
    def timed(self) -> bool:
        """Whether latency has to be measured."""
        return self.goal.guard or (self.budget is not None and self.budget.latency is not None)

    def tolerance(self, work: Subject) -> tuple[Tolerance | None, Judge]:
        """What may be lost, and what tells it: accuracy where a drop of it is limited, else the outputs."""
        judge = Judge(work.score, metric="accuracy on --test is")
        tolerance = Tolerance.of(self.goal.max_drop, self.goal.min_agreement, judge)
        with usage("--max-drop"):
            drop = self.goal.max_drop
            return tolerance, Judge() if drop is None else judge.knowing(work.dense, drop)

    def fitted(self, sites: Sites, calibrated: bool) -> Request:
        """The request with the groups and, where filters were removed, the methods that its plan was made with."""
        if self.plan is None:
            return self
        methods = planned_methods(self.plan, calibrated) if calibrated else []
        return dataclasses.replace(self, methods=methods or self.methods, groups=planned_groups(self.plan, sites))


def run_folder(folder: Path, asked: Mapping[str, Any], work: Subject, tuning: Recipe) -> RunFolder | None:
    """Where the fine-tuning that is asked for can go on after it was stopped; None if there is none."""
    if work.training is None or tuning.epochs == 0:
        return None
    weights = plain_tensors(work.dense.state_dict())
    left = {name: value for name, value in asked.items() if name not in ("test", "batch", "threads", "runtime")}
    record = {**left, "weights_sha256": digest_of_tensors(weights)}
    if asked["plan"] is not None:
        record["plan"] = Path(asked["plan"]).read_text(encoding="utf-8")
    written = {
        "model": "MODEL", "weights_sha256": "the digest of the dense weights", "input_shape": "--input",
        "samples": "what --data holds",
    }  # fmt: skip
    held = RunFolder(folder / UNFINISHED, record, written)
    if (data := work.calibration) is not None:
        then = held.known("samples")
        now, alike = read_again(then, lambda: contents(work.dense, data, work.feed))
        now = then if alike and then is not None else now
        held = dataclasses.replace(held, record={**record, "samples": now}, usual={"samples": now})
    held.claim()
    return held


def compress_and_tell(
    out: Output, request: Request, work: Subject, tuning: Recipe, files: FileOptions, held: RunFolder | None = None
) -> None:
    """Compress, write, fine-tune (which goes on in ``held`` if it is stopped), compare and write again."""
    check_savable(work.dense)
    out.say(f"compressing {work.whose}")
    different = tell_preprocessing(out, work.references, work.dense)
    result = _compressed(out, request, work)
    if request.awaited and not result.sites.groups:
        out.say(NONE_ALIKE)
    if held is not None:
        result = _kept(out, result, work, held)
    # Before what takes long, or may fail: training, and measuring, which writes to a folder of its own.
    file = write_result(result, files.folder)["model"]
    kind = "the network before fine-tuning; the same call goes on with the training"
    out.left = f"{file} is {kind if held is not None else 'the compressed network'}"
    outcome = Outcome(work.network.model, work.dense, result, files.folder, work.named)
    outcome = _tuned(out, outcome, work, tuning, held)
    network = work.network
    kernels = fastest(result.model, work.example, network.threads, network.runtime)
    few = sample_notes(result.sites, _filters(request)) if request.recipe is not None else ()
    outcome = outcome.noted(*different, *filter_notes(result.plan, result.sites), *few, *kernel_notes(kernels))
    outcome, comparison = outcome.compared(work)
    outcome.finish(
        out, comparison, report=files.report, kernels=kernel_values(kernels), filters=filter_values(result.plan),
        weights=work.whose,
    )  # fmt: skip
    if held is not None:
        held.remove()


def _kept(out: Output, result: Result, work: Subject, held: RunFolder) -> Result:
    """The network that training starts from: of the run that was stopped if there was one, else this one, kept."""
    file = held.folder / ONE_SHOT
    if not file.exists():
        save(result.model, result.plan, file)
        return result
    out.say(f"going on with the run in {held.folder}")
    # What was chosen by measured time comes out differently another time.
    plan = read_plan(file)
    model = load_compressed(work.network.model, file).to(next(work.dense.parameters()).device)
    return dataclasses.replace(result, model=model, plan=plan).reporting(plan=plan)


def _compressed(out: Output, request: Request, work: Subject) -> Result:
    """The network as it is asked for."""
    calibrated = work.calibration is not None
    request = request.fitted(work.sites, calibrated)
    check_patterns(request.methods, work.sites)
    if calibrated and request.sought:
        return _reached(out, request, work)
    known = _prepared(out, request, work)
    table = table_of(out, known, request.making(work))
    notes: tuple[str, ...] = ()
    if request.recipe is not None:
        plan = recommended(known.sites, request.recipe, _filters(request))
    elif request.plan is not None:
        makers = [from_record(each) for each in request.plan.methods.values()]
        plan, notes = restated(request.plan, known.sites, makers, table, request.costs)
    else:
        assert request.budget is not None
        plan = select(table, request.budget, request.selector)
    # How layers run is chosen when all is done.
    known = dataclasses.replace(known, latency=None)
    try:
        return finished(work.dense, known, plan, table, Making(forward=work.feed), notes=notes)
    except MissingMomentsError as error:
        if calibrated:
            raise
        said = str(error).partition(". ")[0]
        raise UsageError(f"--plan {request.goal.plan} needs samples to carry it out: give --data ({said})") from error


def _reached(out: Output, request: Request, work: Subject) -> Result:
    """The network of a budget or a tolerance."""
    tolerance, judge = request.tolerance(work)
    goal = Goal(request.budget, tolerance, judge, seconds=request.goal.seconds)

    def prepared(*, competing: bool, known: Prepared | None = None) -> Prepared:
        if not competing:
            return _prepared(out, request, work, show)
        sites = coupled(work.dense, work.sites, work.example, told=stays)
        return steps.prepared(out, work, sites, weigh=True, known=known, progress=show)

    def stays(why: str) -> None:
        out.say(f"no filters are removed: {why}")

    def told(why: str) -> None:
        out.say(f"{why}: sets of methods compete, as with --method {AUTO}")

    with out.progress() as show:
        return reached(work.dense, goal, request.making(work, show), request.sets, prepared, told)


def _prepared(out: Output, request: Request, work: Subject, progress: Progress | None = None) -> Prepared:
    """The dense network prepared for the methods that are asked for."""
    removing = any(method.removes_channels for method in request.methods)
    sites = work.sites
    if removing or (request.plan is not None and removals(request.plan)):
        sites = with_channels(work.dense, sites, work.example)
    return steps.prepared(out, work, sites, request.groups, weigh=True, progress=progress)


def _filters(request: Request) -> PrincipalFilters:
    return next(method for method in request.methods if isinstance(method, PrincipalFilters))


def _tuned(out: Output, outcome: Outcome, work: Subject, tuning: Recipe, held: RunFolder | None) -> Outcome:
    """Fine-tune if there are batches to, and measure before and after if there are batches for it."""
    dense, small, tested = outcome.dense, outcome.result.model, work.testing is not None
    if tested:
        outcome = outcome.scored("dense", work.score(dense)).scored("compressed", work.score(small))
    if held is None:
        return outcome
    assert work.training is not None
    done = fine_tune(
        small, work.training, teacher=dense, recipe=tuning, evaluate=work.score if tested else None,
        progress=out.shows, checkpoint=held.folder / TUNING,
    )  # fmt: skip
    # None of the samples counts as held out any more: training may have seen them all.
    seen = work.calibration
    agreed = None if seen is None else agreement(dense, small, seen, forward=work.feed)
    outcome = dataclasses.replace(outcome.tuned(done, agreed), seeds={"training": tuning.seed})
    return outcome.scored("fine-tuned", work.score(small)) if tested else outcome
