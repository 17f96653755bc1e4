"""Measured latency of layers, as a cost: times kept on disk, few measurements a layer, interpolation between ranks."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spectrim.cost.chains import calls, describe, measure
from spectrim.cost.counted import macs, rank_multiple, register_width
from spectrim.cost.runtimes import Runtime, runtime_of
from spectrim.linalg.unfold import Unfolding
from spectrim.network.file_kinds import path_of
from spectrim.network.files import bytes_of, digest_of, remove_abandoned, replacing
from spectrim.network.files import default_cache as default_cache
from spectrim.network.layer import LayerSpec
from spectrim.network.structure import Chain, Pair
from spectrim.progress import Steps

VERSION = 1
_LARGEST = 64 << 20  # bytes of a file of times
_FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the rank at which a pair costs the MACs of its layer


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the whole batch through layers: a ``Cost`` that measures.

    Layers are a structure (:mod:`spectrim.network.structure`), of which each chain is run; a plain sequence is one
    chain. Call :meth:`prepare` with all first: what is measured together is comparable. What has not been prepared is
    measured at once. How it is measured is told in :mod:`spectrim.cost.chains`.

    A low-rank pair is measured at up to five ranks of its family, from 1/8 of the rank at which it costs as many MACs
    as the dense layer up to that rank, and interpolated piecewise linearly (:func:`interpolate`). A rank in between two
    multiples counts as the next one, since the kernels pad it (:func:`spectrim.cost.counted.rank_multiple`).

    Sparse weights are timed as :func:`spectrim.nn.sparse.kernels.choose_kernels` makes a network run them: as the dense
    ones they are stored in or, where that is faster, in CSR. The positions are random, and densities that agree to two
    digits count as one. The sum of a low-rank pair and a sparse layer is the pair, interpolated over its ranks, and the
    sparse layer with the addition to the pair's output.

    Parameters
    ----------
    device, dtype, threads, batch, memory_format
        How the network will be run. ``memory_format`` is ``contiguous`` or ``channels_last``; the latter applies to
        convolutions over two and three axes. ``threads`` matters on the CPU only.
    runtime
        What runs the network: ``"eager"``, ``"compile"`` (``torch.compile``), ``"onnxruntime"``, or a
        :class:`spectrim.cost.runtimes.Runtime` of your own. Times of each are kept apart.
    cache
        Directory of the measured times; None keeps them in memory.
    register_width
        float32 numbers in a vector register of the CPU, this one's if not given
        (:func:`spectrim.cost.counted.register_width`). Ranks are rounded and offered by it, on any machine.
    rounds
        Timings of each measurement, of which the median counts.
    budget
        Seconds after which one ``prepare`` stops taking further rounds; at least three are taken.
    timer
        Takes chains, the options above and ``runs``, how a chain is run; gives milliseconds.
        :func:`spectrim.cost.chains.measure` by default.

    Raises
    ------
    ValueError
        For an unknown memory format, device or runtime, what the runtime cannot run, values of other types, or counts
        below one.
    ImportError
        If the runtime needs a package or a compiler that is not there.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    threads: int = field(default_factory=torch.get_num_threads)
    batch: int = 1
    memory_format: str = "contiguous"
    cache: Path | None = field(default_factory=default_cache)
    register_width: int = field(default_factory=register_width)
    runtime: Runtime | str = "eager"
    rounds: int = 9
    budget: float = 120.0
    timer: Callable[..., Sequence[float]] = field(default=measure, repr=False, compare=False)
    _times: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.memory_format not in ("contiguous", "channels_last"):
            raise ValueError(f"memory_format {self.memory_format!r} is neither 'contiguous' nor 'channels_last'")
        for name in ("threads", "batch", "register_width", "rounds"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} is {count!r}; it must be a whole number of at least 1")
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}; give one of torch, as torch.float32")
        if not isinstance(self.cache, str | os.PathLike | None):
            raise ValueError(f"cache is {self.cache!r}; give a folder, or None to keep times in memory")
        if self.cache is not None:
            object.__setattr__(self, "cache", path_of(self.cache, "cache"))
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device {self.device!r} is not known: write cpu, cuda, cuda:1 or mps") from error
        self.runs.check(self.device, self.dtype, self.memory_format)
        if self.cache is not None:
            self._times.update(self._read())

    @property
    def runs(self) -> Runtime:
        """What runs the network."""
        return runtime_of(self.runtime)

    def __call__(self, specs: Sequence[LayerSpec]) -> float:
        """Milliseconds of one forward pass of the batch; several calls of a layer in one pass add up.

        Raises
        ------
        ValueError
            If the input shapes of a layer are not known, or layers of a chain do not follow each other.
        """
        self.prepare([specs])
        return sum(self._time(chain, self._times) for chain in calls(specs))

    def prepare(self, structures: Iterable[Sequence[LayerSpec]], progress: Steps | None = None) -> int:
        """Measure all that these layers need and that is not known, taking turns, and store it once.

        Returns
        -------
        int
            How many shapes were measured.
        """
        timed = (c for specs in structures for chain in calls(specs) for c in self._timed(chain)[0].values())
        needed = {describe(chain): chain for chain in timed}
        pending = {key: chain for key, chain in needed.items() if key not in self._times}
        if pending:
            fresh = self._take(pending, progress)
            self._times.update(fresh)
            self._write(fresh)
        return len(pending)

    def facts(self) -> dict[str, Any]:
        """What the numbers hold for; times under different facts are kept apart."""
        return {
            "device": self.device,
            "device_name": device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            "batch": self.batch,
            "memory_format": self.memory_format,
            "register_width": self.register_width,
            "torch": str(torch.__version__),
            **self.runs.facts(),
        }

    def interpolation_error(self, spec: LayerSpec, how: Unfolding, ranks: Sequence[int]) -> dict[int, float]:
        """``interpolated / measured - 1`` at ranks of the caller's choice.

        The knots and the given ranks are measured anew and side by side; known times are neither used nor changed.
        """
        pairs = {rank: calls(spec.factor(how, rank)) for rank in ranks}
        timed = (c for called in pairs.values() for pair in called for c in (pair, *self._timed(pair)[0].values()))
        fresh = self._take({describe(chain): chain for chain in timed}, None)
        return {
            rank: sum(self._time(pair, fresh) for pair in called) / sum(fresh[describe(pair)] for pair in called) - 1
            for rank, called in pairs.items()
        }

    def _take(self, chains: Mapping[str, Chain], progress: Steps | None) -> dict[str, float]:
        taken = self.timer(
            list(chains.values()),
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            batch=self.batch,
            memory_format=self.memory_format,
            rounds=self.rounds,
            budget=self.budget,
            runs=self.runs.ways,
            progress=progress,
        )
        return dict(zip(chains, map(float, taken), strict=True))

    def _time(self, chain: Chain, times: Mapping[str, float]) -> float:
        timed, rank = self._timed(chain)
        return interpolate([(r, times[describe(c)]) for r, c in timed.items()], rank)

    def _timed(self, chain: Chain) -> tuple[dict[int, Chain], int]:
        """The chains that are timed in place of one, by ascending rank, and the rank at which it lies among them.

        A pair is one of a family; any other chain is timed itself.
        """
        if not isinstance(chain, Pair):
            return {1: chain}, 1
        first, second = chain
        full = min(first.features, math.prod(second.kernel) * second.out_channels // second.groups)
        even = min(full, macs([chain.whole]) / macs(chain.at_rank(1)))
        multiple = rank_multiple(self.device, self.dtype, full, self.register_width)
        knots = sorted({max(1, round(even * f / multiple)) * multiple for f in _FRACTIONS})
        return {rank: chain.at_rank(rank) for rank in knots}, -(-chain.rank // multiple) * multiple

    # Times on disk.

    @property
    def path(self) -> Path | None:
        """File of the times: one for each set of facts."""
        if self.cache is None:
            return None
        return self.cache / f"latency-{digest_of(self.facts())[:16]}.json"

    def _read(self) -> dict[str, float]:
        path = self.path
        if path is None or not os.path.exists(path):  # not that of the path, which raises for names that are too long
            return {}
        remove_abandoned(path.parent)
        try:
            content = json.loads(bytes_of(path, _LARGEST))
            if content["version"] != VERSION or content["facts"] != self.facts():
                raise ValueError("it was written for another version or other facts")
            if content.get("sha256", "") not in ("", digest_of(content["timings"])):
                raise ValueError("its timings are not those that were written")
            timings = {str(key): float(value) for key, value in content["timings"].items()}
            if not all(0 < value < math.inf for value in timings.values()):
                raise ValueError("it holds timings that are not positive and finite")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            warnings.warn(f"measured times {str(path)!r} cannot be used and are measured anew: {error}", stacklevel=4)
            return {}
        return timings

    def _write(self, fresh: Mapping[str, float]) -> None:
        """Add to the file what other processes have not added. Readers see the old file or the new one, never a part.

        Two writers at the same instant may lose one's timings, which are then measured again.
        """
        path = self.path
        if path is None:
            return
        timings = {**self._read(), **fresh}
        content = {"version": VERSION, "facts": self.facts(), "timings": timings, "sha256": digest_of(timings)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as scratch:
                scratch.write_text(json.dumps(content, indent=0, sort_keys=True), encoding="utf-8")
        except OSError as error:
            warnings.warn(f"latencies cannot be stored in {str(path)!r} and stay in memory: {error}", stacklevel=3)


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    """Value at ``at`` of a non-decreasing piecewise linear curve through ``points`` (ascending, positive).

    Values that fall are pooled first (the nearest non-decreasing values by least squares), so that less work never
    takes longer. Below the first point the first piece goes on, but not under the line to the origin; above the last
    one the last piece goes on.
    """
    pools: list[tuple[float, int]] = []  # mean, how many
    for _, value in points:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    xs = [x for x, _ in points]
    ys = [mean for mean, count in pools for _ in range(count)]
    if len(xs) == 1:
        return ys[0] * max(1.0, at / xs[0])
    piece = max((i for i in range(len(xs) - 1) if xs[i] <= at), default=0)
    slope = (ys[piece + 1] - ys[piece]) / (xs[piece + 1] - xs[piece])
    line = ys[piece] + slope * (at - xs[piece])
    return max(line, ys[0] * at / xs[0]) if at < xs[0] else line


@functools.cache
def device_name(device: str) -> str:
    """Model of the processor or of the GPU, for people and for keeping times apart."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.get_device_name(kind)
    if kind.type != "cpu":
        return kind.type
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
