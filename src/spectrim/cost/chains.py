"""Layers run one after the other with random weights, and how long that takes.

What makes the sum over layers agree with the time of the network, on a CPU:

- Weights are cold. Inside a network of some size each weight comes from memory and is brought into the kernels' own
  order on each call; timing one weight again and again finds it in the cache and can report half of the real time. So
  the calls rotate through copies. Inputs are warm, since the layer before has just written them.
- Load changes. All chains take turns, so that a busy moment hits them alike, and medians are taken over the rounds.
- A thread that loses its core stops the others at the next barrier, and 1 ms becomes 20 ms. Rounds in which the system
  took a core away are set aside while enough others are left.

A sparse weight is timed with random positions, multiplied as a dense one and, where that is possible, in CSR. The less
of the two counts, which is what :func:`spectrim.nn.sparse.kernels.choose_kernels` makes the network run. The sparse
layer beside a low-rank pair is timed with the addition to the pair's output. What a thinner layer takes to gather its
channels, and one with a smaller kernel to pad or crop its input, is not timed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from spectrim.cost.counted import require_inputs
from spectrim.cost.running import Run, number_pool, rounded_density, ways
from spectrim.network.layer import LayerSpec
from spectrim.network.structure import Addend, Chain, structure_of

Progress = Callable[[int, int], None]
"""Called with the timings taken so far and how many there are to take."""

_BLOCK_MS = 2.0
_BLOCK_CALLS = 50
_FEWEST_ROUNDS = 3
_CHILLED_S = 0.05  # a block's time with weights made cold in between, once it has three calls


def calls(layers: Sequence[LayerSpec]) -> list[Chain]:
    """The chains that layers are made of, once for each call in a forward pass; a plain sequence is one chain.

    Raises
    ------
    ValueError
        If the input shapes of a layer are not known, or a chain's layers cannot be run one after the other.
    """
    found: list[Chain] = []
    for chain in structure_of(layers).chains():
        shapes = [require_inputs(spec) for spec in chain]
        for first, second in itertools.pairwise(chain):
            gives = (first.out_channels, len(first.kernel), len(first.inputs))
            if gives != (second.in_channels, len(second.kernel), len(second.inputs)):
                raise ValueError(
                    f"layer {second.name!r} ({second.kind}, {second.in_channels} inputs, calls: {len(second.inputs)}) "
                    f"cannot take what {first.name!r} gives ({first.kind}, {first.out_channels} outputs, calls: "
                    f"{len(first.inputs)}), so the two are no chain; expected spectrim.network.structure.Apart"
                )
        found += [chain.at(inputs) for inputs in zip(*shapes, strict=True)]
    return found


def describe(chain: Chain) -> str:
    """The shape of a chain as text: all that its time depends on besides the machine and how it is run."""

    def numbers(values: tuple[int, ...] | str) -> str:
        return values if isinstance(values, str) else "x".join(map(str, values))

    def one(spec: LayerSpec) -> str:
        (shape,) = spec.inputs
        text = f"{spec.in_channels}>{spec.out_channels}{'+bias' if spec.bias else ''} @{numbers(shape)}"
        if spec.density < 1:
            text += f" density {rounded_density(spec):g}"
        if isinstance(chain, Addend) and spec is chain[-1]:
            text += " added"
        if spec.is_linear:
            return f"linear {text}"
        parts = f"k{numbers(spec.kernel)} s{numbers(spec.stride)} p{numbers(spec.padding)} d{numbers(spec.dilation)}"
        extra = f" o{numbers(spec.output_padding)}" if spec.transposed else ""
        name = "transposed" if spec.transposed else "conv"
        return f"{name} {text} {parts}{extra} g{spec.groups} {spec.padding_mode}"

    return "; ".join(map(one, chain))


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run with this many threads within operators, and set the former number again; None changes nothing."""
    before = torch.get_num_threads()
    try:
        if count is not None and count != before:
            torch.set_num_threads(count)
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def preemptions() -> int:
    """How often the system took a core away from a thread of this process so far; 0 where it does not say."""
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def undisturbed(samples: Sequence[float], disturbances: Sequence[int], fewest: int = _FEWEST_ROUNDS) -> list[float]:
    """The samples with the fewest disturbances, at least ``fewest`` of them, all that are equally good included."""
    if len(samples) <= fewest:
        return list(samples)
    bar = sorted(disturbances)[fewest - 1]
    return [sample for sample, count in zip(samples, disturbances, strict=True) if count <= bar]


def measure(
    chains: Sequence[Chain],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    batch: int = 1,
    memory_format: str = "contiguous",
    rounds: int = 9,
    budget: float = 120.0,
    progress: Progress | None = None,
) -> list[float]:
    """Milliseconds of each chain: warm-up, then rounds over all chains, and the median of the undisturbed rounds.

    One timing is a block of calls of about 2 ms together. Further rounds are taken, up to three times ``rounds``, while
    a chain has fewer than three undisturbed ones.

    Memory: 64 MiB, or the largest input or twice the largest weight if larger, the activations of one chain, and the
    sparse weights in CSR.

    Parameters
    ----------
    memory_format
        ``contiguous`` or ``channels_last``; the latter applies to convolutions over two and three axes.
    budget
        Seconds after which no further round is begun; three are taken in any case.
    """
    block = _cuda_block if torch.device(device).type == "cuda" else _block
    with torch_threads(threads), torch.inference_mode():
        pool = number_pool(chains, dtype, device, batch)
        found = [ways(chain, pool, batch, memory_format == "channels_last") for chain in chains]
        runs = [run for several in found for run in several]
        counts = []
        for run in runs:
            run()
            counts.append(max(1, min(_BLOCK_CALLS, math.ceil(_BLOCK_MS / block(run, 1)))))
        samples: list[list[float]] = [[] for _ in runs]
        disturbances: list[list[int]] = [[] for _ in runs]
        start = time.perf_counter()
        for turn in range(3 * rounds):
            late = time.perf_counter() - start > budget
            if turn >= _FEWEST_ROUNDS and late:
                break
            for index, (run, count) in enumerate(zip(runs, counts, strict=True)):
                if turn < rounds or disturbances[index].count(0) < _FEWEST_ROUNDS:
                    before = preemptions()
                    samples[index].append(block(run, count))
                    disturbances[index].append(preemptions() - before)
                if progress is not None and turn < rounds:
                    progress(turn * len(runs) + index + 1, rounds * len(runs))
    times = iter([statistics.median(undisturbed(s, d)) for s, d in zip(samples, disturbances, strict=True)])
    return [min(itertools.islice(times, len(several))) for several in found]


def _block(run: Run, count: int) -> float:
    """Median milliseconds of ``count`` calls, or of fewer where making each one's weights cold takes long."""
    taken = []
    begun = time.perf_counter()
    for _ in range(count):
        if run.chill is not None:
            run.chill()
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
        if run.chill is not None and time.perf_counter() - begun > _CHILLED_S and len(taken) >= _FEWEST_ROUNDS:
            break
    return max(statistics.median(taken), 1e-9) * 1e3


def _cuda_block(run: Run, count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / count, 1e-6)
