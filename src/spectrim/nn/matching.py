"""Tensors and values of a file and those of a model: packed for the one, and opened and held against the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import CheckpointError
from spectrim.network import tensor_files
from spectrim.network.state_values import alike, is_ordinary, put_together
from spectrim.nn.sparse.layers import Masked, Slim
from spectrim.nn.sparse.packed import masked_in, packed_mask, read_mask, read_weight, values_inside


def pack_state(
    model: nn.Module,
    state: dict[str, Tensor],
    whole: Mapping[str, Any],
    density_of: Callable[[Masked], object] = lambda layer: None,
) -> list[list[str]]:
    """Put values and packed positions in place of whole weights and masks in a state; the names of each pair.

    ``whole`` is the state with all names of tensors that are the same memory; what the state has under another layer's
    name stays as it is there. A mask that has not the pattern, or the density where that is known, raises
    CheckpointError.
    """
    packed: list[list[str]] = []
    for weight, mask, layer in list(masked_in(model, whole)):
        if weight not in state or mask not in state:
            continue
        try:
            state[mask] = packed_mask(layer, density_of(layer))
        except ValueError as error:
            raise CheckpointError(f"tensor {mask!r} cannot be packed: {error}") from error
        state[weight] = values_inside(layer, state[weight])
        packed.append([weight, mask])
    return packed


def unpack_layers(
    layers: dict[tuple[str, str], Masked],
    tensors: dict[str, Tensor],
    packed: Sequence[Sequence[str]],
) -> None:
    """Put whole weights and masks in place of packed ones, by their names."""
    for weight, mask in packed:
        # A pair that comes twice has left the table.
        layer = layers.pop((weight, mask), None)
        if layer is None:
            raise CheckpointError(
                f"packs {weight!r} and {mask!r}, which are not weight and mask of a sparse layer of the plan"
            )
        name = mask
        try:
            tensors[mask] = read_mask(layer, tensors[mask])
            name = weight
            tensors[weight] = read_weight(layer, tensors[mask], tensors[weight])
        except KeyError:
            raise CheckpointError(f"the packed tensor {name!r} is missing") from None
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"the packed tensor {name!r} cannot be read: {error}") from error


def share_memory(tensors: dict[str, Tensor], owners: Mapping[str, str]) -> None:
    """Give tensors that are the same memory all their names."""
    for name, source in owners.items():
        if source not in tensors:
            raise CheckpointError(f"tensor {name!r} shares {source!r}, which the file does not hold")
        tensors[name] = tensors[source]


def values_of(state: Mapping[str, Any], tensors: dict[str, Tensor], records: Mapping[str, Any]) -> dict[str, Any]:
    """What is no plain tensor; those that it is made of are taken out."""
    missing = [name for name, value in state.items() if not is_ordinary(value) and name not in records]
    if missing:
        raise CheckpointError(
            f"belongs to another architecture: its {missing[0]!r} is not the "
            f"{type(state[missing[0]]).__name__} that the model holds"
        )
    found: dict[str, Any] = {}
    parts: set[str] = set()
    for name, record in records.items():
        try:
            found[name], used = put_together(record, tensors)
        except ValueError as error:
            raise CheckpointError(f"{name!r}: {error}") from error
        if name not in state or not alike(found[name], state[name]):
            raise CheckpointError(f"belongs to another architecture: {name!r} is another value in the model")
        parts |= used
    for name in parts:
        del tensors[name]
    return found


def check_fits(model: nn.Module, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for tensors that are not those of a model with this state."""
    _check_shapes(state, tensors)
    _check_shared(state, tensors)
    _check_channels(model, tensors)


def _check_shapes(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in state if name not in tensors]
    surplus = [name for name in tensors if name not in state]
    if missing or surplus:
        raise CheckpointError(
            f"belongs to another architecture: {len(missing)} tensors missing"
            f"{f' (first {missing[0]!r})' if missing else ''}, {len(surplus)} unknown"
            f"{f' (first {surplus[0]!r})' if surplus else ''}"
        )
    for name, tensor in state.items():
        given = tensors[name]
        if given.shape != tensor.shape:
            raise CheckpointError(
                f"was made for another architecture, or is damaged: tensor {name!r} has shape "
                f"{tuple(given.shape)}, the model's has {tuple(tensor.shape)}"
            )
        if given.dtype != tensor.dtype and not (given.is_floating_point() and tensor.is_floating_point()):
            raise CheckpointError(f"tensor {name!r} is {given.dtype}, the model's is {tensor.dtype}")


def _check_shared(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """What is one tensor in the model must be one in the file, or equal: only the last would be kept."""
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not tensor.numel() or tensor.is_meta:
            continue
        owner = owners.setdefault(tensor_files.memory_of(tensor), name)
        if tensors[name] is not tensors[owner] and not torch.equal(tensors[name], tensors[owner]):
            raise CheckpointError(f"tensors {owner!r} and {name!r} are one in this model and differ in the file")


def _check_channels(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The channels that thinner layers see must be there: they are read by number."""
    for name, module in model.named_modules():
        if isinstance(module, Slim):
            g, _, i, *_ = module.original.shape
            key = f"{name}.channels"
            numbers = tensors[key].reshape(g, -1).long()
            first = i * torch.arange(g).unsqueeze(1)
            inside = (numbers >= first) & (numbers < first + i)
            if not bool(inside.all()) or not bool((numbers.diff(dim=1) > 0).all()):
                raise CheckpointError(
                    f"tensor {key!r} does not name different input channels of {module.original.kind}, "
                    f"ascending from 0 to {module.original.in_channels - 1}, the same number in each group"
                )
