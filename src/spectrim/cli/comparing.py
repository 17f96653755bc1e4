"""``spectrim compare``, when the command line has been read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from torch import nn

from spectrim.cli.common import Output, usage
from spectrim.cli.compare import ComparedOptions, ComparingOptions
from spectrim.cli.data import load_data
from spectrim.cli.filters import with_channels
from spectrim.cli.models import load_compressed, load_model, whose_weights
from spectrim.cli.origins import origin_parts
from spectrim.cli.preprocessing import tell_preprocessing
from spectrim.cli.references import UsageError
from spectrim.cli.steps import fastest, offer, planned_groups
from spectrim.cli.subject import device_named, first_batch
from spectrim.network.files import converted, read_document, record_of
from spectrim.nn.agreement import Agreement, agreement
from spectrim.nn.checkpoint import read_plan
from spectrim.nn.find import find
from spectrim.nn.watch.calibrate import calibrate
from spectrim.nn.watch.nesting import begun
from spectrim.pipeline.shrinking import network_of
from spectrim.report import Origin, Part, Score, SideBySide, SideBySidePage, accuracy
from spectrim.report import compare as side_by_side
from spectrim.report.comparison import Measure
from spectrim.report.side_by_side import planned
from spectrim.selection.front import Sweep
from spectrim.selection.plan import Plan
from spectrim.selection.point import LARGEST, Point

_RESULT = "result.json"


def read_plans(out: Output, paths: dict[str, Path], page: Path | None = None) -> None:
    """What plans say, in one table."""
    plans = _plans(paths)
    unlike = {name: plan.dense_costs.get("parameters") for name, plan in plans.items()}
    if len(set(unlike.values())) > 1:
        told = ", ".join(f"{name} {value:,.0f}" for name, value in unlike.items() if value is not None)
        raise UsageError(f"these are not of one dense network, whose parameters differ: {told}")
    comparisons, agreements = {}, {}
    for name, plan in plans.items():
        stored, agreements[name] = _stored(paths[name])
        comparisons[name] = dataclasses.replace(known := planned(plan), rows=(*stored, *known.rows))
    _finish(out, SideBySide(comparisons, agreements), paths, page)


def _plans(paths: dict[str, Path]) -> dict[str, Plan]:
    return {n: Plan.read(path) if path.suffix == ".json" else read_plan(path) for n, path in paths.items()}


class _Result(msgspec.Struct):
    """What ``compare`` reads of what compress has found."""

    scores: dict[str, float] = {}
    test_samples: int = 0  # 0 of one written before it was kept
    agreement: Agreement | None = None


def _kept(text: bytes) -> _Result:
    what = "what compress writes"
    return converted(record_of(text, what, LARGEST), _Result, what)


def _stored(path: Path) -> tuple[list[Measure], Agreement | None]:
    """How good the network of a file is, as it was measured when it was written; nothing where nothing is kept."""
    if (path.parent / _RESULT).is_file():
        found = read_document(path.parent / _RESULT, _kept, LARGEST, "delete it to compare without it")
        scores = [Score(score, found.test_samples) for score in found.scores.values()]
        rows = [Measure("accuracy (kept)", "%", scores[0], scores[-1], "higher")] if scores else []
        return rows, found.agreement
    try:
        point, sweep = Point.read(path.parent), Sweep.read(path.parent.parent)
    except FileNotFoundError:
        return [], None
    judged, rows = point.judged, []
    if sweep.dense is not None and judged.metric is not None:
        rows = [Measure(f"{sweep.metric} (kept)", sweep.unit, sweep.dense, judged.metric, sweep.better)]
    if point.milliseconds:
        rows.append(Measure("latency (kept)", "ms", point.dense_costs["milliseconds"], point.costs["milliseconds"]))
    agreed = None if judged.error is None else Agreement(judged.samples, judged.error, judged.top1)
    return rows, agreed


def measure_networks(
    out: Output, compared: ComparedOptions, measuring: ComparingOptions, paths: dict[str, Path], page: Path | None
) -> None:
    """Load or make the networks, and measure them beside the dense one."""
    assert compared.model is not None
    device = device_named(measuring.device, measuring.threads, measuring.runtime)
    dense = load_model(compared.model, compared.weights).to(device)
    out.say(f"dense: {whose_weights(compared.model, compared.weights)}")
    data = load_data(measuring.data, purpose="calibration", device=device)
    test = load_data(measuring.test, purpose="test", device=device)
    tell_preprocessing(out, {"--data": data, "--test": test}, dense)
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
    plans = [name for name, path in paths.items() if path.suffix == ".json"]
    notes = [f"the layers of {', '.join(plans)} were fitted to those of --data: their files keep no weights"]
    named = {"model": compared.model, "weights": compared.weights, "--data": measuring.data, "--test": measuring.test}
    parts = origin_parts({role: str(text) for role, text in named.items() if text is not None}, dense)
    _finish(out, found, paths, page, compared.model, parts, notes if plans else ())


def _carried_out(dense: nn.Module, path: Path, batches: Iterable[Any]) -> nn.Module:
    """The network of a plan, its layers fitted to batches."""
    plan, sites = Plan.read(path), find(dense)
    if any(entry.of_channels for entry in plan):
        sites = with_channels(dense, sites, begun(batches)[0])
    sites = calibrate(dense, sites, batches)
    return network_of(dense, offer(sites, planned_groups(plan, sites)), plan, batches)


def _finish(
    out: Output, found: SideBySide, paths: dict[str, Path], page: Path | None, title: str = "Networks side by side",
    parts: Iterable[Part] = (), notes: Iterable[str] = (),
) -> None:  # fmt: skip
    """Print the table or the document, and write the page."""
    agreed = {row["name"]: {part: row[part] for part in ("top1", "error", "samples")} for row in found.rows()}
    out.document(
        {"files": {n: str(path) for n, path in paths.items()}, "networks": found.to_dict(), "agreement": agreed}
    )
    out.table(*found.table())
    for sentence in (*found.sentences, *notes):
        out.prose(sentence)
    if page is not None:
        files = [Part.of_files(name, str(path), path) for name, path in paths.items()]
        SideBySidePage(title, found, _plans(paths), tuple(notes), origin=Origin(parts=(*parts, *files))).write(page)
        out.written(page.parent, {page.name: "the same for people: open it in a browser"})
