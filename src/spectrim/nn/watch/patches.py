"""Input patches of a layer at sampled output positions: the vectors ``x`` with ``y = W x``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spectrim.network.layer import LayerSpec

_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def sample_patches(
    spec: LayerSpec, inputs: Tensor, rows: int | None, generator: torch.Generator
) -> Float[Tensor, "g n i *k"]:
    """Input patches in the order of the canonical weight, at ``rows`` random positions or at all.

    Parameters
    ----------
    inputs
        What the layer was called with, with or without a batch axis.
    rows
        How many; all positions if None or if there are fewer.
    """
    if spec.is_linear:
        flat = inputs.reshape(-1, inputs.shape[-1])
        return _pick(flat, rows, generator)[None]
    axes = len(spec.kernel)
    if inputs.dim() == axes + 1:
        inputs = inputs.unsqueeze(0)
    windows = _windows(spec, inputs)
    positions = [windows.shape[0], *windows.shape[2 : 2 + axes]]
    total = 1
    for size in positions:
        total *= size
    count = total if rows is None else min(rows, total)
    chosen = _indices(total, count, generator).to(inputs.device)
    where: list[Tensor] = []
    for size in reversed(positions):
        where.append(chosen % size)
        chosen = chosen // size
    batch, *spatial = reversed(where)
    picked = windows.movedim(1, 1 + axes)[(batch, *spatial)]
    if spec.transposed:
        # The kernel of a transposed convolution runs backwards over the upsampled input.
        picked = picked.flip(tuple(range(-axes, 0)))
    g, _, i, *kernel = spec.shape
    return picked.reshape(count, g, i, *kernel).transpose(0, 1)


def sample_outputs(
    spec: LayerSpec, outputs: Tensor, rows: int | None, generator: torch.Generator
) -> Float[Tensor, "g n o"]:
    """Outputs of a layer, or its inputs, at ``rows`` random positions or at all."""
    if spec.is_linear:
        flat = outputs.reshape(-1, outputs.shape[-1])
    else:
        batched = outputs.unsqueeze(0) if outputs.dim() == len(spec.kernel) + 1 else outputs
        flat = batched.movedim(1, -1).reshape(-1, batched.shape[1])
    picked = _pick(flat, rows, generator)
    return picked.reshape(len(picked), spec.groups, -1).transpose(0, 1)


def _pick(flat: Tensor, rows: int | None, generator: torch.Generator) -> Tensor:
    if rows is None or rows >= len(flat):
        return flat
    return flat[_indices(len(flat), rows, generator).to(flat.device)]


def _indices(total: int, count: int, generator: torch.Generator) -> Tensor:
    if count >= total:
        return torch.arange(total)
    # One draw from each of `count` equal strata: no sorting of all positions, no repeats, even coverage.
    edges = (torch.arange(count + 1) * total) // count
    widths = edges[1:] - edges[:-1]
    drawn = (torch.rand(count, generator=generator) * widths).long()
    return edges[:-1] + torch.minimum(drawn, widths - 1)


def _windows(spec: LayerSpec, inputs: Tensor) -> Tensor:
    """Strided view ``[batch, channels, *positions, *kernel]`` of all patches. Nothing is copied but the padding."""
    axes = len(spec.kernel)
    if spec.transposed:
        inputs, stride = _upsampled(spec, inputs), (1,) * axes
    else:
        inputs, stride = _padded(spec, inputs), spec.stride
    view = inputs
    for axis in range(axes):
        reach = spec.dilation[axis] * (spec.kernel[axis] - 1) + 1
        view = view.unfold(2 + axis, reach, stride[axis])
    for axis in range(axes):
        step = spec.dilation[axis]
        view = view[(..., slice(None, None, step), *[slice(None)] * (axes - 1 - axis))]
    return view


def _padded(spec: LayerSpec, inputs: Tensor) -> Tensor:
    amounts: list[int] = []
    for axis in reversed(range(len(spec.kernel))):
        if isinstance(spec.padding, str):
            whole = spec.dilation[axis] * (spec.kernel[axis] - 1)
            amounts += [whole // 2, whole - whole // 2]
        else:
            amounts += [spec.padding[axis]] * 2
    return F.pad(inputs, amounts, mode=_MODES[spec.padding_mode]) if any(amounts) else inputs


def _upsampled(spec: LayerSpec, inputs: Tensor) -> Tensor:
    """Input of the ordinary convolution that a transposed one is: zeros between the entries, then padding."""
    assert not isinstance(spec.padding, str)
    shape = [(n - 1) * s + 1 for n, s in zip(inputs.shape[2:], spec.stride, strict=True)]
    spread = inputs.new_zeros(*inputs.shape[:2], *shape)
    spread[(..., *(slice(None, None, s) for s in spec.stride))] = inputs
    amounts: list[int] = []
    for axis in reversed(range(len(spec.kernel))):
        edge = spec.dilation[axis] * (spec.kernel[axis] - 1) - spec.padding[axis]
        amounts += [edge, edge + spec.output_padding[axis]]
    return F.pad(spread, amounts)
