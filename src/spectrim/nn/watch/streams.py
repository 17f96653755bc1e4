"""Streamed statistics of what layers see: one for all layers that are called with one and the same tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from spectrim.linalg.moments import Moments
from spectrim.linalg.sketch import Sketch
from spectrim.linalg.unfold import Unfolding
from spectrim.network.layer import LayerSpec
from spectrim.nn.parameters import version_of
from spectrim.nn.watch.patches import outputs_at, slices_at, taps_at
from spectrim.nn.watch.samples import Samples
from spectrim.nn.watch.sampling import choose, pointwise

# Rows that are waited for before moments are given them: as many as their vectors are long, but no more than this.
_ROOM = 1024
# Numbers of patches that are gathered at a time.
_CHUNK = 1 << 22
Rows = tuple[Tensor, ...]
"""Rows ``[g, n, d]``, and how often each is there, ``[1, n]``, if not once."""


class Buffered:
    """Moments that are given many rows at a time, which costs less than a few rows often.

    Parameters
    ----------
    kind
        Moments or Sketch.
    """

    def __init__(self, kind: Callable[..., Moments] = Moments) -> None:
        self._kind = kind
        self._moments: Moments | None = None
        self._held: list[tuple[Tensor, ...]] = []

    # What a model's own inference mode makes could not be added to outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, rows: Tensor, *counts: Tensor) -> None:
        """Add rows ``[g, n, d]``, and how often each is there, ``[1, n]``, if not once."""
        if self._moments is None:
            self._moments = self._kind(rows.shape[0], rows.shape[2], device=rows.device)
        room = min(rows.shape[2], _ROOM)
        if not self._held and rows.shape[1] >= room:
            self._moments.update(rows, *counts)
            return
        # A copy: what runs later may overwrite the layer's input in place.
        self._held.append((rows.clone(), *counts))
        if sum(part[0].shape[1] for part in self._held) >= room:
            self._flush()

    def _flush(self) -> None:
        if self._held and self._moments is not None:
            self._moments.update(*(torch.cat(parts, dim=1) for parts in zip(*self._held, strict=True)))
            self._held = []

    @property
    def moments(self) -> Moments | None:
        """Of all rows so far."""
        self._flush()
        return self._moments

    def copy(self) -> Buffered:
        """Another one with the same rows."""
        other, mine = Buffered(self._kind), self.moments
        if mine is not None:
            other._moments = self._kind(*mine.mean.shape, device=mine.mean.device)
            other._moments.merge(mine)
        return other


class Stream:
    """What is kept of the inputs of some layers, all of which have been called with the same tensors."""

    def __init__(self, spec: LayerSpec, splits: tuple[Unfolding, ...], *, full: bool, channels: bool) -> None:
        self.spec = spec  # of the first of them; the others have the same patches
        self.readers: set[str] = set()  # their names
        self.told: set[str] = set()  # readers that have been called with the tensor that is not in the statistics yet
        self.calls = 0  # tensors that are in them
        self._splits, self._full, self._channels = splits, full, channels
        self._sums: dict[str, Buffered] = {}
        self._waiting: list[tuple[str, Rows]] = []
        self._done: dict[str, Moments] | None = None

    @property
    def waits(self) -> bool:
        """Whether there are rows that not all readers have been called with."""
        return bool(self.told)

    def add(self, rows: Iterator[tuple[str, Rows]]) -> None:
        """Add the rows of a tensor."""
        for name, part in rows:
            if name not in self._sums:
                self._sums[name] = Buffered(Sketch if name == "sketch" else Moments)
            self._sums[name].add(*part)
        self.calls += 1

    def hold(self, rows: Iterator[tuple[str, Rows]], name: str) -> None:
        """Keep the rows of a tensor until all readers have been called with it."""
        self._waiting = [(statistic, tuple(each.clone() for each in part)) for statistic, part in rows]
        self.told = {name}

    def settle(self) -> None:
        """Add the rows that wait."""
        waiting, self._waiting, self.told = self._waiting, [], set()
        self.add(iter(waiting))

    def rows(self, inputs: Tensor, positions: int | None, samples: Samples, seed: int) -> Iterator[tuple[str, Rows]]:
        """Rows of a tensor by the name of the statistic, slices by ``"slices"`` and theirs."""
        spec, shape = self.spec, tuple(inputs.shape)
        index = choose(spec, shape, positions, samples, seed).index
        for part in index.split(max(1, _CHUNK // (spec.features * spec.groups))):
            if self._full or spec.is_linear:
                yield "input" if self._full else "sketch", (taps_at(spec, inputs, part).flatten(2),)
            for how in self._splits:
                yield f"slices {how.name}", slices_at(spec, inputs, part, how)
        if self._channels and not self._full and not spec.is_linear:
            single = choose(pointwise(spec), shape, positions, samples, seed).index
            yield "channels", (outputs_at(spec, inputs, single),)

    def copy(self, name: str) -> Stream:
        """One of a reader's own, without the rows that wait."""
        other = Stream(self.spec, self._splits, full=self._full, channels=self._channels)
        other.readers, other.calls = {name}, self.calls
        other._sums = {statistic: held.copy() for statistic, held in self._sums.items()}
        return other

    def statistics(self) -> Mapping[str, Any]:
        """Moments by the name of the statistic, in the order of the canonical weight; the same objects at each call."""
        if self._done is None:
            self._done = {}
            for name in list(self._sums):
                moments = self._sums.pop(name).moments
                if moments is not None:
                    self._done[name] = self._ordered(name, moments)
        slices = {name.split(" ")[1]: m for name, m in self._done.items() if name.startswith("slices ")}
        whole = {name: m for name, m in self._done.items() if not name.startswith("slices ")}
        return {**whole, "slices": MappingProxyType(slices)}

    def _ordered(self, name: str, moments: Moments) -> Moments:
        """Taps were last to first: ``(*k, i)`` becomes ``(i, *k)``."""
        taps = moments.mean.shape[1] // self.spec.shape[2]
        return moments if taps == 1 or name == "channels" else moments.swapped(taps)

    def is_finite(self) -> bool:
        """Whether the sums so far are."""
        return all(held._moments is None or held._moments.is_finite() for held in self._sums.values())


class Streams:
    """The streams of a network, by the names of the layers.

    In the first forward pass layers that are called with one tensor, and read the same patches of it, get one stream.
    From then on its rows wait until all of them have been called with the next tensor; those that have not are given a
    stream of their own, with what they have seen so far.
    """

    def __init__(self) -> None:
        self._of: dict[str, Stream] = {}
        self._seen: list[tuple[weakref.ref[Tensor], int, Hashable, Stream]] = []

    def __getitem__(self, name: str) -> Stream:
        return self._of[name]

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def end_of_pass(self) -> None:
        """No layer is called with a tensor of this pass any more."""
        for stream in {id(s): s for s in self._of.values()}.values():
            self._settle(stream)
        self._seen = []

    def see(
        self,
        name: str,
        patches: Hashable,
        inputs: Tensor,
        make: Callable[[], Stream],
        rows: Callable[[Stream], Iterator[tuple[str, Rows]]],
    ) -> None:
        """A layer is called with a tensor, of which it reads such patches."""
        version = version_of(inputs)
        known = next(
            (s for held, then, what, s in self._seen if held() is inputs and (then, what) == (version, patches)), None
        )
        mine = self._of.get(name)
        if mine is None:
            if known is not None and known.calls == 1:
                # All that it has seen is this tensor.
                known.readers.add(name)
                self._of[name] = known
                return
            mine = self._of[name] = make()
            mine.readers.add(name)
        elif known is mine and mine.waits and name not in mine.told:
            mine.told.add(name)
            if mine.told == mine.readers:
                mine.settle()
            return
        self._settle(mine)
        mine = self._of[name]
        if len(mine.readers) == 1:
            mine.add(rows(mine))
        else:
            mine.hold(rows(mine), name)
        self._seen.append((weakref.ref(inputs), version, patches, mine))

    def _settle(self, stream: Stream) -> None:
        """Readers that have not been called with the tensor that waits go their own way."""
        if not stream.waits:
            return
        for name in sorted(stream.readers - stream.told):
            self._of[name] = stream.copy(name)
        stream.readers = set(stream.told)
        stream.settle()


def patches_of(spec: LayerSpec) -> Hashable:
    """What layers agree in that read the same patches of a tensor."""
    return (
        spec.in_channels, spec.kernel, spec.stride, spec.padding, spec.dilation, spec.output_padding, spec.groups,
        spec.transposed, spec.padding_mode,
    )  # fmt: skip
