"""``spectrim evaluate``: accuracy, costs and latency of a model, or of a compressed one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spectrim.cli import options
from spectrim.cli.common import Checked, Output, command, option, usage
from spectrim.cli.data import check_data
from spectrim.cli.references import UsageError


@dataclass(frozen=True)
class MeasuringOptions(Checked):
    """How it is measured."""

    compare: bool = option(
        "With --checkpoint: the dense model (with --weights) beside it.", default=False, flags=("--compare",)
    )
    repeats: int = option("Timed runs; 0 leaves latency out.", "N", 30, min=0)
    batch: int = options.batch_option()
    threads: int | None = options.threads_option()
    runtime: str = options.runtime_option()
    device: str = options.device_option()


@command
def evaluate(
    out: Output, model: options.FinishedOptions, example: options.ExampleOptions, measuring: MeasuringOptions
) -> None:
    """Measure a model: accuracy, parameters, MACs, file size, peak memory, latency.

    Examples
    --------
    $ spectrim evaluate net.py:build -w net.pt -d imagefolder:photos
    $ spectrim evaluate net.py:build -w net.pt -c compressed/model.safetensors -d imagefolder:photos --compare
    """
    data, threads = example.data, measuring.threads
    if data is None and example.input_shape is None:
        raise UsageError("give --data (labelled batches), or --input to measure costs alone, as --input 3x224x224")
    if measuring.compare and model.checkpoint is None:
        raise UsageError("--compare needs --checkpoint: the compressed model to put beside the dense one")
    if not measuring.compare:
        model.check_one("the dense model is measured with --compare: give that too, or leave --weights out")
    if data is not None:
        check_data(data, "test", "--data")
    from spectrim.cli.data import load_data
    from spectrim.cli.models import load_model, whose_weights
    from spectrim.cli.preprocessing import class_note, tell_preprocessing
    from spectrim.cli.steps import fastest, kernel_notes, kernel_values
    from spectrim.cli.subject import device_named, example_batch
    from spectrim.report import accuracy, compare, measure

    device = device_named(measuring.device, threads, measuring.runtime)
    batches = load_data(data, purpose="test", device=device)

    def score(network):
        with usage():  # batches without labels
            return accuracy(network, batches)

    scoring = score if batches is not None else None
    name, network = model.model, model.load().to(device)
    if model.checkpoint is not None:
        name = str(model.checkpoint)
    if batches is not None:
        tell_preprocessing(out, {"--data": batches}, network)
        if note := class_note(batches, network):
            out.say(f"note: {note}")
    batch = example_batch(batches, example, measuring.batch, device, network)
    if model.checkpoint is None:
        out.say(f"measuring {whose_weights(name, model.weights)}")
    kernels = fastest(network, batch, threads, measuring.runtime) if measuring.repeats else ()
    clock: dict[str, Any] = {"repeats": measuring.repeats, "threads": threads, "runtime": measuring.runtime}
    if measuring.compare:
        dense = load_model(model.model, model.weights).to(device)
        out.say(f"dense: {whose_weights(model.model, model.weights)}")
        found = compare(dense, network, batch, evaluate=scoring, **clock)
        columns, rows = ["", ">dense", ">compressed", "change"], found.to_rows()
    else:
        found = measure(network, batch, evaluate=scoring, **clock)
        columns, rows = ["", f">{name}"], [(line.metric, line.text) for line in found.lines]
    out.document({"model": name, **found.to_dict(), "kernels": kernel_values(kernels)})
    out.table(columns, rows)
    for note in kernel_notes(kernels):
        out.print(note)
