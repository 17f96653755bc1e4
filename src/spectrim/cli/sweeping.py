"""``spectrim sweep``, when the command line has been read."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from spectrim.cli.common import Output
from spectrim.cli.filters import with_channels
from spectrim.cli.methods import Methods
from spectrim.cli.options import (
    STEPS,
    InputOptions,
    LayerOptions,
    NetworkOptions,
    SharingOptions,
    TrainingOptions,
)
from spectrim.cli.origins import load_lines, origin_parts
from spectrim.cli.preprocessing import tell_preprocessing
from spectrim.cli.shrinking import SELECTOR_OF
from spectrim.cli.steps import check_patterns, prepared, wanted_groups
from spectrim.cli.subject import Subject
from spectrim.nn.checkpoint import check_savable
from spectrim.pipeline.making import Making
from spectrim.report import Origin, SweepPage
from spectrim.report.figures import write_figure
from spectrim.selection.budget import Budget
from spectrim.selection.front import Sweep
from spectrim.selection.point import Point
from spectrim.train import Sweeping, fine_tune

if TYPE_CHECKING:
    from spectrim.cli.sweep import SizeOptions, SweepFileOptions

_HOLDS = {
    "sweep": "what was swept, and what could not be met",
    "run": "what makes the sweep: the same call goes on with it",
    "figure": "the front as a picture",
    "report": "the same for people: open it in a browser",
    "point": "of each network: what it costs and how good it is",
    "plan": "what was chosen for every layer; compress --plan carries it out",
    "model": "the compressed network: weights and plan",
}
"""What files are for."""


@dataclass(frozen=True)
class SweepRequest:
    """What the command line asks for."""

    network: NetworkOptions
    sizes: SizeOptions
    inputs: InputOptions
    methods: Methods
    training: TrainingOptions
    layers: LayerOptions
    sharing: SharingOptions
    files: SweepFileOptions
    asked: Mapping[str, Budget]  # budgets, by what they say in words
    costs: Mapping[str, Callable[[Any], float]]  # functions of layers of the user's own, by the cost

    @property
    def limited(self) -> set[str]:
        """The costs that budgets limit."""
        return {cost for budget in self.asked.values() for cost in budget.costs}

    @property
    def timed(self) -> bool:
        """Whether networks are timed."""
        return self.sizes.latency or self.sizes.guard or "latency" in self.limited

    @property
    def record(self) -> dict[str, Any]:
        """What makes the sweep, by the option that says it."""
        parts: list[Any] = [self.inputs, self.layers, self.sharing]
        if self.training.train is not None:
            parts.append(dataclasses.replace(self.training, test=None))
        found = {"method": [each.text for each in self.methods.asked], "model": self.network.model}
        for part in parts:
            found |= dataclasses.asdict(part)
        found |= {"selector": self.sizes.selector, "guard": self.sizes.guard, "cost": self.sizes.own}
        found["runtime"] = self.network.runtime
        if self.timed:
            found |= {name: getattr(self.network, name) for name in ("device", "threads", "batch")}
        return {f"--{name.replace('_', '-')}": value for name, value in found.items() if name != "test"}

    def carry_out(self, out: Output) -> None:
        """Make or read every point, write the files, print the table or the document."""
        groups = wanted_groups(self.sharing, self.methods, self.limited)
        tuning = self.training.recipe(STEPS)
        methods = self.methods.chosen(True, multiple_of=self.layers.multiple_of, share=groups is not False)
        work = Subject.load(self.network, self.layers, self.inputs, self.training, timed=self.timed)
        check_patterns(methods, work.sites)
        if self.files.models:
            check_savable(work.dense)
        out.say(f"sweeping {work.whose}")
        different = tell_preprocessing(out, work.references, work.dense)
        folder = self.files.folder
        out.left = f"the points that are done are in {folder}; the same call goes on with the others"

        def tune(small: nn.Module, file: Path | None) -> None:
            assert work.training is not None
            fine_tune(small, work.training, teacher=work.dense, recipe=tuning, progress=out.shows, checkpoint=file)

        def ready() -> Any:
            sites = work.sites
            if any(method.removes_channels for method in methods):
                sites = with_channels(work.dense, sites, work.example)
            return prepared(out, work, sites, groups, weigh=True)

        with out.progress() as progress:
            making = Making(
                methods, guard=self.sizes.guard, costs=self.costs, selector=SELECTOR_OF[self.sizes.selector],
                forward=work.feed, progress=progress,
            )  # fmt: skip
            found = Sweeping(
                work.dense, ready, making=making, evaluate=work.score if work.testing is not None else None,
                metric="accuracy", fine_tune=tune if work.training is not None else None, timed=self.timed,
                folder=folder, keep_models=self.files.models, options=self.record, calibration=work.calibration or (),
                done=functools.partial(_told, out),
            ).sweep(self.asked)  # fmt: skip
        self._finish(out, found, work, different)

    def _finish(self, out: Output, found: Sweep, work: Subject, notes: tuple[str, ...]) -> None:
        folder, model = self.files.folder, self.network.model
        files = {"sweep": folder / "sweep.json", "run": folder / "run.json"}
        smallest = folder / found.front()[-1].folder if found.front() else folder
        kept = self.files.models
        again = shlex.join(["spectrim", "compress", model, *(
            ["-w", str(self.network.weights)] if self.network.weights is not None else []
        ), "-d", str(self.inputs.data), "--plan", str(smallest / "plan.json")])  # fmt: skip
        if kept:
            again = load_lines(model, work.dense, {"model": smallest / "model.safetensors"})
        if self.files.report:
            files |= {"figure": folder / "sweep.svg", "report": folder / "sweep.html"}
            draw(found, files["figure"])
            origin = Origin(parts=tuple(origin_parts(work.named, work.dense)), load=again)
            SweepPage(model, found, notes, origin=origin).write(files["report"])
        rows = [
            {**row, "folder": str(folder / point.folder), "notes": list(point.notes)}
            for row, point in zip(found.rows(), found, strict=True)
        ]
        out.document(
            {
                "model": model, "folder": str(folder), "files": {n: str(path) for n, path in files.items()},
                "cost": found.cost, "judged_by": found.judged_by, "unit": found.judged_in, "dense": found.dense,
                "points": rows,
                "unmet": dict(found.unmet), "notes": [*found.sentences, *notes],
            }
        )  # fmt: skip
        out.table(*found.table())
        for note in (*found.sentences, *notes):
            out.prose(note)
        out.prose("* on the front: no other network is as cheap and as good; % of the dense network")
        told = {path.name: _HOLDS[name] for name, path in files.items()} | {"*/point.json": _HOLDS["point"]}
        told |= {"*/plan.json": _HOLDS["plan"]} | ({"*/model.safetensors": _HOLDS["model"]} if kept else {})
        out.written(folder, told)
        out.code("To load the smallest network of the front:" if kept else "To carry out that network:", again)


def draw(found: Sweep, file: Path) -> None:
    """The front as SVG, whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    found.plot(ax=figure.subplots())
    write_figure(figure, file)


def _told(out: Output, point: Point, sweep: Sweep) -> None:
    """Say what a point has come to."""
    judged = ", fine-tuned" if point.tuned is not None else ""
    told = zip(sweep.measures, sweep.texts(point.judged), strict=True)
    out.say(f"{point.asked}: {', '.join(f'{name} {text}' for name, text in told)}{judged}")
