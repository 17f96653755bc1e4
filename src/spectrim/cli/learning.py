"""Learned ranks on the command line: what was asked for, what it works on, and folders in which a run continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spectrim.cli.common import Output, usage
from spectrim.cli.options import (
    FileOptions,
    InputOptions,
    LayerOptions,
    LearnedRanksOptions,
    NetworkOptions,
    TrainingOptions,
)
from spectrim.cli.preprocessing import tell_preprocessing
from spectrim.cli.results import Outcome
from spectrim.cli.subject import Subject
from spectrim.cli.unfinished import UNFINISHED, RunFolder, make_folder
from spectrim.cli.values import read_budget, read_costs
from spectrim.methods import ActivationSVD, WeightSVD
from spectrim.network.printing import count
from spectrim.preparation import prepare
from spectrim.selection.budget import Budget
from spectrim.selection.selectors import check_reachable
from spectrim.tables import tabulate
from spectrim.train import LearnedResult, Recipe, Schedule, learn_ranks

# Options as they are written, where that is not ``--`` and the name of the field.
_OPTIONS = {"model": "MODEL", "points": "--budget", "costs": "--cost"} | {
    field.name: field.name for field in dataclasses.fields(LearnedRanksOptions)
}


@dataclass(frozen=True)
class RankRun:
    """What the command line says about learning ranks. Two calls with equal records are one run."""

    network: NetworkOptions
    inputs: InputOptions
    training: TrainingOptions
    layers: LayerOptions
    learned: LearnedRanksOptions
    points: Sequence[str]  # one budget each, its limits joined by commas; empty if a multiplier takes their place
    costs: Sequence[str] = ()  # of the user's own, as ``--cost`` takes them

    def __post_init__(self) -> None:
        _ = self.budgets, self.options()

    @property
    def record(self) -> dict[str, Any]:
        """What makes the run."""
        training = {name: value for name, value in asdict(self.training).items() if name != "test"}
        files = {"model": self.network.model, "weights": self.network.weights, **asdict(self.inputs)}
        asked = {"points": self.points, "costs": self.costs}
        return {**files, **training, **asked, **asdict(self.learned), **asdict(self.layers)}

    @property
    def functions(self) -> dict[str, Callable[[Any], float]]:
        """The costs of the user's own, by name."""
        return read_costs(self.costs)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return tuple(read_budget([point], self.functions) for point in self.points)

    @property
    def timed(self) -> bool:
        """Whether latency has to be measured."""
        return self.learned.cost == "latency" or any(budget.latency is not None for budget in self.budgets)

    def options(self) -> dict[str, Any]:
        """Arguments that :func:`spectrim.train.learn_ranks` and :func:`spectrim.train.budget_path` share."""
        learned, layers = self.learned, self.layers
        given: dict[str, Any] = {"costs": self.functions} if self.costs else {}
        if learned.multiplier is not None:
            given |= {"multiplier": learned.multiplier, "cost": learned.cost}
        if learned.energy is not None:
            given["energy"] = learned.energy
        if layers.multiple_of is not None:
            by_weight = learned.energy == "weight" or learned.multiplier is not None
            given["methods"] = [(WeightSVD if by_weight else ActivationSVD)(multiple_of=layers.multiple_of)]
        with usage("rank_lr"):
            learning = Recipe(epochs=learned.rank_epochs, lr=learned.rank_lr)
        return given | {
            "learning": learning,
            "tuning": self.training.recipe(),
            "schedule": spread_schedule(learned.c_steps),
            "skip": list(layers.skip or ()),
            "only": list(layers.only or ()),
        }

    def folder(self, folder: Path) -> RunFolder:
        """A folder of checkpoints of this run. Points may be added after those that are known, or left away there."""
        return RunFolder(folder, self.record, _OPTIONS, {"costs": [], **asdict(InputOptions())}, ("points",))


def spread_schedule(steps: int) -> Schedule:
    """The default schedule, its range of ``mu`` spread over another number of C steps."""
    usual = Schedule()
    if steps == 1:
        return dataclasses.replace(usual, steps=1)
    return dataclasses.replace(usual, steps=steps, factor=usual.factor ** ((usual.steps - 1) / (steps - 1)))


def work(run: RankRun) -> Subject:
    """Load what a run works on, and see that every budget can be met before anything is trained.

    Milliseconds are not looked at.
    """
    found = Subject.load(run.network, run.layers, run.inputs, run.training, timed=run.timed)
    known = prepare(found.dense, found.sites, [found.example], statistics=False, sensitivity=False)
    table = tabulate(known.sites, [WeightSVD(multiple_of=run.layers.multiple_of)], costs=run.functions)
    check_reachable(table, run.budgets)
    return found


def compress_by_learning(out: Output, run: RankRun, files: FileOptions) -> None:
    """``spectrim compress --method learned-ranks``, when the command line has been read."""
    folder = make_folder(out, files.folder)
    on = work(run)
    assert on.training is not None
    out.say(f"compressing {on.whose}")
    different = tell_preprocessing(out, on.references, on.dense)
    scores = [("dense", on.score(on.dense))] if on.testing is not None else []
    held = run.folder(files.checkpoint or folder / UNFINISHED)
    held.claim()
    out.left = f"the same call goes on with the training that is kept in {held.folder}"
    result = learn_ranks(
        on.dense, on.training, run.budgets[0] if run.points else None, calibration=on.calibration,
        checkpoint=held.folder, latency=on.latency, progress=out.shows, mask=on.feed.layout.mask, **run.options(),
        **on.sampling.options,
    )  # fmt: skip
    if scores:
        scores.append(("learned ranks", on.score(result.model)))
    outcome = Outcome(
        on.network.model, on.dense, result, folder, on.named, tuple(scores),
        (training_sentence(result, run), *different), {"training": run.training.recipe().seed},
    )  # fmt: skip
    outcome, comparison = outcome.compared(on)
    outcome.finish(out, comparison, report=files.report, animate=files.animate, weights=on.whose)
    if files.checkpoint is None:
        held.remove()


def training_sentence(result: LearnedResult, run: RankRun) -> str:
    """How a network was trained."""
    learning, tuning = result.learning, result.tuning
    if learning is None:
        parts = ["Ranks chosen once, without learning"]
    else:
        early = learning.epochs < run.learned.rank_epochs
        epochs = count(learning.epochs, "epoch") + (
            f" of {run.learned.rank_epochs}, until they settled," if early else ""
        )
        steps = len(result.trajectory)
        parts = [f"Ranks learned for {epochs} in {learning.seconds:.0f} s, chosen anew {steps} times (C steps)"]
    if tuning is not None:
        parts.append(f"fine-tuned for {count(tuning.epochs, 'epoch')} in {tuning.seconds:.0f} s")
    return ", then ".join(parts) + (", with the dense model as teacher." if learning or tuning else ".")
