"""``spectrim compress``: a model and a budget in, a smaller model, its plan and a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import common
from spectrim.cli.common import Output, command

SELECTORS = ("exact", "lagrangian", "greedy", "energy", "uniform")


@command
def compress(
    out: Output,
    context: typer.Context,
    model: common.Model,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="macs=50%, parameters=1.2M, bytes=10MiB, latency=3ms. Repeatable."),
    ] = None,
    weights: common.Weights = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Calibration batches.")] = None,
    input_shape: common.Input = None,
    train: Annotated[
        str | None, typer.Option("--train", help="Training batches: fine-tune after the compression, or learn ranks.")
    ] = None,
    test: common.Test = None,
    epochs: Annotated[int, typer.Option("--epochs", min=0, help="Epochs of fine-tuning; needs --train.")] = 10,
    lr: common.Lr = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="auto, weight-svd, activation-svd, joint, low-rank-plus-sparse, principal-filters, or learned-ranks "
            "(needs --train).",
        ),
    ] = "auto",
    share: Annotated[
        bool | None,
        typer.Option(
            "--share/--no-share",
            help="Offer that repeated layers, and layers with one input, share factors. By default where the budget "
            "limits parameters or bytes and --method is auto.",
        ),
    ] = None,
    groups: common.Groups = None,
    pattern: common.Patterns = None,
    low_rank_share: common.LowRankShare = None,
    with_low_rank: Annotated[
        bool,
        typer.Option("--with-low-rank", help="Principal filters: offer low rank too; the budget chooses between them."),
    ] = False,
    width_recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Principal filters: how many stay, in place of --budget: kl, or energy=0.95 for a share of the "
            "responses' energy.",
        ),
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            "--rule",
            help="Principal filters: which stay, by reconstruction of what reads them or by correlation: l1-max, "
            "abs-max; l1-min, abs-min as controls.",
        ),
    ] = "reconstruction",
    pooling: Annotated[
        str,
        typer.Option(
            "--pooling", help="Principal filters: max, mean or none; of responses over the positions of a sample."
        ),
    ] = "max",
    rank_epochs: common.RankEpochs = 10,
    rank_lr: common.RankLr = None,
    c_steps: common.CSteps = 64,
    rank_energy: common.RankEnergy = "weight",
    multiplier: Annotated[
        float | None,
        typer.Option(
            "--multiplier", help="Learned ranks: loss that one unit of --cost is worth, in place of --budget."
        ),
    ] = None,
    cost: Annotated[
        str, typer.Option("--cost", help="Learned ranks: macs, parameters, bytes or latency; what --multiplier is for.")
    ] = "macs",
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Learned ranks: folder from which the same call continues after a kill."),
    ] = None,
    animate: Annotated[bool, typer.Option("--animate", help="Learned ranks: write ranks.gif too.")] = False,
    selector: Annotated[str, typer.Option("--selector", help=", ".join(SELECTORS) + ".")] = "exact",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Carry out this plan in place of a budget.")] = None,
    skip: common.Skip = None,
    only: common.Only = None,
    multiple_of: common.MultipleOf = None,
    guard: Annotated[
        bool, typer.Option("--guard", help="Leave out choices that are measured no faster than dense.")
    ] = False,
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for model.safetensors, plan.json, report.html.")
    ] = Path("compressed"),
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html.")] = True,
    batch: common.Batch = 1,
    threads: common.Threads = None,
    device: common.Device = "cpu",
) -> None:
    """Make a model smaller, fit a budget, and say what it cost.

    Writes model.safetensors (weights and plan), plan.json and report.html, and for learned ranks ranks.json, the course
    they took. Exit code 3 if the budget cannot be met.
    """
    from spectrim.cli import learning
    from spectrim.cli.costs import read_budget
    from spectrim.cli.data import load_data
    from spectrim.cli.filters import METHOD as FILTERS
    from spectrim.cli.filters import PARAMETERS as FILTER_PARAMETERS
    from spectrim.cli.filters import (
        Filters,
        filter_notes,
        filter_values,
        planned_filters,
        recommended,
        sample_notes,
        with_channels,
    )
    from spectrim.cli.models import load_model
    from spectrim.cli.references import UsageError
    from spectrim.cli.results import Outcome
    from spectrim.cli.sharing import NONE_ALIKE, planned_groups, wanted_groups
    from spectrim.cli.sparsity import Sparsity, fastest, kernel_notes, kernel_values
    from spectrim.cli.steps import (
        METHODS,
        carry_out,
        chosen_methods,
        device_named,
        first_batch,
        locate,
        prepared,
        random_input,
        table_of,
        training_batches,
    )
    from spectrim.cost.latency import Latency
    from spectrim.pipeline import shrink
    from spectrim.report import accuracy, compare
    from spectrim.selection.plan import Plan
    from spectrim.selection.selectors import energy, exact, greedy, lagrangian, select, uniform
    from spectrim.train import Recipe, fine_tune

    if method == learning.METHOD:
        common.refuse(
            context,
            {"plan_file", "selector", "guard", "share", "groups", "pattern", "low_rank_share", *FILTER_PARAMETERS},
            f"does not combine with --method {method}",
        )
        if multiplier is None:
            common.refuse(context, {"cost"}, "is the cost that --multiplier is for, and there is no --multiplier")
        points = (",".join(budget),) if budget else ()
        run = learning.RankRun(
            model=model, weights=weights, train=train, data=data, points=points, multiplier=multiplier, cost=cost,
            rank_epochs=rank_epochs, rank_lr=rank_lr, c_steps=c_steps, epochs=epochs, lr=lr, energy=rank_energy,
            skip=skip, only=only, multiple_of=multiple_of,
        )  # fmt: skip
        work = learning.Work.load(run, test, batch=batch, threads=threads, device=device)
        learning.compress(out, run, work, folder, checkpoint=checkpoint, report=report, animate=animate)
        return
    if method not in METHODS:
        raise UsageError(f"--method {method!r} is not known; choose from {', '.join((*METHODS, learning.METHOD))}")
    common.refuse(context, learning.PARAMETERS, f"is for --method {learning.METHOD}, not for --method {method}")
    sparsity = Sparsity.of(context, method, pattern, low_rank_share)
    filters = Filters.of(context, method, recipe=width_recipe, rule=rule, pooling=pooling, with_low_rank=with_low_rank)
    selectors = dict(zip(SELECTORS, (exact, lagrangian, greedy, energy, uniform), strict=True))
    if selector not in selectors:
        raise UsageError(f"--selector {selector!r} is not known; choose from {', '.join(SELECTORS)}")
    if filters.recipe is None and bool(budget) == (plan_file is not None):
        either = "either --budget (as macs=50%)"
        either = either if method != FILTERS else "one of --budget (as macs=50%), --recipe (as kl)"
        raise UsageError(f"give {either} or --plan FILE")
    wanted = read_budget(budget) if budget else None
    with common.usage():
        recipe = Recipe(epochs=epochs, lr=lr)
    if plan_file is not None:
        if not plan_file.is_file():
            raise UsageError(f"--plan {str(plan_file)!r} is not a file")
        common.refuse(context, {"share", "groups"}, "does not combine with --plan, which says what is shared")
        common.refuse(context, FILTER_PARAMETERS, "does not combine with --plan, which says what is removed")
    elif data is None:
        chosen_methods(method, False, filters=filters)  # some need data
    if data is None and input_shape is None:
        raise UsageError("give --data for calibration, or --input for a data-free compression, as --input 3x224x224")

    # What sharing saves is parameters and bytes: under other budgets it is hardly ever chosen, and takes time to offer.
    usual = wanted is not None and method == "auto" and not {"parameters", "bytes"}.isdisjoint(wanted.costs)
    sharing = wanted_groups(share, groups, method, default=usual)
    device = device_named(device, threads)
    dense = load_model(model, weights).to(device)
    batches = load_data(data, purpose="calibration", device=device) if data is not None else None
    training = training_batches(train, device) if train is not None else None
    testing = load_data(test, purpose="test", device=device) if test is not None else None
    if batches is not None:
        example = first_batch(batches, batch, str(data))
    else:
        example = random_input(str(input_shape), batch, device)
    clocked = guard or (wanted is not None and "latency" in wanted.costs)
    clock = Latency(device=device, batch=batch) if clocked else None
    plan = Plan.read(plan_file) if plan_file is not None else None
    sites = locate(dense, skip, only)
    sparsity.check(sites)
    if plan is not None:
        sharing = planned_groups(plan, sites)
        removed = planned_filters(plan)
        if removed is not None and batches is not None:
            method, filters = FILTERS, removed
        if removed is not None or method == FILTERS:
            sites = with_channels(dense, sites, example)
    elif method == FILTERS:
        sites = with_channels(dense, sites, example)
    methods = chosen_methods(
        method, batches is not None, multiple_of, share=sharing is not False, sparsity=sparsity, filters=filters
    )
    known = prepared(
        out, dense, sites, batches=batches, example=example, groups=sharing, weigh=batches is not None, latency=clock
    )
    if plan is None and batches is not None and filters.recipe is None:
        assert wanted is not None
        with out.progress() as show:
            result = shrink(
                dense, known, wanted, methods=methods, guard=guard, selector=selectors[selector], progress=show
            )
    else:
        table = table_of(out, known, methods, guard=guard)
        if filters.recipe is not None:
            plan = recommended(known.sites, filters, multiple_of)
        elif plan is None:
            assert wanted is not None
            plan = select(table, wanted, selectors[selector])
        result = carry_out(dense, known, table, plan)
    small = result.model
    if sharing is True and (share or method == "joint") and not result.sites.groups:
        out.say(NONE_ALIKE)

    def evaluate(network):
        assert testing is not None
        with common.usage():  # batches without labels
            return accuracy(network, testing)

    outcome = Outcome(model, dense, result, folder)
    if testing is not None:
        outcome = outcome.scored("dense", evaluate(dense)).scored("compressed", evaluate(small))
    if training is not None and epochs > 0:
        score = evaluate if testing is not None else None
        bar = False if out.quiet else None
        done = fine_tune(small, training, teacher=dense, recipe=recipe, evaluate=score, progress=bar)
        outcome = outcome.tuned(done)
        if testing is not None:
            outcome = outcome.scored("fine-tuned", evaluate(small))
    kernels = fastest(small, example, threads)
    outcome = outcome.noted(*filter_notes(result.plan, result.sites))
    if filters.recipe is not None:
        outcome = outcome.noted(*sample_notes(result.sites, filters.method(multiple_of)))
    outcome = outcome.noted(*kernel_notes(kernels))
    comparison = compare(
        dense, small, example, evaluate=outcome.known_score if testing is not None else None, threads=threads
    )
    outcome.finish(out, comparison, report=report, kernels=kernel_values(kernels), filters=filter_values(result.plan))
