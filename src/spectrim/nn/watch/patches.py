"""Input patches of a layer at some output positions: the vectors ``x`` with ``y = W x``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from spectrim.network.layer import LayerSpec

_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


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
    if spec.is_linear:
        return _taken(inputs.reshape(-1, inputs.shape[-1]), index)[None]
    axes = len(spec.kernel)
    if inputs.dim() == axes + 1:
        inputs = inputs.unsqueeze(0)
    windows = _windows(spec, inputs)
    positions = [windows.shape[0], *windows.shape[2 : 2 + axes]]
    rest = torch.arange(math.prod(positions)) if index is None else index
    rest = rest.to(inputs.device)
    count = len(rest)
    where: list[Tensor] = []
    for size in reversed(positions):
        where.append(rest % size)
        rest = rest // size
    batch, *spatial = reversed(where)
    picked = windows.movedim(1, 1 + axes)[(batch, *spatial)]
    if spec.transposed:
        # The kernel of a transposed convolution runs backwards over the upsampled input.
        picked = picked.flip(tuple(range(-axes, 0)))
    g, _, i, *kernel = spec.shape
    return picked.reshape(count, g, i, *kernel).transpose(0, 1)


def outputs_at(spec: LayerSpec, outputs: Tensor, index: Int64[Tensor, " n"] | None) -> Float[Tensor, "g n o"]:
    """Outputs of a layer at the rows of :func:`patches_at`; all if ``index`` is None."""
    if spec.is_linear:
        flat = outputs.reshape(-1, outputs.shape[-1])
    else:
        batched = outputs.unsqueeze(0) if outputs.dim() == len(spec.kernel) + 1 else outputs
        flat = batched.movedim(1, -1).reshape(-1, batched.shape[1])
    picked = _taken(flat, index)
    return picked.reshape(len(picked), spec.groups, -1).transpose(0, 1)


def _taken(flat: Tensor, index: Tensor | None) -> Tensor:
    return flat if index is None else flat[index.to(flat.device)]


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
