"""``spectrim compare``: several compressed networks or plans in one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from spectrim.cli import options
from spectrim.cli.common import Checked, Output, command, refuse, usage
from spectrim.cli.models import check_model
from spectrim.cli.references import UsageError
from spectrim.cli.values import check_plan
from spectrim.cli.weights import check_checkpoint, check_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from spectrim.nn.agreement import Agreement
    from spectrim.report import SideBySide
    from spectrim.report.comparison import Measure

_MODEL, _PLAN, _POINT, _RESULT = "model.safetensors", "plan.json", "point.json", "result.json"


@dataclass(frozen=True)
class ComparedOptions(Checked):
    """What is compared."""

    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="model.safetensors or plan.json that compress or sweep wrote, or such folders; of a sweep all points.",
        ),
    ]
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="What returns the dense model, as compress takes it: to measure, and not only read what plans say.",
        ),
        check_model,
    ] = None
    weights: Annotated[
        Path | None, options.weights_option("Weights of the dense model: .safetensors or .pt."), check_file
    ] = None

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
        raise UsageError(f"{str(given)!r} {what}, which compress and sweep write")


@dataclass(frozen=True)
class ComparingOptions(Checked):
    """How it is measured."""

    data: Annotated[
        str | None,
        options.data_option("Samples on which outputs are compared with the dense network's, named as for compress."),
        options.check_calibration,
    ] = None
    test: Annotated[
        str | None, typer.Option(metavar="DATA", help="Batches with labels to measure accuracy on."), options.check_test
    ] = None
    latency: Annotated[
        bool, typer.Option("--latency", help="Time all networks in turns, so that a busy moment hits each of them.")
    ] = False
    batch: options.Batch = 1
    threads: options.Threads = None
    runtime: options.Runtime = "eager"
    device: options.Device = "cpu"


@command
def compare(out: Output, context: typer.Context, compared: ComparedOptions, *, measuring: ComparingOptions) -> None:
    """Put several compressed networks, or plans, side by side: costs, agreement, accuracy, milliseconds.

    Without --model it is what their plans say, and what was measured when they were made. With it and --data or --test
    they are loaded, or plans carried out on --data, and measured beside the dense network.

    Examples
    --------
    $ spectrim compare half third quarter
    $ spectrim compare sweep -m net.py:build -w net.pt -d imagefolder:photos --test imagefolder:photos --latency
    """
    paths = compared.found()
    if compared.model is None:
        refuse(context, {"data", "test", "latency", "weights"}, "needs --model: what returns the dense model")
        _read(out, paths)
        return
    if measuring.data is None and measuring.test is None:
        raise UsageError("--model needs --data or --test: batches to run the networks on")
    plans = [name for name, path in paths.items() if path.suffix == ".json"]
    if plans and measuring.data is None:
        raise UsageError(f"{plans[0]} is a plan: give --data, on which it is carried out, or its {_MODEL}")
    _measure(out, compared, measuring, paths)


def _read(out: Output, paths: dict[str, Path]) -> None:
    """What plans say, in one table."""
    from spectrim.nn.checkpoint import read_plan
    from spectrim.report import SideBySide
    from spectrim.report.side_by_side import planned
    from spectrim.selection.plan import Plan

    plans = {n: Plan.read(path) if path.suffix == ".json" else read_plan(path) for n, path in paths.items()}
    unlike = {name: plan.dense_costs.get("parameters") for name, plan in plans.items()}
    if len(set(unlike.values())) > 1:
        told = ", ".join(f"{name} {value:,.0f}" for name, value in unlike.items() if value is not None)
        raise UsageError(f"these are not of one dense network, whose parameters differ: {told}")
    comparisons, agreements = {}, {}
    for name, plan in plans.items():
        stored, agreements[name] = _stored(paths[name])
        comparisons[name] = dataclasses.replace(known := planned(plan), rows=(*stored, *known.rows))
    _finish(out, SideBySide(comparisons, agreements), paths)


class _Agreed(msgspec.Struct):
    """How far outputs agreed, as compress has written it."""

    samples: int
    error: float
    top1: float | None = None


class _Kept(msgspec.Struct):
    """What ``compare`` reads of what compress has found."""

    scores: dict[str, float] = {}
    agreement: _Agreed | None = None


def _kept(text: bytes) -> _Kept:
    from spectrim.network.files import converted, record_of
    from spectrim.selection.point import LARGEST

    what = "what compress writes"
    return converted(record_of(text, what, LARGEST), _Kept, what)


def _stored(path: Path) -> tuple[list[Measure], Agreement | None]:
    """How good the network of a file is, as it was measured when it was written; nothing where nothing is kept."""
    from spectrim.network.files import read_document
    from spectrim.nn.agreement import Agreement
    from spectrim.report.comparison import Measure
    from spectrim.selection.front import Sweep
    from spectrim.selection.point import LARGEST, Point

    if (path.parent / _RESULT).is_file():
        found = read_document(path.parent / _RESULT, _kept, LARGEST, "delete it to compare without it")
        scores = [*found.scores.values()]
        rows = [Measure("accuracy (kept)", "%", scores[0], scores[-1], "higher")] if scores else []
        return rows, None if found.agreement is None else Agreement(**msgspec.structs.asdict(found.agreement))
    try:
        point, sweep = Point.read(path.parent), Sweep.read(path.parent.parent)
    except FileNotFoundError:
        return [], None
    judged, rows = point.judged, []
    if sweep.dense is not None and judged.metric is not None:
        rows = [Measure(f"{sweep.metric} (kept)", "", sweep.dense, judged.metric, sweep.better)]
    if point.milliseconds:
        rows.append(Measure("latency (kept)", "ms", point.dense_costs["milliseconds"], point.costs["milliseconds"]))
    agreed = None if judged.error is None else Agreement(judged.samples, judged.error, judged.top1)
    return rows, agreed


def _measure(out: Output, compared: ComparedOptions, measuring: ComparingOptions, paths: dict[str, Path]) -> None:
    """Load or make the networks, and measure them beside the dense one."""
    from spectrim.cli.data import load_data
    from spectrim.cli.models import load_compressed, load_model
    from spectrim.cli.preprocessing import tell
    from spectrim.cli.sparsity import fastest
    from spectrim.cli.work import device_named, first_batch
    from spectrim.nn.agreement import agreement
    from spectrim.report import accuracy
    from spectrim.report import compare as side_by_side

    assert compared.model is not None
    device = device_named(measuring.device, measuring.threads, measuring.runtime)
    dense = load_model(compared.model, compared.weights).to(device)
    data = None if measuring.data is None else load_data(measuring.data, purpose="calibration", device=device)
    test = None if measuring.test is None else load_data(measuring.test, purpose="test", device=device)
    tell(out, {"--data": data, "--test": test}, dense)
    batches, named = (data, measuring.data) if data is not None else (test, measuring.test)
    assert batches is not None
    example = first_batch(batches, measuring.batch, str(named), dense)
    models: dict[str, nn.Module] = {}
    for name, path in paths.items():
        if path.suffix == ".json":
            out.say(f"carrying out {path}")
            models[name] = _carried_out(dense, path, batches)
        else:
            models[name] = load_compressed(compared.model, path).to(device)
        if measuring.latency:
            fastest(models[name], example, measuring.threads, measuring.runtime)
    with usage("--test"):
        found = side_by_side(
            dense, models, example, threads=measuring.threads, runtime=measuring.runtime,
            repeats=30 if measuring.latency else 0,
            evaluate=None if test is None else lambda network: accuracy(network, test),
        )  # fmt: skip
    if data is not None:
        agreed = {name: agreement(dense, model, data) for name, model in models.items()}
        found = dataclasses.replace(found, agreements=agreed)
    _finish(out, found, paths)
    if plans := [name for name, path in paths.items() if path.suffix == ".json"]:
        out.prose(f"the layers of {', '.join(plans)} were fitted to those of --data: their files keep no weights")


def _carried_out(dense: nn.Module, path: Path, batches: Iterable[Any]) -> nn.Module:
    """The network of a plan, its layers fitted to batches."""
    from spectrim.application import carry_out
    from spectrim.cli.filters import with_channels
    from spectrim.cli.sharing import offer, planned_groups
    from spectrim.nn.find import find
    from spectrim.nn.watch.calibrate import calibrate
    from spectrim.nn.watch.nesting import begun
    from spectrim.selection.plan import Plan

    plan, sites = Plan.read(path), find(dense)
    if any(entry.of_channels for entry in plan):
        sites = with_channels(dense, sites, begun(batches)[0])
    sites = calibrate(dense, sites, batches)
    return carry_out(dense, offer(sites, planned_groups(plan, sites)), plan, batches).model


def _finish(out: Output, found: SideBySide, paths: dict[str, Path]) -> None:
    """Print the table or the document."""
    agreed = {row["name"]: {part: row[part] for part in ("top1", "error", "samples")} for row in found.rows()}
    out.document(
        {"files": {n: str(path) for n, path in paths.items()}, "networks": found.to_dict(), "agreement": agreed}
    )
    out.table(*found.table())
    for sentence in found.sentences:
        out.prose(sentence)
