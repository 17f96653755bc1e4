"""What calls that learn ranks have in common: one run, and what comes of each of its budgets."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.cost.latency import Latency
from spectrim.errors import CheckpointError, did_you_mean
from spectrim.network.printing import Grid, count
from spectrim.nn.find import Which, check_loaded
from spectrim.nn.modes import check_trainable
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.nesting import begun
from spectrim.nn.watch.sampling import Sampling
from spectrim.pipeline import Result, reported
from spectrim.preparation import Prepared, check_options, locate, prepare
from spectrim.progress import reporting
from spectrim.selection.budget import Budget
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import check_reachable
from spectrim.selection.trajectory import Trajectory
from spectrim.train import randomness
from spectrim.train.batches import epoch_length
from spectrim.train.devices import assign
from spectrim.train.learned_ranks import LearnedRanks
from spectrim.train.loop import Evaluate, Loop
from spectrim.train.objective import Objective, check_teacher
from spectrim.train.one_shot import Candidate, better, loss_of, one_shot
from spectrim.train.recipe import Recipe
from spectrim.train.result import TrainingResult
from spectrim.train.schedule import Schedule

# Samples taken from the training batches where no calibration batches are given.
_SAMPLES = 2048
# Distance of weights and low-rank copies at which learning may end.
_CLOSE = 0.05


@dataclass(frozen=True, repr=False)
class LearnedResult(Result):
    """What :func:`learn_ranks` returns.

    Attributes
    ----------
    model, plan, report, candidates, sites
        As of :class:`spectrim.Result`; the model is trained already, and the report tells how far its outputs agree
        with those of the model that was given, on calibration samples, which were trained on. The sites hold weights as
        they were learned, which the given model has not: another plan is carried out on a network that has them.
    trajectory
        Ranks after every C step.
    learning, tuning
        The training of the dense network, and that of the factored one; None for no epochs.
    """

    trajectory: Trajectory = field(default_factory=lambda: Trajectory((), (), {}))
    learning: TrainingResult | None = None
    tuning: TrainingResult | None = None

    def _grid(self) -> Grid:
        grid = super()._grid()
        steps = [f"ranks learned in {count(len(self.trajectory), 'C step')}, see result.trajectory"]
        parts = {"trained with the penalty": self.learning, "fine-tuned": self.tuning}
        steps += [
            f"{what}: {count(part.epochs, 'epoch')} in {part.seconds:.0f} s"
            for what, part in parts.items()
            if part is not None
        ]
        return replace(grid, notes=(*steps, *grid.notes))


@dataclass(kw_only=True)
class LearningRun:
    """What does not change from one budget to the next: parameters of :func:`learn_ranks`, and those of its trainings.

    Without a teacher and a loss the model is the teacher; an iterator of calibration batches becomes a list.
    """

    model: nn.Module = field(kw_only=False)
    batches: Iterable[Any] = field(kw_only=False)
    calibration: Iterable[Any] | None
    learning: Recipe
    tuning: Recipe
    patience: int | None
    weigh: bool
    skip: Which | Iterable[Which]
    only: Which | Iterable[Which]
    groups: bool | Mapping[str, Sequence[str]]
    sampling: Sampling
    feed: Feed
    evaluate: Evaluate | None
    latency: Latency | None
    training: dict[str, Any]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        check_loaded(self.model)
        check_options(self.groups, self.latency)
        check_teacher(self.training["teacher"])
        known = [
            name for name in inspect.signature(LearnedRanks).parameters if name not in ("model", "sites", "budget")
        ]
        if unknown := [name for name in self.options if name not in known]:
            if unknown[0] in (each.name for each in fields(Recipe)):
                said = f"{unknown[0]}={self.options[unknown[0]]!r}"
                raise TypeError(f"{said} is of a training: write learning=Recipe({said}), or tuning=Recipe({said})")
            close = did_you_mean(unknown[0], known) or f" Options beside its own are {', '.join(known)}"
            raise TypeError(f"learning ranks has no option {unknown[0]!r}.{close}")
        if self.training["teacher"] is None and self.training["loss"] is None:
            self.training["teacher"] = self.model
        seed = self.learning.seed
        if self.calibration is None:
            self.calibration = self._first(seed)
        # iter() would do to tell an iterator, but a DataLoader draws a number from the global generator for it.
        if hasattr(self.calibration, "__next__"):
            with randomness.seeded(seed):
                self.calibration = list(self.calibration)

    def point(
        self, net: nn.Module, budget: Budget | None, folder: Path | None, number: int = 0, left: Sequence[Budget] = ()
    ) -> LearnedResult:
        """Learn one budget on ``net``, in place, and fine-tune what comes of it.

        ``number`` counts the budgets; those that are ``left`` are seen to be in reach before anything is trained.
        """
        learning, tuning = self.learning, self.tuning
        planned = folder is not None and learning.epochs and (folder / "plan.json").exists()
        if folder is not None and planned and not (folder / "learning.safetensors").exists():
            raise CheckpointError(
                f"{folder}: holds the plan.json of a run without its learning.safetensors. Delete it to start again"
            )
        # What is kept of a C step must be where training will take place.
        net.to(assign(net, self.training["accelerate"]).device)
        # Calibration batches may be drawn from the generators, too.
        with randomness.seeded(learning.seed, self.calibration):
            known, ranks = self._ranks(net, budget)
            check_reachable(ranks.candidates, left)
            # Of the weights as they are now. What is measured would not come out alike in a call that goes on.
            other = None
            if learning.epochs and budget is not None and budget.latency is None:
                options = (self.options.get("methods"), self.options.get("costs"))
                other = one_shot(net, known, budget, *options, self.feed)
        # Every training goes on counting epochs and seeds, so that none repeats the orders of the one before.
        epoch = number * (learning.epochs + tuning.epochs)
        learned = tuned = None
        if learning.epochs:
            loop = self._loop(net, learning, epoch, folder, "learning", penalty=ranks, after_step=ranks.after_step)
            while loop.epoch < learning.epochs and not _settled(ranks.trajectory, self.patience):
                loop.run(until=loop.epoch + 1)
            learned = loop.result()
        with randomness.seeded(learning.seed, self.calibration):
            found, said = better(self._finished(ranks, folder), other, self._lost)
        small = found.applied.model
        if tuning.epochs:
            epoch += learning.epochs
            tuned = self._loop(small, tuning, epoch, folder, "tuning", evaluate=self.evaluate).run()
        with randomness.seeded(learning.seed, self.calibration):
            report = reported(
                self.model, small, found.sites, found.plan, found.applied, self.calibration,
                sampling=self.sampling, forward=self.feed, notes=said, trained=True,
            )  # fmt: skip
        return LearnedResult(small, found.plan, report, found.table, found.sites, ranks.trajectory, learned, tuned)

    def _lost(self, model: nn.Module) -> float:
        """What is lost with a network before it is fine-tuned."""
        assert self.calibration is not None
        recipe, training = self.tuning, self.training
        objective = Objective(training["loss"], training["teacher"], recipe.distillation, recipe.precision)
        return loss_of(
            model, self.calibration, objective, lambda b: self.feed.decide(self.model, b).layout.size(b), self.evaluate
        )

    def _first(self, seed: int) -> list[Any]:
        """Training batches up to a number of samples, for calibration: the same ones in every call with one seed."""
        batches, samples = [], 0
        with randomness.seeded(seed, self.batches):
            for batch in self.batches:
                batches.append(batch)
                samples += self.feed.decide(self.model, batch).layout.size(batch)
                if samples >= _SAMPLES:
                    break
        return batches

    def _finished(self, ranks: LearnedRanks, folder: Path | None) -> Candidate:
        """The factored network; its plan is kept, since one made by measuring comes out differently another time."""
        kept, plan = None if folder is None else folder / "plan.json", None
        if kept is not None and kept.exists():
            plan, asked = Plan.read(kept), ranks.trajectory.budget
            # A limit in time is a share of what was measured, which differs from one process to the next.
            same = all(name == "latency" or math.isclose(asked[name], plan.budget.get(name, 0.0)) for name in asked)
            if plan.budget.keys() != asked.keys() or not same:
                raise CheckpointError(
                    f"{kept}: a plan within {dict(plan.budget)}, but the budget is {dict(asked)}. Delete the folder "
                    "to start again"
                )
        _, chosen = ranks.finish(self.calibration, plan=plan, forward=self.feed, **self.sampling.options)
        if kept is not None and plan is None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            chosen.write(kept)
        assert ranks.applied is not None
        return Candidate(ranks.applied, chosen, ranks.candidates, ranks.fitted)

    def _loop(self, model: nn.Module, recipe: Recipe, epoch: int, folder: Path | None, name: str, **hooks: Any) -> Loop:
        recipe = replace(recipe, seed=recipe.seed + epoch)
        path = None if folder is None else folder / f"{name}.safetensors"
        return Loop(model, self.batches, recipe, checkpoint=path, first_epoch=epoch, **hooks, **self.training)

    def _ranks(self, net: nn.Module, budget: Budget | None) -> tuple[Prepared, LearnedRanks]:
        """The network as it is prepared, and a run that begins with it."""
        assert self.calibration is not None
        sites = locate(net, self.calibration, skip=self.skip, only=self.only, parts=True, forward=self.feed)
        with reporting(self.training["progress"]) as report:
            prepared = prepare(
                net, sites, self.calibration, sensitivity=self.weigh, groups=self.groups,
                sampling=self.sampling, progress=report, forward=self.feed,
                latency=self.latency or (budget is not None and budget.latency is not None),
                dense_latency=self.options.get("dense_latency"),
            )  # fmt: skip
        check_trainable(net, prepared.sites, begun(self.calibration)[0], self.feed)
        schedule = self.options.get("schedule") or Schedule()
        total = self.learning.epochs * (epoch_length(self.batches, needed=True) or 0)
        # The last C step is due after the last batch.
        every = max(1.0, total / max(1, schedule.steps - 1))
        timing = {"latency": prepared.latency, "dense_latency": prepared.dense_latency}
        by_data = budget is not None and self.options.get("normalize", True)
        energy = "output" if by_data and all(site.statistics for site in prepared.sites) else "weight"
        options = {"energy": energy, **self.options, **timing}
        ranks = LearnedRanks(net, prepared.sites, budget, every=every, **options)
        ranks.whole_file = True
        return prepared, ranks


def _settled(trajectory: Trajectory, patience: int | None) -> bool:
    if patience is None or not trajectory.records:
        return False
    return trajectory.settled >= patience and trajectory.records[-1].distance <= _CLOSE
