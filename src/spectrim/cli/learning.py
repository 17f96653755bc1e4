"""Learned ranks on the command line: what was asked for, what it works on, and folders in which a run continues."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.cli.common import Output, usage
from spectrim.cli.costs import read_budget
from spectrim.cli.data import load_data
from spectrim.cli.models import load_model
from spectrim.cli.references import UsageError
from spectrim.cli.results import Outcome
from spectrim.cli.steps import device_named, first_batch, locate, training_batches
from spectrim.cost.latency import Latency
from spectrim.methods import WeightSVD
from spectrim.network.sites import Sites
from spectrim.preparation import prepare
from spectrim.report import accuracy, compare
from spectrim.selection.budget import COSTS, Budget
from spectrim.selection.selectors import lagrangian
from spectrim.tables import tabulate
from spectrim.train import LearnedResult, Recipe, Schedule, learn_ranks

METHOD = "learned-ranks"
# Parameters of ``spectrim compress`` that no other method has.
PARAMETERS = frozenset(
    {"rank_epochs", "rank_lr", "c_steps", "rank_energy", "multiplier", "cost", "checkpoint", "animate"}
)
_OPTIONS = {"model": "MODEL", "points": "--budget"}


@dataclass(frozen=True, kw_only=True)
class RankRun:
    """What the command line says about learning ranks. Two calls with equal records are one run.

    Attributes
    ----------
    model, weights, train, data
        References, as given.
    points
        One budget each, its limits joined by commas; empty if ``multiplier`` takes their place.
    multiplier, cost
        Loss that one unit of the cost is worth.
    rank_epochs, rank_lr, c_steps
        Of learning weights and ranks together.
    epochs, lr
        Of the fine-tuning afterwards.
    energy
        ``weight`` or ``output``.
    skip, only
        Patterns of layer names.
    multiple_of
        Of ranks.

    Raises
    ------
    UsageError
        For a value that cannot be used; the message quotes it.
    """

    model: str
    weights: Path | None
    train: str | None
    data: str | None
    points: tuple[str, ...]
    multiplier: float | None = None
    cost: str = "macs"
    rank_epochs: int
    rank_lr: float | None
    c_steps: int
    epochs: int
    lr: float | None
    energy: str
    skip: Sequence[str] | None
    only: Sequence[str] | None
    multiple_of: int | None

    def __post_init__(self) -> None:
        if self.train is None:
            raise UsageError("ranks are learned in training: give --train, batches with labels")
        if bool(self.points) == (self.multiplier is not None):
            raise UsageError("give either --budget (as macs=50%) or --multiplier (as 4e-9)")
        if self.energy not in ("weight", "output"):
            raise UsageError(f"--energy {self.energy!r} is not known; choose from weight, output")
        if self.cost not in COSTS:
            raise UsageError(f"--cost {self.cost!r} is not known; choose from {', '.join(COSTS)}")
        if self.multiplier is not None and not 0 < self.multiplier < float("inf"):
            raise UsageError(f"--multiplier {self.multiplier} must be a finite number above 0, as 4e-9")
        for option, lr in (("--rank-lr", self.rank_lr), ("--lr", self.lr)):
            with usage(option):
                Recipe(lr=lr)
        _ = self.budgets

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return tuple(read_budget([point]) for point in self.points)

    @property
    def timed(self) -> bool:
        """Whether latency has to be measured."""
        return self.cost == "latency" or any(budget.latency is not None for budget in self.budgets)

    def options(self) -> dict[str, Any]:
        """Arguments that :func:`spectrim.train.learn_ranks` and :func:`spectrim.train.budget_path` share."""
        given: dict[str, Any] = {}
        if self.multiplier is not None:
            given |= {"multiplier": self.multiplier, "cost": self.cost}
        if self.multiple_of is not None:
            given["methods"] = [WeightSVD(multiple_of=self.multiple_of)]
        return given | {
            "learning": Recipe(epochs=self.rank_epochs, lr=self.rank_lr),
            "tuning": Recipe(epochs=self.epochs, lr=self.lr),
            "schedule": spread(self.c_steps),
            "energy": self.energy,
            "skip": list(self.skip or ()),
            "only": list(self.only or ()),
        }

    def claim(self, folder: Path) -> None:
        """Make a folder of checkpoints this run's, or see that it is so already.

        Points may be added after those that are known, or left away at their end. A folder without a checkpoint is
        free for any run.

        Raises
        ------
        UsageError
            If the folder holds another run; the message names what differs.
        """
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{str(folder)!r} is not a folder; checkpoints of learned ranks are several files")
        file = folder / "run.json"
        now = json.loads(json.dumps(asdict(self), default=str))
        if file.exists() and any(folder.rglob("*.safetensors")):
            then = _read(file)
            known, points = then["points"], now["points"]
            shared = min(len(known), len(points))
            then["points"], now["points"] = known[:shared], points[:shared]
            changed = [
                f"{_OPTIONS.get(name, '--' + name.replace('_', '-'))} was {then.get(name)!r} and is {value!r}"
                for name, value in now.items()
                if then.get(name) != value
            ]
            if changed:
                raise UsageError(
                    f"{str(folder)!r} holds another run: {'; '.join(changed)}. Give the same options to continue it, "
                    "or another folder"
                )
            now["points"] = max(known, points, key=len)
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        os.replace(part, file)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{str(file)!r} is no JSON ({error}); give another folder") from error
    if not isinstance(found, dict) or not isinstance(found.get("points"), list):
        raise UsageError(f"{str(file)!r} is no record of a run; give another folder")
    return found


def spread(steps: int) -> Schedule:
    """The default schedule, its range of ``mu`` spread over another number of C steps."""
    usual = Schedule()
    if steps == 1:
        return dataclasses.replace(usual, steps=1)
    return dataclasses.replace(usual, steps=steps, factor=usual.factor ** ((usual.steps - 1) / (steps - 1)))


@dataclass(frozen=True)
class Work:
    """What a run works on.

    Attributes
    ----------
    dense
        The model.
    sites
        Where something may be chosen.
    training, calibration, testing
        Batches; without calibration some of the training batches are taken.
    example
        A batch as latency and memory are measured with.
    latency
        How time is measured; None if no budget asks for it.
    threads
        As given.
    """

    dense: nn.Module
    sites: Sites
    training: Iterable[Any]
    calibration: Iterable[Any] | None
    testing: Iterable[Any] | None
    example: Any
    latency: Latency | None
    threads: int | None

    @classmethod
    def load(cls, run: RankRun, test: str | None, *, batch: int, threads: int | None, device: str) -> Work:
        """Load what a command line names.

        Raises
        ------
        UsageError
            If something cannot be used; the message quotes it.
        """
        device = device_named(device, threads)
        dense = load_model(run.model, run.weights).to(device)
        sites = locate(dense, run.skip, run.only)
        training = training_batches(str(run.train), device)
        calibration = load_data(run.data, purpose="calibration", device=device) if run.data is not None else None
        testing = load_data(test, purpose="test", device=device) if test is not None else None
        example = first_batch(training if calibration is None else calibration, batch, str(run.data or run.train))
        clock = Latency(device=device, batch=batch) if run.timed else None
        return cls(dense, sites, training, calibration, testing, example, clock, threads)

    def score(self, model: nn.Module) -> float:
        """Percent of the test samples.

        Raises
        ------
        UsageError
            For batches without labels.
        """
        assert self.testing is not None
        with usage("--test"):
            return accuracy(model, self.testing)

    def see_reachable(self, run: RankRun) -> None:
        """See that every budget can be met, before anything is trained. Milliseconds are not looked at.

        Raises
        ------
        InfeasibleBudgetError
            For the first that cannot.
        """
        counted = [b.replace(latency=None) for b in run.budgets if set(b.costs) != {"latency"}]
        if counted:
            known = prepare(self.dense, self.sites, [self.example], statistics=False, sensitivity=False)
            table = tabulate(known.sites, [WeightSVD(multiple_of=run.multiple_of)])
            for budget in counted:
                lagrangian(table, budget)


def compress(
    out: Output,
    run: RankRun,
    work: Work,
    folder: Path,
    *,
    checkpoint: Path | None,
    report: bool,
    animate: bool,
) -> None:
    """``spectrim compress --method learned-ranks``, once everything is loaded."""
    scores = [("dense", work.score(work.dense))] if work.testing is not None else []
    work.see_reachable(run)
    if checkpoint is not None:
        run.claim(checkpoint)
    result = learn_ranks(
        work.dense, work.training, run.budgets[0] if run.points else None, calibration=work.calibration,
        checkpoint=checkpoint, latency=work.latency, progress=False if out.quiet else None, **run.options(),
    )  # fmt: skip
    if scores:
        scores.append(("learned ranks", work.score(result.model)))
    outcome = Outcome(run.model, work.dense, result, folder, tuple(scores), (sentence(result, run),))
    comparison = compare(
        work.dense, result.model, work.example, evaluate=outcome.known_score if scores else None, threads=work.threads
    )
    outcome.finish(out, comparison, report=report, animate=animate)


def sentence(result: LearnedResult, run: RankRun) -> str:
    """How a network was trained."""
    learning, tuning = result.learning, result.tuning
    if learning is None:
        parts = ["Ranks chosen once, without learning"]
    else:
        early = learning.epochs < run.rank_epochs
        epochs = f"{learning.epochs} epochs" + (f" of {run.rank_epochs}, until they settled," if early else "")
        steps = len(result.trajectory)
        parts = [f"Ranks learned for {epochs} with {steps} C steps in {learning.seconds:.0f} s"]
    if tuning is not None:
        parts.append(f"fine-tuned for {tuning.epochs} epochs in {tuning.seconds:.0f} s")
    return ", then ".join(parts) + (", with the dense model as teacher." if learning or tuning else ".")
