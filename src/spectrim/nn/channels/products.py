"""What channels take of the products that modules multiply themselves, as those of attention and of graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from torch import nn

from spectrim.network.coupling import Coupling, axes_left
from spectrim.nn.channels.narrow import narrow
from spectrim.nn.channels.rules import layers_of
from spectrim.nn.channels.trial import Trial, half
from spectrim.nn.copying import copy_model
from spectrim.nn.flops import WorkCounter
from spectrim.nn.watch.state import evaluating


def with_products(trial: Trial, couplings: Sequence[Coupling]) -> Iterator[Coupling]:
    """The couplings with the share that one of their channels has of such products."""
    counted = _own_macs(trial, trial.model) if couplings else {}
    for coupling in couplings:
        yield dataclasses.replace(coupling, products=_shares(trial, coupling, counted)) if counted else coupling


def _shares(trial: Trial, coupling: Coupling, counted: Mapping[str, float]) -> Mapping[str, float]:
    """What a channel takes of each module's products, by the module's path: seen without half of the channels."""
    kept = half(coupling)
    small = copy_model(trial.model)
    narrow(small, axes_left([coupling], {coupling.name: kept}))
    now = _own_macs(trial, small)
    gone = coupling.channels - len(kept)
    lost = {path: (1 - now.get(path, 0.0) / work) / gone for path, work in counted.items()}
    return MappingProxyType({path: share for path, share in lost.items() if share > 0})


def _own_macs(trial: Trial, model: nn.Module) -> dict[str, float]:
    with evaluating(model), WorkCounter() as counter:
        trial.run(model, trial.example)
    layers = {name for name, _ in layers_of(model)}
    return {path: work for path, work in counter.own_macs(model).items() if path not in layers}
