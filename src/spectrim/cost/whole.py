"""What a network costs with some of its channels removed and some of its layers replaced, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from spectrim.cost import counted
from spectrim.cost.latency import Latency
from spectrim.network.choices import DENSE, ChannelsChoice, Choice
from spectrim.network.layer import LayerSpec
from spectrim.network.narrowing import beside_layers, layers_left
from spectrim.network.sites import Site, Sites

Costs = dict[str, float]
Picks = dict[str, Choice]


class Layered(Protocol):
    """What counting asks of a method: the layers that a choice turns a site into."""

    @property
    def name(self) -> str: ...

    def layers(self, site: Site, choice: Choice) -> Sequence[LayerSpec]: ...


@dataclass(eq=False)
class Network:
    """What the network really costs with some of its channels removed and some of its layers replaced."""

    sites: Sites
    methods: Sequence[Layered]
    latency: Latency | None
    dense_latency: float | None
    functions: dict[str, counted.Cost] = field(init=False)
    beyond: Costs = field(init=False)

    def __post_init__(self) -> None:
        self.functions = counted.known(self.sites)
        self._makers = {method.name: method for method in self.methods}
        self._specs = {spec.name: spec for spec in self.sites.untouched}
        self._specs |= {site.name: site.spec for site in self.sites}
        self._couplings = {coupling.name: coupling for coupling in self.sites.couplings}
        self._touching: dict[str, list[tuple[str, str, int, int]]] = {}
        for c in self.sites.couplings:
            for side in c.sides:
                if side.name in self._specs:
                    held = self._touching.setdefault(side.name, [])
                    held.append((c.name, side.axis, side.positions.shape[1], side.size))
        self._known: dict[tuple[object, ...], Costs] = {}
        layers = self._sum(self._specs, {}, measured=True)
        self.beyond = {"parameters": float(self.sites.other_parameters), "bytes": float(self.sites.other_bytes)}
        self.beyond |= {"macs": self.sites.other_macs}
        if self.latency is not None:
            # What the layers do not explain stays.
            self.beyond["latency"] = max(0.0, (self.dense_latency or 0.0) - layers["latency"])

    def width(self, name: str, picks: Picks) -> int:
        """Channels that picks leave of a coupling."""
        choice = picks.get(name, DENSE)
        return len(choice.kept) if isinstance(choice, ChannelsChoice) else self._couplings[name].channels

    def spec(self, name: str, picks: Picks) -> LayerSpec:
        """A layer with the channels that picks leave."""
        left: dict[str, int] = {}
        for coupling, axis, entries, size in self._touching.get(name, ()):
            gone = self._couplings[coupling].channels - self.width(coupling, picks)
            left[axis] = left.get(axis, size) - gone * entries
        spec = self._specs[name]
        return spec.narrowed(left) if left else spec

    def layer(self, name: str, picks: Picks, *, measured: bool = False) -> Costs:
        """What one layer costs.

        Of its time, ``measured`` says whether it is taken by the clock. Otherwise the effects of the channels of each
        kind are measured apart and multiplied, which needs far fewer measurements.
        """
        found = self._counted(name, picks)
        if self.latency is None:
            return found
        if measured:
            return {**found, "latency": self._time(name, picks)}
        own = {name: picks[name]} if name in picks else {}
        whole = time = self._time(name, own)
        for coupling, *_ in self._touching.get(name, ()):
            if coupling in picks:
                time *= self._time(name, {coupling: picks[coupling]}) / max(self._time(name, {}), 1e-9)
        return {**found, "latency": min(time, whole)}

    def _time(self, name: str, picks: Picks) -> float:
        assert self.latency is not None
        return self.latency(self._chain(name, picks))

    def _chain(self, name: str, picks: Picks) -> Sequence[LayerSpec]:
        """The layers in place of one."""
        spec, choice = self.spec(name, picks), picks.get(name, DENSE)
        if choice.is_dense:
            return (spec,)
        site = dataclasses.replace(self.sites[name], layers=(spec,))
        try:
            return self._makers[choice.method].layers(site, choice) or (spec,)
        except ValueError:
            # With the channels that are left a sparse weight may not have the pattern: the layer would stay dense.
            return (spec,)

    def _counted(self, name: str, picks: Picks) -> Costs:
        choice = picks.get(name, DENSE)
        key = (name, choice, *(self.width(coupling, picks) for coupling, *_ in self._touching.get(name, ())))
        if key not in self._known:
            chain = self._chain(name, picks)
            self._known[key] = {cost: function(chain) for cost, function in self.functions.items()}
        return self._known[key]

    def of(self, row: str, picks: Picks) -> Costs:
        """What the layers of a row cost: one layer, or all that hold the channels of a coupling."""
        if row not in self._couplings:
            return self.layer(row, picks)
        coupling = self._couplings[row]
        found = self._sum({side.name: None for side in coupling.sides if side.name in self._specs}, picks)
        width = self.width(row, picks)
        found["parameters"] += coupling.parameters * width
        found["bytes"] += coupling.bytes * width
        return found

    def cost(self, picks: Picks) -> Costs:
        """What the whole network costs, its time measured layer by layer."""
        found = self._sum(self._specs, picks, measured=True)
        for name, value in self.beyond.items():
            if name in found:
                found[name] += value
        for coupling in self.sites.couplings:
            gone = coupling.channels - self.width(coupling.name, picks)
            found["parameters"] -= gone * coupling.parameters
            found["bytes"] -= gone * coupling.bytes
        return found

    def _sum(self, names: Mapping[str, object], picks: Picks, *, measured: bool = False) -> Costs:
        found: Costs = {}
        for name in names:
            for cost, value in self.layer(name, picks, measured=measured).items():
                found[cost] = found.get(cost, 0.0) + value
        return found


def costs(sites: Sites, numbers: Mapping[str, int], functions: Mapping[str, counted.Cost]) -> dict[str, float]:
    """What the network costs with so many channels of each coupling, all layers counted as they are then.

    Parameters
    ----------
    numbers
        Channels kept by the name of the coupling; all of those that are not named.
    functions
        Costs by name.
    """
    counts = layers_left(sites.couplings, numbers)
    less = {"parameters": 0.0, "bytes": 0.0}
    for coupling in sites.couplings:
        gone = coupling.channels - numbers.get(coupling.name, coupling.channels)
        for name, value in beside_layers(coupling, gone, less).items():
            less[name] += value
    smaller = dataclasses.replace(
        sites, untouched=tuple(spec.narrowed(counts.get(spec.name, {})) for spec in sites.untouched)
    )
    found = counted.fixed(smaller, functions)
    for name, cost in functions.items():
        found[name] += sum(cost((site.spec.narrowed(counts.get(site.name, {})),)) for site in sites)
        found[name] -= less.get(name, 0.0)
    return found
