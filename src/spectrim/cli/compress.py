"""``spectrim compress``: a model and a budget in, a smaller model, its plan and a report out."""

from __future__ import annotations

import dataclasses

import typer

from spectrim.cli import options
from spectrim.cli.common import Output, command, refuse
from spectrim.cli.former import formerly, with_former_options
from spectrim.cli.methods import AUTO, FILTERS, LEARNED, Methods
from spectrim.cli.references import UsageError
from spectrim.cli.unfinished import make_folder
from spectrim.cli.values import check_plan, named_costs

_SHARING = frozenset({"share", "groups"})


@command
@formerly(
    "pattern", "low_rank_share", "rule", "pooling", "with_low_rank", "rank_epochs", "rank_lr", "c_steps", "energy",
    "multiplier",
)  # fmt: skip
def compress(
    out: Output,
    context: typer.Context,
    network: options.NetworkOptions,
    *,
    inputs: options.InputOptions,
    goal: options.GoalOptions,
    method: options.Methods = None,
    training: options.TrainingOptions,
    layers: options.LayerOptions,
    sharing: options.SharingOptions,
    files: options.FileOptions,
) -> None:
    """Make a model smaller, fit a budget, and say what it cost.

    Writes model.safetensors (weights and plan), plan.json, result.json (all figures) and report.html, and for learned
    ranks ranks.json, the course they took. A training that is stopped goes on with the same call. Exit code 3 if the
    budget cannot be met.

    Examples
    --------
    $ spectrim compress net.py:build -w net.pt -d imagefolder:photos --test imagefolder:photos -b macs=50%
    $ spectrim compress torchvision:resnet18 --input 3x224x224 -b parameters=60% -o small
    """
    # Without a function it is what a multiplier is for, as it was written formerly.
    former = [text for text in goal.cost or () if "=" not in text]
    if former and not any(text.partition(":")[0] == LEARNED for text in method or ()):
        named_costs(former)
    methods = Methods.read(with_former_options(out, method, {"cost": former}), competing=True)
    if LEARNED in methods:
        no = {"plan", "selector", "guard", "recipe", "max_drop", "min_agreement", "compete", *_SHARING}
        refuse(context, no, f"does not combine with --method {LEARNED}")
        points = [",".join(goal.budget)] if goal.budget else []
        costs = [text for text in goal.cost or () if text not in former]
        learned = _learned(methods)
        learned.check(training, points, costs)
        from spectrim.cli import learning

        run = learning.RankRun(network, inputs, training, layers, learned, points, costs)
        learning.compress_by_learning(out, run, files)
        return
    _check(context, methods, goal, inputs, training)
    if goal.max_drop is not None and training.test is None:
        raise UsageError(f"--max-drop {goal.max_drop:g} is measured on --test, batches with labels: give them too")
    make_folder(out, files.folder)
    from spectrim.cli import shrinking
    from spectrim.cli.subject import Subject

    request = shrinking.Request.read(
        methods, goal, sharing, calibrated=inputs.data is not None, multiple_of=layers.multiple_of
    )
    tuning = training.recipe(options.STEPS)
    work = Subject.load(network, layers, inputs, training, timed=request.timed)
    # What the fine-tuned weights follow from; what is only measured with is left out.
    record = {"method": [each.text for each in methods.asked]}
    for options_ in (network, inputs, layers, sharing, goal, training):
        record |= dataclasses.asdict(options_)
    held = shrinking.run_folder(files.folder, record, work, tuning)
    shrinking.compress_and_tell(out, request, work, tuning, files, held)


def _learned(methods: Methods) -> options.LearnedRanksOptions:
    """The options of learned ranks, which are learned alone."""
    asked, *others = methods.asked
    if others:
        raise UsageError(f"--method {LEARNED} does not combine with another --method: it learns the ranks alone")
    if "cost" in asked.options and "multiplier" not in asked.options:
        raise UsageError(f"--method {asked.text}: cost is what a multiplier is for, and there is no multiplier")
    return asked.filled(options.LearnedRanksOptions)


def _check(
    context: typer.Context, methods: Methods, goal: options.GoalOptions, inputs: options.InputOptions,
    training: options.TrainingOptions,
) -> None:  # fmt: skip
    """Refuse options that do not go with each other."""
    refuse(context, {"checkpoint", "animate"}, f"is for --method {LEARNED}, not for {methods}")
    if training.train is None:
        refuse(context, {"epochs", "lr"}, "is for fine-tuning: give --train too, batches to train on")
    _check_goal(context, methods, goal)
    _check_competing(context, methods, goal, inputs)
    if goal.tolerant and inputs.data is None:
        raise UsageError("a tolerance is searched for with calibration batches: give --data")
    if goal.plan is not None:
        check_plan(goal.plan)
        refuse(context, _SHARING, "does not combine with --plan, which says what is shared")
        if any(each.options for each in methods.asked if each.name == FILTERS):
            raise UsageError(f"{methods} has options, but --plan says what is removed")
    else:
        methods.check_data(inputs.data is not None)
    if inputs.data is None and inputs.input_shape is None:
        raise UsageError("give --data for calibration, or --input for a data-free compression, as --input 3x224x224")


def _check_goal(context: typer.Context, methods: Methods, goal: options.GoalOptions) -> None:
    """Refuse two that say how small, or none."""
    ways = "--budget (as macs=50%), --max-drop, --min-agreement"
    if FILTERS in methods:
        refuse(context, _SHARING, f"does not combine with --method {FILTERS}")
        ways += ", --recipe (as kl)"
    else:
        refuse(context, {"recipe"}, f"is for --method {FILTERS}, not for {methods}")
    if goal.recipe is not None:
        why = f"does not combine with --recipe {goal.recipe}, which says by itself how many filters stay"
        refuse(context, {"budget", "plan", "selector", "guard", "max_drop", "min_agreement", "compete"}, why)
        if len(methods.asked) > 1:
            raise UsageError(f"{methods} {why}")
    elif (bool(goal.budget) or goal.tolerant) == (goal.plan is not None):
        raise UsageError(f"give one of {ways} or --plan FILE")


def _check_competing(
    context: typer.Context, methods: Methods, goal: options.GoalOptions, inputs: options.InputOptions
) -> None:
    """Refuse what sets of methods that compete leave no room for."""
    decided = {*(() if AUTO in methods else ("method",)), "multiple_of", "plan", *_SHARING}
    if AUTO in methods or goal.compete:
        how = f"--method {AUTO}" if AUTO in methods else "--compete"
        refuse(context, decided, f"does not combine with {how}")
        if inputs.data is None:
            raise UsageError("networks compete on held-out calibration samples: give --data")
    elif goal.seconds is not None:
        limits = f"--seconds {goal.seconds:g} limits how long sets of methods compete"
        refuse(context, decided, f"leaves one set of methods, and {limits}: give --method {AUTO}, or leave it out")
