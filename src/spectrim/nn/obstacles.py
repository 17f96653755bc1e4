"""Why layers cannot be factorised, in words for those who wonder where a layer is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from spectrim.network.layer import LayerSpec
from spectrim.network.sites import tied_to
from spectrim.nn.layers import is_quantised, weight_of
from spectrim.nn.parameters import asked
from spectrim.nn.standing import LAYERS, StandIn

# Of a part of a compressed layer.
MERGE = "To compress the layer again, compress spectrim.merge(model)"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What older functions of torch leave beside a weight that they compute, by the end of its name, and what takes it away.
_REMOVES = {
    "g": "torch.nn.utils.remove_weight_norm",
    "mask": "torch.nn.utils.prune.remove",
    "u": "torch.nn.utils.remove_spectral_norm",
}


def pointless(spec: LayerSpec) -> str | None:
    _, o, i, *_ = spec.shape
    if spec.groups > 1 and (i == 1 or o == 1):
        return "depthwise: each group has one channel, so there is no matrix to factor"
    return None


def obstacle(model: nn.Module, module: nn.Module, paths: tuple[str, ...], tied: Mapping[int, list[str]]) -> str | None:
    """Why a layer cannot be factorised, or None."""
    if reason := obstacle_in_weight(module) or _changes_forward(module) or _changes_rows(module):
        return reason
    if reason := _read_above(model, paths):
        return reason
    for name, tensor in module._parameters.items():
        if id(tensor) in tied:
            others = ", ".join(n or "the model itself" for n in tied[id(tensor)] if n not in paths)
            part = any(isinstance(above, StandIn) for above in _above(model, paths))
            return f"its {name} is tied to {others}. {MERGE}" if part else tied_to(name, others)
    if module._modules:
        return f"it holds modules of its own ({', '.join(module._modules)}): move them to the module that holds it"
    return "the model itself is this layer: wrap it in nn.Sequential" if "" in paths else None


def _is_of_quantisation(module: nn.Module | None) -> bool:
    """Whether a module is a layer or an observer that preparing for quantisation has put there."""
    return type(module).__module__.startswith("torch.ao.")


def obstacle_in_weight(module: nn.Module) -> str | None:
    """Why the weight of a layer cannot be read as a plain tensor of numbers, or None."""
    if is_quantised(module) or any(map(_is_of_quantisation, (module, *module._modules.values()))):
        return "quantised, or prepared for it: compress the network before that, and quantise what comes of it"
    if is_lazy(weight_of(module)):
        return "lazy: run the model once so that its weight has a shape"
    # Weight and spectral normalisation of the older kind, and pruning masks, set the weight before every call.
    if parametrize.is_parametrized(module) or not _holds_its_own(module):
        return _computed(module)
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.dtype not in _DTYPES:
        return f"its weight is not a floating-point tensor ({getattr(weight, 'dtype', type(weight).__name__)})"
    # Quantised and distributed weights pass for floating-point ones by a tensor type of their own.
    if type(weight) not in (Tensor, nn.Parameter) or weight.layout != torch.strided:
        return (
            f"its weight is a {type(weight).__name__} of layout {weight.layout}, not a plain dense tensor: compress "
            "the network before it is sharded or quantised"
        )
    if not weight.numel():
        return "empty: it has no inputs or no outputs"
    if weight.dim() < 2:
        return f"its weight is of shape {tuple(weight.shape)}: compress the network before it is sharded or quantised"
    return "its weight is on the meta device and has no values" if weight.is_meta else None


def _holds_its_own(layer: nn.Module) -> bool:
    """Whether weight and bias are parameters of the layer, and not computed before every call."""
    wanted = {"weight"} if isinstance(layer, nn.Embedding) else {"weight", "bias"}
    return wanted <= layer._parameters.keys()


def _changes_forward(module: nn.Module) -> str | None:
    """Why a layer is not run as torch runs it, or None."""
    base = next(b for b in LAYERS if isinstance(module, b))
    if "forward" in vars(module):
        return f"its forward was replaced on this object: delete it, or put a plain nn.{base.__name__} in its place"
    if any(getattr(type(module), name, None) is not getattr(base, name, None) for name in ("forward", "_conv_forward")):
        name = type(module).__name__
        kind = f"{type(module).__module__}.{name}" if name == base.__name__ else name
        return f"{kind} overrides forward: put a plain nn.{base.__name__} in its place"
    return None


def _read_above(model: nn.Module, paths: Sequence[str]) -> str | None:
    """Why modules that hold a layer read its weight, or None."""
    for path in paths:
        parent = model.get_submodule(path.rpartition(".")[0]) if path else model
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight directly: compress spectrim.with_linear_layers(model)"
    if any(asked(above, "reads_weights") for above in _above(model, paths)):
        return f"its weight is one part of a layer's. {MERGE}"
    return None


def _above(model: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    """The modules that hold a layer, from the model on."""
    for path in paths:
        names = path.split(".")
        yield from (model.get_submodule(".".join(names[:n])) for n in range(len(names)))


def _changes_rows(module: nn.Module) -> str | None:
    """Why the rows of a table are not what is looked up, or not trained as they are; None if they are."""
    if not isinstance(module, nn.Embedding):
        return None
    if module.max_norm is not None:
        return "max_norm changes its rows when they are looked up, which those of a pair are not: scale them beforehand"
    if module.sparse or module.scale_grad_by_freq:
        return "its gradients are sparse or scaled by how often a row is asked for, which those of a pair are not"
    return None


def _computed(module: nn.Module) -> str:
    """Why weight and bias are no parameters of a layer, and how to make them such."""
    left = {name.rpartition("_")[2] for name in (*module._parameters, *module._buffers) if "_" in name}
    removes = [function for part, function in _REMOVES.items() if part in left]
    if parametrize.is_parametrized(module):
        removes = ["torch.nn.utils.parametrize.remove_parametrizations"]
    if removes:
        return f"parametrised: remove the parametrisation first ({removes[0]})"
    name = next(name for name in ("weight", "bias") if name not in module._parameters)
    what = "a buffer" if name in module._buffers else "set from outside"
    return f"its {name} is {what} and no parameter: make it an nn.Parameter; compress what FSDP shards before that"
