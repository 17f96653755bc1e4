"""Sites: all that a method may know of a network.

A :class:`LayerSpec` describes one linear layer or convolution as numbers, a :class:`Site` is a place where one choice
is made, and :class:`Sites` is what ``find`` and ``calibrate`` return: the sites, what was skipped and why, and what the
rest of the network costs. There is no ``nn.Module`` in any of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from spectrim.coupling import Coupling
from spectrim.errors import MissingMomentsError
from spectrim.linalg.moments import Moments
from spectrim.linalg.packing import packed_bytes
from spectrim.linalg.patterns import Channels, Pattern, Taps
from spectrim.unfold import Unfolding


@dataclass(frozen=True)
class LayerSpec:
    """A linear layer or convolution as numbers.

    A choice turns the specs of its site into other specs; every cost is a function of specs. Channel counts are totals
    over the groups, as in torch.

    Attributes
    ----------
    names
        Module paths of the layer, more than one for a module that is registered in several places.
    kernel, stride, padding, dilation, output_padding
        One number an axis; all empty for a linear layer. ``padding`` may be ``"same"``.
    inputs
        Spatial shape of the input for every call in one forward pass, for one sample. A linear layer has the number of
        rows a sample. Empty until the network has been run.
    shared
        Numbers of the weight that belong to another spec too, which counts them (shared factors).
    density
        Fraction of the weight that is stored and multiplied (sparse factors).
    index_bytes
        Bytes that say which entries those are.
    needs_bias
        Whether the layer gets a bias when it loses inputs: it has none, and no normalisation takes the mean of what
        they delivered.
    """

    names: tuple[str, ...]
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    padding_mode: str = "zeros"
    bias: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    inputs: tuple[tuple[int, ...], ...] = ()
    shared: int = 0
    density: float = 1.0
    index_bytes: int = 0
    needs_bias: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_linear(self) -> bool:
        return not self.kernel

    @property
    def shape(self) -> tuple[int, ...]:
        """``(g, o, i, *k)``: the canonical shape of the weight."""
        g = self.groups
        return (g, self.out_channels // g, self.in_channels // g, *self.kernel)

    @property
    def family(self) -> tuple[object, ...]:
        """What layers agree in whose unfolded weights may share a factor, besides the shared side's channels."""
        return (self.kernel, self.groups, self.transposed, self.dtype, self.device)

    @property
    def stored(self) -> int:
        """Numbers of the weight that are stored, those included that another spec counts."""
        return round(math.prod(self.shape) * self.density)

    @property
    def features(self) -> int:
        """Length of one group's input patch, ``i * prod(k)``."""
        return math.prod(self.shape[2:])

    @property
    def kind(self) -> str:
        """A short word for people: ``Linear``, ``Conv2d 3x3/2``, ..."""
        if self.is_linear:
            return "Linear"
        strided = "" if set(self.stride) == {1} else "/" + "x".join(map(str, dict.fromkeys(self.stride)))
        grouped = "" if self.groups == 1 else f" g{self.groups}"
        transposed = "Transpose" if self.transposed else ""
        return f"Conv{transposed}{len(self.kernel)}d {'x'.join(map(str, self.kernel))}{strided}{grouped}"

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial shape of the output for a spatial shape of the input."""
        if self.is_linear or self.padding == "same":
            return shape
        assert not isinstance(self.padding, str)
        parts = zip(shape, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        if self.transposed:
            return tuple(
                (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
                for (n, k, s, p, d), extra in zip(parts, self.output_padding, strict=True)
            )
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts)

    def at(self, inputs: tuple[tuple[int, ...], ...]) -> LayerSpec:
        """The same layer with the input shapes it was seen with."""
        return dataclasses.replace(self, inputs=inputs)

    def sparse(self, pattern: Pattern, density: float, *, bias: bool | None = None) -> LayerSpec:
        """The layer of a sparse weight in place of this one.

        Patterns whose entries form a smaller layer give that layer's spec.

        Parameters
        ----------
        bias
            Whether the layer has a bias; by default as this layer.

        Raises
        ------
        ValueError
            If this layer cannot have the pattern.
        """
        if not self.allows(pattern):
            raise ValueError(f"layer {self.name!r} ({self.kind}) cannot have the pattern {pattern.name!r}")
        spec = dataclasses.replace(self, bias=self.bias if bias is None else bias)
        if isinstance(pattern, Taps):
            return _cropped(spec, pattern)
        pools, units, _ = pattern.size(self.shape)
        kept = pattern.kept(self.shape, density)
        if isinstance(pattern, Channels):
            return dataclasses.replace(spec, in_channels=pools * kept, index_bytes=4 * pools * kept)
        return dataclasses.replace(
            spec,
            density=pattern.stored(self.shape, density) / math.prod(self.shape),
            index_bytes=packed_bytes(pools * units, pools * kept),
        )

    def allows(self, pattern: Pattern) -> bool:
        """Whether a weight of this layer can have the pattern."""
        if isinstance(pattern, Taps) and (self.transposed or self.padding_mode != "zeros"):
            return False
        return pattern.fits(self.shape)

    def margins(self, pattern: Taps) -> tuple[tuple[int, int], ...]:
        """Padding before and after each axis of the input with which the smaller kernel sees what it saw in this one.

        Negative numbers crop.
        """
        found = []
        for a, (k, d) in enumerate(zip(self.kernel, self.dilation, strict=True)):
            if isinstance(self.padding, str):
                both = d * (k - 1)
                before, after = both // 2, both - both // 2
            else:
                before = after = self.padding[a]
            first, count = pattern.corner[a], pattern.extent[a]
            found.append((before - first * d, after - (k - first - count) * d))
        return tuple(found)

    def narrowed(self, left: Mapping[str, int]) -> LayerSpec:
        """The layer with fewer channels.

        Parameters
        ----------
        left
            Channels that are left of ``"out"``, of ``"in"``, or of both at once in a depthwise layer (``"through"``).
        """
        if "through" in left:
            n = left["through"]
            return dataclasses.replace(self, in_channels=n, out_channels=n, groups=n)
        inputs, outputs = left.get("in", self.in_channels), left.get("out", self.out_channels)
        bias = self.bias or (self.needs_bias and inputs < self.in_channels)
        return dataclasses.replace(self, in_channels=inputs, out_channels=outputs, bias=bias)

    def factor(self, how: Unfolding, rank: int, *, bias: bool | None = None) -> tuple[LayerSpec, LayerSpec]:
        """The two layers of a rank-``rank`` pair in place of this one.

        Stride, padding and dilation of an axis go to the factor that has the axis, so that the pair equals the layer
        exactly at full rank, also for reflecting and circular padding and for transposed convolutions.

        Parameters
        ----------
        rank
            For each group.
        bias
            Whether the second layer has a bias; by default as this layer.
        """
        middle = rank * self.groups
        wanted = self.bias if bias is None else bias
        if self.is_linear:
            first = dataclasses.replace(self, out_channels=middle, bias=False)
            return first, dataclasses.replace(self, in_channels=middle, bias=wanted)
        kernels = how.kernels(self.kernel)

        def part(kernel: tuple[int, ...], mine: list[bool]) -> dict[str, object]:
            def pick(values: tuple[int, ...], other: int) -> tuple[int, ...]:
                return tuple(v if m else other for v, m in zip(values, mine, strict=True))

            padding = self.padding if isinstance(self.padding, str) else pick(self.padding, 0)
            return {
                "kernel": kernel,
                "stride": pick(self.stride, 1),
                "padding": padding,
                "dilation": pick(self.dilation, 1),
                "output_padding": pick(self.output_padding, 0) if self.transposed else self.output_padding,
            }

        has = [a in how.axes for a in range(len(self.kernel))]
        first = dataclasses.replace(self, out_channels=middle, bias=False, **part(kernels[0], has))  # type: ignore[arg-type]
        second = dataclasses.replace(  # type: ignore[arg-type]
            self,
            in_channels=middle,
            bias=wanted,
            inputs=tuple(first.output_shape(s) for s in self.inputs),
            **part(kernels[1], [not h for h in has]),
        )
        return first, second


def _cropped(spec: LayerSpec, pattern: Taps) -> LayerSpec:
    """A convolution with a part of the kernel, whose inputs are padded or cropped beforehand."""
    margins = spec.margins(pattern)
    inputs = tuple(tuple(n + a + b for n, (a, b) in zip(shape, margins, strict=True)) for shape in spec.inputs)
    none = (0,) * len(spec.kernel)
    return dataclasses.replace(spec, kernel=pattern.extent, padding=none, inputs=inputs)


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
        Calibration statistics by name (see :mod:`spectrim.nn.calibrate`): ``input`` and ``output`` of a single layer.
        Those of the ``n``-th of several layers have ``"n/"`` before the name.
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
