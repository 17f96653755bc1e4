"""What a network costs, dense or as planned: the layers in place of each site, channels, and what no choice touches."""

from __future__ import annotations

import dataclasses
import math
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
from spectrim.network.sites import Sites, Skipped
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
_PRODUCTS = (
    "it multiplies tensors outside of layers, as attention does. Smaller inputs cost less there; where one of them is "
    "a layer's weight, call the layer instead"
)


class Layered(Protocol):
    """What counting asks of a method: the layers that a choice turns a site into."""

    @property
    def name(self) -> str: ...

    def layers(self, site: Any, choice: Any) -> Sequence[LayerSpec]: ...


@dataclass(eq=False)
class Network:
    """Counts a network as it would be with some of its layers replaced and some of its channels removed.

    Nothing is counted or measured before it is asked for, and nothing twice.
    """

    sites: Sites  # of the dense network, with groups and couplings if there are any
    costs: Mapping[str, counted.Cost]  # what is counted, by name: functions of layers that run one after the other
    methods: Sequence[Layered] = ()  # those that the choices are of
    latency: Latency | None = None  # measures milliseconds as a further cost, called ``latency``
    # Milliseconds of the whole dense network. What the sites do not explain of them is there whatever is chosen, but
    # for what layers without a choice save by having fewer channels. Without it only layers take time.
    dense_latency: float | None = None
    _known: dict[tuple[object, ...], Costs] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        sites = self.sites
        timed = {} if self.latency is None else {"latency": self.latency}
        self._functions: dict[str, counted.Cost] = {**self.costs, **timed}
        self._makers = {method.name: method for method in self.methods}
        # Places are layers, with a choice or without one, those that have one weight, and groups of layers.
        alone = (*sites, *sites.tied)
        places = {spec.name: (spec,) for spec in sites.untouched} | {site.name: site.layers for site in alone}
        self._present = {site.name: site.running for site in sites if site.present}
        self._couplings = {coupling.name: coupling for coupling in sites.couplings}
        sides = {c.name: list(dict.fromkeys(side.name for side in c.sides)) for c in sites.couplings}
        # A row of coupled channels is about all places that hold them.
        self._rows = {name: [side for side in names if side in places] for name, names in sides.items()}
        self._groups = {site.name: site for site in sites.joint() if site.name not in places}
        self._tied = {site.name: site for site in sites.tied}
        self._specs = places | {name: site.layers for name, site in self._groups.items()}
        self._near = {
            place: [c for c in sites.couplings if not {spec.name for spec in specs}.isdisjoint(sides[c.name])]
            for place, specs in self._specs.items()
        }

    def cost(self, picks: Picks = _ALL_DENSE, widths: Widths = _ALL_THERE) -> Costs:
        """What the whole network costs. ``widths`` are the channels of couplings that nothing is picked for."""
        left = self._left(picks, widths)
        groups = [name for name in picks if name in self._groups]
        replaced = {member for name in groups for member in self._groups[name].members}
        names = [*(site.name for site in self.sites if site.name not in replaced), *self._tied, *groups]
        places = [self._place(name, picks, left) for name in names]
        return {name: value + sum(costs[name] for costs in places) for name, value in self._rest(left).items()}

    def fixed(self, rows: Iterable[str], picks: Picks = _ALL_DENSE) -> Costs:
        """What a table with these rows has to add to them, dense or as picked, for the sum to be :meth:`cost`.

        The layers of coupled channels have rows of their own too, and are not counted twice.
        """
        left, rows = self._left(picks), set(rows)
        costs = self._rest(left)
        for site in self.sites:
            exact, estimate = self._place(site.name, picks, left), self.estimate(site.name, picks)
            costs = {name: value + (exact[name] - estimate[name]) for name, value in costs.items()}
        for tied in self._tied.keys() - rows:
            costs = {name: value + self._place(tied, picks, left)[name] for name, value in costs.items()}
        for coupling in (name for name in self._couplings if name in rows):
            estimate = self.estimate(coupling, picks)
            costs = {name: value - estimate[name] for name, value in costs.items()}
        return costs

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

    def left_alone(self) -> tuple[Skipped, ...]:
        """What was skipped, and what else computes, each with what it costs."""
        sites, alone = self.sites, {spec.name for spec in self.sites.untouched}
        skipped: list[Skipped] = []
        told = {each.name for each in sites.skipped}
        for each in sites.skipped:
            costs = dict(each.costs)
            if each.name in alone:
                of_spec = self._place(each.name, {}, {})
                costs = {cost: value + costs.get(cost, 0.0) for cost, value in of_spec.items()}
            elif each.name in sites.work:
                costs["macs"] = sites.work[each.name]
            skipped.append(dataclasses.replace(each, costs=costs))
        others = (Skipped(path, "products", _PRODUCTS, {"macs": macs}) for path, macs in sites.work.items())
        return (*skipped, *(each for each in others if each.name not in told))

    def beside(self, coupling: str, picks: Picks = _ALL_DENSE, widths: Widths = _ALL_THERE) -> Costs:
        """What coupled channels cost in modules that are no layers: normalisation, embeddings, products of heads."""
        return self._beside(self._couplings[coupling], self._left(picks, widths))

    def prepare(self, options: Iterable[tuple[str, Choice]], progress: Steps | None) -> None:
        """Measure the layers of the dense network and of options of rows together, so that they are comparable."""
        if self.latency is None:
            return
        chains: list[Sequence[LayerSpec]] = [site.running for site in self.sites]
        chains += [(spec,) for site in self._tied.values() for spec in site.layers]
        for row, choice in options:
            picks = {row: choice}
            left = self._left(picks)
            chains += [chain for place in self._rows.get(row, [row]) for chain in self._chains(place, picks, left)]
        chains += [(spec,) for spec in self.sites.untouched]
        self.latency.prepare(chains, progress)

    def _row(self, name: str, left: Widths, costs: Callable[[str], Costs]) -> Costs:
        if name not in self._rows:
            return costs(name)
        places, beside = [costs(place) for place in self._rows[name]], self._beside(self._couplings[name], left)
        return {cost: sum(place[cost] for place in places) + beside[cost] for cost in places[0]}

    def _beside(self, coupling: Coupling, left: Widths) -> Costs:
        number = left.get(coupling.name, coupling.channels)
        products = sum(share * self.sites.work.get(path, 0.0) for path, share in coupling.products.items())
        by_cost = {"parameters": coupling.parameters, "bytes": coupling.bytes, "macs": products}
        return {name: by_cost.get(name, 0.0) * number for name in self._functions}

    def _left(self, picks: Picks, widths: Widths = _ALL_THERE) -> dict[str, int]:
        """Channels left of the couplings that lose some."""
        picked = {name: len(c.kept) for name, c in picks.items() if isinstance(c, ChannelsChoice)}
        return {**widths, **picked}

    def _place(
        self, name: str, picks: Picks, left: Widths, functions: Mapping[str, counted.Cost] | None = None
    ) -> Costs:
        """What a layer or group costs with its own choice and the channels that are left."""
        functions = self._functions if functions is None else functions
        numbers = (left.get(coupling.name, coupling.channels) for coupling in self._near[name])
        known = self._known.setdefault((name, picks.get(name, DENSE), *numbers), {})
        missing = {cost: function for cost, function in functions.items() if cost not in known}
        if missing:
            chains = self._chains(name, picks, left)
            known |= {cost: _total(cost, function, chains) for cost, function in missing.items()}
        return {cost: known[cost] for cost in functions}

    def _estimated(self, name: str, picks: Picks, left: Widths) -> Costs:
        costs = self._place(name, picks, left, self.costs)
        if self.latency is None:
            return costs

        def time(picks: Picks, left: Widths) -> float:
            return self._place(name, picks, left)["latency"]

        whole = estimate = time(picks, {})
        for coupling in self._near[name]:
            if coupling.name in left:
                estimate *= time({}, {coupling.name: left[coupling.name]}) / max(time({}, {}), 1e-9)
        return {**costs, "latency": min(estimate, whole)}

    def _chains(self, place: str, picks: Picks, left: Widths) -> Chains:
        """The layers in place of a layer or group."""
        counts = layers_left([c for c in self._near[place] if c.name in left], left)
        dense, choice = self._specs[place], picks.get(place, DENSE)
        specs = tuple(spec.narrowed(counts[spec.name]) if spec.name in counts else spec for spec in dense)
        if not choice.is_dense:
            site = self._groups.get(place) or self._tied.get(place) or self.sites.layer(place)
            try:
                return (self._makers[choice.method].layers(site.with_layers(specs), choice),)
            except ValueError:
                if specs == dense:
                    raise
                # With the channels that are left a sparse weight may not have the pattern: the layer would stay dense.
        return tuple(self._present.get(spec.name, (spec,)) for spec in specs)

    def _rest(self, left: Widths) -> Costs:
        """What is no layer with a choice, with so many channels left."""
        others = {
            "parameters": self.sites.other_parameters,
            "bytes": self.sites.other_bytes,
            "macs": self.sites.other_macs,
        }
        untouched = [spec.name for spec in self.sites.untouched]
        alone = [self._place(name, {}, left) for name in untouched]
        total = {name: sum(costs[name] for costs in alone) + others.get(name, 0.0) for name in self._functions}
        for coupling in self.sites.couplings:
            dense, now = self._beside(coupling, {}), self._beside(coupling, left)
            total = {name: value - (dense[name] - now[name]) for name, value in total.items()}
        if self.latency is not None and self.dense_latency is not None:
            alone = (*self.sites, *self._tied.values())
            explained = sum(self._place(site.name, {}, {})["latency"] for site in alone)
            saved = sum(self._place(name, {}, {})["latency"] for name in untouched) - total["latency"]
            total["latency"] = max(0.0, max(0.0, self.dense_latency - explained) - saved)
        return total


def _total(name: str, cost: counted.Cost, chains: Chains) -> float:
    """The sum of a cost over chains."""
    values = [cost(chain) for chain in chains]
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"cost {name!r} gave {values[0]!r:.60} for layers: expected a number") from error
    for number, chain in zip(numbers, chains, strict=True):
        if not 0 <= number < math.inf:
            where = " and ".join(repr(spec.name) for spec in chain)
            raise ValueError(f"cost {name!r} gave {number} for layer {where}: expected a finite number of at least 0")
    return sum(numbers)
