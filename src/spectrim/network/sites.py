"""Sites: all that a method may know of a network.

A :class:`Site` is a place where one choice is made, and :class:`Sites` is what ``find`` and ``calibrate`` return: the
sites, what was skipped and why, and what the rest of the network costs. There is no ``nn.Module`` in any of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from torch import Tensor

from spectrim.errors import MissingMomentsError
from spectrim.linalg.moments import Moments
from spectrim.network.coupling import Coupling
from spectrim.network.layer import LayerSpec


@dataclass(frozen=True)
class Site:
    """A place where one choice is made.

    Attributes
    ----------
    name
        Unique; the first layer's module path for a site of one layer.
    layers
        The layers concerned: one for low rank, several for joint factors or coupled channels.
    weights
        One canonical weight ``[g, o, i, *k]`` a layer, detached, in the model's dtype and on its device.
    biases
        One bias ``[o_total]`` or None a layer.
    moments
        Calibration statistics by name (see :mod:`spectrim.nn.watch.calibrate`): ``input`` and ``output`` of a single
        layer. Those of the ``n``-th of several layers have ``"n/"`` before the name.
    same_input
        Whether all of several layers are called with one and the same tensor, as the queries, keys and values of
        attention are.
    coupling
        For a site of coupled channels: where they lie in its layers. Its own moments, beside those of the layers, are
        ``pooled:max``, ``pooled:mean`` and ``unpooled``: the channels as their readers see them.
    """

    name: str
    layers: tuple[LayerSpec, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    moments: Mapping[str, Moments] = field(default_factory=lambda: MappingProxyType({}))
    same_input: bool = False
    coupling: Coupling | None = None

    @classmethod
    def join(cls, name: str, parts: Sequence[Site], *, same_input: bool = False) -> Site:
        """One site of the layers of several."""
        layers = [
            (spec, w, b) for part in parts for spec, w, b in zip(part.layers, part.weights, part.biases, strict=True)
        ]
        specs, weights, biases = zip(*layers, strict=True)
        moments = {f"{n}/{key}": held for n, part in enumerate(parts) for key, held in part.moments.items()}
        return cls(name, specs, weights, biases, MappingProxyType(moments), same_input)

    @property
    def parts(self) -> tuple[Site, ...]:
        """The layers as sites of their own, each with its moments."""
        if len(self.layers) == 1:
            return (self,)
        held: list[dict[str, Moments]] = [{} for _ in self.layers]
        for key, moments in self.moments.items():
            number, _, statistic = key.partition("/")
            if statistic:
                held[int(number)][statistic] = moments
        rows = zip(self.layers, self.weights, self.biases, held, strict=True)
        return tuple(Site(spec.name, (spec,), (w,), (b,), MappingProxyType(own)) for spec, w, b, own in rows)

    @property
    def spec(self) -> LayerSpec:
        """The only layer of a site of one layer."""
        (spec,) = self.layers
        return spec

    @property
    def weight(self) -> Tensor:
        """The only weight of a site of one layer."""
        (weight,) = self.weights
        return weight

    def require(self, statistic: str, why: str) -> Moments:
        """The moments called ``statistic``.

        Raises
        ------
        MissingMomentsError
            If calibration did not collect them; the message names the site.
        """
        if statistic not in self.moments:
            held = ", ".join(sorted(self.moments)) or "none"
            raise MissingMomentsError(
                f"site {self.name!r} ({self.layers[0].kind}) holds no {statistic!r} moments (held: {held}), which "
                f"{why} needs. Run calibrate(model, sites, batches) first."
            )
        return self.moments[statistic]


@dataclass(frozen=True)
class Skipped:
    """A layer that is left alone, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Sites:
    """The sites of a network, in order of execution once it has been run, and what surrounds them.

    Attributes
    ----------
    sites
        The places where a choice is made, one layer each.
    groups
        Sites that may share factors, by the name of the group (:func:`spectrim.group`). Two groups have no site in
        common, or one contains the other. A group is on offer beside its sites, in place of them.
    same_inputs
        Names of sites that are called with one and the same tensor, known after a run.
    couplings
        Channels that can be removed, with all places they lie in (:func:`spectrim.couple`).
    pooled
        Statistics of coupled channels by the name of the coupling, known after calibration.
    followers
        Layers no choice is made at which lose channels with their neighbours, such as depthwise convolutions.
    norms
        The normalisation that alone reads a layer's output, by the layer.
    skipped
        Layers left alone, with the reason.
    untouched
        Specs of the linear layers and convolutions among ``skipped`` that can be described: they cost MACs too.
    other_parameters, other_bytes
        Parameters (and bytes of parameters and buffers) outside all of the above: normalisation, embeddings.
    other_macs
        MACs a sample outside all of the above, such as attention products; known after a run.
    samples
        Calibration samples seen.
    """

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...] = ()
    untouched: tuple[LayerSpec, ...] = ()
    other_parameters: int = 0
    other_bytes: int = 0
    other_macs: float = 0.0
    samples: int = 0
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    same_inputs: tuple[tuple[str, ...], ...] = ()
    couplings: tuple[Coupling, ...] = ()
    pooled: Mapping[str, Mapping[str, Moments]] = field(default_factory=lambda: MappingProxyType({}))
    followers: tuple[Site, ...] = ()
    norms: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        """A site by its name, or the site of all layers of a group or of coupled channels."""
        coupling = next((c for c in self.couplings if c.name == name), None)
        if coupling is not None:
            return self._coupled(coupling)
        if name in self.groups and name not in self._by_name:
            return self.together(name, self.groups[name])
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"no site {name!r}; there are {', '.join(map(repr, self._by_name)) or 'none'}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name or name in self.groups

    def together(self, name: str, members: Sequence[str]) -> Site:
        """One site of the layers of several."""
        same = any(set(members) <= set(names) for names in self.same_inputs)
        return Site.join(name, [self[member] for member in members], same_input=same)

    def joint(self) -> tuple[Site, ...]:
        """The sites of the groups, those whose layers are all there."""
        return tuple(self[name] for name, members in self.groups.items() if all(m in self._by_name for m in members))

    def coupled(self) -> tuple[Site, ...]:
        """The sites of coupled channels: all layers that hold them, with their moments."""
        return tuple(self._coupled(coupling) for coupling in self.couplings)

    def _coupled(self, coupling: Coupling) -> Site:
        specs = {spec.name: spec for spec in self.untouched}
        beside = {site.name: site for site in self.followers}
        parts = []
        for name in dict.fromkeys(side.name for side in coupling.sides):
            if name in self._by_name:
                parts.append(self._by_name[name])
            elif name in beside:
                # What calibration learned of its inputs is in its spec among the untouched.
                parts.append(dataclasses.replace(beside[name], layers=(specs.get(name, beside[name].spec),)))
        joined = Site.join(coupling.name, parts)
        moments = {**joined.moments, **self.pooled.get(coupling.name, {})}
        return dataclasses.replace(joined, moments=MappingProxyType(moments), coupling=coupling)

    @cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    @property
    def seen(self) -> bool:
        """Whether the network has been run, so that input shapes and MACs are known."""
        return all(spec.inputs for site in self.sites for spec in site.layers)
