"""``spectrim evaluate``: accuracy, costs and latency of a model, or of a compressed one."""

from __future__ import annotations

from typing import Annotated

import typer

from spectrim.cli import options
from spectrim.cli.common import Output, command, usage


@command
def evaluate(
    out: Output,
    model: options.Model,
    weights: options.Weights = None,
    checkpoint: options.Checkpoint = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Labelled batches.")] = None,
    input_shape: options.Input = None,
    compare_dense: Annotated[
        bool, typer.Option("--compare", help="With --checkpoint: the dense model (with --weights) beside it.")
    ] = False,
    repeats: Annotated[int, typer.Option("--repeats", min=0, help="Timed runs; 0 leaves latency out.")] = 30,
    batch: options.Batch = 1,
    threads: options.Threads = None,
    device: options.Device = "cpu",
) -> None:
    """Measure a model: accuracy, parameters, MACs, file size, peak memory, latency."""
    from spectrim.cli.data import load_data
    from spectrim.cli.models import load_compressed, load_model
    from spectrim.cli.preprocessing import tell
    from spectrim.cli.references import UsageError
    from spectrim.cli.sparsity import fastest, kernel_notes, kernel_values
    from spectrim.cli.work import device_named, first_batch, random_input
    from spectrim.report import accuracy, compare, measure

    if data is None and input_shape is None:
        raise UsageError("give --data (labelled batches), or --input to measure costs alone, as --input 3x224x224")
    if compare_dense and checkpoint is None:
        raise UsageError("--compare needs --checkpoint: the compressed model to put beside the dense one")
    device = device_named(device, threads)
    batches = load_data(data, purpose="test", device=device) if data is not None else None

    def score(network):
        assert batches is not None
        with usage():  # batches without labels
            return accuracy(network, batches)

    scoring = score if batches is not None else None
    name = str(checkpoint) if checkpoint is not None else model
    network = load_compressed(model, checkpoint) if checkpoint is not None else load_model(model, weights)
    network = network.to(device)
    if batches is not None:
        tell(out, {"--data": batches}, network)
        example = first_batch(batches, batch, str(data), network)
    else:
        example = random_input(str(input_shape), batch, device)
    kernels = fastest(network, example, threads) if repeats else ()
    if compare_dense:
        dense = load_model(model, weights).to(device)
        comparison = compare(dense, network, example, evaluate=scoring, repeats=repeats, threads=threads)
        out.document({"model": name, **comparison.to_dict(), "kernels": kernel_values(kernels)})
        out.table(["", ">dense", ">compressed", ">change"], comparison.to_rows())
        for note in kernel_notes(kernels):
            out.print(note)
        return
    measured = measure(network, example, evaluate=scoring, repeats=repeats, threads=threads)
    out.document({"model": name, **measured.to_dict(), "kernels": kernel_values(kernels)})
    out.table(["", f">{name}"], [(line.metric, line.text) for line in measured.lines])
    for note in kernel_notes(kernels):
        out.print(note)
