"""Weights that no layer of :func:`spectrim.find` holds: whose they are, why they are left alone, what frees them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spectrim.errors import first_few
from spectrim.network.sites import Skipped

_RECURRENT = (
    "recurrent: one kernel multiplies its matrices step after step, where no pair of layers can stand. Train it with a "
    "smaller hidden_size or a proj_size, or write its cell with nn.Linear layers"
)
_REASONS: dict[type[nn.Module], str] = {
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: "a recurrent cell: it multiplies its matrices itself. Write it with nn.Linear layers",
    nn.EmbeddingBag: "it sums the rows that it looks up, which no pair of layers does. Use nn.Embedding and sum",
    nn.Bilinear: "bilinear: its weight has three axes and takes two inputs, which no pair of layers does",
    nn.MultiheadAttention: (
        "it multiplies its weights itself. Compress spectrim.with_linear_layers(model), which computes the same with "
        "nn.Linear layers (if it appends keys or has a forward of its own, write it with those)"
    ),
}
# By the name of the class, so that the library need not be there.
_BY_NAME = {
    "Conv1D": (
        "a linear layer that holds its weight transposed. Compress spectrim.with_linear_layers(model), which computes "
        "the same with nn.Linear layers (Conv1D of transformers; in place of any other put one with conv.weight.T)"
    )
}
_SCRIPTED = (
    "compiled by TorchScript, whose layers cannot be replaced. Compress the Python model that it was made from, and "
    "script or trace the result"
)


def unheld(
    model: nn.Module, layers: Mapping[nn.Module, tuple[str, ...]], covered: Collection[int]
) -> Iterator[Skipped]:
    """The modules that hold matrices of their own, with the reason and what they store; none of the layers."""
    told = [path for paths in layers.values() for path in paths]
    counted = set(covered)
    for name, module in model.named_modules():
        if any(name == path or name.startswith(f"{path}.") for path in told):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            told.append(name)
            if any(p.dim() > 1 for p in module.parameters()) or not name:
                yield Skipped(name, type(module).__name__, _SCRIPTED, stored(module.parameters(), counted))
            if not name:
                return
            continue
        yield from _held(name, module, counted)
        yield from _unregistered(name, module, counted)


def _held(name: str, module: nn.Module, counted: set[int]) -> Iterator[Skipped]:
    """A module that holds matrices of its own: as parameters, or as buffers that files hold."""
    kind = type(module).__name__

    def new(held: Mapping[str, Any]) -> dict[str, Any]:
        return {key: tensor for key, tensor in held.items() if tensor is not None and id(tensor) not in counted}

    own = new(module._parameters)
    if matrices := [key for key, p in own.items() if not is_lazy(p) and _is_matrix(p)]:
        yield Skipped(name, kind, _reason(module, matrices), stored(own.values(), counted))
    kept = {key: b for key, b in new(module._buffers).items() if _is_matrix(b)}
    passing = module._non_persistent_buffers_set
    if keys := [key for key, b in kept.items() if "weight" in key or (b.is_floating_point() and key not in passing)]:
        counted.update(id(kept[key]) for key in keys)
        shapes = first_few([f"{key} {tuple(kept[key].shape)}" for key in keys])
        reason = (
            f"its {shapes} {'is a buffer' if len(keys) == 1 else 'are buffers'} ({kept[keys[0]].dtype}) and no layer's "
            "parameter: a table, or a frozen, packed or quantised weight. What is multiplied and may become smaller "
            "belongs into a layer, frozen by requires_grad_(False)"
        )
        nbytes = sum(kept[key].numel() * kept[key].element_size() for key in keys if key not in passing)
        yield Skipped(name, kind, reason, {"bytes": float(nbytes)})


def stored(parameters: Iterable[nn.Parameter], counted: set[int]) -> dict[str, float]:
    """Numbers and bytes of parameters that were not counted before, which they are now."""
    new = {id(p): p for p in parameters if id(p) not in counted and not is_lazy(p)}
    counted.update(new)
    return {
        "parameters": float(sum(p.numel() for p in new.values())),
        "bytes": float(sum(p.numel() * p.element_size() for p in new.values())),
    }


def _is_matrix(tensor: Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) > 1


def _reason(module: nn.Module, names: list[str]) -> str:
    for kind, reason in _REASONS.items():
        if isinstance(module, kind):
            return reason
    if type(module).__name__ in _BY_NAME:
        return _BY_NAME[type(module).__name__]
    shapes = first_few([f"{name} {tuple(module._parameters[name].shape)}" for name in names])  # type: ignore[union-attr]
    return (
        f"it holds {shapes} itself and is no layer. If these are multiplied (functional convolution or linear, "
        "einsum, matmul), put them into nn.Linear or nn.Conv modules"
    )


def _unregistered(name: str, module: nn.Module, counted: set[int]) -> Iterator[Skipped]:
    """Parameters in plain lists and dictionaries, which torch does not know of."""
    for key, value in vars(module).items():
        if key.startswith("_"):
            continue
        several = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else ()
        hidden = [p for p in several if isinstance(p, nn.Parameter) and _is_matrix(p) and id(p) not in counted]
        if hidden:
            where = f"{name}.{key}" if name else key
            yield Skipped(
                where, type(value).__name__,
                "parameters in a plain container, which torch neither moves nor saves and no cost counts. Use "
                "nn.ParameterList or nn.ParameterDict",
            )  # fmt: skip
