"""The one call of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spectrim.errors import called_as, did_you_mean
from spectrim.train.loop import Evaluate, Loop
from spectrim.train.objective import Loss
from spectrim.train.recipe import Recipe
from spectrim.train.result import TrainingResult


@called_as("Write fine_tune(model, batches); of a result, its .model", model=nn.Module)
def fine_tune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    recipe: Recipe | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    checkpoint: str | Path | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
    progress: bool | None = None,
    accelerate: bool | None = None,
    **overrides: Any,
) -> TrainingResult:
    """Train a model in place, from its own labels and from a teacher.

    Parameters
    ----------
    model
        Trained in place. Its training and evaluation flags are put back afterwards.
    batches
        Read once an epoch: a ``DataLoader``, a list, any object that can be iterated again. A batch is a pair
        ``(inputs, targets)`` or a dict that the model takes as keyword arguments, with ``labels`` among them. If there
        is a method ``set_epoch(epoch)``, it is called before each epoch.
    teacher
        The uncompressed model. Runs in evaluation mode without gradients and is left as found. What is learned of
        its outputs: :class:`~spectrim.train.Distillation`.
    recipe
        The hyper-parameters.
    loss
        Function of ``(logits, targets)`` with a mean over the batch. None takes the loss that the model returned, if it
        did, and cross-entropy otherwise, where labels of -100 are left out and a batch of nothing else has a loss of 0.
    evaluate
        Function of the model, in evaluation mode, to a number where higher is better.
    checkpoint
        File to write, and to continue from if it exists. See Notes.
    penalty
        Function of the model to a scalar added to the loss of each step. If it has ``state_dict`` and
        ``load_state_dict`` (of tensors), its state goes into checkpoints.
    after_step
        Called with the model after each optimizer step, for example to project weights or to move the support of
        sparse ones (:class:`~spectrim.train.Regrow`), which else stays as it is. Its state goes into checkpoints as
        that of ``penalty`` does. If it has ``attach`` and ``detach``, they are called with the optimizer before the
        training and without anything after it.
    progress
        Show a progress bar; None shows it as ``SPECTRIM_PROGRESS`` says (1 or 0), else if standard error is a terminal.
    accelerate
        Use accelerate for devices and processes; None decides, see :func:`spectrim.train.devices.assign`.
    **overrides
        Fields of :class:`Recipe` to change: ``epochs=10``, ``lr=0.01``.

    Returns
    -------
    TrainingResult
        History, best metric, steps and seconds.

    Raises
    ------
    TypeError
        If an override is no field of the recipe, or targets are no tensor where the loss is cross-entropy.
    ValueError
        If labels do not fit the outputs that cross-entropy compares them with; the message says the cure.
    CheckpointError
        If the file at ``checkpoint`` is damaged, or belongs to another model, recipe or data.
    FloatingPointError
        If the loss is not finite.

    Notes
    -----
    Where the loss of the last epoch is more than five times that of the first batch, the log warns of the rate.

    The global generators are left as found, so that training does not depend on what ran before. Do not shard the data:
    with several processes, each takes its part of every batch.

    A run that was killed and started again with the same arguments ends in the same weights, bit for bit on a CPU with
    the same number of threads. This asks of the data that everything random in it follows from the global generators of
    torch, numpy and python, from the ``generator`` of a ``DataLoader``, or from ``set_epoch``; workers that live longer
    than an epoch (``persistent_workers=True``) keep a state that no checkpoint sees. A checkpoint of a finished run
    makes the call return at once with the weights and the result of that run.

    Examples
    --------
    >>> fine_tune(small, train_batches, teacher=model, epochs=10)  # doctest: +SKIP
    """
    recipe = Recipe() if recipe is None else recipe
    known = {f.name for f in fields(Recipe)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        close = did_you_mean(unknown[0], known)
        raise TypeError(
            f"fine_tune has no option {', '.join(unknown)}; the recipe has {', '.join(sorted(known))}"
            f"{'.' if close else ''}{close}"
        )
    loop = Loop(
        model, batches, replace(recipe, **overrides), teacher=teacher, loss=loss, evaluate=evaluate,
        checkpoint=checkpoint, penalty=penalty, after_step=after_step, progress=progress, accelerate=accelerate,
    )  # fmt: skip
    return loop.run()
