"""Sparse weights as files hold them: the values inside the mask in one row, and the packed positions of kept units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.linalg.packing import pack, packed_bytes, unpack
from spectrim.nn.sparse.layers import Masked, laid_open, laid_out
from spectrim.nn.stored import name_in


def masked_layers(model: nn.Module) -> Iterator[tuple[str, str, Masked]]:
    """Layers with a mask, each once: the names of weight and mask in the model's state, and the layer."""
    for name, module in model.named_modules():
        if isinstance(module, Masked):
            prefix = f"{name}." if name else ""
            yield f"{prefix}layer.weight", f"{prefix}mask", module


def masked_in(model: nn.Module, state: Mapping[str, Any]) -> Iterator[tuple[str, str, Masked]]:
    """The same with the names of weight and mask in a state of the model, where it has both."""
    taken: set[str] = set()
    for *usual, layer in masked_layers(model):
        tensors: Any = (layer.layer.weight, layer.mask)
        weight, mask = (name_in(state, name, t, taken) for name, t in zip(usual, tensors, strict=True))
        if weight is not None and mask is not None:
            taken |= {weight, mask}
            yield weight, mask, layer


def values_inside(layer: Masked, weight: Tensor) -> Tensor:
    """A weight's entries inside a layer's mask, ``[kept * entries]``: unit after unit in the order of the pattern."""
    opened = layer.pattern.open(laid_open(weight, layer.original))
    return opened.reshape(-1, opened.shape[-1])[_units(layer)].reshape(-1)


def packed_mask(layer: Masked, density: object = None) -> Tensor:
    """Which units are kept, as bytes (:func:`spectrim.linalg.packing.pack`).

    Raises ValueError if the mask does not have its pattern, but parts of units or pools of different sizes, or has
    another density than one that is given as a number.
    """
    units = _units(layer)
    if not torch.equal(layer.pattern.expand(units, layer.original.shape), layer.support):
        raise ValueError(f"the mask keeps parts of the units of its pattern {layer.pattern.name!r}")
    _check_pools(layer, units)
    if isinstance(density, (int, float)):
        shape = layer.original.shape
        wanted = layer.pattern.size(shape)[0] * layer.pattern.kept(shape, density)
        if int(units.sum()) != wanted:
            raise ValueError(f"the mask keeps {int(units.sum())} units, and the plan's density of {density} {wanted}")
    return pack(units)


def stored_bytes(layer: Masked) -> tuple[int, int]:
    """Bytes of the values and of the packed positions."""
    units, weight = _units(layer), layer.layer.weight
    assert isinstance(weight, Tensor)
    _, _, entries = layer.pattern.size(layer.original.shape)
    kept = int(units.sum())
    return kept * entries * weight.element_size(), packed_bytes(units.numel(), kept)


def read_mask(layer: Masked, positions: Tensor) -> Tensor:
    """Inverse of :func:`packed_mask` for a layer with any mask of as many units, in the layout of the layer's weight.

    The positions may be anyone's: nothing is allocated that the layer does not take anyway, and what are no positions
    of so many units, or not of the pattern, raises ValueError.
    """
    own = _units(layer)
    units = unpack(positions, own.numel(), int(own.sum()))
    _check_pools(layer, units)
    return laid_out(layer.pattern.expand(units, layer.original.shape), layer.original)


def read_weight(layer: Masked, mask: Tensor, values: Tensor) -> Tensor:
    """Inverse of :func:`values_inside` for a mask from :func:`read_mask`; ValueError for what are no such values."""
    shape, weight = layer.original.shape, layer.layer.weight
    assert isinstance(weight, Tensor)
    pools, count, entries = layer.pattern.size(shape)
    units = layer.pattern.units(laid_open(mask, layer.original))
    wanted = (int(units.sum()) * entries,)
    if values.shape != wanted or not values.is_floating_point():
        raise ValueError(
            f"it holds {values.dtype} of shape {tuple(values.shape)}; expected floating-point values inside the mask, "
            f"of shape {wanted}"
        )
    rows = torch.zeros(pools * count, entries, dtype=weight.dtype)
    rows[units] = values.to(weight.dtype).reshape(-1, entries)
    return laid_out(layer.pattern.close(rows.reshape(pools, count, entries), shape), layer.original)


def opened_state(layer: Masked, state: dict[str, Tensor], weight: str, mask: str) -> None:
    """Put a whole weight and mask in place of packed ones in a state, if it has such."""
    if weight in state and mask in state and state[mask].dtype == torch.uint8:
        state[mask] = read_mask(layer, state[mask])
        state[weight] = read_weight(layer, state[mask], state[weight])


def _units(layer: Masked) -> Tensor:
    return layer.pattern.units(layer.support)


def _check_pools(layer: Masked, units: Tensor) -> None:
    pools, count, _ = layer.pattern.size(layer.original.shape)
    kept = units.reshape(pools, count).sum(1)
    if int(kept.max()) != int(kept.min()):
        raise ValueError(
            f"the mask keeps from {int(kept.min())} to {int(kept.max())} of {count} units in a pool; the pattern "
            f"{layer.pattern.name!r} keeps the same number in each"
        )
