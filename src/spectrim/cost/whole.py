"""What a network costs, dense or as planned: the layers in place of each site, channels, and what no choice touches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from spectrim.cost import counted
from spectrim.cost.latency import Latency
from spectrim.network.choices import DENSE, ChannelsChoice, Choice
from spectrim.network.coupling import Coupling
from spectrim.network.layer import LayerSpec
from spectrim.network.narrowing import layers_left
from spectrim.network.sites import Group, Layer, Sites
from spectrim.progress import Steps

Costs = dict[str, float]
Picks = Mapping[str, Choice]
"""Choices by the names of sites, of groups in place of their sites, and of coupled channels; dense where not named."""
Widths = Mapping[str, int]
"""Channels that are left by the name of the coupling; all where not named."""
_ALL_DENSE: Picks = MappingProxyType({})
_ALL_THERE: Widths = MappingProxyType({})
Chains = tuple[Sequence[LayerSpec], ...]
"""What runs in place of layers: each chain one after the other, none of them fed by another."""


class Layered(Protocol):
    """What counting asks of a method: the layers that a choice turns a site into."""

    @property
    def name(self) -> str: ...

    def layers(self, site: Any, choice: Any) -> Sequence[LayerSpec]: ...


@dataclass(eq=False)
class Network:
    """Counts a network as it would be with some of its layers replaced and some of its channels removed.

    Nothing is counted or measured before it is asked for, and nothing twice.

    Attributes
    ----------
    sites
        Of the dense network, with groups and couplings if there are any.
    costs
        What is counted, by name: functions of layers that run one after the other.
    methods
        Those that the choices are of.
    latency
        Measures milliseconds as a further cost, called ``latency``.
    dense_latency
        Milliseconds of the whole dense network. What the sites do not explain of them is there whatever is chosen, but
        for what layers without a choice save by having fewer channels. Without it only layers take time.
    """

    sites: Sites
    costs: Mapping[str, counted.Cost]
    methods: Sequence[Layered] = ()
    latency: Latency | None = None
    dense_latency: float | None = None
    _known: dict[tuple[object, ...], Costs] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        timed = {} if self.latency is None else {"latency": self.latency}
        self._functions: dict[str, counted.Cost] = {**self.costs, **timed}
        self._makers = {method.name: method for method in self.methods}
        self._untouched = {spec.name: spec for spec in self.sites.untouched}
        self._specs = self._untouched | {site.name: site.spec for site in self.sites}
        self._couplings = {coupling.name: coupling for coupling in self.sites.couplings}
        self._touching: dict[str, list[Coupling]] = {}
        for coupling in self.sites.couplings:
            for name in dict.fromkeys(side.name for side in coupling.sides):
                self._touching.setdefault(name, []).append(coupling)
        self._joined: dict[str, Layer | Group] = {}

    def cost(self, picks: Picks = _ALL_DENSE, widths: Widths = _ALL_THERE) -> Costs:
        """What the whole network costs.

        Parameters
        ----------
        picks
            Choices; of coupled channels how many are left counts.
        widths
            Channels of couplings that nothing is picked for.
        """
        left = self._left(picks, widths)
        replaced = {site for name in picks if name in self.sites.groups for site in self.sites.groups[name]}
        names = [site.name for site in self.sites if site.name not in replaced]
        names += [name for name in picks if name in self.sites.groups]
        layers = [self._place(name, picks, left) for name in names]
        return {name: value + sum(costs[name] for costs in layers) for name, value in self._rest(left).items()}

    def fixed(self, rows: Iterable[str], picks: Picks = _ALL_DENSE) -> Costs:
        """What a table with these rows has to add to them, dense or as picked, for the sum to be :meth:`cost`.

        The layers of coupled channels have rows of their own too, and are not counted twice.
        """
        left = self._left(picks)
        found = self._rest(left)
        for site in self.sites:
            exact, estimate = self._place(site.name, picks, left), self.estimate(site.name, picks)
            found = {name: value + (exact[name] - estimate[name]) for name, value in found.items()}
        for coupling in (row for row in rows if row in self._couplings):
            estimate = self.estimate(coupling, picks)
            found = {name: value - estimate[name] for name, value in found.items()}
        return found

    def row(self, name: str, picks: Picks = _ALL_DENSE, widths: Widths = _ALL_THERE) -> Costs:
        """What a site costs, a group, or all layers that hold coupled channels together."""
        left = self._left(picks, widths)
        return self._row(name, left, lambda part: self._place(part, picks, left))

    def counted(self, name: str, picks: Picks = _ALL_DENSE) -> Costs:
        """As :meth:`row` without measuring anything."""
        left = self._left(picks)
        return self._row(name, left, lambda part: self._place(part, picks, left, self.costs))

    def estimate(self, name: str, picks: Picks) -> Costs:
        """As :meth:`row`, with times put together from few measurements.

        The effects on a layer's time of its own choice and of the channels of each kind are measured apart and
        multiplied.
        """
        left = self._left(picks)
        return self._row(name, left, lambda part: self._estimated(part, picks, left))

    def beside(self, coupling: str, picks: Picks = _ALL_DENSE, widths: Widths = _ALL_THERE) -> Costs:
        """What coupled channels cost in modules that are no layers: normalisation, embeddings."""
        return self._beside(self._couplings[coupling], self._left(picks, widths))

    def prepare(self, options: Iterable[tuple[str, Choice]], progress: Steps | None) -> None:
        """Measure the layers of the dense network and those of options of rows together, so that they are comparable.

        Parameters
        ----------
        options
            Names of rows and choices of theirs.
        """
        if self.latency is None:
            return
        chains: list[Sequence[LayerSpec]] = [(site.spec,) for site in self.sites]
        for row, choice in options:
            picks = {row: choice}
            left = self._left(picks)
            chains += [chain for part in self._parts(row) for chain in self._chains(part, picks, left)]
        chains += [(spec,) for spec in self.sites.untouched]
        self.latency.prepare(chains, progress)

    # A row is one place, or all the places that hold coupled channels; a place is a layer or a group.

    def _parts(self, row: str) -> list[str]:
        if row not in self._couplings:
            return [row]
        return [name for name in dict.fromkeys(s.name for s in self._couplings[row].sides) if name in self._specs]

    def _row(self, name: str, left: Widths, costs: Callable[[str], Costs]) -> Costs:
        parts = [costs(part) for part in self._parts(name)]
        if name not in self._couplings:
            return parts[0]
        beside = self._beside(self._couplings[name], left)
        return {cost: sum(part[cost] for part in parts) + beside[cost] for cost in parts[0]}

    def _beside(self, coupling: Coupling, left: Widths) -> Costs:
        number = left.get(coupling.name, coupling.channels)
        held = {"parameters": coupling.parameters * number, "bytes": coupling.bytes * number}
        return {name: held.get(name, 0.0) for name in self._functions}

    def _left(self, picks: Picks, widths: Widths = _ALL_THERE) -> dict[str, int]:
        """Channels left of the couplings that lose some."""
        kept = {n: choice.kept for n, choice in picks.items() if isinstance(choice, ChannelsChoice)}
        return {**widths, **{name: len(channels) for name, channels in kept.items()}}

    def _place(
        self, name: str, picks: Picks, left: Widths, functions: Mapping[str, counted.Cost] | None = None
    ) -> Costs:
        """What a layer or group costs with its own choice and the channels that are left."""
        functions = self._functions if functions is None else functions
        beside = {c.name: left.get(c.name, c.channels) for layer in self._layers(name) for c in self._near(layer)}
        known = self._known.setdefault((name, picks.get(name, DENSE), *beside.items()), {})
        missing = {cost: function for cost, function in functions.items() if cost not in known}
        if missing:
            chains = self._chains(name, picks, left)
            known |= {cost: float(sum(function(chain) for chain in chains)) for cost, function in missing.items()}
        return {cost: known[cost] for cost in functions}

    def _estimated(self, name: str, picks: Picks, left: Widths) -> Costs:
        found = self._place(name, picks, left, self.costs)
        if self.latency is None:
            return found

        def time(picks: Picks, left: Widths) -> float:
            return self._place(name, picks, left)["latency"]

        whole = estimate = time(picks, {})
        for layer in self._layers(name):
            for coupling in self._near(layer):
                if coupling.name in left:
                    estimate *= time({}, {coupling.name: left[coupling.name]}) / max(time({}, {}), 1e-9)
        return {**found, "latency": min(estimate, whole)}

    def _near(self, layer: str) -> list[Coupling]:
        """The couplings that a layer holds channels of."""
        return self._touching.get(layer, [])

    def _layers(self, place: str) -> tuple[str, ...]:
        return (place,) if place in self._specs else tuple(self.sites.groups[place])

    def _chains(self, place: str, picks: Picks, left: Widths) -> Chains:
        """The layers in place of a layer or group."""
        specs = tuple(self._spec(name, left) for name in self._layers(place))
        choice = picks.get(place, DENSE)
        if choice.is_dense:
            return tuple((spec,) for spec in specs)
        site = self._joined.setdefault(place, self.sites[place])
        narrower = site.with_layers(specs)
        try:
            return (self._makers[choice.method].layers(narrower, choice),)
        except ValueError:
            if specs == site.layers:
                raise
            # With the channels that are left a sparse weight may not have the pattern: the layer would stay dense.
            return tuple((spec,) for spec in specs)

    def _spec(self, layer: str, left: Widths) -> LayerSpec:
        """A layer with the channels that are left."""
        spec, near = self._specs[layer], [c for c in self._near(layer) if c.name in left]
        return spec.narrowed(layers_left(near, left)[layer]) if near else spec

    def _rest(self, left: Widths) -> Costs:
        """What is no layer with a choice, with so many channels left."""
        others = {
            "parameters": self.sites.other_parameters,
            "bytes": self.sites.other_bytes,
            "macs": self.sites.other_macs,
        }
        alone = [self._place(name, {}, left) for name in self._untouched]
        found = {name: sum(costs[name] for costs in alone) + others.get(name, 0.0) for name in self._functions}
        for coupling in self.sites.couplings:
            dense, now = self._beside(coupling, {}), self._beside(coupling, left)
            found = {name: value - (dense[name] - now[name]) for name, value in found.items()}
        if self.latency is not None and self.dense_latency is not None:
            explained = sum(self._place(site.name, {}, {})["latency"] for site in self.sites)
            saved = sum(self._place(name, {}, {})["latency"] for name in self._untouched) - found["latency"]
            found["latency"] = max(0.0, max(0.0, self.dense_latency - explained) - saved)
        return found
