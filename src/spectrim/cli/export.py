"""``spectrim export``: a model as ONNX or as a torch.export program, checked against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options
from spectrim.cli.common import Output, command

FORMATS = (".onnx", ".pt2")


@command
def export(
    out: Output,
    model: options.Model,
    file: Annotated[Path, typer.Option("--out", "-o", help="File to write: .onnx or .pt2 (torch.export).")],
    weights: options.Weights = None,
    checkpoint: options.Checkpoint = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Batches to take the example input from.")] = None,
    input_shape: options.Input = None,
    batch: Annotated[
        int, typer.Option("--batch", min=2, help="Samples of the example; the exported batch is free.")
    ] = 2,
    threads: options.Threads = None,
) -> None:
    """Write a model for other runtimes, and check that it computes the same numbers."""
    from spectrim.cli.data import load_data
    from spectrim.cli.models import load_compressed, load_model
    from spectrim.cli.references import UsageError
    from spectrim.cli.unfinished import make_folder
    from spectrim.cli.work import device_named, first_batch, random_input
    from spectrim.nn.export import export_onnx, export_program

    if file.suffix not in FORMATS:
        raise UsageError(f"--out {str(file)!r}: expected a name ending in {' or '.join(FORMATS)}")
    if data is None and input_shape is None:
        raise UsageError("an example input is needed: give --input, as --input 3x224x224, or --data")
    make_folder(out, file.parent)
    device_named("cpu", threads)
    network = load_compressed(model, checkpoint) if checkpoint is not None else load_model(model, weights)
    if data is not None:
        example = first_batch(load_data(data, purpose="test"), batch, data, network)
    else:
        example = random_input(str(input_shape), batch, "cpu")
    write = export_onnx if file.suffix == ".onnx" else export_program
    difference = write(network, example, file)
    size = file.stat().st_size
    out.document(
        {"model": model, "file": str(file), "format": file.suffix[1:], "bytes": size, "difference": difference}
    )
    out.print(f"{file}  {size:,} bytes, largest difference to the model {difference:.1e}")
