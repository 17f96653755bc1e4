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
from typing import Any

from spectrim.errors import CalibrationError
from spectrim.linalg.finite import all_finite
from spectrim.network.coupling import Coupling
from spectrim.network.layer import LayerSpec
from spectrim.network.printing import Grid, Printed, amount, count, folded, listed, reasons, tail
from spectrim.network.site import Channels as Channels
from spectrim.network.site import Group as Group
from spectrim.network.site import Layer as Layer
from spectrim.network.site import Site as Site
from spectrim.network.site import Tied as Tied
from spectrim.network.site import tied_to as tied_to
from spectrim.network.skipped import Skipped as Skipped
from spectrim.network.statistics import Copied
from spectrim.network.statistics import Pooled as Pooled
from spectrim.network.statistics import Statistics as Statistics
from spectrim.network.statistics import entries_of as entries_of


def _row(
    what: Layer | Skipped, spec: LayerSpec | None, beside: int, groups: list[str], rows: float, skipped: str = ""
) -> dict[str, Any]:
    """A row of :meth:`Sites.rows`, with so many parameters beside those that a spec tells of."""
    return {
        "layer": what.name, "kind": what.kind,
        "in_channels": 0 if spec is None else spec.in_channels,
        "out_channels": 0 if spec is None else spec.out_channels,
        "parameters": beside + (0 if spec is None else spec.stored + spec.out_channels * spec.bias),
        "macs": 0 if spec is None else spec.products,
        "groups": groups, "rows": rows, "skipped": skipped,
    }  # fmt: skip


@dataclass(frozen=True)
class Sites(Copied, Printed):
    """The sites of a network, in order of execution once it has been run, and what surrounds them.

    ``print(sites)`` and notebooks show them as a table, :meth:`rows` and :meth:`to_pandas` give all of it. They have a
    length, can be iterated, and are indexed by name.

    Attributes
    ----------
    sites
        The places where a choice is made, one layer each.
    groups
        Sites that may share factors, by the name of the group (:func:`spectrim.group`). Two groups have no site in
        common, or one contains the other. A group is on offer beside its sites, in place of them.
    same_inputs
        Names of sites that are called with one and the same tensor, known after a run.
    tied
        Tables and linear layers of one weight, which have one choice together. ``sites`` does not hold them.
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
        Parameters (and bytes of parameters and buffers) outside all of the above, such as normalisation.
    other_macs
        MACs a sample outside all of the above, such as attention products; known after a run.
    samples
        Calibration samples seen.
    tokens
        Tokens in them that are data, where batches have a mask; else 0. The rows that the statistics of a layer rest
        on are the ``count`` of its moments.
    work
        What ``other_macs`` are: MACs a sample by the path of the module that computes them itself.
    uncounted
        Operations that may multiply numbers and could not be counted, with the path of a module that calls them.
    notes
        What a user should know of the data and how they were taken.
    keeps_state
        Whether a forward pass of the network leaves something on its modules: activations, caches, counters.
    loops
        Whether layers are called again and again for some samples of a batch each, as by a loop over its images.
    shaped
        A batch like the first one that was run, of tensors without numbers (of the meta device); None before a run.
    """

    sites: tuple[Layer, ...]
    skipped: tuple[Skipped, ...] = ()
    untouched: tuple[LayerSpec, ...] = ()
    other_parameters: int = 0
    other_bytes: int = 0
    other_macs: float = 0.0
    samples: int = 0
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    same_inputs: tuple[tuple[str, ...], ...] = ()
    couplings: tuple[Coupling, ...] = ()
    pooled: Mapping[str, Pooled] = field(default_factory=lambda: MappingProxyType({}))
    followers: tuple[Layer, ...] = ()
    norms: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    tokens: int = 0
    work: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    uncounted: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()
    keeps_state: bool = False
    loops: bool = False
    tied: tuple[Tied, ...] = ()
    shaped: Any = field(default=None, repr=False, compare=False)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Any:
        """A :class:`Layer` by its name, or a :class:`Group`, :class:`Channels` or :class:`Tied` by theirs."""
        tied = next((each for each in self.tied if each.name == name), None)
        if tied is not None:
            return tied
        coupling = next((c for c in self.couplings if c.name == name), None)
        if coupling is not None:
            return self._coupled(coupling)
        if name in self.groups and name not in self._by_name:
            return self.together(name, self.groups[name])
        return self.layer(name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name or name in self.groups

    def rows(self) -> list[dict[str, Any]]:
        """The sites as plain values, one dict a layer, and one for each thing that is left alone.

        Returns
        -------
        list of dict
            ``layer`` and ``kind`` in words; ``in_channels``, ``out_channels``; ``parameters`` of the layer, ``macs``
            for a sample (0 before a run); ``groups``, names of the groups it is in; ``rows`` that its statistics rest
            on; ``skipped``, why it is left alone, else empty.
        """
        known = {spec.name: spec for spec in self.untouched}
        groups = {
            layer.name: [name for name, members in self.groups.items() if layer.name in members]
            for layer in self.layers
        }
        return [
            *(
                _row(part, part.spec, -part.spec.shared, groups[part.name], part.statistics.rows)
                for part in self.layers
            ),
            *(
                _row(each, known.get(each.name), int(each.costs.get("parameters", 0)), [], 0.0, each.reason)
                for each in self.skipped
            ),
        ]

    _records = rows

    def _grid(self) -> Grid:
        from spectrim.network.sites import sites_grid

        return sites_grid(self)

    def __repr__(self) -> str:
        parts = [count(len(self.sites), "layer")]
        parts += [
            count(len(each), noun) for each, noun in ((self.groups, "group"), (self.couplings, "coupling")) if each
        ]
        parts += [f"{count(len(self.skipped), 'layer')} skipped"] if self.skipped else []
        return f"Sites({', '.join([*parts, count(self.samples, 'sample')])})"

    def layer(self, name: str) -> Layer:
        """A single layer by its name."""
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"no site {name!r}; there are {', '.join(map(repr, self._by_name)) or 'none'}") from None

    def together(self, name: str, members: Sequence[str]) -> Group:
        """One site of several layers."""
        same = any(set(members) <= set(names) for names in self.same_inputs)
        return Group(name, tuple(self.layer(member) for member in members), same)

    def joint(self) -> tuple[Group, ...]:
        """The groups whose layers are all there."""
        groups = {n: members for n, members in self.groups.items() if all(m in self._by_name for m in members)}
        return tuple(self.together(name, members) for name, members in groups.items())

    def coupled(self) -> tuple[Channels, ...]:
        """The coupled channels, with all layers that hold them."""
        return tuple(self._coupled(coupling) for coupling in self.couplings)

    def _coupled(self, coupling: Coupling) -> Channels:
        specs = {spec.name: spec for spec in self.untouched}
        # What calibration learned of a follower's inputs is in its spec among the untouched.
        known = {f.name: dataclasses.replace(f, spec=specs.get(f.name, f.spec)) for f in self.followers} | self._by_name
        names = dict.fromkeys(side.name for side in coupling.sides)
        parts = tuple(known[name] for name in names if name in known)
        return Channels(coupling, parts, self.pooled.get(coupling.name, Pooled()))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Those with a choice of their own, and those that have one together."""
        return (*self.sites, *(part for each in self.tied for part in each.parts))

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def untied(self) -> Sites:
        """The same with the tied layers left alone, for what asks layers one by one."""
        parts = [part.spec for each in self.tied for part in each.parts]
        skipped = [reason for each in self.tied for reason in each.untied()]
        return dataclasses.replace(
            self, tied=(), skipped=(*self.skipped, *skipped), untouched=(*self.untouched, *parts)
        )

    def check_finite(self) -> None:
        """Raise CalibrationError if a weight or bias of a layer holds NaN or Inf; the message names the layer."""
        for layer in self.layers:
            for what, values in (("weight", layer.weight), ("bias", layer.bias)):
                if values is not None and not all_finite(values):
                    raise CalibrationError(
                        f"layer {layer.name!r} ({layer.kind}) holds NaN or Inf in its {what}: mend the model's "
                        "weights, or skip the layer"
                    )

    @property
    def seen(self) -> bool:
        """Whether the network has been run, so that input shapes and MACs are known."""
        return all(layer.spec.inputs for layer in self.layers)


def sites_grid(sites: Sites) -> Grid:
    """A line a layer: what it is, what it costs, and how much was seen of it."""
    layers = [row for row in sites.rows() if not row["skipped"]]
    others = [row for row in sites.rows() if row["skipped"]]
    lines = [
        [
            tail(row["layer"]),
            row["kind"],
            f"{row['in_channels']} -> {row['out_channels']}",
            amount("macs", row["macs"]) if sites.seen else "",
            amount("parameters", row["parameters"]),
            amount("", row["rows"]) if row["rows"] else "",
        ]
        for row in layers
    ]
    parameters = sum(row["parameters"] for row in layers)
    macs = sum(row["macs"] for row in layers)
    beside = (
        sum(spec.products for spec in sites.untouched) + sites.other_macs,
        sum(spec.stored + spec.out_channels * spec.bias for spec in sites.untouched) + sites.other_parameters,
    )
    totals = [
        _total("these layers", macs, parameters, sites.seen),
        _total("whole network", macs + beside[0], parameters + beside[1], sites.seen),
    ]
    title = [f"{count(len(sites), 'layer')} to choose at", f"{len(others):,} left alone" if others else ""]
    title += [f"{count(sites.samples, 'sample')} seen" if sites.samples else "not calibrated yet"]
    return Grid(
        ["layer", "kind", ">channels", ">MACs", ">parameters", ">rows seen"],
        folded(lines, lambda rest: ["...", f"({len(rest):,} more)", *[""] * 4]),
        totals,
        title="; ".join(part for part in title if part),
        notes=tuple(_notes(sites)),
        words=[("rows seen", "inputs of the layer that its statistics rest on")] if sites.samples else [],
    )


def _total(name: str, macs: float, parameters: float, seen: bool) -> Sequence[str]:
    return [name, "", "", amount("macs", macs) if seen else "", amount("parameters", parameters), ""]


def _notes(sites: Sites) -> Iterator[str]:
    for name, members in [*sites.groups.items()][:5]:
        yield f"{tail(name)}: may share a factor: {listed(members, 4)}"
    if len(sites.groups) > 5:
        yield f"{len(sites.groups) - 5} more groups, see sites.groups"
    if sites.couplings:
        numbers: dict[str, int] = {}
        for coupling in sites.couplings:
            numbers[coupling.unit] = numbers.get(coupling.unit, 0) + coupling.channels
        what = " and ".join(count(number, unit) for unit, number in numbers.items())
        yield f"{what} in {count(len(sites.couplings), 'group')} can be removed, see sites.couplings"
    yield from reasons(((each.name, each.kind, each.reason) for each in sites.skipped), "sites.skipped")
    yield from sites.notes
