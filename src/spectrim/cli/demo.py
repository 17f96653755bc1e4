"""``spectrim demo``: the whole way on scikit-learn's digits, in about a minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.cli.common import Output, command
from spectrim.network.choices import LowRankChoice
from spectrim.network.printing import count

if TYPE_CHECKING:
    from torch import nn

    from spectrim.report import Comparison
    from spectrim.selection.budget import Budget
    from spectrim.selection.plan import Plan


@command
def demo(
    out: Output,
    folder: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the report, the checkpoint and the plan.")
    ] = Path("demo-out"),
    budget: Annotated[
        str, typer.Option("--budget", "-b", metavar="COST=VALUE", help="What the compressed model may cost.")
    ] = "macs=22%",
    width: Annotated[int, typer.Option(min=4, metavar="N", help="Channels of the network's first layers.")] = 64,
    dense_epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Epochs of training the dense model.")] = 12,
    epochs: Annotated[int, typer.Option("--epochs", min=0, metavar="N", help="Epochs of fine-tuning.")] = 16,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images a call when time is measured.")] = 64,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the first weights and the order of the samples.")] = 0,
    threads: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="CPU threads; the network is small.")] = 1,
) -> None:
    """Train a network on digits, compress it, fine-tune it, and say how much smaller and faster it is.

    Needs no download; takes about a minute. Writes report.html, model.safetensors and plan.json.

    Examples
    --------
    $ spectrim demo
    $ spectrim demo --budget macs=12% --batch 1 --out smaller
    """
    from spectrim.cli.data import check_data, load_data
    from spectrim.cli.unfinished import make_folder
    from spectrim.cli.values import read_budget

    wanted = read_budget([budget])
    check_data("digits", "test")
    make_folder(out, folder)
    import torch

    from spectrim.cli.batches import Batches
    from spectrim.cli.digits_net import DigitsNet
    from spectrim.cli.results import Outcome
    from spectrim.cli.subject import device_named, first_batch
    from spectrim.nn.agreement import agreement
    from spectrim.pipeline import compress
    from spectrim.report import accuracy, compare
    from spectrim.train import fine_tune

    started = time.perf_counter()
    device_named("cpu", threads)
    of_model, of_data = f"spectrim.cli.digits_net:DigitsNet?width={width}", f"digits?batch=64&seed={seed}"
    train = load_data(of_data, purpose="training")
    test = load_data("digits", purpose="test")
    assert isinstance(train, Batches)
    assert isinstance(test, Batches)
    progress = out.shows

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dense = DigitsNet(width)
    example = first_batch(test, batch, "digits", dense)
    _check_reachable(dense, example, wanted)
    out.say(f"training a network of five convolutions on {train.samples} digits, testing on {test.samples}")
    fine_tune(dense, train, epochs=dense_epochs, lr=0.1, seed=seed, progress=progress)
    dense.eval()

    out.say(f"compressing to {budget}")
    calibration = load_data("digits", purpose="calibration")
    with out.progress() as show:
        result = compress(dense, calibration, wanted, progress=show)
    small = result.model
    outcome = Outcome(
        "Digits demo", dense, result, folder, {"model": of_model, "training data": of_data}, seeds={"demo": seed}
    )
    outcome = outcome.scored("dense", accuracy(dense, test)).scored("compressed", accuracy(small, test))

    if epochs:
        out.say(f"fine-tuning for {epochs} epochs with the dense network as teacher")
        done = fine_tune(small, train, teacher=dense, epochs=epochs, seed=seed, progress=progress)
        outcome = outcome.tuned(done, agreement(dense, small, calibration)).scored("fine-tuned", accuracy(small, test))
    out.say(f"timing both networks side by side, {batch} images a call")
    comparison = compare(dense, small, example, evaluate=outcome.known_score, repeats=_ROUNDS, threads=threads)
    outcome = outcome.noted(*_said(result.plan, comparison, test.samples, threads))
    seconds = time.perf_counter() - started
    outcome.finish(out, comparison, seconds=seconds)
    out.print(f"took {seconds:.0f} s")


def _check_reachable(model: nn.Module, example: Any, wanted: Budget) -> None:
    """Raise InfeasibleBudgetError before any training: what a network costs at the least hangs on no weights."""
    from spectrim.pipeline import methods_on_offer
    from spectrim.preparation import locate, prepare
    from spectrim.selection.selectors import check_reachable
    from spectrim.tables import tabulate

    groups = methods_on_offer(None, None, wanted.costs)[1]
    known = prepare(model, locate(model, ()), [example], groups=groups, statistics=False, sensitivity=False)
    check_reachable(tabulate(known.sites), [wanted])


_ROUNDS = 100
"""In which both networks are timed: of calls of a few milliseconds, for an interval of a few percent."""


def _said(plan: Plan, comparison: Comparison, images: int, threads: int) -> Iterator[str]:
    """What was done and by how much, in plain words."""
    changed = [entry for entry in plan if not entry.choice.is_dense]
    pairs = all(isinstance(entry.choice, LowRankChoice) for entry in changed)
    thin = "two thin layers in a row (low rank)" if pairs else "two or three thin layers in a row"
    yield (
        f"Done: {len(changed)} of {len(plan.entries)} layers became {thin}, chosen so that the whole network keeps the "
        "budget and loses the least."
        if changed
        else "Done: no layer had to change, since the network keeps the budget as it is."
    )
    size, score = comparison["file size"], comparison["accuracy"]
    yield (
        f"Smaller: {size.show(size.compressed)} of weights in place of {size.show(size.dense)}, {size.ratio:.1f} times "
        f"less, and {plan.ratio('macs'):.1f} times fewer multiply-accumulates (MACs)."
    )
    wrong = [round(images * (100 - percent) / 100) for percent in (score.dense, score.compressed)]
    yield f"Accuracy: of {images} test images {wrong[0]} were wrong before and {wrong[1]} are wrong now."
    yield _said_of_time(comparison, f"{comparison.batch} images a call on {count(threads, 'thread')}")


def _said_of_time(comparison: Comparison, how: str) -> str:
    """Whether the network is faster on this machine, with the spread; nothing is claimed that noise could have made."""
    clock = comparison["latency p50"]
    assert clock.speed is not None
    spread = f"{clock.speed.low:.2f} to {clock.speed.high:.2f}"
    times = f"{clock.show(clock.compressed)} in place of {clock.show(clock.dense)}"
    if not clock.speed.differs:
        return f"Time: {clock.speed.words} on this machine, with {how} (ratio {spread})."
    if clock.speed.ratio < 1:
        return f"Slower on this machine: {times}, with {how} (ratio {spread})."
    return (
        f"Faster: {times}, with {how}. Run beside run it is {clock.speed.ratio:.2f} times as fast, and in 99 of 100 "
        f"cases that median lies within {spread}. On another CPU it will be another ratio."
    )
