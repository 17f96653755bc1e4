"""``spectrim export``: a model as ONNX or as a torch.export program, checked against the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spectrim.cli import options
from spectrim.cli.common import REQUIRED, Output, command, option
from spectrim.cli.references import Reference, UsageError, installed
from spectrim.cli.unfinished import make_folder
from spectrim.cli.values import check_results_folder

FORMATS = (".onnx", ".pt2")
_RUNS = {
    ".onnx": """import onnxruntime
session = onnxruntime.InferenceSession({file!r})
names = [each.name for each in session.get_inputs()]
outputs = session.run(None, dict(zip(names, arrays)))""",
    ".pt2": "import torch\nmodel = torch.export.load({file!r}).module()",
}
"""Lines that run what was written, by the suffix."""


@dataclass(frozen=True)
class ExportOptions:
    """The file."""

    file: Path = option("File to write: .onnx or .pt2 (torch.export).", "FILE", REQUIRED, flags=("--out", "-o"))
    batch: int = option("Samples of the example; the exported batch is free.", "N", 2, min=2)
    threads: int | None = options.threads_option()

    def __post_init__(self) -> None:
        if self.file.suffix not in FORMATS:
            raise UsageError(f"--out {str(self.file)!r}: expected a name ending in {' or '.join(FORMATS)}")
        check_results_folder(self.file.parent)


@command
def export(
    out: Output, model: options.FinishedOptions, example: options.ExampleOptions, written: ExportOptions
) -> None:
    """Write a model for other runtimes, and check that it computes the same numbers.

    Examples
    --------
    $ spectrim export net.py:build -c compressed/model.safetensors --input 3x224x224 -o net.onnx
    """
    file = written.file
    if example.data is None and example.input_shape is None:
        raise UsageError("an example input is needed: give --input, as --input 3x224x224, or --data")
    model.check_one("one of them is exported: leave the other out")
    if file.suffix == ".onnx":
        for package in ("onnx", "onnxscript"):
            installed(package, Reference(f"--out {file}", ""), "spectrim[export]")
    make_folder(out, file.parent, [file.name])
    from spectrim.cli.data import load_data
    from spectrim.cli.subject import device_named, example_batch
    from spectrim.nn.export import export_onnx, export_program

    device_named("cpu", written.threads)
    network = model.load()
    batches = load_data(example.data, purpose="test")
    batch = example_batch(batches, example, written.batch, "cpu", network)
    write = export_onnx if file.suffix == ".onnx" else export_program
    difference = write(network, batch, file)
    size = file.stat().st_size
    out.document(
        {"model": model.model, "file": str(file), "format": file.suffix[1:], "bytes": size, "difference": difference}
    )
    out.print(f"{file}  {size:,} bytes, largest difference to the model {difference:.1e}")
    out.code("To run it in Python:", _RUNS[file.suffix].format(file=str(file)))
