"""Cut modules along the axes that lose channels, and build them anew for weights to be loaded into."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from spectrim.errors import PlanError
from spectrim.network.coupling import IN, OUT, THROUGH, Axis, Side
from spectrim.nn.channels.numbers import number_at, set_number
from spectrim.nn.channels.rules import ChannelRule, Held, is_registered, picked, rule_of
from spectrim.nn.layers import spec_of
from spectrim.nn.modules import Chained, Factored
from spectrim.nn.parameters import in_place_of
from spectrim.nn.standing import StandIn, sized

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


@torch.no_grad()
def narrow(model: nn.Module, axes: Mapping[Axis, Tensor]) -> None:
    """Keep some positions of every named axis, in place (:func:`spectrim.network.coupling.axes_left`).

    Raises PlanError if the model does not have such a module, or its axis cannot be cut so.
    """
    for (name, axis), kept in axes.items():
        owner, leaf = _owner(model, name)
        module = getattr(owner, leaf) if leaf else owner
        try:
            if isinstance(module, nn.Parameter):
                setattr(owner, leaf, picked(module, int(axis), kept))
            elif not isinstance(module, nn.Module):
                raise ValueError(f"is a {type(module).__name__}")
            elif axis.startswith("."):
                set_number(module, axis[1:], len(kept))
            else:
                rule = rule_along(module, axis)
                if rule is None:
                    raise ValueError(f"a {type(module).__name__} has no channels that can be cut")
                rule.cut(module, kept)
        except (ValueError, IndexError, RuntimeError) as error:
            raise PlanError(f"{name!r}: cannot cut axis {axis!r} to {len(kept)}: {error}") from error
    _follow(model)


def reshape(model: nn.Module, name: str, axis: str, fewer: int) -> None:
    """Make an axis shorter, whatever its values: a checkpoint brings those. Raises PlanError as :func:`narrow` does."""
    owner, leaf = _owner(model, name)
    module = getattr(owner, leaf) if leaf else owner
    size, pools = axis_length(module, axis), pools_of(module, axis)
    if size is None:
        raise PlanError(f"{name!r} is a {type(module).__name__}, which has no axis {axis!r} that can be cut")
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


@dataclass(frozen=True)
class _Along:
    """How a module of torch loses entries of an axis: an attribute is its length, and tensors lie along it."""

    attribute: str
    held: Held

    def size(self, module: nn.Module) -> int:
        size = getattr(module, self.attribute)
        return size[-1] if isinstance(size, tuple) else size

    def cut(self, module: nn.Module, kept: Tensor) -> None:
        pools = pools_of(module, THROUGH)
        _runs(kept, pools, self.size(module) // pools)
        self.held.cut(module, kept)
        size = getattr(module, self.attribute)
        setattr(module, self.attribute, (*size[:-1], len(kept)) if isinstance(size, tuple) else len(kept))


@dataclass(frozen=True)
class _OfConvolution:
    """How a convolution loses what it writes, reads, or both."""

    axis: str

    def size(self, module: _ConvNd) -> int:
        return module.out_channels if self.axis == OUT else module.in_channels

    def cut(self, module: _ConvNd, kept: Tensor) -> None:
        _cut_conv(module, self.axis, kept)


_OF_NORM = Held({"weight": -1, "bias": -1, "running_mean": 0, "running_var": 0})
_LAYERS: dict[type[nn.Module], Mapping[str, ChannelRule]] = {
    _ConvNd: {axis: _OfConvolution(axis) for axis in (OUT, IN, THROUGH)},
    nn.Linear: {
        OUT: _Along("out_features", Held({"weight": 0, "bias": 0})),
        IN: _Along("in_features", Held({"weight": 1})),
    },
    nn.Embedding: {OUT: _Along("embedding_dim", Held({"weight": 1}))},
}
_BETWEEN: dict[type[nn.Module], Mapping[str, ChannelRule]] = {
    nn.LayerNorm: {THROUGH: _Along("normalized_shape", _OF_NORM)},
    nn.GroupNorm: {THROUGH: _Along("num_channels", _OF_NORM)},
    nn.PReLU: {THROUGH: _Along("num_parameters", _OF_NORM)},
    _BatchNorm: {THROUGH: _Along("num_features", _OF_NORM)},
    _InstanceNorm: {THROUGH: _Along("num_features", _OF_NORM)},
}


def rule_along(module: Any, axis: str) -> ChannelRule | None:
    """How a module loses entries of an axis, if it can: as torch's own, as its class is registered, or as it holds."""
    if isinstance(module, StandIn) or not isinstance(module, nn.Module):
        return None
    kinds = _LAYERS if is_registered(module) else _LAYERS | _BETWEEN
    for kind, rules in kinds.items():
        if isinstance(module, kind):
            return rules.get(axis)
    known = rule_of(module) if axis == THROUGH else None
    return None if known is None else known[0]


def axis_length(module: Any, axis: str) -> int | None:
    """Length of an axis of a module or parameter, or the number that an attribute is; None where there is none."""
    if axis.startswith("."):
        return number_at(module, axis[1:])
    if isinstance(module, nn.Parameter):
        return module.shape[int(axis)] if axis.isdecimal() and int(axis) < module.dim() else None
    rule = rule_along(module, axis)
    return None if rule is None else rule.size(module)


def pools_of(module: Any, axis: str) -> int:
    """The number of equal runs of an axis that all have to lose the same."""
    if isinstance(module, _ConvNd) and axis != THROUGH:
        return module.groups
    return module.num_groups if isinstance(module, nn.GroupNorm) else 1


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
        runs = _runs(kept, groups, size // groups)
        # [g, o, i, *k], or [g, i, o, *k] of a transposed convolution.
        dim = 1 if (axis == OUT) != module.transposed else 2
        index = runs.reshape(groups, *(-1 if d == dim else 1 for d in range(1, weight.dim())))
        left = torch.take_along_dim(weight, index, dim)
        cut = left.reshape(-1, *left.shape[2:])
        if axis == OUT:
            module.out_channels = len(kept)
        else:
            module.in_channels = len(kept)
    if axis != IN and module.bias is not None:
        module.bias = cast(nn.Parameter, picked(module.bias, 0, kept))
    module.weight = in_place_of(cast(nn.Parameter, module.weight), cut.clone())


def _runs(kept: Tensor, groups: int, pool: int) -> Tensor:
    """Positions within each of ``groups`` runs of ``pool``, ``[groups, n]``."""
    counts = torch.bincount((kept // pool).cpu(), minlength=groups)
    if len(counts) > groups:
        raise ValueError(f"entry {int(kept.max())} lies beyond the end, at {groups * pool}")
    if bool((counts != counts[0]).any()):
        raise ValueError(f"its {groups} groups would keep different numbers of channels, {counts.tolist()}")
    return (kept % pool).reshape(groups, -1)


def _follow(model: nn.Module) -> None:
    """Bring what compressed layers know of the layer they stand for up to date."""
    for module in model.modules():
        if not isinstance(module, (Factored, Chained)):
            continue
        first, last = module[0], module[-1]
        if isinstance(first, (_ConvNd, nn.Linear, nn.Embedding)) and isinstance(last, (_ConvNd, nn.Linear)):
            inputs, outputs = spec_of(first, ("first",)), spec_of(last, ("last",))
            module.original = dataclasses.replace(
                module.original, in_channels=inputs.in_channels, out_channels=outputs.out_channels
            )
            sized(module)
