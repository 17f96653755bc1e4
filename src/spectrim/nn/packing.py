"""A model's state as files hold it: of sparse weights the values inside the mask, and the packed positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from spectrim.errors import CheckpointError
from spectrim.nn.sparse.layers import Masked
from spectrim.nn.sparse.packed import masked_in, packed_mask, values_inside


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
