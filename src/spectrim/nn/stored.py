"""What files hold of a model: bytes of its state, whatever hooks of its own make of that, and names in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spectrim.network.state_values import is_ordinary, taken_apart
from spectrim.network.tensor_files import memory_of, owners
from spectrim.nn.parameters import parameters_of


def bytes_of_state(model: nn.Module, counted: Collection[int] = ()) -> int:
    """Bytes of parameters and of buffers that files hold, and of what else the state has, shared ones once.

    Those whose ``id`` is among the counted are left out.
    """
    held = {id(t): t for t in (*parameters_of(model), *_kept_buffers(model)) if not is_lazy(t)}
    size = sum(_bytes(t) for key, t in held.items() if key not in counted)
    return max(0, size + _more(model, held.values()))


def _kept_buffers(model: nn.Module) -> Iterator[Tensor]:
    for module in nn.Module.modules(model):
        passing = getattr(module, "_non_persistent_buffers_set", ())
        yield from (buffer for name, buffer in module.named_buffers(recurse=False) if name not in passing)


def _more(model: nn.Module, held: Collection[Tensor]) -> int:
    """Bytes that the state has beside parameters and buffers; less than none where it leaves some out."""
    if any(t.is_meta for t in held):
        return 0
    try:
        state = model.state_dict()
        tensors = {name: value for name, value in state.items() if is_ordinary(value)}
        for name in state.keys() - tensors.keys():
            tensors |= taken_apart(name, state[name])[1]
        stored, plain = (owners(each)[0] for each in (tensors, {str(n): t for n, t in enumerate(held)}))
        return sum(map(_bytes, stored.values())) - sum(map(_bytes, plain.values()))
    except Exception:  # of a user's own: whoever saves it is told
        return 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def name_in(state: Mapping[str, Any], usual: str, tensor: Tensor, taken: Collection[str] = ()) -> str | None:
    """The name, not yet taken, that a tensor of a model has in its state, which hooks may have renamed or copied."""
    there = state.get(usual)
    if isinstance(there, Tensor) and there.shape == tensor.shape:
        return usual
    alike = {
        name: value
        for name, value in state.items()
        if name not in taken and is_ordinary(value) and (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
    }
    same = (name for name, value in alike.items() if memory_of(value) == memory_of(tensor))
    return next(same, None) or next((name for name, value in alike.items() if torch.equal(value, tensor)), None)
