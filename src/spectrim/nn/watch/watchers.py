"""What is kept of one layer while batches pass: its input shapes, and streamed moments of what it sees and gives."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import CalibrationError
from spectrim.linalg.alike import Alike
from spectrim.linalg.moments import Moments
from spectrim.linalg.unfold import unfoldings
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer, Statistics
from spectrim.nn.flops import unwatched
from spectrim.nn.parameters import version_of
from spectrim.nn.watch.patches import outputs_at
from spectrim.nn.watch.samples import Samples
from spectrim.nn.watch.sampling import Extent, Sampling, choose, mean_rows, unmasked
from spectrim.nn.watch.shapes import Call, of_one_sample
from spectrim.nn.watch.streams import Buffered, Stream, Streams, patches_of

# Patches up to this length get a full second moment (at most 11 MB); longer ones one for each unfolding's slices.
FULL_PATCH = 1152
# Linear layers up to this many inputs do too (at most 34 MB): they have no slices to keep in its place.
FULL_LINEAR = 2048
# Samples from which on it is not asked how alike the rows of each are.
_MANY = 256
# Share of a layer's own MACs that its statistics may cost.
EFFORT = 0.08
# Rows over the whole run that a moment of vectors of d numbers rests on at least, in multiples of d; and rows at least.
FLOOR = 12
FEWEST = 1024


class SameInputs:
    """Which layers are called with one and the same tensor in the first forward pass."""

    def __init__(self) -> None:
        self._calls: list[tuple[weakref.ref[Tensor], int, list[str]]] = []

    def note(self, inputs: Tensor, name: str) -> None:
        # A tensor that is gone may have given its place to another one; one that was written to is another one.
        version = version_of(inputs)
        for held, then, names in self._calls:
            if held() is inputs and then == version:
                names.append(name)
                return
        self._calls.append((weakref.ref(inputs), version, [name]))

    def together(self, known: list[str]) -> tuple[tuple[str, ...], ...]:
        """Names of layers that see the same, of those that are called once a pass."""
        calls = [name for _, _, names in self._calls for name in names]
        once = {name for name in known if calls.count(name) == 1}
        sets = [tuple(name for name in names if name in once) for _, _, names in self._calls]
        return tuple(names for names in sets if len(names) > 1)


class Order:
    """Names of layers in the order of execution, also where batches take different ways: those that a later batch
    reaches first come right behind what it called before them.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.called: set[str] = set()
        self._at = -1

    def start(self) -> None:
        """A new pass begins."""
        self.called = set()
        self._at = -1

    def see(self, name: str) -> None:
        """A layer is called."""
        self.called.add(name)
        if name not in self.names:
            self.names.insert(self._at + 1, name)
        self._at = max(self._at, self.names.index(name))


class Shapes:
    """Remembers the input shapes of every call of a layer in the first forward pass, for one sample."""

    def __init__(self, spec: LayerSpec, seen: SameInputs | None = None) -> None:
        self.spec = spec
        self.frozen = False
        self._calls: list[Call] = []
        self._of = 1
        self.refused = ""
        self.seen = seen
        self.number = 0
        self.size = 1
        self.samples: Samples

    def start(self, number: int, samples: Samples, *, first: bool) -> None:
        self.number, self.size, self.samples = number, samples.size, samples
        self.frozen = not first

    def hook(self, order: Order) -> Callable[..., None]:
        @torch.no_grad()
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = args[0] if args else kwargs["input"]
            if len(args) + len(kwargs) > 1:
                self.refused = (
                    "called with more than its input (output_size), which a pair of layers cannot take: give "
                    "output_padding to its constructor instead"
                )
            if not isinstance(inputs, Tensor):
                self.refused = f"called with a {type(inputs).__name__} and not with a tensor"
                return
            if inputs.is_nested:
                self.refused = (
                    "called with a nested tensor, whose rows cannot be watched: give it a padded one "
                    "(to_padded_tensor(0))"
                )
            elif inputs.layout is not torch.strided:
                self.refused = "called with a sparse tensor, whose rows cannot be watched: give it x.to_dense()"
            if not inputs.numel():
                return
            order.see(self.spec.name)
            # A layer that the first batch does not reach is described by the first call it gets.
            if not self.frozen or not self._calls:
                if self.seen is not None and not self.frozen:
                    self.seen.note(inputs, self.spec.name)
                self._of = self.size
                self._calls.append(Call.of(self.spec, _shape(self.spec, inputs), self.size))
            self.see(inputs, output)

        return watch

    @property
    def inputs(self) -> tuple[tuple[float, ...], ...]:
        """Of one sample."""
        return of_one_sample(self._calls, self._of)

    @property
    def loops(self) -> bool:
        """Whether it is called with some of the samples, more often than for one of them."""
        return not all(call.whole for call in self._calls) and len(self._calls) > len(self.inputs)

    def see(self, inputs: Tensor, outputs: Tensor) -> None:
        """What else to do with a call; nothing for a bystander."""

    def obstacle(self) -> str:
        return self.refused or "never reached by the calibration batches"


class Watcher(Shapes):
    """Streams the statistics of one layer."""

    def __init__(
        self, layer: Layer, amount: Sampling, run: Extent, streams: Streams | None, seed: int, seen: SameInputs,
        *, reads_channels: bool,
    ) -> None:  # fmt: skip
        super().__init__(layer.spec, seen)
        self._layer = layer
        self._amount, self._run, self._seed = amount, run, seed
        self._streams = streams
        self._output = Buffered()
        self._reads_channels = reads_channels
        self.alike = Alike(layer.spec.out_channels)
        # Rows of a sample of which no mask says whether they are padding.
        self.unmasked = 0

    def see(self, inputs: Tensor, outputs: Tensor) -> None:
        if self._streams is None or self.refused:
            return
        # Sampled rows alone would miss most of a few broken positions.
        self._refuse_unless(_squares(inputs), "sees")
        with unwatched():
            self._update(self._streams, inputs, outputs)

    def _update(self, streams: Streams, inputs: Tensor, outputs: Tensor) -> None:
        spec, shape = self.spec, tuple(inputs.shape)
        positions = self._positions(shape)
        self.unmasked = self.unmasked or unmasked(spec, shape, self.samples)
        streams.see(
            spec.name, (patches_of(spec), self._reads_channels), inputs, self._stream,
            lambda stream: stream.rows(inputs, positions, self.samples, self._seed),
        )  # fmt: skip
        full, few = in_full(spec), (self._run.samples or 0) < _MANY
        if not full:
            self._refuse_unless(_squares(outputs), "gives")
        if full and not few:
            return
        chosen = choose(spec, shape, positions, self.samples, self._seed)
        rows = outputs_at(spec, outputs, chosen.index)
        if not full:
            self._output.add(rows)
        if few:
            self.alike.add(rows.transpose(0, 1).flatten(1), chosen.sample, self.size, self.number)

    def _stream(self) -> Stream:
        spec, full = self.spec, in_full(self.spec)
        splits = () if full else tuple(how for how in unfoldings(spec.kernel) if how.name != "channel")
        return Stream(spec, splits, full=full, channels=self._reads_channels)

    @property
    def numbers(self) -> int:
        """Most directions that its answers may have."""
        return min(self.spec.out_channels // self.spec.groups, self.spec.features)

    def _positions(self, shape: tuple[int, ...]) -> int | None:
        """Rows of a sample of mean length."""
        return self._amount.positions_in(self._run, lambda: self._enough(shape))

    def _enough(self, shape: tuple[int, ...]) -> int:
        spec = self.spec
        # A patch of d numbers costs d^2 operations; a position of the layer costs d x out.
        work = spec.features**2 * spec.groups if in_full(spec) else spec.features * spec.in_channels * 6
        share = EFFORT * spec.features * spec.out_channels / work
        cheap = int(share * mean_rows(spec, shape, self.samples) + 1e-6)
        return max(self._run.positions(max(FEWEST, FLOOR * _longest(spec))), cheap)

    def _refuse_unless(self, fine: bool, what: str) -> None:
        if not fine:
            raise NotFiniteError(
                f"layer {self.spec.name!r} ({self.spec.kind}) {what} NaN or Inf, or numbers too large to be squared, "
                f"in calibration batch {self.number}. Check the batch and the model's dtype."
            )

    def layer(self) -> Layer:
        """The layer with the shapes of its inputs and its statistics."""
        spec = self.spec.at(self.inputs)
        if self._streams is None or self.spec.name not in self._streams:
            return dataclasses.replace(self._layer, spec=spec)
        output = self._output.moments
        stream = self._streams[self.spec.name]
        statistics = Statistics(**stream.statistics(), output=output)
        if not all(m.is_finite() for m in (statistics.input, output, *statistics.slices.values()) if m is not None):
            raise CalibrationError(
                f"the statistics of layer {self.spec.name!r} ({self.spec.kind}) are too large for their numbers. Check "
                "the batches and the model's dtype."
            )
        return dataclasses.replace(self._layer, spec=spec, statistics=statistics)


class TableWatcher(Watcher):
    """Counts how often each entry of a table is asked for, which tells all of what it answers."""

    def __init__(self, layer: Layer, *options: Any, **more: Any) -> None:
        super().__init__(layer, *options, **more)
        # One tensor of places is no input that layers could share a factor for.
        self.seen = None
        self._counts = torch.zeros(layer.spec.in_channels, dtype=torch.int64)
        # Those that stand for padding are no new ones.
        self._padding = torch.zeros(layer.spec.in_channels, dtype=torch.int64)

    def see(self, inputs: Tensor, outputs: Tensor) -> None:
        if self._streams is None or self.refused:
            return
        self._refuse_unless(_squares(outputs), "gives")
        shape = self.spec.as_vectors(tuple(inputs.shape))
        index = choose(self.spec, shape, None, self.samples, self._seed).index
        places = inputs.reshape(-1).cpu().long()
        data = torch.bincount(places.index_select(0, index.cpu()), minlength=len(self._counts))
        self._counts += data
        self._padding += torch.bincount(places, minlength=len(self._counts)) - data

    @property
    def _weights(self) -> Tensor:
        return expected(self._counts, self._padding > 0)

    @property
    def asked(self) -> Tensor | None:
        """How often each entry is asked for in as much data again, as shares."""
        return (weights := self._weights) / weights.sum() if bool(self._counts.any()) else None

    def layer(self) -> Layer:
        spec = self.spec.at(self.inputs)
        count = int(self._counts.sum())
        if not count:
            return dataclasses.replace(self._layer, spec=spec)
        output = Moments.of_rows(self._layer.weight[0].mT, self._weights, count, centred=not spec.keeps_zero)
        return dataclasses.replace(self._layer, spec=spec, statistics=Statistics(output=output))


def _shape(spec: LayerSpec, inputs: Tensor) -> tuple[int, ...]:
    """Shape of a layer's input as its weight multiplies it; of a nested tensor that of all its rows."""
    if not inputs.is_nested:
        return spec.as_vectors(tuple(inputs.shape))
    rows = inputs.numel() if spec.looks_up else inputs.numel() // spec.in_channels
    return spec.as_vectors((rows,) if spec.looks_up else (rows, spec.in_channels))


def expected(counts: Tensor, padding: Tensor | None = None) -> Tensor:
    """How often entries are expected in as much data again, for how often they were seen.

    Of as many as were seen once, something new is expected (Good 1953): entries that were not seen have an equal part,
    but for those that were seen as ``padding``.
    """
    new = counts == 0 if padding is None else (counts == 0) & ~padding
    once = (counts == 1).sum()
    return counts.double() + torch.where(new, once / new.sum().clamp_min(1), 0.0)


def _squares(tensor: Tensor) -> bool:
    """Whether the sum of all squares is finite: one NaN, Inf or number too large spoils it."""
    kind = torch.promote_types(tensor.dtype, torch.float32)
    return bool(torch.isfinite(torch.linalg.vector_norm(tensor, dtype=kind)))


def _longest(spec: LayerSpec) -> int:
    """Length of the vectors whose moment is kept, as a patch gives one of each; slices come several a patch."""
    if in_full(spec):
        return spec.features
    return max(spec.in_channels, spec.out_channels) // spec.groups


def in_full(spec: LayerSpec) -> bool:
    """Whether a second moment of whole patches is kept."""
    return spec.features <= (FULL_LINEAR if spec.is_linear else FULL_PATCH)


def too_wide(head: LayerSpec) -> str:
    """Why no second moment of a linear layer's inputs is kept, in words; empty where one is."""
    if in_full(head):
        return ""
    return f"its {head.features:,} inputs are more than the {FULL_LINEAR:,} whose second moment is kept"


class NotFiniteError(CalibrationError):
    """A layer sees or gives NaN or Inf."""
