"""``spectrim demo``: the whole way on scikit-learn's digits, in a minute."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli.common import Output, command


@command
def demo(
    out: Output,
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the report, the checkpoint and the plan.")
    ] = Path("demo-out"),
    budget: Annotated[str, typer.Option("--budget", "-b", help="What the compressed model may cost.")] = "macs=22%",
    dense_epochs: Annotated[
        int, typer.Option("--dense-epochs", min=1, help="Epochs of training the dense model.")
    ] = 12,
    epochs: Annotated[int, typer.Option("--epochs", min=0, help="Epochs of fine-tuning.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of the first weights and the order of the samples.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads; the network is small.")] = 1,
) -> None:
    """Train a small network on digits, compress it, fine-tune it and report.

    Needs no download. Writes report.html, model.safetensors and plan.json.
    """
    import torch

    from spectrim.cli.batches import Batches
    from spectrim.cli.data import load_data
    from spectrim.cli.digits_net import DigitsNet
    from spectrim.cli.results import Outcome
    from spectrim.cli.unfinished import make_folder
    from spectrim.cli.values import read_budget
    from spectrim.cli.work import device_named, first_batch
    from spectrim.nn.agreement import agreement
    from spectrim.pipeline import compress
    from spectrim.report import accuracy, compare
    from spectrim.train import fine_tune

    started = time.perf_counter()
    wanted = read_budget([budget])
    make_folder(out, folder)
    device_named("cpu", threads)
    train = load_data(f"digits?batch=64&seed={seed}", purpose="training")
    test = load_data("digits", purpose="test")
    assert isinstance(train, Batches)
    assert isinstance(test, Batches)

    def evaluate(model):
        return accuracy(model, test)

    progress = not out.quiet
    out.say(f"training a small network on {train.samples} digits, testing on {test.samples}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dense = DigitsNet()
    fine_tune(dense, train, epochs=dense_epochs, lr=0.1, seed=seed, progress=progress)
    dense.eval()

    out.say(f"compressing to {budget}")
    calibration = load_data("digits", purpose="calibration")
    example = first_batch(test, 1, "digits", dense)
    with out.progress() as show:
        result = compress(dense, calibration, wanted, progress=show)
    small = result.model
    named = {"model": "spectrim.cli.digits_net:DigitsNet", "data": "digits"}
    outcome = Outcome("Digits demo", dense, result, folder, named=named, seeds={"weights, order of samples": seed})
    outcome = outcome.scored("dense", evaluate(dense)).scored("compressed", evaluate(small))

    if epochs:
        out.say(f"fine-tuning for {epochs} epochs with the dense network as teacher")
        done = fine_tune(small, train, teacher=dense, epochs=epochs, seed=seed, progress=progress)
        outcome = outcome.tuned(done, agreement(dense, small, calibration)).scored("fine-tuned", evaluate(small))
    comparison = compare(dense, small, example, evaluate=outcome.known_score, threads=threads)
    seconds = time.perf_counter() - started
    outcome.finish(out, comparison, seconds=seconds)
    out.print(f"took {seconds:.0f} s")
