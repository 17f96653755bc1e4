"""Input patches of a layer at some output positions: the vectors ``x`` with ``y = W x``."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spectrim.linalg.unfold import Unfolding
from spectrim.network.layer import LayerSpec
from spectrim.nn.watch.keys import mixed

# Numbers of the tables that say where kernels read, at most: 4 MB each.
_TABLE = 1 << 19


def patches_at(spec: LayerSpec, inputs: Tensor, index: Int64[Tensor, " n"] | None) -> Float[Tensor, "g n i *k"]:
    """Input patches in the order of the canonical weight, at some rows.

    Parameters
    ----------
    inputs
        What the layer was called with, with or without a batch axis.
    index
        Rows, counted over the batch and then over the output positions, the last axis fastest; of a linear layer
        over all axes but the last one. All rows if None.
    """
    return taps_at(spec, inputs, index).movedim(-1, 2)


def taps_at(spec: LayerSpec, inputs: Tensor, index: Int64[Tensor, " n"] | None) -> Float[Tensor, "g n *k i"]:
    """The same with the channels last, as they are read."""
    if spec.is_linear:
        return _taken(inputs.reshape(-1, inputs.shape[-1]), index)[None]
    inputs = _batched(spec, inputs)
    shape = tuple(inputs.shape[2:])
    positions = spec.output_shape(shape)
    size = math.prod(positions)
    if index is None:
        index = torch.arange(len(inputs) * size)
    place, outside = _read(spec, shape, positions, index % size)
    sample = (index // size).unsqueeze(1)
    picked = _gathered(inputs, sample.to(inputs.device), place.to(inputs.device))
    if outside is not None:
        picked.masked_fill_(outside.to(inputs.device).unsqueeze(2), 0)
    g, _, i, *kernel = spec.shape
    return picked.reshape(len(index), *kernel, g, i).movedim(-2, 0)


def slices_at(
    spec: LayerSpec, inputs: Tensor, index: Int64[Tensor, " n"], how: Unfolding
) -> tuple[Float[Tensor, "g m si"], Int64[Tensor, "1 m"]]:
    """The slices of patches that a first factor sees, ``(k_S, i)``, each once, and how often each is there.

    Patches of neighbouring positions have slices in common: those of all positions are as few as the positions.
    """
    inputs = _batched(spec, inputs)
    shape = tuple(inputs.shape[2:])
    positions = spec.output_shape(shape)
    size = math.prod(positions)
    place, outside = _read(spec, shape, positions, index % size)
    place = place if outside is None else place.masked_fill(outside, -1)
    rest = [1 + a for a in range(len(spec.kernel)) if a not in how.axes]
    first, second = how.sizes(spec.kernel)
    place = place.reshape(-1, *spec.kernel).permute(0, *rest, *(1 + a for a in how.axes)).reshape(-1, first)
    each = torch.cat([(index // size).repeat_interleave(second).unsqueeze(1), place], dim=1)
    each, counts = _different(each)
    sample, place = each[:, :1], each[:, 1:]
    picked = _gathered(inputs, sample.to(inputs.device), place.clamp_min(0).to(inputs.device))
    picked.masked_fill_((place < 0).to(inputs.device).unsqueeze(2), 0)
    g, _, i, *_ = spec.shape
    return picked.reshape(len(each), first, g, i).movedim(2, 0).flatten(2), counts.unsqueeze(0)


def _different(rows: Int64[Tensor, "n w"]) -> tuple[Int64[Tensor, "m w"], Int64[Tensor, " m"]]:
    """Rows that differ, in some order, and how often each is there."""
    keys = torch.zeros(len(rows), dtype=torch.int64)
    for column in rows.unbind(1):
        keys = mixed(keys + column)
    ordered = rows[keys.argsort(stable=True)]
    # Equal rows lie together; where different ones have one key, which hardly ever happens, they are told more often.
    begins = torch.cat([torch.ones(1, dtype=torch.bool), (ordered[1:] != ordered[:-1]).any(1)]).nonzero().squeeze(1)
    return ordered[begins], torch.cat([begins, begins.new_tensor([len(rows)])]).diff()


def outputs_at(spec: LayerSpec, outputs: Tensor, index: Int64[Tensor, " n"] | None) -> Float[Tensor, "g n o"]:
    """Outputs of a layer at the rows of :func:`patches_at`; all if ``index`` is None."""
    if spec.is_linear:
        picked = _taken(outputs.reshape(-1, outputs.shape[-1]), index)
    else:
        batched = _batched(spec, outputs)
        size = math.prod(batched.shape[2:])
        if index is None or len(index) == len(batched) * size:
            picked = _taken(batched.movedim(1, -1).reshape(-1, batched.shape[1]), index)
        else:
            rows = index.to(outputs.device).unsqueeze(1)
            picked = _gathered(batched, rows // size, rows % size).squeeze(1)
    # There may be no rows.
    return picked.reshape(len(picked), spec.groups, picked.shape[1] // spec.groups).transpose(0, 1)


def _batched(spec: LayerSpec, values: Tensor) -> Tensor:
    """What a convolution takes or gives, with an axis of samples."""
    return values.unsqueeze(0) if values.dim() == len(spec.kernel) + 1 else values


def _taken(flat: Tensor, index: Tensor | None) -> Tensor:
    return flat if index is None else flat.index_select(0, index.to(flat.device))


def _gathered(inputs: Tensor, sample: Tensor, place: Tensor) -> Tensor:
    """Channels ``[n, taps, channels]`` of ``inputs`` at flat places ``[n, taps]`` of samples ``[n, 1]``."""
    size = math.prod(inputs.shape[2:])
    last = inputs.movedim(1, -1)
    # Reading whole runs of channels is worth a copy unless few places are read.
    if last.is_contiguous() or 2 * place.numel() >= len(inputs) * size:
        flat = last.reshape(-1, inputs.shape[1])
        return flat.index_select(0, (sample * size + place).flatten()).reshape(*place.shape, -1)
    return inputs.flatten(2).transpose(1, 2)[sample, place]


def _read(
    spec: LayerSpec, shape: tuple[int, ...], positions: tuple[int, ...], index: Tensor
) -> tuple[Int64[Tensor, "n taps"], Tensor | None]:
    """Where each tap of the kernel reads, as a flat index into the input, and where it reads nothing (or None)."""
    if math.prod((*positions, *spec.kernel)) > _TABLE:
        return _places(spec, shape, positions, index)
    place, outside = _every_place(_geometry(spec), shape, positions)
    return place[index], outside if outside is None else outside[index]


def _geometry(spec: LayerSpec) -> LayerSpec:
    """A layer with the same windows, alike for all layers that have them."""
    return LayerSpec(
        ("",), 1, 1, spec.kernel, spec.stride, spec.padding, spec.dilation, spec.output_padding,
        transposed=spec.transposed, padding_mode=spec.padding_mode,
    )  # fmt: skip


# Layers of one geometry follow one another, batch by batch.
@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _every_place(
    spec: LayerSpec, shape: tuple[int, ...], positions: tuple[int, ...]
) -> tuple[Int64[Tensor, "positions taps"], Tensor | None]:
    return _places(spec, shape, positions, torch.arange(math.prod(positions)))


def _places(
    spec: LayerSpec, shape: tuple[int, ...], positions: tuple[int, ...], index: Tensor
) -> tuple[Int64[Tensor, "n taps"], Tensor | None]:
    place, inside = index.new_zeros(len(index), 1), index.new_ones(len(index), 1, dtype=torch.bool)
    where: list[Tensor] = []
    for size in reversed(positions):
        where.append(index % size)
        index = index // size
    for axis, at in enumerate(reversed(where)):
        tap = torch.arange(spec.kernel[axis]) * spec.dilation[axis]
        before, step, size = spec.sides[axis][0], spec.stride[axis], shape[axis]
        if spec.transposed:
            moved = at.unsqueeze(1) + before - tap
            here, read = moved // step, moved % step == 0
        else:
            here = at.unsqueeze(1) * step - before + tap
            read = torch.ones_like(here, dtype=torch.bool)
        if spec.padding_mode == "zeros":
            read = read & (here >= 0) & (here < size)
            here = here.clamp(0, size - 1)
        elif spec.padding_mode == "circular":
            here = here % size
        elif spec.padding_mode == "reflect":
            here = (size - 1) - ((size - 1) - here.abs()).abs()
        else:
            here = here.clamp(0, size - 1)
        place = (place.unsqueeze(2) * size + here.unsqueeze(1)).flatten(1)
        inside = (inside.unsqueeze(2) & read.unsqueeze(1)).flatten(1)
    return place, None if bool(inside.all()) else ~inside
