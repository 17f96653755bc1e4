"""Sites: all that a method may know of a network.

A :class:`Site` is a place where one choice is made, and :class:`Sites` is what ``find`` and ``calibrate`` return: the
sites, what was skipped and why, and what the rest of the network costs. There is no ``nn.Module`` in any of them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectrim.errors import CalibrationError, MissingMomentsError
from spectrim.linalg.moments import Moments
from spectrim.linalg.sketch import Sketch
from spectrim.network.coupling import Coupling
from spectrim.network.layer import LayerSpec
from spectrim.network.printing import Grid, Printed, count
from spectrim.network.skipped import Skipped as Skipped
from spectrim.network.structure import Chain


class _Copied:
    """Pickle and deepcopy know nothing of read-only views: they are stored as what they show."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: dict(v) if isinstance(v, MappingProxyType) else v for k, v in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({k: MappingProxyType(v) if isinstance(v, dict) else v for k, v in state.items()})


@dataclass(frozen=True)
class Statistics(_Copied):
    """What calibration keeps of one layer, as streamed moments ``[g, features]``; all of it may be absent.

    Attributes
    ----------
    input
        Of whole input patches ``(i, *k)``, or of a linear layer's inputs.
    output
        Of the outputs, where there is no room for ``input``.
    slices
        Of the slices of each unfolding's first factor, by its name (``height-first``), where there is none either.
    channels
        Of a convolution's input channels at single positions, where channels may be removed and there is no ``input``.
    sketch
        A few rows in place of ``input``, for linear layers with many inputs.
    gradient
        Of the gradients that reach the outputs (:func:`spectrim.sensitivity`).
    """

    input: Moments | None = None
    output: Moments | None = None
    slices: Mapping[str, Moments] = field(default_factory=lambda: MappingProxyType({}))
    channels: Moments | None = None
    sketch: Sketch | None = None
    gradient: Moments | None = None

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """What there is, for people."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name))

    @property
    def rows(self) -> float:
        """Rows of inputs or outputs that they rest on."""
        whole = (self.input, self.output, self.channels, self.sketch, *self.slices.values())
        return max((float(moments.count) for moments in whole if moments is not None), default=0.0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        whole = (self.input, self.output, self.channels, self.sketch, self.gradient, *self.slices.values())
        return sum(moments.nbytes for moments in whole if moments is not None)

    def of_inputs(self, channels: Tensor, of: int) -> Statistics:
        """The statistics once only some input channels ``[g, n]`` are left, of so many a group."""

        def taken(moments: Any) -> Any:
            return None if moments is None else moments.take(entries_of(channels, moments.mean.shape[1] // of))

        return dataclasses.replace(
            self,
            input=taken(self.input),
            channels=taken(self.channels),
            sketch=taken(self.sketch),
            slices=MappingProxyType({name: taken(moments) for name, moments in self.slices.items()}),
        )

    def of_outputs(self, rows: Tensor) -> Statistics:
        """The statistics once only some output channels ``[g, n]`` are left."""
        output, gradient = (moments and moments.take(rows) for moments in (self.output, self.gradient))
        return dataclasses.replace(self, output=output, gradient=gradient)


def entries_of(channels: Tensor, per: int) -> Tensor:
    """Entries ``[g, n * per]`` of channels ``[g, n]`` that have so many each, one after the other."""
    return (channels.unsqueeze(2) * per + torch.arange(per, device=channels.device)).flatten(1)


class Site(ABC):
    """A place where one choice is made: a :class:`Layer`, a :class:`Group`, or coupled :class:`Channels`.

    Attributes
    ----------
    name
        Unique; the module path of a single layer.
    parts
        The layers concerned, each with its statistics.
    """

    if TYPE_CHECKING:

        @property
        def name(self) -> str: ...

        @property
        def parts(self) -> tuple[Layer, ...]: ...

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers as numbers."""
        return tuple(part.spec for part in self.parts)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """One canonical weight ``[g, o, i, *k]`` a layer."""
        return tuple(part.weight for part in self.parts)

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        """One bias ``[o_total]`` or None a layer."""
        return tuple(part.bias for part in self.parts)

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the layers that it is on offer in place of; none for a layer, which is on offer itself."""
        return ()

    @property
    def calibrated(self) -> bool:
        """Whether there are statistics of any of the layers."""
        return any(part.statistics for part in self.parts)

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it is, for people."""

    def _required(self, held: Statistics | Pooled, statistic: str, why: str) -> Moments:
        moments = getattr(held, statistic)
        if moments is None:
            raise self.missing(statistic, why, held.names)
        return moments

    def __repr__(self) -> str:
        statistics = dict.fromkeys(name for part in self.parts for name in part.statistics.names)
        held = f"statistics of {', '.join(statistics)}" if statistics else "no statistics"
        return f"{type(self).__name__}({self.name!r}, {self.kind}, {held})"

    def missing(self, statistic: str, why: str, there: Sequence[str]) -> MissingMomentsError:
        """The error for a statistic that calibration has not collected."""
        return MissingMomentsError(
            f"site {self.name!r} ({self.kind}) holds no {statistic!r} moments (held: "
            f"{', '.join(sorted(there)) or 'none'}), which {why} needs. Run calibrate(model, sites, batches) first."
        )


@dataclass(frozen=True, repr=False)
class Layer(Site):
    """One layer.

    Attributes
    ----------
    spec
        The layer as numbers.
    weight
        Canonical, ``[g, o, i, *k]``, detached, in the model's dtype and on its device.
    bias
        ``[o_total]`` or None.
    statistics
        From :func:`spectrim.calibrate`.
    present
        The layers that an earlier compression has put in its place, one after the other, whose product the weight is;
        none for a layer as it was made.
    """

    spec: LayerSpec
    weight: Tensor
    bias: Tensor | None = None
    statistics: Statistics = Statistics()
    present: tuple[LayerSpec, ...] = ()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def parts(self) -> tuple[Layer, ...]:
        return (self,)

    @property
    def kind(self) -> str:
        return f"{self.spec.kind} in {len(self.present)} layers" if self.present else self.spec.kind

    @property
    def running(self) -> Sequence[LayerSpec]:
        """The layers that compute it now, with the input shapes they see: itself, or those at present in its place."""
        if not self.present:
            return (self.spec,)
        found, inputs = [], self.spec.inputs
        for part in self.present:
            found.append(part.at(inputs))
            inputs = tuple(part.output_shape(shape) for shape in inputs)
        return Chain(tuple(found))

    def with_layers(self, specs: Sequence[LayerSpec]) -> Layer:
        """The same with other numbers for its layer."""
        (spec,) = specs
        return dataclasses.replace(self, spec=spec)

    def require(self, statistic: str, why: str) -> Moments:
        """The statistic of this name.

        Raises
        ------
        MissingMomentsError
            If calibration did not collect it; the message names the layer.
        """
        return self._required(self.statistics, statistic, why)


class _Several(Site):
    """What layers together answer that are asked as one."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("spec", "weight", "bias", "statistics"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise AttributeError(
            f"site {self.name!r} is {len(self.parts)} layers ({', '.join(part.name for part in self.parts)}) and has "
            f"no {name} of its own: ask each of its parts"
        )


@dataclass(frozen=True, repr=False)
class Group(_Several):
    """Layers that may share factors.

    Attributes
    ----------
    same_input
        Whether all of them are called with one and the same tensor, as the queries, keys and values of attention are.
    """

    name: str
    parts: tuple[Layer, ...]
    same_input: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    def with_layers(self, specs: Sequence[LayerSpec]) -> Group:
        """The same with other numbers for its layers."""
        parts = zip(self.parts, specs, strict=True)
        return dataclasses.replace(self, parts=tuple(dataclasses.replace(part, spec=spec) for part, spec in parts))

    @property
    def kind(self) -> str:
        return f"{len(self.parts)} x {self.parts[0].kind}"


def tied_to(what: str, others: str) -> str:
    """Why a layer is left alone whose weight or bias others have, too."""
    return f"its {what} is tied to {others}: give one of them a copy of its own to compress it; a copy is counted, too"


@dataclass(frozen=True, repr=False)
class Tied(_Several):
    """A table and a linear layer that have one weight: looked up by rows, and multiplied as a matrix.

    They have one choice. A pair in place of one of them would leave the dense weight to the other.

    Attributes
    ----------
    table, head
        The layers. The head's spec counts the weight as the table's (``shared``).
    asked
        ``[entries]``: how often each row of the table is looked up, as shares; None before calibration.
    weights
        ``[entries]``: mean squares of the gradients that reach the head's outputs; None without a sensitivity.
    """

    table: Layer
    head: Layer
    asked: Tensor | None = None
    weights: Tensor | None = None

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def parts(self) -> tuple[Layer, ...]:
        return (self.table, self.head)

    @property
    def kind(self) -> str:
        return f"{self.table.kind} and {self.head.kind}"

    def with_layers(self, specs: Sequence[LayerSpec]) -> Tied:
        """The same with other numbers for its layers."""
        table, head = (dataclasses.replace(part, spec=spec) for part, spec in zip(self.parts, specs, strict=True))
        return dataclasses.replace(self, table=table, head=head)

    def untied(self) -> tuple[Skipped, ...]:
        """The layers as what is left alone, with the reason."""
        names = (self.head.name, self.table.name)
        return tuple(
            Skipped(part.name, part.kind, tied_to("weight", other))
            for part, other in zip(self.parts, names, strict=True)
        )


@dataclass(frozen=True)
class Pooled:
    """Moments of coupled channels as their readers see them, ``[1, channels]``.

    Attributes
    ----------
    max, mean
        Of the largest and of the mean response over the positions of a sample.
    unpooled
        Of single positions.
    """

    max: Moments | None = None
    mean: Moments | None = None
    unpooled: Moments | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What there is, for people."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)

    def take(self, channels: Tensor) -> Pooled:
        """Those of some channels ``[n]``."""
        parts = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return Pooled(**{name: moments and moments.take(channels.unsqueeze(0)) for name, moments in parts})


@dataclass(frozen=True, repr=False)
class Channels(_Several):
    """Channels of several layers that can only be removed together.

    Attributes
    ----------
    coupling
        Where they lie.
    parts
        All layers that hold them.
    pooled
        Their statistics, known after calibration.
    """

    coupling: Coupling
    parts: tuple[Layer, ...]
    pooled: Pooled = Pooled()

    @property
    def name(self) -> str:
        return self.coupling.name

    @property
    def kind(self) -> str:
        return self.coupling.kind

    def require(self, statistic: str, why: str) -> Moments:
        """The pooled statistic of this name.

        Raises
        ------
        MissingMomentsError
            If calibration did not collect it; the message names the channels.
        """
        return self._required(self.pooled, statistic, why)


def _row(
    what: Layer | Skipped, spec: LayerSpec | None, beside: int, groups: list[str], rows: float, skipped: str = ""
) -> dict[str, Any]:
    """A row of :meth:`Sites.rows`, with so many parameters beside those that a spec tells of."""
    return {
        "layer": what.name, "kind": what.kind,
        "in_channels": 0 if spec is None else spec.in_channels,
        "out_channels": 0 if spec is None else spec.out_channels,
        "parameters": beside + (0 if spec is None else spec.stored + spec.out_channels * spec.bias),
        "macs": 0 if spec is None else spec.stored * spec.positions,
        "groups": groups, "rows": rows, "skipped": skipped,
    }  # fmt: skip


@dataclass(frozen=True)
class Sites(_Copied, Printed):
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
        from spectrim.network.printed import sites_grid

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
                if values is not None and not bool(torch.isfinite(values).all()):
                    raise CalibrationError(
                        f"layer {layer.name!r} ({layer.kind}) holds NaN or Inf in its {what}: mend the model's "
                        "weights, or skip the layer"
                    )

    @property
    def seen(self) -> bool:
        """Whether the network has been run, so that input shapes and MACs are known."""
        return all(layer.spec.inputs for layer in self.sites)
