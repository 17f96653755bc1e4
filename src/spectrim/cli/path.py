"""``spectrim path``: several budgets from one run of learned ranks, the curve of accuracy against cost."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.cli import options
from spectrim.cli.common import Checked, Output, command
from spectrim.cli.references import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spectrim.train import LearnedResult

_NAMES = {"macs": "MACs", "parameters": "parameters", "bytes": "weights", "latency": "latency"}


@dataclass(frozen=True)
class PointOptions(Checked):
    """Points of the curve."""

    budget: list[str] | None = options.budget_option(
        "One point, as macs=50% or macs=50%,parameters=40%. Repeatable, the loosest first."
    )
    cost: list[str] | None = options.costs_option()
    data: str | None = options.calibration_option("Samples that layers are fitted to; some of --train by default.")
    mask: str | None = options.mask_option()
    rows: int | None = options.rows_option()
    positions: int | None = options.positions_option()
    folder: Path = options.folder_option(
        "Folder for path.json, path.svg and a folder for each point.", default=Path("path")
    )


@command
def path(
    out: Output,
    network: options.NetworkOptions,
    points: PointOptions,
    training: options.TrainingOptions,
    learned: options.LearningOptions,
    layers: options.LayerOptions,
) -> None:
    """Learn ranks for several budgets in one run: the curve of accuracy against cost.

    Every budget goes on from the weights that the one before has learned. A point is written to a folder of its own as
    soon as it is done: model.safetensors, plan.json, ranks.json. The same call again continues a run that was killed,
    or adds the budgets after its last one. Exit code 3 if a budget cannot be met.

    Examples
    --------
    $ spectrim path net.py:build -w net.pt --train photos.py:train --test photos.py:test -b macs=60% -b macs=40%
    """
    budget, cost, folder = points.budget, points.cost, points.folder
    if not budget:
        raise UsageError("give --budget once for each point, as --budget macs=50% --budget macs=30%")
    if training.test is None:
        raise UsageError("give --test: labelled batches to measure the accuracy of every point on")
    ranks = options.LearnedRanksOptions(**dataclasses.asdict(learned))
    ranks.check(training, budget, cost or [])
    from spectrim.cli import learning
    from spectrim.cli.origins import load_lines
    from spectrim.cli.preprocessing import tell_preprocessing
    from spectrim.cli.results import write_result
    from spectrim.cli.unfinished import make_folder
    from spectrim.network.files import write_text
    from spectrim.selection.point import Point
    from spectrim.train import budget_path

    fitted_to = options.InputOptions(points.data, None, points.mask, points.rows, points.positions)
    run = learning.RankRun(network, fitted_to, training, layers, ranks, budget, cost or ())
    make_folder(out, folder, ("path.json", "path.svg", "checkpoint/run.json"))
    work = learning.work(run)
    tell_preprocessing(out, work.references, work.dense)
    out.say(f"compressing {work.whose}")
    assert work.training is not None
    score = work.score(work.dense)
    checkpoint = folder / "checkpoint"
    run.folder(checkpoint).claim()
    out.left = f"the same call goes on with what is in {folder}"
    done_points: list[dict[str, Any]] = []
    found: dict[str, Any] = {"model": network.model, "dense": {"costs": {}, "accuracy": score}, "points": done_points}
    files = {"path": folder / "path.json", "figure": folder / "path.svg"}

    def done(result: LearnedResult) -> None:
        asked = budget[len(done_points)]
        written = write_result(result, folder / f"{len(done_points):02d}-{Point.folder_of(asked)}")
        names = {name: file.relative_to(folder).as_posix() for name, file in written.items()}
        done_points.append(_record(asked, result, work.score(result.model), names))
        found["dense"]["costs"] = dict(result.plan.dense_costs)
        write_text(files["path"], json.dumps(found, indent=1) + "\n")
        _draw(found, run.budgets[0].costs[0], files["figure"])
        point = done_points[-1]
        out.say(f"{asked}: {point['accuracy']:.2f} %, dense {score:.2f} %; {point['seconds']:.0f} s of training")

    budget_path(
        work.dense, work.training, run.budgets, calibration=work.calibration, checkpoint=checkpoint,
        latency=work.latency, progress=out.shows, done=done, mask=work.feed.layout.mask, **run.options(),
        **work.sampling.options,
    )  # fmt: skip
    out.document({**found, "folder": str(folder), "files": {name: str(file) for name, file in files.items()}})
    _print(out, found)
    for name, file in files.items():
        out.print(f"{name:6} {file}")
    last = done_points[-1]["files"]["model"]
    load = load_lines(network.model, work.dense, {"model": folder / last})
    out.code(f"Each point has a folder in {folder}. To load the last one in Python:", load)


def _record(asked: str, result: LearnedResult, accuracy: float, files: Mapping[str, str]) -> dict[str, Any]:
    """What is told of a point."""
    parts = [part for part in (result.learning, result.tuning) if part is not None]
    return {
        "asked": asked,
        "budget": dict(result.plan.budget),
        "costs": dict(result.plan.costs),
        "accuracy": accuracy,
        "rank_epochs": result.learning.epochs if result.learning is not None else 0,
        "c_steps": len(result.trajectory),
        "seconds": sum(part.seconds for part in parts),
        "files": dict(files),
    }


def _draw(found: Mapping[str, Any], cost: str, file: Path) -> None:
    from spectrim.report import Measured, cost_curve
    from spectrim.report.figures import write_figure

    networks = [Measured(p["asked"], p["costs"][cost], p["accuracy"]) for p in found["points"]]
    dense = Measured("dense", found["dense"]["costs"][cost], found["dense"]["accuracy"])
    write_figure(cost_curve(networks, dense, cost=cost), file)


def _print(out: Output, found: Mapping[str, Any]) -> None:
    from spectrim.report.charts import cost_text

    dense, points = found["dense"], found["points"]
    limited = {cost for point in points for cost in point["budget"]}
    shown = [cost for cost in dense["costs"] if cost in {"macs", "parameters", *limited}]

    def numbers(costs: Mapping[str, float]) -> list[str]:
        return [cost_text(cost, costs[cost]) for cost in shown]

    def cells(costs: Mapping[str, float]) -> list[str]:
        shares = (f"{costs[cost] / dense['costs'][cost]:>6.1%}" for cost in shown)
        return [f"{number} {share}" for number, share in zip(numbers(costs), shares, strict=True)]

    rows = [("dense", *numbers(dense["costs"]), f"{dense['accuracy']:.2f} %", "")]
    for point in points:
        change = f"{point['accuracy'] - dense['accuracy']:+.2f} points"
        rows.append((point["asked"], *cells(point["costs"]), f"{point['accuracy']:.2f} %", change))
    out.table(["", *(f">{_NAMES.get(cost, cost)}" for cost in shown), ">accuracy", ">change"], rows)
