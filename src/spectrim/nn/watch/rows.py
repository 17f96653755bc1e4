"""By which input samples are counted: outputs have a row for each, so that they tell where the first input has none."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from spectrim.errors import SpectrimError
from spectrim.nn.watch.layout import Layout
from spectrim.nn.watch.nesting import tensors

Outputs = Callable[[Any], list[Tensor] | None]
"""What a model gives for a batch; None where it fails."""

_SEVERAL = 2
_COUNT = "pass samples=, a function that counts the samples of a batch, if it has others"


def counted(layout: Layout, batch: Any, taken: Sequence[Tensor], outputs: Outputs) -> tuple[Layout, str]:
    """The layout with the input that samples are counted by, and what a user should know who has that so.

    Parameters
    ----------
    layout
        Counts by the first input.
    batch
        The first one.
    taken
        The tensors of it that the model is given; where all have as many rows it is not run.
    outputs
        Runs the model, on few samples where those tell.
    """
    sizes = [len(tensor) for tensor in taken if tensor.dim()]
    if isinstance(layout.inputs(batch), PackedSequence) or len(set(sizes)) < _SEVERAL:
        return layout, ""
    first, size = taken[0], layout.size(batch)
    if size != sizes[0] or not size:
        return layout, ""
    few = 3 if size == 2 else 2
    part = _cut(layout, batch, outputs, few)
    rows = _rows_of_others(first, size, few, part, lambda: _leading(outputs(batch)))
    if rows is None:
        return layout, ""
    for tensor in (each for each in taken if each.dim() and len(each) == rows and not _is_more(first, each)):
        place = next(number for number, each in enumerate(tensors(batch)) if each is tensor)
        by_other = dataclasses.replace(layout, counted=place)
        parts = [(number, _cut(by_other, batch, outputs, number)) for number in _numbers(rows)]
        # Where it cannot be cut by either of them, as where a state has its samples second, one row is no samples.
        uncut = size == 1 and all(cut is None for cut in (part, *(cut for _, cut in parts)))
        if uncut or any(cut is not None and _has_rows(cut, number) for number, cut in parts):
            return by_other, (
                f"{rows} samples were counted in the first batch by an input of shape {tuple(tensor.shape)}, since "
                f"outputs have as many rows; {_COUNT}"
            )
    return layout, ""


def _rows_of_others(
    first: Tensor, size: int, few: int, part: Sequence[Tensor] | None, whole: Callable[[], Sequence[Tensor]]
) -> int | None:
    """How many rows outputs have that another input than the first may count; None where the first one does.

    ``part`` is the first output for ``few`` samples by the first input, and ``whole`` gives that for all ``size``.
    """
    if part is not None and _has_rows(part, few):
        return None
    leading = whole()
    rows = next((len(tensor) for tensor in leading), size)
    # Positions are in front, and samples follow them.
    turned = bool(part) and [t.shape[1:2] for t in (*part, *leading)] == [torch.Size([n]) for n in (few, size)]
    # With one sample more it runs, and its positions are in front: an axis of one sample was taken away.
    squeezed = part is not None and first.dim() > 1 and first.shape[1] == rows
    return None if rows == size or turned or squeezed or _folds(first, size, rows) else rows


def uncounted(layout: Layout, batch: Any, outputs: Sequence[Tensor]) -> str:
    """What a user should know of outputs that have other numbers of rows than a batch has samples; empty if none."""
    if layout.listed or layout.count is not None or isinstance(layout.inputs(batch), PackedSequence):
        return ""
    size, first = layout.size(batch), next(iter(tensors(layout.inputs(batch))), None)
    rows = _rows(outputs, size)
    if rows is None or not _leading(outputs) or (first is not None and _folds(first, size, rows)):
        return ""
    return (
        f"{size} samples were counted in a batch whose outputs have {rows} rows: costs are those of one of {size}; "
        f"{_COUNT}"
    )


def parted(layout: Layout, batch: Any, outputs: Outputs) -> tuple[Layout, str]:
    """The layout of a list, whose entries may be no samples but inputs of the same samples, as outputs tell."""
    entries = layout.inputs(batch)
    sizes = {len(entry) if isinstance(entry, Tensor) and entry.dim() else 0 for entry in entries}
    rows = sizes.pop()
    if sizes or rows < _SEVERAL or rows == len(entries):
        return layout, ""
    whole = outputs(batch)
    if whole is None or len(whole) == len(entries) or _rows(whole, len(entries)) != rows:
        return layout, ""
    together = dataclasses.replace(layout, listed=False)
    parts = [(number, _cut(together, batch, outputs, number)) for number in _numbers(rows)]
    if not any(part is not None and _has_rows(part, number) for number, part in parts):
        return layout, ""
    return together, (
        f"{rows} samples were counted in the first batch, whose {len(entries)} inputs and whose outputs have as many "
        f"rows; {_COUNT}"
    )


def _numbers(rows: int) -> Iterator[int]:
    """Other numbers of samples: what is a sample for others, as a node for edges, may not be left out."""
    if rows > 1:
        yield (rows + 1) // 2
    yield 2 * rows


def _cut(layout: Layout, batch: Any, outputs: Outputs, number: int) -> Sequence[Tensor] | None:
    """The first output of another number of samples, if it has rows; None where a model does not run with these."""
    with contextlib.suppress(SpectrimError):
        given = outputs(layout.resized(batch, number))
        return None if given is None else _leading(given)
    return None


def _leading(outputs: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """The first output that is more than one number: what is beside it may be of no samples, as a time step."""
    return [tensor for tensor in outputs or () if tensor.dim() and tensor.numel() > 1][:1]


def _has_rows(leading: Sequence[Tensor], number: int) -> bool:
    """Whether an output has so many rows, or there is none that has any, as of a loss."""
    return all(len(tensor) == number for tensor in leading)


def _rows(outputs: Sequence[Tensor], samples: int) -> int | None:
    """How many rows outputs have; None if one has as many as there are samples, or as many columns, or none has any."""
    shaped = [tensor for tensor in outputs if tensor.dim()]
    if any(samples in tensor.shape[:2] for tensor in shaped):
        return None
    return next((len(tensor) for tensor in shaped), None)


def _folds(first: Tensor, size: int, rows: int) -> bool:
    """Whether each sample of the first input may have several rows, as positions or boxes; pairs of nodes are none."""
    pairs = first.dim() == 2 and size == 2 and not first.is_floating_point()
    turned = first.dim() > 1 and first.shape[1] == rows  # samples that follow their positions
    return size > 1 and rows % size == 0 and not pairs and not turned


def _is_more(first: Tensor, other: Tensor) -> bool:
    """Whether the first input holds more numbers: an image beside its boxes, and no time step beside samples."""
    return first.is_floating_point() and first.numel() >= other.numel()
