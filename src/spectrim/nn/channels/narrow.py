"""Cut modules along the axes that lose channels, and build them anew for weights to be loaded into."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from spectrim.errors import PlanError
from spectrim.network.coupling import IN, OUT, THROUGH, Axis, Side
from spectrim.nn.channels.rules import is_registered, rule_of
from spectrim.nn.find import describe
from spectrim.nn.modules import Chained, Factored
from spectrim.nn.standing import StandIn, sized

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


@torch.no_grad()
def narrow(model: nn.Module, axes: Mapping[Axis, Tensor]) -> None:
    """Keep a part of every named axis, in place.

    Parameters
    ----------
    axes
        Positions that stay by the path of the module and the axis (:func:`spectrim.network.coupling.axes_left`).

    Raises
    ------
    PlanError
        If the model does not have such a module, or its axis cannot be cut so.
    """
    for (name, axis), kept in axes.items():
        owner, leaf = _owner(model, name)
        module = getattr(owner, leaf) if leaf else owner
        try:
            if isinstance(module, nn.Parameter):
                setattr(owner, leaf, _parameter(module, int(axis), kept))
            elif not isinstance(module, nn.Module):
                raise ValueError(f"is a {type(module).__name__}")
            elif axis.startswith("."):
                setattr(module, axis[1:], len(kept))
            else:
                _cut(module, axis, kept)
        except (ValueError, IndexError, RuntimeError) as error:
            raise PlanError(f"{name!r}: cannot cut axis {axis!r} to {len(kept)}: {error}") from error
    _follow(model)


def reshape(model: nn.Module, name: str, axis: str, fewer: int) -> None:
    """Make an axis shorter, whatever its values: a checkpoint brings those.

    Raises
    ------
    PlanError
        If the model has no such module, or so many entries cannot be taken from it.
    """
    owner, leaf = _owner(model, name)
    module = getattr(owner, leaf) if leaf else owner
    size, pools = _size(module, axis, name)
    left = size - fewer
    if not 1 <= left <= size or left % pools or size % pools:
        raise PlanError(f"{name!r}: {fewer} entries cannot be taken from axis {axis!r} of length {size}")
    runs = torch.arange(size).reshape(pools, -1)[:, : left // pools]
    narrow(model, {(name, axis): runs.flatten()})


@torch.no_grad()
def add_bias(module: Any, name: str) -> None:
    """Give a layer without a bias one of zeros."""
    if not isinstance(module, (_ConvNd, nn.Linear)) or isinstance(module, StandIn):
        raise PlanError(f"{name!r} is a {type(module).__name__} and cannot be given a bias")
    if module.bias is None:
        outputs = module.out_channels if isinstance(module, _ConvNd) else module.out_features
        module.bias = nn.Parameter(module.weight.new_zeros(outputs), requires_grad=module.weight.requires_grad)


def held_at(model: nn.Module, path: str) -> Any:
    """The module or parameter at a path."""
    parent, _, leaf = path.rpartition(".")
    return getattr(model.get_submodule(parent), leaf) if leaf else model


def beside_layers(model: nn.Module, sides: Sequence[Side]) -> tuple[float, float]:
    """Numbers that a channel has in modules that are no layers, and their bytes."""
    numbers = size = 0.0
    for side in sides:
        owner = held_at(model, side.name)
        if isinstance(owner, (_ConvNd, nn.Linear, nn.Embedding)) or side.axis.startswith("."):
            continue
        held = [owner] if isinstance(owner, Tensor) else [*owner.parameters(), *owner.buffers()]
        per = [t for t in held if t.numel() >= side.size]
        share = side.positions.shape[1] / side.size
        numbers += sum(t.numel() * share for t in per if isinstance(t, nn.Parameter))
        size += sum(t.numel() * t.element_size() * share for t in per)
    return numbers, size


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        if leaf:
            getattr(owner, leaf)
    except AttributeError as error:
        raise PlanError(f"the model has no module or parameter {name!r}: {error}") from error
    return owner, leaf


def _size(module: Any, axis: str, name: str) -> tuple[int, int]:
    """Length of an axis, and the number of equal runs that all have to lose the same."""
    if isinstance(module, StandIn):
        raise PlanError(f"{name!r} is a {type(module).__name__}, which has no axis {axis!r} that can be cut")
    if axis.startswith(".") and type(number := vars(module).get(axis[1:])) is int:
        return number, 1
    if isinstance(module, nn.Parameter) and axis.isdecimal() and int(axis) < module.dim():
        return module.shape[int(axis)], 1
    if isinstance(module, _ConvNd) and axis in (IN, OUT, THROUGH):
        size = module.out_channels if axis == OUT else module.in_channels
        return size, 1 if axis == THROUGH else module.groups
    if isinstance(module, nn.Linear) and axis in (IN, OUT):
        return (module.in_features if axis == IN else module.out_features), 1
    if isinstance(module, nn.Embedding) and axis == OUT:
        return module.embedding_dim, 1
    if axis == THROUGH and isinstance(module, (*NORMS, nn.PReLU)) and not is_registered(module):
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1], 1
        if isinstance(module, nn.GroupNorm):
            return module.num_channels, module.num_groups
        return (module.num_parameters if isinstance(module, nn.PReLU) else module.num_features), 1
    if axis == THROUGH and isinstance(module, nn.Module) and (known := rule_of(module)) is not None:
        return known[0].size(module), 1
    raise PlanError(f"{name!r} is a {type(module).__name__}, which has no axis {axis!r} that can be cut")


def _cut(module: nn.Module, axis: str, kept: Tensor) -> None:
    if isinstance(module, StandIn):
        raise ValueError(f"a {type(module).__name__} is cut by its parts")
    if isinstance(module, _ConvNd):
        _cut_conv(module, axis, kept)
    elif isinstance(module, nn.Linear):
        module.weight = _parameter(module.weight, 0 if axis == OUT else 1, kept)
        module.out_features, module.in_features = module.weight.shape
        if axis == OUT and module.bias is not None:
            module.bias = _parameter(module.bias, 0, kept)
    elif isinstance(module, nn.Embedding):
        module.weight = _parameter(module.weight, 1, kept)
        module.embedding_dim = len(kept)
    elif isinstance(module, (*NORMS, nn.PReLU)) and not is_registered(module):
        _cut_norm(module, kept)
    elif axis == THROUGH and (known := rule_of(module)) is not None:
        known[0].cut(module, kept)
    else:
        raise ValueError(f"a {type(module).__name__} has no channels that can be cut")


def _cut_conv(module: _ConvNd, axis: str, kept: Tensor) -> None:
    groups = module.groups
    weight = module.weight.reshape(groups, module.weight.shape[0] // groups, *module.weight.shape[1:])
    kept = kept.to(weight.device)
    if axis == THROUGH:
        if not module.in_channels == module.out_channels == groups:
            raise ValueError("only a depthwise convolution is cut on both sides at once")
        cut = weight[kept].reshape(-1, *module.weight.shape[1:])
        module.in_channels = module.out_channels = module.groups = len(kept)
    else:
        size = module.out_channels if axis == OUT else module.in_channels
        pool = size // groups
        runs = _runs(kept, groups, pool)
        # [g, o, i, *k], or [g, i, o, *k] of a transposed convolution.
        dim = 1 if (axis == OUT) != module.transposed else 2
        index = runs.reshape(groups, *(-1 if d == dim else 1 for d in range(1, weight.dim())))
        picked = torch.take_along_dim(weight, index, dim)
        cut = picked.reshape(-1, *picked.shape[2:])
        if axis == OUT:
            module.out_channels = len(kept)
        else:
            module.in_channels = len(kept)
    if axis != IN and module.bias is not None:
        module.bias = _parameter(module.bias, 0, kept)
    module.weight = nn.Parameter(cut.clone(), requires_grad=module.weight.requires_grad)


def _cut_norm(module: Any, kept: Tensor) -> None:
    for name in ("weight", "bias"):
        held = getattr(module, name, None)
        if isinstance(held, nn.Parameter) and held.numel() > 1:
            setattr(module, name, _parameter(held, held.dim() - 1, kept))
    for name in ("running_mean", "running_var"):
        held = getattr(module, name, None)
        if isinstance(held, Tensor):
            setattr(module, name, held[kept.to(held.device)].clone())
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (*module.normalized_shape[:-1], len(kept))
    elif isinstance(module, nn.GroupNorm):
        _runs(kept, module.num_groups, module.num_channels // module.num_groups)
        module.num_channels = len(kept)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(kept)
    else:
        module.num_features = len(kept)


def _runs(kept: Tensor, groups: int, pool: int) -> Tensor:
    """Positions within each of ``groups`` runs of ``pool``, ``[groups, n]``."""
    counts = torch.bincount((kept // pool).cpu(), minlength=groups)
    if len(counts) > groups:
        raise ValueError(f"entry {int(kept.max())} lies beyond the end, at {groups * pool}")
    if bool((counts != counts[0]).any()):
        raise ValueError(f"its {groups} groups would keep different numbers of channels, {counts.tolist()}")
    return (kept % pool).reshape(groups, -1)


def _parameter(held: Tensor, dim: int, kept: Tensor) -> nn.Parameter:
    cut = held.detach().index_select(dim, kept.to(held.device))
    return nn.Parameter(cut, requires_grad=held.requires_grad)


def _follow(model: nn.Module) -> None:
    """Bring what compressed layers know of the layer they stand for up to date."""
    for module in model.modules():
        if not isinstance(module, (Factored, Chained)):
            continue
        first, last = module[0], module[-1]
        if isinstance(first, (_ConvNd, nn.Linear, nn.Embedding)) and isinstance(last, (_ConvNd, nn.Linear)):
            inputs, outputs = describe(first, ("first",)), describe(last, ("last",))
            module.original = dataclasses.replace(
                module.original, in_channels=inputs.in_channels, out_channels=outputs.out_channels
            )
            sized(module)
