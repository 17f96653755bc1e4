"""Layers and shapes of a plan in a dense model, whose values are to be loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from pathlib import Path

from torch import nn

from spectrim.errors import CheckpointError, PlanError
from spectrim.network.choices import ChannelsChoice
from spectrim.network.coupling import IN
from spectrim.network.sites import Sites
from spectrim.nn.build import skeleton
from spectrim.nn.channels.narrow import add_bias, reshape
from spectrim.nn.find import find
from spectrim.nn.layers import spec_of
from spectrim.nn.standing import StandIn
from spectrim.nn.surgery import replace_module
from spectrim.selection.plan import Plan


@contextlib.contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Say of a plan or file that is wrong where it stands, as a CheckpointError."""
    try:
        yield
    except (CheckpointError, PlanError) as error:
        raise CheckpointError(f"{place}: {error}") from (error.__cause__ or error)


def rebuild(model: nn.Module, plan: Plan, names: Container[str]) -> None:
    """Give a dense model the layers and shapes of a plan, in place; tensors of these ``names`` are to be loaded.

    Raises CheckpointError or PlanError, which name the first layer that the plan does not fit.
    """
    sites = find(model)
    if any(name not in sites for entry in plan for name in entry.sites if not entry.of_channels):
        # Before version 0.3 what was compressed again were the layers of a pair.
        sites = find(model, parts=True)
    _narrow(model, plan, names)
    _rebuild(model, sites, plan)


def _narrow(model: nn.Module, plan: Plan, names: Container[str]) -> None:
    """Give modules the shapes that a removal of channels left."""
    lost: dict[tuple[str, str], int] = {}
    try:
        for entry in plan:
            if isinstance(entry.choice, ChannelsChoice):
                for place in entry.choice.lost:
                    lost[place.module, place.axis] = lost.get((place.module, place.axis), 0) + place.entries
        for (name, axis), count in lost.items():
            if count:
                reshape(model, name, axis, count)
        for name, axis in lost:
            if axis == IN and f"{name}.bias" in names:
                add_bias(model.get_submodule(name), name)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(str(error)) from error


def check_dense(model: nn.Module, plan: Plan) -> None:
    """Raise CheckpointError if a layer of the first plan has been compressed already."""
    modules = dict(model.named_modules())
    for name in (name for entry in plan if not entry.choice.is_dense for name in entry.sites):
        if isinstance(modules.get(name), StandIn):
            raise CheckpointError(f"the plan changes layer {name!r}, but {_absent(model, name)}")


def _absent(model: nn.Module, name: str) -> str:
    """Why there is no such layer to change."""
    if isinstance(dict(model.named_modules()).get(name), StandIn):
        return "it is compressed already in this model: load into the network as it was before any compression"
    return "this model does not have it: load into the network that was compressed, made with the same arguments"


def _rebuild(model: nn.Module, sites: Sites, plan: Plan) -> None:
    for entry in plan:
        if entry.choice.is_dense or isinstance(entry.choice, ChannelsChoice):
            continue
        for name in entry.sites:
            if name not in sites:
                reasons = {skipped.name: skipped.reason for skipped in sites.skipped}
                why = reasons.get(name, _absent(model, name))
                raise CheckpointError(f"the plan changes layer {name!r}, but {why}")
        # As narrow as they are now: a grouped layer that is left one channel a group is a site no longer.
        layers = [spec_of(model.get_submodule(name), sites.layer(name).spec.names) for name in entry.sites]
        for spec, module in zip(layers, skeleton(entry.choice, layers), strict=True):
            replace_module(model, spec.names, module)
