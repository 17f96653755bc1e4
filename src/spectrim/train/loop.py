"""The training loop. Its whole state can be written at any step and continued bit for bit."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from spectrim.errors import CheckpointError
from spectrim.network.file_kinds import path_of
from spectrim.network.files import changed_values
from spectrim.nn.agreement import metric_of
from spectrim.nn.contiguity import contiguous_where_needed
from spectrim.nn.parameters import modes_kept
from spectrim.nn.sparse.layers import Masked
from spectrim.nn.watch.chance import draws_kept
from spectrim.nn.watch.norms import batch_norms
from spectrim.nn.watch.state import cut_graphs
from spectrim.progress import Update, training_bar
from spectrim.train import batches as batching
from spectrim.train import faults, randomness, resume
from spectrim.train.devices import assign
from spectrim.train.objective import Loss, Objective, check_teacher
from spectrim.train.penalties import add_product_decay, factored_pairs
from spectrim.train.recipe import Recipe, parameter_groups
from spectrim.train.result import EpochRecord, TrainingResult

log = logging.getLogger(__name__)
# A loss that ends so many times above where it began is worse by more than chance.
_WORSE = 5.0

Evaluate = Callable[[nn.Module], float]


class Loop:
    """A training run that can be stopped between epochs and continued.

    The arguments are those of :func:`fine_tune`, and ``first_epoch``, the number that ``set_epoch`` of the data gets in
    the first epoch: a run that follows another one goes on counting, and sees other orders.

    ``run(until=5)`` followed by ``run()`` gives the weights of one ``run()``; in between, the model may be looked at
    and :attr:`penalty` changed. A resumed loop skips what is done, so the code around it needs no case for resuming.

    Attributes
    ----------
    penalty, after_step
        The hooks, free to change between two calls of :meth:`run`.
    epoch, step
        What is done.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        recipe: Recipe,
        *,
        teacher: nn.Module | None = None,
        loss: Loss | None = None,
        evaluate: Evaluate | None = None,
        checkpoint: str | Path | None = None,
        penalty: Callable[[nn.Module], Tensor] | None = None,
        after_step: Callable[[nn.Module], None] | None = None,
        progress: bool | None = None,
        accelerate: bool | None = None,
        first_epoch: int = 0,
    ) -> None:
        if recipe.keep == "best" and evaluate is None:
            raise ValueError("keep='best' needs evaluate=, a function of the model to a number where higher is better")
        check_teacher(teacher)
        if teacher is model:
            raise ValueError("the teacher is the model itself; pass a copy made before the compression")
        self.model, self.batches, self.recipe = model, batches, recipe
        self.evaluate, self.penalty, self.after_step = evaluate, penalty, after_step
        self.checkpoint = None if checkpoint is None else path_of(checkpoint, "checkpoint")
        self.progress, self.first_epoch = progress, first_epoch
        self.steps_per_epoch = batching.epoch_length(
            batches, needed=recipe.schedule != "constant" or bool(recipe.warmup)
        )
        self.devices = assign(model, accelerate)
        if self.devices.count > 1 and isinstance(getattr(batches, "sampler", None), DistributedSampler):
            raise ValueError(
                "batches are sharded already by a DistributedSampler; pass the plain DataLoader, each of the "
                f"{self.devices.count} processes does its part of every batch"
            )
        self._channels_last = recipe.memory_format == "channels_last"
        model.to(self.devices.device)
        if self._channels_last:
            cast(Any, model).to(memory_format=torch.channels_last)
        # Gradients of several processes are averaged in the strides that the weights have now.
        with contiguous_where_needed(model):
            self._wrapped = self.devices.wrap(model)
        self._objective = Objective(loss, teacher, recipe.distillation, recipe.precision)
        self._pairs = factored_pairs(model) if recipe.decay_product and recipe.weight_decay else ()
        self._optimizer = self._made_optimizer()
        self._base_lr = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._masked = self._mixed()
        self._decoupled = bool(self._optimizer.defaults.get("decoupled_weight_decay", False))

        # As a checkpoint says it.
        self._done = resume.CheckpointRecord({}, 0, 0, 0, 0.0, (), (None, None), resume.OptimizerRecord({}, []))
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.devices.device)
        self._first: Tensor | None = None  # the loss of the first batch, before any step
        self._best: dict[str, Tensor] = {}
        with randomness.seeded(recipe.seed):
            self._random = self._epoch_random = randomness.capture()
        if self.checkpoint is not None:
            self._done.start = resume.magnitudes(resume.model_tensors(model))
            if self.checkpoint.exists():
                self._resume(self.checkpoint)

    @property
    def epoch(self) -> int:
        return self._done.epoch

    @property
    def step(self) -> int:
        return self._done.step

    def _made_optimizer(self) -> torch.optim.Optimizer:
        """The recipe's optimizer, at its rate of learning; weights of pairs whose product decays have a group apart."""
        apart = [parameter for pair in self._pairs for parameter in pair.parameters]
        optimizer = self.recipe.make_optimizer(parameter_groups(self.model, self.recipe.weight_decay, apart))
        if self.recipe.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr
        return optimizer

    def _mixed(self) -> list[Masked]:
        """Layers whose zeros a step may fill: one of an optimizer of the user's, which may mix the entries of a weight.

        Steps of the library's two leave a weight of zero without a gradient at zero.
        """
        if isinstance(self.recipe.optimizer, str):
            return []
        return [module for module in self.model.modules() if isinstance(module, Masked)]

    def run(self, until: int | None = None) -> TrainingResult:
        """Train until ``until`` epochs are done in all; None is the recipe's number.

        Raises
        ------
        ValueError
            If ``until`` exceeds the epochs of the recipe, which the learning rate is planned for.
        """
        until = self.recipe.epochs if until is None else until
        if until > self.recipe.epochs:
            raise ValueError(f"until={until} exceeds the {self.recipe.epochs} epochs of the recipe")
        total = None if self.steps_per_epoch is None else until * self.steps_per_epoch
        if self.checkpoint is not None and self.devices.main and self.epoch < until:
            resume.check_checkpoint_place(self.checkpoint)
        shown = self.progress if self.devices.main else False
        with self._ready(), training_bar(total, done=self.step, shown=shown) as update:
            while self.epoch < until:
                before = {name: t.detach().clone() for name, t in resume.model_tensors(self.model).items()}
                try:
                    self._run_epoch(update)
                    self._check_finite(resume.spoiled(self.model, before))
                    self._finish_epoch()
                except FloatingPointError:
                    resume.copy_tensors(self.model, before, "the weights of before the epoch")
                    raise
        if self.epoch == self.recipe.epochs and self.recipe.keep == "best" and self._best:
            resume.copy_tensors(self.model, self._best, "the best weights")
        elif self._first is not None and self.penalty is None:
            self._tell_if_worse(float(self._first), self._done.history[-1].loss)
        return self.result()

    def result(self) -> TrainingResult:
        """What was reached so far."""
        done = self._done
        return TrainingResult(done.history, *done.best, done.epoch, done.step, done.seconds)

    def _run_epoch(self, update: Update) -> None:
        here, done = self._random, self._done
        if done.batch:
            randomness.restore(self._epoch_random, self.batches)
        else:
            self._epoch_random = randomness.capture(self.batches)
        for owner in (self.batches, getattr(self.batches, "dataset", None), getattr(self.batches, "sampler", None)):
            if hasattr(owner, "set_epoch"):
                cast(Any, owner).set_epoch(self.first_epoch + self.epoch)
        iterator = iter(self.batches)
        if done.batch:
            self._skip(iterator)
            randomness.restore(here, self.batches)
        for batch in iterator:
            self._train_on(batch)
            every = self.recipe.checkpoint_every
            if every and self.step % every == 0:
                self._check_finite()
                self._save()
            update(self.step, f"epoch {self.epoch + 1}")
        if not done.batch:
            raise ValueError(
                f"batches gave nothing in epoch {self.epoch + 1}. It must be iterable again for every epoch, as a list "
                "or a DataLoader is and a generator is not"
            )

    def _train_on(self, batch: Any) -> None:
        recipe = self.recipe
        batch, share = batching.part(batch, self.devices.index, self.devices.count)
        inputs, targets = batching.split(batching.place(batch, self.devices.device, self._channels_last))
        total = self.steps_per_epoch * recipe.epochs if self.steps_per_epoch else 0
        factor = recipe.lr_factor(self.step, total) if total else 1.0
        for group, base in zip(self._optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * factor
        loss = self._objective(self._wrapped, inputs, targets) * share
        self._loss_sum += loss.detach()
        if self.step == 0:
            self._first = loss.detach()
        faults.backward(loss, self.model, lambda: self._objective(self._wrapped, inputs, targets))
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        if self.penalty is not None and (penalty := self.penalty(self.model)).requires_grad:
            self._add_gradients(penalty)
        rate = self._optimizer.param_groups[0]["lr"] if self._decoupled else 1.0
        add_product_decay(self._pairs, recipe.weight_decay * rate, shrink=self._decoupled)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for layer in self._masked:
            layer.settle()
        if self.after_step is not None:
            try:
                self.after_step(self.model)
            except FloatingPointError:
                if self._first is not None and not bool(self._first.isfinite()):
                    self._check_finite()  # the loss is at fault, and not the weights that come of it
                raise
        self._done.step += 1
        self._done.batch += 1

    def _add_gradients(self, penalty: Tensor) -> None:
        """Those of the penalty, whatever the norm of the loss's: it is to hold the weights where they are to go."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        found = torch.autograd.grad(penalty, weights, allow_unused=True)
        for weight, gradient in zip(weights, found, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

    def _finish_epoch(self) -> None:
        done, metric = self._done, None
        loss = self.devices.mean(self._loss_sum) / done.batch
        done.epoch += 1
        due = done.epoch % self.recipe.evaluate_every == 0 or done.epoch == self.recipe.epochs
        if self.evaluate is not None and due:
            metric = self._measure(self.evaluate)
            best, _ = done.best
            if best is None or metric > best:
                done.best = metric, done.epoch
                if self.recipe.keep == "best":
                    tensors = resume.model_tensors(self.model)
                    self._best = {name: t.detach().cpu().clone() for name, t in tensors.items()}
        rate = float(self._optimizer.param_groups[0]["lr"])
        done.history += (EpochRecord(done.epoch, loss, rate, metric),)
        log.info("epoch %d of %d: loss %.4g, metric %s", done.epoch, self.recipe.epochs, loss, metric)
        done.batch = 0
        self._loss_sum.zero_()
        self._save()

    def _measure(self, evaluate: Evaluate) -> float:
        self.devices.share_buffers(self.model)
        with draws_kept():
            return self.devices.from_main(metric_of(evaluate, self.model, "the network in training"))

    def _check_finite(self, spoiled: str | None = None) -> None:
        loss, rate = self._loss_sum.item(), self._optimizer.param_groups[0]["lr"]
        wrong = not math.isfinite(loss)
        if wrong or spoiled is not None:
            what = f"the loss is {loss}" if wrong else f"{spoiled!r} holds numbers that are not finite"
            smaller = "set clip=1.0" if self.recipe.clip is None else f"set clip={self.recipe.clip / 10:.1g}"
            raise FloatingPointError(
                f"{what} in epoch {self.epoch + 1}, by step {self.step}, lr={rate:.3g}; the model has the weights "
                f"again that it had before this epoch. Lower lr, {smaller}, or look in the batches for non-finite "
                "values, and for labels that are all ignored, of which torch's own mean is nan"
            )

    def _tell_if_worse(self, first: float, last: float) -> None:
        """Warn where the loss of the last epoch is far above that of the first batch."""
        if 0 < first < last / _WORSE:
            rate = max(self._base_lr)
            log.warning(
                "the loss was %.3g on the first batch, before any step, and %.3g over the last epoch: training made "
                "the network worse, as too large steps do. Train it as it was before with a lower rate, as lr=%.1g in "
                "place of %.3g", first, last, rate / 10, rate,
            )  # fmt: skip

    def _skip(self, iterator: Any) -> None:
        for number in range(self._done.batch):
            if next(iterator, None) is None:
                raise CheckpointError(
                    f"{self.checkpoint}: stopped after batch {self._done.batch} of epoch {self.epoch + 1}, but batches "
                    f"ended after {number}: the data differ from those of the stopped run"
                )

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Modes, teacher and generators for training; everything as before on leaving."""
        self._started = time.perf_counter() - self._done.seconds
        attached: Any = self.after_step if hasattr(self.after_step, "attach") else None
        with draws_kept(), modes_kept(self.model):
            self.model.train()
            if self.recipe.batch_norm == "frozen":
                for _, norm in batch_norms(self.model):
                    norm.eval()
            self._optimizer.zero_grad()
            randomness.restore(self._random, None if self._done.batch else self.batches)
            try:
                if attached is not None:
                    attached.attach(self._optimizer)
                with self._objective.ready(self.devices.device), contiguous_where_needed(self.model):
                    yield
                self.devices.share_buffers(self.model)
            finally:
                if attached is not None:
                    attached.detach()
                self._done.seconds = time.perf_counter() - self._started
                self._random = randomness.capture(self.batches)
                cut_graphs(self.model)

    def _hooks(self) -> tuple[tuple[str, Any], ...]:
        """Those that may have a state, by their names in checkpoints."""
        return ("penalty", self.penalty), ("after_step", self.after_step)

    def _record(self) -> dict[str, Any]:
        teacher = self._objective.teacher is not None
        return dict(self.recipe.record()) | {"steps_per_epoch": self.steps_per_epoch, "teacher": teacher}

    def _save(self) -> None:
        if self.checkpoint is None or not self.devices.main:
            return
        done = self._done
        optimizer, done.optimizer = resume.optimizer_tensors(self._optimizer)
        parts = {
            "model": resume.model_tensors(self.model),
            "optimizer": optimizer,
            "best": self._best,
            "random": randomness.capture(self.batches),
            "epoch_random": self._epoch_random,
            "loss": {"sum": self._loss_sum},
        }
        for name, hook in self._hooks():
            if hasattr(hook, "state_dict"):
                parts[name] = hook.state_dict()
        done.run, done.seconds = self._record(), max(0.0, time.perf_counter() - self._started)
        per_epoch = self.steps_per_epoch
        done.uneven = per_epoch is not None and done.step != done.epoch * per_epoch + done.batch
        flat = {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
        resume.write_checkpoint(self.checkpoint, flat, msgspec.to_builtins(done, enc_hook=float))  # as numpy's numbers

    def _resume(self, path: Path) -> None:
        """Put back what a checkpoint holds, when all of it has been looked at: an error leaves everything as it was."""
        tensors, raw = resume.read_checkpoint(path)
        parts = {name: resume.section(tensors, name) for name in {key.partition("/")[0] for key in tensors}}
        resume.check_tensors(self.model, parts.get("model", {}), str(path))
        record = resume.read_record(raw, str(path))
        if record.run.get("clip", 0.0) is None:
            self._go_on_without_limit(record)
        if changed := changed_values(record.run, self._record()):
            raise CheckpointError(
                f"{path}: belongs to another run: {'; '.join(changed)}. Use the same recipe and data to continue, "
                "or delete the file to start again"
            )
        wanted = self.recipe.keep == "best" and record.best[0] is not None
        if problem := resume.damage(parts, record.problem(self.recipe.epochs, self.steps_per_epoch), wanted):
            raise CheckpointError(f"{path}: the training checkpoint is damaged: {problem}; delete it to start again")
        if best := parts.get("best", {}):
            resume.check_tensors(self.model, best, str(path))
        state = resume.optimizer_state(self._optimizer, parts.get("optimizer", {}), record.optimizer, str(path))
        for name in ("random", "epoch_random"):
            randomness.check_restorable(parts.get(name, {}), self.batches, f"{path}: {name}")
        self._resume_hooks(parts, path)
        # It may also be where the run is: what a call before this one has trained.
        been = [record.start, *(resume.magnitudes(each) for each in (parts["model"], best) if each)]
        elsewhere = [resume.apart(self._done.start, each) for each in been]
        if all(elsewhere):
            warnings.warn(
                f"{path}: its run began with other weights than the model has now, in {elsewhere[0]!r}: the model gets "
                "those of the run, which goes on; to train what it has, delete the file or give another checkpoint",
                stacklevel=4,
            )
        resume.copy_tensors(self.model, parts["model"], str(path))
        self._optimizer.load_state_dict(state)
        record.start = record.start or self._done.start
        self._best, self._done = best, record
        self._random, self._epoch_random = parts["random"], parts["epoch_random"]
        self._loss_sum.copy_(parts["loss"]["sum"])
        log.info("%s: goes on from epoch %d, step %d", path, self.epoch, self.step)

    def _go_on_without_limit(self, record: resume.CheckpointRecord) -> None:
        """A run that began when gradients had no limit by default has none to its end."""
        if self.recipe.clip == Recipe.clip:
            self.recipe = dataclasses.replace(self.recipe, clip=None)
        record.run = {**record.run, "clip": Recipe(clip=None).record()["clip"]}

    def _resume_hooks(self, parts: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
        for name, hook in self._hooks():
            if hasattr(hook, "load_state_dict"):
                try:
                    hook.load_state_dict(dict(parts.get(name, {})))
                except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as error:
                    what = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
                    raise CheckpointError(f"{path}: the state of {name} cannot be put back: {what}") from error
