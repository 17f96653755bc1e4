"""``spectrim compare``: several compressed networks or plans in one table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from spectrim.cli import options
from spectrim.cli.common import REQUIRED, Checked, Output, command, option, refuse
from spectrim.cli.models import check_reference
from spectrim.cli.references import UsageError
from spectrim.cli.unfinished import make_folder
from spectrim.cli.values import check_plan
from spectrim.cli.weights import check_checkpoint

_MODEL, _PLAN, _POINT = "model.safetensors", "plan.json", "point.json"


@dataclass(frozen=True)
class ComparedOptions(Checked):
    """What is compared."""

    files: list[Path] = option(
        "model.safetensors or plan.json that compress or sweep wrote, or such folders; of a sweep all points.",
        "FILE...",
        REQUIRED,
        kind=typer.Argument,
    )
    model: str | None = option(
        "What returns the dense model, as compress takes it: to measure, and not only read what plans say.",
        "MODEL",
        flags=("--model", "-m"),
        check=check_reference,
    )
    weights: Path | None = options.weights_option("Weights of the dense model: .safetensors or .pt.")

    def found(self) -> dict[str, Path]:
        """Checkpoints and plans, by the shortest names that tell them apart."""
        paths = [path for given in self.files for path in _paths(given)]
        if len(set(paths)) < len(paths):
            raise UsageError(f"{str(next(path for path in paths if paths.count(path) > 1))!r} is named twice")
        whole = {path: (path.parent if path.name in (_MODEL, _PLAN) else path) for path in paths}
        short = {path: part.name for path, part in whole.items()}
        names = [*short.values()]
        return {short[path] if short[path] and names.count(short[path]) == 1 else str(path): path for path in paths}


def _paths(given: Path) -> Iterator[Path]:
    if given.is_file():
        if given.suffix == ".json":
            check_plan(given, "")
        else:
            check_checkpoint(given)
        yield given
        return
    here = [given / name for name in (_MODEL, _PLAN) if (given / name).is_file()]
    points = sorted(file.parent for file in given.glob(f"*/{_POINT}"))
    if here:
        yield here[0]
    elif points:
        for point in points:
            yield from _paths(point)
    else:
        what = f"holds neither {_MODEL} nor {_PLAN}" if given.is_dir() else "is neither a file nor a folder"
        model = f": a model is given by --model {given}" if ":" in str(given) else ""
        raise UsageError(f"{str(given)!r} {what}, which compress and sweep write{model}")


@dataclass(frozen=True)
class ComparingOptions(Checked):
    """How it is measured."""

    data: str | None = options.calibration_option(
        "Samples on which outputs are compared with the dense network's, named as for compress."
    )
    test: str | None = option("Batches with labels to measure accuracy on.", "DATA", check=options.check_test)
    latency: bool = option(
        "Time all networks in turns, so that a busy moment hits each of them.", default=False, flags=("--latency",)
    )
    batch: int = options.batch_option()
    threads: int | None = options.threads_option()
    runtime: str = options.runtime_option()
    device: str = options.device_option()


@dataclass(frozen=True)
class PageOptions:
    """Files."""

    page: Path | None = option("Write the table, with a figure, as a page for a browser: compared.html.", "FILE")

    def __post_init__(self) -> None:
        if self.page is not None and self.page.suffix != ".html":
            raise UsageError(f"--page {str(self.page)!r}: expected a name ending in .html, as compared.html")


@command
def compare(
    out: Output, context: typer.Context, compared: ComparedOptions, *, measuring: ComparingOptions, files: PageOptions
) -> None:
    """Put several compressed networks, or plans, side by side: costs, agreement, accuracy, milliseconds.

    Without --model it is what their plans say, and what was measured when they were made. With it and --data or --test
    they are loaded, or plans carried out on --data, and measured beside the dense network.

    Examples
    --------
    $ spectrim compare half third quarter
    $ spectrim compare sweep -m net.py:build -w net.pt -d imagefolder:photos --latency --page compared.html
    """
    paths = compared.found()
    plans = [name for name, path in paths.items() if path.suffix == ".json"]
    if compared.model is None:
        refuse(context, {"data", "test", "latency", "weights"}, "needs --model: what returns the dense model")
    elif measuring.data is None and measuring.test is None:
        raise UsageError("--model needs --data or --test: batches to run the networks on")
    elif plans and measuring.data is None:
        raise UsageError(f"{plans[0]} is a plan: give --data, on which it is carried out, or its {_MODEL}")
    if files.page is not None:
        make_folder(out, files.page.parent, [files.page.name])
    from spectrim.cli import comparing

    if compared.model is None:
        comparing.read_plans(out, paths, files.page)
    else:
        comparing.measure_networks(out, compared, measuring, paths, files.page)
