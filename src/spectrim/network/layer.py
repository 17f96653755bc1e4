"""One layer as numbers: what a choice turns into other layers, and what every cost is a function of."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from spectrim.linalg.packing import packed_bytes
from spectrim.linalg.patterns import Pattern, Taps, WholeChannels
from spectrim.linalg.unfold import Unfolding
from spectrim.network.structure import Pair

N = TypeVar("N", int, float)
# Products of real numbers in one of complex ones.
COMPLEX = 4


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
        rows a sample, a mean where samples have different numbers. Empty until the network has been run.
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
    inputs: tuple[tuple[float, ...], ...] = ()
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
    def looks_up(self) -> bool:
        """Whether its inputs are places of a table (:class:`Lookup`), and not vectors."""
        return False

    @property
    def keeps_zero(self) -> bool:
        """Whether one of its inputs may give zero before and after training, so that no bias may carry a mean."""
        return False

    def as_vectors(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of an input as the weight multiplies it, for the shape that the layer is called with."""
        return shape

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
    def positions(self) -> float:
        """Positions that each weight is used at, over all calls in one forward pass of a sample; 0 before a run."""
        return sum(map(math.prod, self.inputs)) if self.transposed else self.rows

    @property
    def products(self) -> float:
        """Multiply-accumulates of a sample, over all calls; 0 before a run. Products of complex numbers are four."""
        return self.stored * self.positions * (COMPLEX if self.dtype.is_complex else 1)

    @property
    def rows(self) -> float:
        """Output positions over all calls in one forward pass of a sample; 0 before a run."""
        return sum(math.prod(self.output_shape(shape)) for shape in self.inputs)

    @property
    def features(self) -> int:
        """Length of one group's input patch, ``i * prod(k)``."""
        return math.prod(self.shape[2:])

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """Padding before and after each axis."""
        if not isinstance(self.padding, str):
            return tuple((n, n) for n in self.padding)
        both = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
        return tuple((n // 2, n - n // 2) for n in both)

    @property
    def kind(self) -> str:
        """A short word for people: ``Linear``, ``Conv2d 3x3/2``, ..."""
        if self.is_linear:
            return "Linear"
        strided = "" if set(self.stride) == {1} else "/" + "x".join(map(str, dict.fromkeys(self.stride)))
        grouped = "" if self.groups == 1 else f" g{self.groups}"
        transposed = "Transpose" if self.transposed else ""
        return f"Conv{transposed}{len(self.kernel)}d {'x'.join(map(str, self.kernel))}{strided}{grouped}"

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether the layer can be called with a tensor of a shape: some models try, and go on another way."""
        if self.looks_up:
            return True
        axes = len(self.kernel)
        return (not axes or len(shape) <= axes + 2) and len(shape) > axes and shape[-axes - 1] == self.in_channels

    def output_shape(self, shape: tuple[N, ...]) -> tuple[N, ...]:
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

    def at(self, inputs: tuple[tuple[float, ...], ...]) -> LayerSpec:
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
        if isinstance(pattern, WholeChannels):
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

    def along(self, axes: Collection[int]) -> dict[str, Any]:
        """Kernel, stride, padding and the like of a layer that has these axes of the kernel; the others are of one."""

        def pick(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(value if axis in axes else other for axis, value in enumerate(values))

        padding = self.padding if isinstance(self.padding, str) else pick(self.padding, 0)
        ones = {name: pick(getattr(self, name), 1) for name in ("kernel", "stride", "dilation")}
        return {**ones, "padding": padding, "output_padding": pick(self.output_padding, 0)}

    def margins(self, pattern: Taps) -> tuple[tuple[int, int], ...]:
        """Padding before and after each axis of the input with which the smaller kernel sees what it saw in this one.

        Negative numbers crop.
        """
        axes = zip(self.kernel, self.dilation, self.sides, pattern.corner, pattern.extent, strict=True)
        return tuple(
            (before - first * d, after - (k - first - count) * d) for k, d, (before, after), first, count in axes
        )

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

    def factor(self, how: Unfolding, rank: int, *, bias: bool | None = None) -> Pair:
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
        first, second = _halves(self, how, self.bias if bias is None else bias)
        return Pair((_like(first, "out_channels", middle), _like(second, "in_channels", middle)), self)


# A layer has a pair for every rank and unfolding, and tables ask for all of them, one after the other.
@functools.lru_cache(maxsize=64)
def _halves(spec: LayerSpec, how: Unfolding, bias: bool) -> tuple[LayerSpec, LayerSpec]:
    """The two layers of a pair, with channels in the middle yet to be set."""
    rest = [axis for axis in range(len(spec.kernel)) if axis not in how.axes]
    first = dataclasses.replace(spec, bias=False, **spec.along(how.axes))
    inputs = tuple(first.output_shape(shape) for shape in spec.inputs)
    return first, dataclasses.replace(spec, bias=bias, inputs=inputs, **spec.along(rest))


def _like(spec: LayerSpec, side: str, channels: int) -> LayerSpec:
    """The layer with other channels on one side; :func:`dataclasses.replace` takes ten times as long."""
    made = object.__new__(LayerSpec)
    made.__dict__.update(spec.__dict__, **{side: channels})
    return made


@dataclass(frozen=True)
class Lookup(LayerSpec):
    """A table that is looked up, ``nn.Embedding``: a linear layer of inputs of which one is 1 and all others are 0.

    Torch holds its weight as rows of outputs, so that it is ``transposed``. Nothing is multiplied: it has no MACs. Of a
    low-rank pair the first layer is a narrower table and the second is linear.

    Attributes
    ----------
    in_channels, out_channels
        Entries of the table and their width.
    padding_idx
        Entry that gets no gradient; None for none.
    """

    transposed: bool = True
    bias: bool = False
    padding_idx: int | None = None

    @property
    def kind(self) -> str:
        return "Embedding"

    @property
    def looks_up(self) -> bool:
        return True

    @property
    def keeps_zero(self) -> bool:
        """Padding does whose row is zero: a pair without bias answers zero, too, and learns nothing from it."""
        return self.padding_idx is not None

    @property
    def positions(self) -> float:
        """No position multiplies a weight."""
        return 0

    def as_vectors(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape, self.in_channels)

    def allows(self, pattern: Pattern) -> bool:
        """A row of the table is read as it lies, so that none of its zeros is skipped."""
        return False

    def factor(self, how: Unfolding, rank: int, *, bias: bool | None = None) -> Pair:
        table = dataclasses.replace(self, out_channels=rank)
        wanted = self.bias if bias is None else bias
        second = LayerSpec(
            self.names, rank, self.out_channels, bias=wanted, dtype=self.dtype, device=self.device, inputs=self.inputs
        )
        return Pair((table, second), self)


def _cropped(spec: LayerSpec, pattern: Taps) -> LayerSpec:
    """A convolution with a part of the kernel, whose inputs are padded or cropped beforehand."""
    margins = spec.margins(pattern)
    inputs = tuple(tuple(n + a + b for n, (a, b) in zip(shape, margins, strict=True)) for shape in spec.inputs)
    none = (0,) * len(spec.kernel)
    return dataclasses.replace(spec, kernel=pattern.extent, padding=none, inputs=inputs)
