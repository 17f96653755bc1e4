"""Torch's layers as numbers: what describes one, its weight in one order, and the names and weights of a model.

The canonical weight is ``[g, o, i, *k]``: groups, outputs and inputs of each, and the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from spectrim.errors import UnsupportedLayerError
from spectrim.network.layer import LayerSpec, Lookup
from spectrim.nn.parameters import modes_kept
from spectrim.nn.standing import LAYERS

_UP_BY_AXES = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Layers that torch keeps the weight of with the inputs first.
_INPUTS_FIRST = (nn.Embedding, *_TRANSPOSED)


def spec_of(module: nn.Module, names: Iterable[str]) -> LayerSpec:
    """The numbers of a linear layer, convolution or embedding. Raises UnsupportedLayerError for any other module.

    Sizes are those of the weight, which torch computes with: who cuts a weight may leave what the layer says of it.
    """
    names = tuple(names)
    if not isinstance(module, LAYERS):
        raise UnsupportedLayerError(
            f"{names[0]!r} is a {type(module).__name__}; expected nn.Linear, nn.Embedding or nn.Conv*"
        )
    weight: Any = weight_of(module)
    one, other = weight.shape[0], weight.shape[1] * getattr(module, "groups", 1)
    inputs, outputs = (one, other) if isinstance(module, _INPUTS_FIRST) else (other, one)
    common: dict[str, Any] = {
        "names": names,
        "in_channels": inputs,
        "out_channels": outputs,
        "bias": getattr(module, "bias", None) is not None,
        "dtype": weight.dtype,
        "device": str(weight.device),
    }
    if isinstance(module, nn.Linear):
        return LayerSpec(**common)
    if isinstance(module, nn.Embedding):
        return Lookup(padding_idx=module.padding_idx, **common)
    conv: Any = module
    return LayerSpec(
        kernel=tuple(weight.shape[2:]),
        stride=tuple(conv.stride),
        padding=_padding(conv),
        dilation=tuple(conv.dilation),
        output_padding=tuple(conv.output_padding),
        groups=conv.groups,
        transposed=isinstance(conv, _TRANSPOSED),
        padding_mode=conv.padding_mode,
        **common,
    )


def _padding(module: Any) -> tuple[int, ...] | str:
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    return module.padding if isinstance(module.padding, str) else tuple(module.padding)


def canonical(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight as ``[g, o, i, *k]`` and bias, detached. Views where torch's layout allows it."""
    weight, bias = opened(module)
    return weight.detach(), None if bias is None else bias.detach()


def opened(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """As :func:`canonical`, with gradients."""
    weight = module.weight
    bias = getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    groups = getattr(module, "groups", 1)
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    if isinstance(module, _INPUTS_FIRST):
        grouped = grouped.transpose(1, 2)
    return grouped, bias if isinstance(bias, Tensor) else None


def paths_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """The names of each module, in order of registration."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name)
    return names


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's layers itself, and nothing that stands for one."""
    return type(module) in LAYERS


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a layer whose weight can be read as an ordinary tensor of numbers."""
    weight = weight_of(module) if isinstance(module, LAYERS) else None
    return isinstance(weight, Tensor) and not is_lazy(weight) and weight.dim() > 1 and weight.numel() > 0


def weight_of(module: nn.Module) -> Any:
    """A layer's weight as evaluation reads it: in training, reading a spectral norm moves what it is computed from."""
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight
    parts = module.get_submodule("parametrizations")
    with modes_kept(parts), torch.no_grad():
        parts.eval()
        return module.weight


def is_quantised(module: nn.Module) -> bool:
    home = type(module).__module__
    return "quantized" in home and hasattr(module, "weight") and not isinstance(module, nn.Sequential)


def tied_weights(model: nn.Module) -> dict[int, list[str]]:
    """Paths of the modules that hold each weight, for weights held by more than one module."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in holders.items() if len(names) > 1}


def run_with(host: Any, spec: LayerSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a plain layer, the host, would answer with this weight (in torch's layout) and this bias."""
    if not spec.kernel:
        return F.linear(x, weight, bias)
    if spec.transposed:
        up = _UP_BY_AXES[len(spec.kernel)]
        return up(x, weight, bias, host.stride, host.padding, host.output_padding, host.groups, host.dilation)
    # torch's own way to run a convolution with another weight: it knows every padding.
    return host._conv_forward(x, weight, bias)
