"""Numbers of one model: its score, its size and its work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from spectrim.nn.checkpoint import file_size as file_size
from spectrim.nn.watch.batches import Feed, arguments
from spectrim.nn.watch.nesting import logits
from spectrim.nn.watch.observe import observe
from spectrim.selection.point import share_error

Evaluate = Callable[[nn.Module], float]


class Score(float):
    """A percentage of samples that knows how many there were.

    Parameters
    ----------
    value
        In percent.
    samples
        It was measured on; by default those of ``value`` if it is a score, else 0, which stands for an unknown number.
    """

    samples: int
    unit = "%"

    def __new__(cls, value: float, samples: int | None = None) -> Self:
        score = super().__new__(cls, value)
        score.samples = getattr(value, "samples", 0) if samples is None else samples
        return score

    @property
    def standard_error(self) -> float:
        """In points, as :func:`spectrim.selection.point.share_error` says; NaN for an unknown number of samples."""
        return 100 * share_error(self / 100, self.samples) if self.samples else math.nan


def accuracy(model: nn.Module, batches: Iterable[Any]) -> Score:
    """Share of samples, in percent, whose largest output is at the label.

    Parameters
    ----------
    batches
        Tuples ``(inputs, labels)``, or mappings with ``labels`` among the model's arguments.

    Raises
    ------
    ValueError
        If a batch holds no labels, others than a class for each answer, or there is no batch, or the model answers NaN.
    """
    feed = Feed()
    right = seen = 0
    with observe(model, forward=feed) as run:
        for batch in batches:
            if isinstance(batch, Mapping):
                labels = batch.get("labels")
            else:
                labels = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
            if not isinstance(labels, Tensor):
                raise ValueError(
                    f"a batch of type {type(batch).__name__} holds no labels: expected (inputs, labels) or a mapping "
                    "with 'labels'"
                )
            scores = logits(run(batch))
            if scores.isnan().any():
                raise ValueError(
                    "the model answers NaN, of which no class is the largest: accuracy is not measured. Mend the "
                    "model's weights or the batches, which may hold NaN or Inf"
                )
            guess = scores.argmax(-1)
            right += int((guess == _classes(labels, guess, scores.shape[-1])).sum())
            seen += labels.numel()
    if not seen:
        raise ValueError("no batches to evaluate on: the iterable was empty")
    return Score(100.0 * right / seen, seen)


def _classes(labels: Tensor, guess: Tensor, count: int) -> Tensor:
    """Labels as answers are. ValueError for such as are no classes: every answer to them would count as wrong."""
    if labels.squeeze().shape != guess.squeeze().shape:
        what = f"of shape {tuple(labels.shape)}, the model's answers of shape {tuple(guess.shape)}"
    else:
        # torch's losses ignore -100.
        wrong = ((labels < 0) & (labels != -100)) | (labels >= count)
        if labels.is_floating_point():
            wrong |= labels != labels.floor()
        if not wrong.any():
            return labels.reshape(guess.shape).to(guess.device)
        kind = str(labels.dtype).removeprefix("torch.")
        what = f"{kind} such as {labels[wrong][0].item():.6g}, not classes 0 to {count - 1}"
    raise ValueError(f"labels are {what}: accuracy is not measured. Give a class for each answer, or no test batches")


def counted_macs(model: nn.Module, example: Any) -> float:
    """Multiply-accumulates for one sample, as :func:`spectrim.nn.counting.counting` counts them."""
    from spectrim.nn.counting import counting

    feed = Feed().decide(model, example)
    with counting(model) as work, observe(model, forward=feed) as run:
        run(example)
    return work.macs / feed.layout.size(example)


def inputs(model: nn.Module, example: Any) -> Any:
    """What to pass to a model, on its device: a tuple of arguments or a dict."""
    args, kwargs = arguments(model, example)
    return kwargs or args
