"""Which positions of a batch's samples are data, and which are padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.errors import CalibrationError
from spectrim.nn.watch.layout import Layout
from spectrim.nn.watch.nesting import transformed

# The mask of a batch where no other is named: not zero where there is data, as models of transformers take it.
MASK = "attention_mask"
# The end of the name of those that are zero there, as layers of torch take them: true, or -inf, where there is padding.
PADDING = "key_padding_mask"


def mask_of(batch: Any, size: int, layout: Layout = Layout()) -> Tensor | None:  # noqa: B008 (frozen)
    """The mask of a batch, ``[size, positions]`` on the CPU, True where a token is data; of images pixel by pixel."""
    name, found = _named(batch, layout)
    if found is None:
        return None
    what = repr(name) if name else str(layout.mask)
    if isinstance(found, Tensor) and found.shape == (size,) and _counts(found):
        return _in_front(found.cpu(), what, _sides(batch, size, layout))
    if not isinstance(found, Tensor) or found.dim() < 2 or found.shape[0] != size:
        kind = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
        raise CalibrationError(
            f"the mask {what} has {kind}: expected ({size} samples, positions), or how many tokens each sample has; "
            "pass mask=, a function of the batch that gives such a tensor, or None where no position is padding"
        )
    data = found == 0 if name.endswith(PADDING) else found > _TAKEN_AWAY if _is_added(found, what) else found != 0
    return (data if data.dim() == 2 else _of_positions(data, _sides(batch, size, layout))).cpu()


def tensor_of(batch: Any, layout: Layout) -> Any:
    """The tensor that says where data is in a batch, as it is there; None where there is none."""
    return _named(batch, layout)[1]


def with_numbers(batch: Any, layout: Layout) -> Any:
    """A batch with zeros in place of NaN and Inf in its padding: what stands there is to count nowhere."""
    says = tensor_of(batch, layout)
    data = None if says is None else mask_of(batch, layout.size(batch), layout)
    if data is None or bool(data.all()):
        return batch

    def change(tensor: Tensor) -> Tensor:
        where = None if tensor is says or not tensor.is_floating_point() else _spread(data, tensor, layout)
        return tensor if where is None else tensor.masked_fill(~(where.to(tensor.device) | tensor.isfinite()), 0)

    return transformed(batch, change)


def _spread(data: Tensor, tensor: Tensor, layout: Layout) -> Tensor | None:
    """A mask in the shape of a tensor, with axes of length one where it has more; None for one without positions."""
    size, positions = data.shape
    axis = layout.axis_of(tensor, size)
    sides = () if axis is None else tensor.movedim(axis, 0).shape[1:]
    place = _place(sides, positions)
    if axis is None or place is None:
        return None
    ones = (1,) * len(sides)
    shape = (*ones[: place.start], *sides[place], *ones[place.stop :])
    return data.reshape(size, *shape).movedim(0, axis)


def positions_second(tensor: Tensor, positions: int) -> Tensor:
    """A tensor with samples in front with its positions behind them; as it is where it has none."""
    place = _place(tensor.shape[1:], positions)
    if place is None or not place.start:
        return tensor
    return tensor.flatten(1 + place.start).movedim(-1, 1)


def _place(sides: Sequence[int], positions: int) -> slice | None:
    """Which sides of a sample are its positions: the first, as of tokens, or the last ones, as of an image."""
    if sides and sides[0] == positions:
        return slice(0, 1)
    last = (n for n in range(1, len(sides)) if math.prod(sides[n:]) == positions)
    return next((slice(n, len(sides)) for n in last), None)


def _sides(batch: Any, size: int, layout: Layout) -> list[int]:
    """Sizes of the axes of the inputs, without that of the samples; masks beside them are none."""
    plain = [value for name, value in layout.named(batch).items() if "mask" not in str(name).lower()]
    return layout.sides(plain or layout.inputs(batch), size)


def _of_positions(data: Tensor, sides: Sequence[int]) -> Tensor:
    """One number a position, of a mask of pixels or of one between positions, for inputs of these sides."""
    shape = tuple(data.shape[1:])
    image = shape[1:] if shape[0] == 1 else shape
    if len(image) > 1 and len(sides) == len(image) + 1 and image in (tuple(sides[1:]), tuple(sides[:-1])):
        return data.flatten(1)
    # The last axis is what is attended to: data is what any position attends to.
    return (data & ~_of_padding(data)).flatten(1, -2).any(1)


def _is_added(found: Tensor, what: str) -> bool:
    """Whether a mask is added to scores of attention, of which it takes away what is below zero."""
    above, below = (bool(each.any()) for each in (found > 0, found < 0))
    # One between positions that is all zeros takes nothing away.
    added = found.is_floating_point() and (below or (found.dim() > 2 and not above))
    # One without positions to attend from is all zeros for a sample without padding, and for one of nothing else.
    if added and (above or found.dim() == 2):
        entry = what if what.startswith("'") else "'mask'"
        raise CalibrationError(
            f"the mask {what} has numbers below 0, as one that is added to scores of attention, "
            + ("and others above it" if above else "for each position once")
            + ": expected one that is zero where there is padding, and not where there is data; pass a function that "
            f"compares it, such as mask=lambda batch: batch[{entry}] == 0"
        )
    return added


# What is added to a score of attention that is to count.
_TAKEN_AWAY = -1e3


def _of_padding(data: Tensor) -> Tensor:
    """Rows ``[..., positions, 1]`` that attend to everything, ahead of one that does not: attention needs something to
    attend to, so that causal masks let padding on the left do so.
    """
    whole = data.all(-1, keepdim=True)
    behind = (data.any(-1, keepdim=True) & ~whole).flip(-2).cumsum(-2).flip(-2) > 0
    return whole & behind


def _named(batch: Any, layout: Layout) -> tuple[str, Any]:
    """What says where data is in a batch, and its name; None where nothing does."""
    mask = layout.mask
    if callable(mask):
        return "", mask(batch)
    inputs = layout.named(batch)
    if mask is None:
        name = next((n for n in inputs if n == MASK), None) or next((n for n in inputs if _is_padding(n)), "")
        return name, inputs.get(name)
    if inputs.get(mask) is None:
        kind = type(batch[0] if isinstance(batch, list | tuple) and batch else batch).__name__
        there = ", ".join(map(repr, inputs)) or f"a {kind}"
        raise CalibrationError(
            f"mask={mask!r}: the batch holds no such tensor, but {there}; name one that it holds, or pass a "
            "function of the batch"
        )
    return mask, inputs[mask]


def _is_padding(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(PADDING)


def _counts(found: Tensor) -> bool:
    """Whether a tensor holds whole numbers."""
    return not found.is_floating_point() and not found.is_complex() and found.dtype != torch.bool


def _in_front(lengths: Tensor, what: str, sides: Sequence[int]) -> Tensor:
    """The mask of samples that have so many tokens, the first ones of as many as the inputs have positions."""
    longest = int(lengths.max())
    positions = next((side for side in sides if side >= longest), None)
    if positions is None:
        raise CalibrationError(
            f"the mask {what} says that a sample has {longest:,} tokens, and the inputs have {list(sides)} positions: "
            "expected no more; pass mask=, a function of the batch that gives a tensor of (samples, positions)"
        )
    return torch.arange(positions) < lengths.unsqueeze(1)


def check_not_inverted(mask: Tensor, inputs: Sequence[Sequence[Tensor]]) -> None:
    """Raise CalibrationError for a mask that is true of padding: the inputs are one and the same there alone.

    Parameters
    ----------
    mask
        ``[samples, positions]``.
    inputs
        Tensors with samples in front, in one piece.
    """
    for column in inputs:
        part = column[0]
        if len(column) > 1 or part.shape[:2] != mask.shape:
            continue
        data, padding = (part[where.to(part.device)] for where in (mask, ~mask))
        if len(data) > 1 and bool((data == data[0]).all()) and len(padding) and not bool((padding == padding[0]).all()):
            raise CalibrationError(
                "the mask of the calibration batches is turned round: inputs are all the same where it says that there "
                "is data, and differ where it says that there is padding; pass a function that compares it, such as "
                "mask=lambda batch: batch['mask'] == 0"
            )


def unread(batch: Any, layout: Layout) -> Iterator[str]:
    """What a user should know of tensors that may say where padding is, and were not taken so."""
    if layout.mask is not None or tensor_of(batch, layout) is not None:
        return
    size = layout.size(batch)
    for name, value in layout.named(batch).items():
        if isinstance(value, Tensor) and value.dim() and len(value) == size and _tells(str(name).lower(), value):
            yield (
                f"padding, if there is any, was taken for data: {name!r} may tell it, and was not read so. Pass "
                f"mask={name!r} if it is not zero where a token is data, or says how many tokens a sample has, or a "
                "function of the batch that gives such a tensor"
            )
            return


def _tells(name: str, value: Tensor) -> bool:
    lengths = "length" in name or name.endswith("lens")
    return ("mask" in name and value.dim() > 1) or (lengths and value.dim() == 1 and _counts(value))
