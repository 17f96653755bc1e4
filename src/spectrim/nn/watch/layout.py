"""Where the samples of a batch are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from spectrim.errors import CalibrationError, check_function
from spectrim.nn.watch.nesting import is_record, rebuilt, tensors, transformed

Mask = str | Callable[[Any], Tensor | None] | None
"""What says which positions of a batch are data: the name of one of its tensors, or a function of the batch."""

Where = int | Callable[[Any], int] | None
"""Where a batch's samples are: the axis of the inputs that they lie on, or a function that counts those of a batch."""


def check_where(samples: Where) -> None:
    """Raise TypeError or ValueError for what says nothing of samples."""
    if samples is None:
        return
    if callable(samples) and not isinstance(samples, type):
        check_function("samples", samples, ("a batch",), "a function that counts the samples of a batch")
        return
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(
            f"samples is {samples!r}: expected the axis of the inputs that samples lie on, such as 1 for (time, "
            "samples, features), or a function that counts the samples of a batch"
        )
    if samples < 0:
        raise ValueError(f"samples is {samples}: axes are counted from the front, from 0")


@dataclass(frozen=True)
class Layout:
    """Which part of a batch is inputs, what of them is a sample, and which of its positions are data."""

    axis: int = 0  # of the input tensors, that samples lie on
    counted: int = 0  # which of a batch's tensors says how many samples there are, where that is not the first input
    listed: bool = False  # the inputs are a list with an entry for each sample, which may differ in size
    whole: bool = False  # the batch as it comes is the inputs; else, of a list or tuple, its first element
    count: Callable[[Any], int] | None = None  # counts the samples of a batch, where a user says how
    names: tuple[str, ...] = ()  # of the inputs in the order of a tuple, as the model's ``forward`` calls them
    mask: Mask = None  # says what is padding, where a user says how; see :mod:`spectrim.nn.watch.masks`

    def inputs(self, batch: Any) -> Any:
        """The part of a batch that tells samples apart, without targets."""
        first = batch[0] if isinstance(batch, list | tuple) and batch and not self.whole else None
        if first is not None and (counted := self._element(batch)):
            return tuple(batch[: max(counted + 1, len(self.names))])
        return first if isinstance(first, Tensor | Mapping | list | tuple) or is_record(first) else batch

    def _element(self, batch: Sequence[Any]) -> int:
        """Which element of a batch holds the tensor that is counted."""
        ends = itertools.accumulate(sum(1 for _ in tensors(element)) for element in batch) if self.counted else ()
        return next((number for number, end in enumerate(ends) if self.counted < end), 0)

    def named(self, batch: Any) -> Mapping[str, Any]:
        """The inputs that have names, in a mapping or as the model's ``forward`` calls them."""
        inputs = self.inputs(batch)
        if isinstance(inputs, Mapping):
            return inputs
        if is_record(inputs):
            return vars(inputs)
        parts = inputs if isinstance(inputs, list | tuple) else batch
        return dict(zip(self.names, parts, strict=False)) if isinstance(parts, list | tuple) else {}

    def size(self, batch: Any) -> int:
        """How many samples a batch has.

        Raises
        ------
        CalibrationError
            If nothing in it has the axis that samples lie on.
        """
        if self.count is not None:
            counted = self.count(batch)
            if isinstance(counted, bool) or not isinstance(counted, int) or counted < 0:
                raise CalibrationError(f"samples= counted {counted!r} samples of a batch: expected a whole number")
            return counted
        if self.listed:
            return len(self.inputs(batch))
        if isinstance(self.inputs(batch), PackedSequence):
            return int(self.inputs(batch).batch_sizes[0])
        if self.counted:
            return len(next(itertools.islice(tensors(batch), self.counted, None)))
        for part in (self.inputs(batch), batch):
            for tensor in tensors(part):
                if tensor.dim() > self.axis:
                    return tensor.shape[self.axis]
        axis = "a batch axis" if not self.axis else f"an axis {self.axis} for its samples (samples={self.axis})"
        raise CalibrationError(
            f"a batch of type {type(batch).__name__} holds no tensor with {axis}: pass tensors, or samples=, a "
            "function that counts the samples of a batch"
        )

    def axis_of(self, tensor: Tensor, size: int) -> int | None:
        """The axis of a tensor that so many samples lie on, if there is one."""
        # Where a user counts, the numbers tell; labels and lengths have their samples in front.
        axes = (self.axis, 0) if self.count is None else (0, 1)
        return next((axis for axis in axes if tensor.dim() > axis and tensor.shape[axis] == size), None)

    def columns(self, batch: Any, size: int, without: Any = None) -> list[list[Tensor]]:
        """What tells samples apart: tensors with samples in front, in one piece or one a sample; ``without`` a mask.

        Sparse ones count where there are no others: the edges of a graph, which its nodes tell apart.
        """
        inputs = self.inputs(batch)
        if self.listed and self.count is None:
            rows = [list(tensors(sample)) for sample in inputs]
            return [[t.detach().unsqueeze(0) for t in column] for column in zip(*rows, strict=False)]
        among = (tensor for tensor in tensors(inputs) if tensor is not without)
        found = [(tensor.detach(), self.axis_of(tensor, size)) for tensor in among]
        cut = [(tensor, axis) for tensor, axis in found if axis is not None]
        plain = [(tensor, axis) for tensor, axis in cut if tensor.layout is torch.strided]
        return [[tensor.movedim(axis, 0)] for tensor, axis in plain or [(t.to_dense(), axis) for t, axis in cut]]

    def numbers(self, batch: Any) -> int:
        """How many numbers the largest sample of a batch has in the first of the inputs that tells samples apart."""
        columns = self.columns(batch, self.size(batch))
        return max((part.shape[1:].numel() for part in columns[0]), default=0) if columns else 0

    def lengths(self, batch: Any, size: int) -> frozenset[int]:
        """Sizes of the axis beside that of the samples."""
        found = ((tensor, self.axis_of(tensor, size)) for tensor in tensors(self.inputs(batch)))
        return frozenset(t.shape[1 - axis] for t, axis in found if axis in (0, 1) and t.dim() > 1)

    def sides(self, inputs: Any, size: int) -> list[int]:
        """Sizes of the axes of the first of some inputs that has more than samples, without those."""
        found = ((tensor, self.axis_of(tensor, size)) for tensor in tensors(inputs) if tensor.dim() > 1)
        return next(([*t.shape[:axis], *t.shape[axis + 1 :]] for t, axis in found if axis is not None), [])

    def is_turned(self, batch: Any, size: int) -> bool:
        """Whether positions come before samples."""
        first = next((tensor for tensor in tensors(self.inputs(batch)) if tensor.dim() > 1), None)
        return first is not None and not self.listed and self.axis_of(first, size) == 1

    def resized(self, batch: Any, size: int) -> Any:
        """The same batch with its samples repeated or cut to ``size``."""
        now = self.size(batch)
        if not now:
            raise CalibrationError("the first batch is empty: it holds no sample; leave it out")
        return self.picked(batch, torch.arange(size) % now)

    def picked(self, batch: Any, index: Int64[Tensor, " n"]) -> Any:
        """The same batch with some of its samples, by their numbers. What has no sample for each stays whole."""
        size = self.size(batch)
        if self.listed:
            inputs = self.inputs(batch) is batch
            return _chosen(batch, index, size) if inputs else rebuilt(batch, [_chosen(v, index, size) for v in batch])
        return self.of_samples(batch, index, size)

    def of_samples(self, value: Any, index: Int64[Tensor, " n"], size: int) -> Any:
        """What is of some of ``size`` samples, by their numbers, in inputs or outputs; the rest stays whole."""

        def change(tensor: Tensor) -> Tensor:
            axis = self.axis_of(tensor, size)
            return tensor if axis is None else tensor.index_select(axis, index.to(tensor.device))

        return transformed(value, change)


def samples_first(outputs: Tensor, size: int, turned: bool) -> Tensor:
    """Outputs of so many samples with these in front, where a model is given its positions there (``turned``)."""
    second = turned and outputs.dim() > 1 and outputs.shape[1] == size
    return outputs.movedim(1, 0) if second and (outputs.dim() > 2 or outputs.shape[0] != size) else outputs


def _chosen(value: Any, index: Tensor, size: int) -> Any:
    """Some entries of a list with one for each of ``size`` samples, or of a tensor of targets with a row for each."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() and len(value) == size else value
    if isinstance(value, list | tuple) and len(value) == size and not hasattr(value, "_fields"):
        return type(value)(value[n] for n in index.tolist())
    return value
