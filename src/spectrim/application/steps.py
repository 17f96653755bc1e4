"""What is done at one layer when its turn comes, and the order of the turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

from torch import nn

from spectrim.application.work import Work
from spectrim.methods import Method
from spectrim.network.choices import Choice
from spectrim.network.coupling import IN
from spectrim.network.factors import Factors
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Group, Layer, Sites
from spectrim.nn.build import build
from spectrim.nn.surgery import replace_module
from spectrim.selection.plan import Entry


class Step(Protocol):
    """What is done at one layer when its turn comes."""

    changes: ClassVar[bool]

    @property
    def layer(self) -> Layer: ...

    @property
    def sketches(self) -> bool:
        """Whether a sketch is to be held of inputs whose second moment calibration did not keep."""
        ...

    def observable(self, work: Work) -> bool:
        """Whether the layer can be fitted to its present inputs."""
        ...

    def put(self, work: Work, layer: Layer, observed: bool) -> None:
        """Fit and build what takes the place of the layer, as it was observed or calibrated, and put it there."""
        ...


@dataclass(frozen=True)
class Stays:
    """The layer stays; its weight and bias may be fitted anew."""

    changes: ClassVar[bool] = False
    sketches = False
    layer: Layer

    def observable(self, work: Work) -> bool:
        return not self.layer.present and (self.layer.statistics.input is not None or work.narrows(self.layer))

    def put(self, work: Work, layer: Layer, observed: bool) -> None:
        if not layer.present:  # what stands for the layer stays, too
            work.removal.write(layer)


@dataclass(frozen=True)
class Alone:
    """A choice for this layer."""

    changes: ClassVar[bool] = True
    layer: Layer
    method: Method
    choice: Choice

    @property
    def sketches(self) -> bool:
        return self.method.reads_sketches

    def observable(self, work: Work) -> bool:
        return self.layer.statistics.input is not None or self.method.reads_sketches or work.narrows(self.layer)

    def put(self, work: Work, layer: Layer, observed: bool) -> None:
        narrowed, spare = work.narrows(layer), None
        if (observed or narrowed) and not _biased(self.method.layers(layer, self.choice)):
            spare, layer = layer.bias, dataclasses.replace(layer, bias=None)
        factors = self.method.factorize(layer, self.choice)
        (module,) = build(factors, layer.layers, layer.biases)
        work.put(layer, module, factors, observed=observed or narrowed)
        if narrowed:
            work.removal.settle(layer.name, spare)


@dataclass
class Shared:
    """A choice for a group: its modules are made together, and fitted when the turn of each comes."""

    group: Group
    method: Method
    choice: Choice

    @cached_property
    def biased(self) -> bool:
        return _biased(self.method.layers(self.group, self.choice))

    @cached_property
    def factors(self) -> Factors:
        return self.method.factorize(self.group, self.choice)

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        return build(self.factors, self.group.layers, self.group.biases)

    def refit(self, layer: Layer, number: int) -> None:
        """Fit what one layer has of its own to its inputs and targets; the shared parameters stay the same objects."""
        module = self.modules[number]
        self.factors = self.method.refit(layer, self.factors, number)
        biases = [layer.bias if n == number else bias for n, bias in enumerate(self.group.biases)]
        module.load_state_dict(build(self.factors, self.group.layers, biases)[number].state_dict())


@dataclass(frozen=True)
class Member:
    """A choice for a group that the layer is the ``number``-th of."""

    changes: ClassVar[bool] = True
    sketches = False
    layer: Layer
    shared: Shared
    number: int

    def observable(self, work: Work) -> bool:
        return self.layer.statistics.input is not None

    def put(self, work: Work, layer: Layer, observed: bool) -> None:
        if observed:
            self.shared.refit(layer if self.shared.biased else dataclasses.replace(layer, bias=None), self.number)
        work.put(layer, self.shared.modules[self.number], self.shared.factors, observed=observed)


def put_tied(work: Work, entries: Iterable[Entry], makers: Mapping[str, Method]) -> None:
    """Put pairs in place of weights that two layers have in common, before anything else is fitted.

    They are fitted to what calibration saw: the first of the two comes before all others, and the last behind them.
    """
    tied = {site.name: site for site in work.removal.sites.tied}
    for entry in entries:
        if entry.site in tied and not entry.choice.is_dense:
            site = tied[entry.site]
            factors = makers[entry.choice.method].factorize(site, entry.choice)
            for spec, module in zip(site.layers, build(factors, site.layers, site.biases), strict=True):
                replace_module(work.removal.model, spec.names, module)


def ordered(work: Work, entries: Iterable[Entry], makers: Mapping[str, Method]) -> list[Step]:
    """What is done, in order of execution. Where it follows, also at dense layers whose bias can correct the mean.

    Only those after the first changed layer: before it, nothing has moved.
    """
    sites, removal = work.removal.sites, work.removal
    entries = list(entries)
    planned: dict[str, Step] = {}
    for entry in entries:
        planned |= _planned(sites, entry, makers)
    steps: list[Step] = []
    moved = any(entry.choice.others for entry in entries)
    for layer in sites:
        # A plan may name the channels alone; the layers that lose some are left dense then.
        step = planned.get(layer.name, Stays(layer) if work.narrows(layer) else None)
        if step is None:
            continue
        biased = layer.spec.bias or (removal.changed and removal.corrects(layer.name))
        correctable = work.follows and biased and layer.statistics.input is not None
        reads = (layer.name, IN) in removal.axes
        if step.changes or (work.follows and reads) or (moved and correctable):
            steps.append(step)
        moved |= step.changes or reads
    return steps


def _planned(sites: Sites, entry: Entry, makers: Mapping[str, Method]) -> dict[str, Step]:
    """The steps that one entry of a plan asks for, by the name of the layer."""
    layers = [sites.layer(name) for name in entry.sites]
    if entry.choice.is_dense:
        return {layer.name: Stays(layer) for layer in layers}
    method = makers[entry.choice.method]
    if not entry.members:
        return {layer.name: Alone(layer, method, entry.choice) for layer in layers}
    shared = Shared(sites.together(entry.site, entry.members), method, entry.choice)
    return {layer.name: Member(layer, shared, number) for number, layer in enumerate(layers)}


def _biased(layers: Iterable[LayerSpec]) -> bool:
    """Whether a choice was counted with a bias; without one it gets none, or it would cost more than its plan."""
    return any(spec.bias for spec in layers)
