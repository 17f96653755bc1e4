"""Stream the responses of coupled channels, as the layers that read them see them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from spectrim.linalg.moments import Moments
from spectrim.network.coupling import IN, OUT, Coupling
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Pooled
from spectrim.nn.flops import unwatched
from spectrim.nn.watch.samples import Samples
from spectrim.nn.watch.sampling import Extent, Sampling, choose_places

# Single positions over the run at least, and in multiples of the number of channels.
FEWEST, FLOOR = 1024, 12


class Responses:
    """Moments of the channels of a group: their maximum and mean over the positions of a sample, and single positions.

    A channel that several layers read is seen after what happens to it in between: normalisation, activation, pooling,
    addition. Different tensors are taken for further samples, so that a tied set of channels has one spectrum.
    """

    def __init__(
        self, coupling: Coupling, readers: Mapping[str, LayerSpec], amount: Sampling, run: Extent, seed: int
    ) -> None:
        self.sides = [side for side in coupling.on(IN) if side.name in readers]
        self._specs = readers
        self._seed = seed
        self._amount, self._run = amount, run
        self._samples: Samples
        self._seen: list[weakref.ref[Tensor]] = []
        n = coupling.channels
        self._max, self._mean, self._unpooled = Moments(1, n), Moments(1, n), Moments(1, n)

    @property
    def pooled(self) -> Pooled:
        """What has been seen so far."""
        return Pooled(self._max, self._mean, self._unpooled)

    def start(self, samples: Samples) -> None:
        """Begin with another batch."""
        self._samples = samples
        self._seen = []

    def hook(self, number: int) -> Callable[..., None]:
        """For the ``number``-th side, before its module is run."""
        side = self.sides[number]
        spec = self._specs[side.name]

        @torch.no_grad()
        def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if not x.numel() or not spec.takes(x.shape) or any(held() is x for held in self._seen):
                return
            self._seen.append(weakref.ref(x))
            with unwatched():
                self._update(_channels(x.detach(), spec, side.positions), side.positions.shape[1])

        return watch

    def _update(self, rows: Tensor, entries: int) -> None:
        """Add responses ``[samples, channels, entries of a channel x positions]``."""
        single = rows.transpose(1, 2).flatten(0, 1)
        index = choose_places(len(rows), rows.shape[2], self._positions(), self._samples, self._seed)
        self._unpooled.update(single[index.to(single.device)].unsqueeze(0))
        mask = self._samples.mask
        mask = None if mask is None else mask.repeat(1, entries)
        if mask is None or mask.shape != (len(rows), rows.shape[2]):
            largest, mean = rows.amax(2), rows.float().mean(2)
        else:
            data = mask.to(rows.device).unsqueeze(1)
            largest = rows.masked_fill(~data, -torch.inf).amax(2)
            mean = (rows.float() * data).sum(2) / data.sum(2).clamp_min(1)
            some = mask.any(1).to(rows.device)
            largest, mean = largest[some], mean[some]
        self._max.update(largest.unsqueeze(0))
        self._mean.update(mean.unsqueeze(0))

    def _positions(self) -> int | None:
        """Single positions of a sample of mean length."""
        least = max(FEWEST, FLOOR * self._max.mean.shape[1])
        return self._amount.positions_in(self._run, lambda: self._run.positions(least))


class OtherWays:
    """Which coupled channels go another way in a later pass than in the first, by which their readers were found."""

    def __init__(self, couplings: Iterable[Coupling]) -> None:
        sides = {c.name: [frozenset(side.name for side in c.on(axis)) for axis in (OUT, IN)] for c in couplings}
        self._writers = {name: out for name, (out, _) in sides.items()}
        self._readers = {name: into for name, (_, into) in sides.items()}
        self._other: set[str] = set()

    def first(self, called: Set[str]) -> None:
        """Readers that run without being called tell nothing."""
        self._readers = {name: into & called for name, into in self._readers.items()}

    def later(self, called: Set[str]) -> None:
        """Channels that are written, and that none of their readers reads, have another."""
        for name, into in self._readers.items():
            if into and into.isdisjoint(called) and not self._writers[name].isdisjoint(called):
                self._other.add(name)

    def why(self, coupling: Coupling) -> str:
        """Why channels stay; else nothing."""
        if coupling.name not in self._other:
            return ""
        return "batches take different ways, and on some none of the layers that are known to read them is called"


def _channels(x: Tensor, spec: LayerSpec, positions: Tensor) -> Tensor:
    """``[samples, channels, positions]`` of an input."""
    if spec.is_linear:
        # A vector is one sample.
        rows = x.reshape(x.shape[0] if x.dim() > 1 else 1, -1, x.shape[-1]).transpose(1, 2)
    else:
        axes = len(spec.kernel)
        rows = x.reshape(-1, x.shape[-axes - 1], *x.shape[-axes:]).flatten(2)
    index = positions.to(x.device)
    whole = index.shape[1] == 1 and index.shape[0] == rows.shape[1] and bool((index[:, 0].diff() == 1).all())
    # A plain run of channels needs no copy.
    return rows if whole else rows[:, index].flatten(2)
