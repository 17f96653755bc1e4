"""Convolutions whose gradients torch may compute in contiguous order only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from spectrim.nn.parameters import asked
from spectrim.nn.standing import StandIn

# Channels that oneDNN takes at once, with AVX-512; with AVX2 it is half of it.
_BLOCK = 16


@contextmanager
def contiguous_where_needed(model: nn.Module) -> Iterator[None]:
    """Give strided 1x1 convolutions of few channels contiguous weights and, on a CPU, inputs.

    torch's CPU kernel for the gradient of their weight corrupts memory in channels-last order (seen in torch 2.13 with
    oneDNN 3.12, ``Conv2d(4, 8, 1, stride=2)``): it books space for as many channels as there are and goes through it in
    steps of a whole block, 8 channels with AVX2 and 16 with AVX-512. From images of about 16 x 16 on gradients are
    wrong, or the process hangs or dies. Transposed convolutions do so with few outputs. Low rank makes such layers of
    every down-sampling shortcut. In contiguous order another kernel runs, which is sound. For a kernel of one position
    both orders are the same in memory, so weights keep values and storage.
    """
    callers = [(module, [m for m in _hosts(module) if _is_at_risk(m)]) for module in model.modules()]
    hooks = []
    for caller, layers in callers:
        for layer in layers:
            layer.weight.data = _contiguous(layer.weight.data)
        if layers:
            hooks.append(caller.register_forward_pre_hook(_contiguous_inputs, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hosts(module: nn.Module) -> Iterator[Any]:
    """The layers that a module runs without calling them, or the module itself."""
    return module.modules() if asked(module, "reads_weights") else iter((module,))


def _is_at_risk(layer: Any) -> bool:
    # What stands for a layer runs its parts, which are asked as well.
    convolutions = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d
    if not isinstance(layer, convolutions) or isinstance(layer, StandIn):
        return False
    narrow = (layer.out_channels if layer.transposed else layer.in_channels) < _BLOCK
    return narrow and set(layer.kernel_size) == {1} != set(layer.stride)


def _contiguous_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map_only(Tensor, lambda x: _contiguous(x) if x.device.type == "cpu" else x, (args, kwargs))


def _contiguous(tensor: Tensor) -> Tensor:
    """The tensor with contiguous strides, also along axes of size 1, which ``contiguous`` leaves as they are.

    One that has them is itself: what layers share is known by the object.
    """
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.dim())]
    return tensor if list(tensor.stride()) == strides else tensor.reshape(-1).view(tensor.shape)
