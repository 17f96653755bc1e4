"""Batches of any usual form: pairs, dicts; whole, on a device, or one process's part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import CalibrationError
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.nesting import named_logits, tensors, transformed
from spectrim.train.faults import training_forward


def epoch_length(batches: Any, *, needed: bool) -> int | None:
    """Batches in an epoch, None if unknown. Raises TypeError if it is needed and unknown."""
    try:
        return len(batches)
    except TypeError:
        if not needed:
            return None
        raise TypeError(
            f"{type(batches).__name__} has no length, which the schedule of the learning rate needs. Give it a "
            "__len__, pass a list or a DataLoader, or use schedule='constant' without warmup"
        ) from None


def split(batch: Any) -> tuple[Any, Any]:
    """A batch as ``(inputs, targets)``; a dict is its own inputs and has its targets under ``labels``.

    A tensor, alone or alone in a list, is inputs without targets, to be learned from a teacher. Raises TypeError if the
    batch has another form.
    """
    if isinstance(batch, Mapping):
        return batch, batch.get("labels")
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, list | tuple) and len(batch) == 1:
        return batch[0], None
    if isinstance(batch, Tensor):
        return batch, None
    form = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
    raise TypeError(
        f"a batch must be a pair (inputs, targets), inputs alone or a dict with 'labels', not a {form}: "
        "write (batch, targets), or (batch,) to learn from a teacher"
    )


def part(batch: Any, index: int, count: int) -> tuple[Any, float]:
    """What process ``index`` of ``count`` does of a batch, and the weight that makes the mean over processes exact.

    Every tensor whose first axis is the batch is cut; all others are given to each process. A batch with fewer samples
    than processes is done by all of them.
    """
    first = next(tensors(batch), None)
    size = first.shape[0] if first is not None and first.ndim else 0
    if count == 1 or size < count:
        return batch, 1.0
    start, stop = index * size // count, (index + 1) * size // count
    cut = transformed(batch, lambda t: t[start:stop] if t.ndim and t.shape[0] == size else t)
    return cut, (stop - start) * count / size


def place(batch: Any, device: torch.device, channels_last: bool) -> Any:
    """A batch on a device, 4-axis floating tensors in channels-last order if asked."""

    def move(tensor: Tensor) -> Tensor:
        if channels_last and tensor.ndim == 4 and tensor.is_floating_point():
            return tensor.to(device, non_blocking=True, memory_format=torch.channels_last)
        return tensor.to(device, non_blocking=True)

    return transformed(batch, move)


class Calls:
    """How a model is called with the inputs of batches: as in calibration, seen from the first ones of each type."""

    def __init__(self) -> None:
        self._feeds: dict[type, Feed] = {}

    def __call__(self, model: nn.Module, inputs: Any) -> Any:
        """Call a model with copies, into which it may write.

        Raises TypeError if the inputs are none that it takes, TrainingError for what the model raises.
        """
        feed = self._feeds.setdefault(type(inputs), Feed())
        try:
            # Trying ways draws no number that training would.
            with torch.random.fork_rng(devices=[]):
                feed.decide(model, (inputs,))
        except CalibrationError as error:
            kind = f"a tuple of {len(inputs)}" if isinstance(inputs, tuple) else f"a {type(inputs).__name__}"
            said = str(error).split(": ")[0]
            raise TypeError(
                f"{type(model).__name__} cannot be called with the inputs of a training batch, {kind} ({said}). Give "
                "batches (inputs, targets), with inputs of several parts in a tuple, ((x, mask), targets), or "
                "((x, mask),) without targets"
            ) from error
        args, kwargs = feed.arguments(model, (inputs,))
        with training_forward(model):
            return model(*args, **kwargs)


def scores_of(output: Any) -> Any:
    """The ``logits`` of a structured output, or the output itself."""
    named = named_logits(output)
    return output if named is None else named
