"""Layers run one after the other with random weights, and how long that takes.

What makes the sum over layers agree with the time of the network, on a CPU:

- Weights are cold. Inside a network of some size each weight comes from memory and is brought into the kernels' own
  order on each call; timing one weight again and again finds it in the cache and can report half of the real time. So
  the calls rotate through copies. Inputs are warm, since the layer before has just written them.
- Load changes. All chains take turns, so that a busy moment hits them alike, and medians are taken over the rounds.
- A thread that loses its core stops the others at the next barrier, and 1 ms becomes 20 ms. Rounds in which the system
  took a core away are set aside while enough others are left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.costs import require_inputs
from spectrim.sites import LayerSpec

Chain = tuple[LayerSpec, ...]
"""Layers run one after the other, each spec with exactly one input shape."""
Progress = Callable[[int, int], None]
"""Called with the timings taken so far and how many there are to take."""

_POOL_BYTES = 64 * 2**20  # more than the last-level cache that one process usually gets
_COPIES = 8  # of a weight; a layer so small that eight copies stay in the cache stays there in its network too
_BLOCK_MS = 2.0
_BLOCK_CALLS = 50
_FEWEST_ROUNDS = 3


def split(specs: Sequence[LayerSpec]) -> list[Chain]:
    """The specs as low-rank pairs and single layers, once for each call in a forward pass."""
    found: list[Chain] = []
    rest = tuple(specs)
    while rest:
        chain = rest[:2] if is_pair(rest[:2]) else rest[:1]
        rest = rest[len(chain) :]
        calls = zip(*(require_inputs(spec) for spec in chain), strict=True)
        found += [tuple(s.at((shape,)) for s, shape in zip(chain, shapes, strict=True)) for shapes in calls]
    return found


def is_pair(chain: Chain) -> bool:
    """Whether these are the two layers that ``LayerSpec.factor`` makes of one layer."""
    if len(chain) != 2:
        return False
    first, second = chain
    return first.names == second.names and first.out_channels == second.in_channels and first.groups == second.groups


def at_rank(pair: Chain, rank: int) -> Chain:
    """The pair of the same family with another rank (for each group)."""
    first, second = pair
    middle = rank * first.groups
    return dataclasses.replace(first, out_channels=middle), dataclasses.replace(second, in_channels=middle)


def undivided(pair: Chain) -> LayerSpec:
    """The layer that a pair stands for. On each axis one of the two has its numbers and the other the smallest."""

    def join(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(max, a, b))

    first, second = pair
    a, b = first.padding, second.padding
    return dataclasses.replace(
        first,
        out_channels=second.out_channels,
        kernel=join(first.kernel, second.kernel),
        stride=join(first.stride, second.stride),
        padding="same" if isinstance(a, str) or isinstance(b, str) else join(a, b),
        dilation=join(first.dilation, second.dilation),
        output_padding=join(first.output_padding, second.output_padding),
        bias=second.bias,
    )


def describe(chain: Chain) -> str:
    """The shape of a chain as text: all that its time depends on besides the machine and how it is run."""

    def numbers(values: tuple[int, ...] | str) -> str:
        return values if isinstance(values, str) else "x".join(map(str, values))

    def one(spec: LayerSpec) -> str:
        (shape,) = spec.inputs
        text = f"{spec.in_channels}>{spec.out_channels}{'+bias' if spec.bias else ''} @{numbers(shape)}"
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

    Memory: 64 MiB, or the largest input or twice the largest weight if larger, and the activations of one chain.

    Parameters
    ----------
    memory_format
        ``contiguous`` or ``channels_last``; the latter applies to convolutions over two and three axes.
    budget
        Seconds after which no further round is begun; three are taken in any case.
    """
    block = _cuda_block if torch.device(device).type == "cuda" else _block
    with torch_threads(threads), torch.inference_mode():
        pool = _pool(chains, dtype, device, batch)
        runs = [_runner(chain, pool, batch, memory_format == "channels_last") for chain in chains]
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
    return [statistics.median(undisturbed(s, d)) for s, d in zip(samples, disturbances, strict=True)]


def _block(run: Callable[[], Tensor], count: int) -> float:
    """Median milliseconds of ``count`` calls."""
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return max(statistics.median(taken), 1e-9) * 1e3


def _cuda_block(run: Callable[[], Tensor], count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / count, 1e-6)


def _weight_shape(spec: LayerSpec) -> tuple[int, ...]:
    if spec.transposed:
        return (spec.in_channels, spec.out_channels // spec.groups, *spec.kernel)
    return (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)


def _input_shape(spec: LayerSpec, batch: int) -> tuple[int, ...]:
    (shape,) = spec.inputs
    return (batch * shape[0], spec.in_channels) if spec.is_linear else (batch, spec.in_channels, *shape)


def _aligned(numel: int) -> int:
    return -(-numel // 64) * 64


def _numel(chain: Chain) -> int:
    return sum(_aligned(math.prod(_weight_shape(spec))) + _aligned(spec.out_channels) for spec in chain)


def _pool(chains: Sequence[Chain], dtype: torch.dtype, device: str, batch: int) -> Tensor:
    """Random numbers that all weights and inputs are views of, so that memory does not grow with the chains."""
    sizes = [2 * _numel(chain) for chain in chains]
    sizes += [math.prod(_input_shape(chain[0], batch)) for chain in chains]
    numel = max([_POOL_BYTES // dtype.itemsize, *sizes])
    # A block of numbers repeated: drawing all of them would take longer than some measurements.
    drawn = (0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))).to(dtype)
    return drawn.repeat(-(-numel // drawn.numel())).to(device)


def _runner(chain: Chain, pool: Tensor, batch: int, channels_last: bool) -> Callable[[], Tensor]:
    """A function that runs the chain, with other weights than the last time."""

    def view(offset: int, shape: tuple[int, ...]) -> Tensor:
        flat = pool[offset : offset + math.prod(shape)]
        if channels_last and len(shape) in (4, 5):
            return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return flat.view(shape)

    copies: list[list[tuple[Tensor, Tensor | None]]] = []
    offset = 0
    for _ in range(min(_COPIES, pool.numel() // _numel(chain))):
        copies.append([])
        for spec in chain:
            weight = view(offset, _weight_shape(spec))
            offset += _aligned(weight.numel())
            copies[-1].append((weight, view(offset, (spec.out_channels,)) if spec.bias else None))
            offset += _aligned(spec.out_channels)
    operators = [_operator(spec) for spec in chain]
    turns = itertools.cycle(copies)
    x = view(0, _input_shape(chain[0], batch))

    def run() -> Tensor:
        y = x
        for operator, (weight, bias) in zip(operators, next(turns), strict=True):
            y = operator(y, weight, bias)
        return y

    return run


def _operator(spec: LayerSpec) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What the module of this layer calls."""
    if spec.is_linear:
        return F.linear
    axes = len(spec.kernel) - 1
    if spec.transposed:
        up = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes]
        padding = spec.padding
        assert not isinstance(padding, str)  # torch has no "same" here
        return lambda x, w, b: up(x, w, b, spec.stride, padding, spec.output_padding, spec.groups, spec.dilation)
    conv = (F.conv1d, F.conv2d, F.conv3d)[axes]
    if spec.padding_mode == "zeros":
        return lambda x, w, b: conv(x, w, b, spec.stride, spec.padding, spec.dilation, spec.groups)
    sides: list[int] = []  # last axis first, as F.pad takes them
    for axis in reversed(range(len(spec.kernel))):
        if isinstance(spec.padding, str):
            both = spec.dilation[axis] * (spec.kernel[axis] - 1)
            sides += [both // 2, both - both // 2]
        else:
            sides += [spec.padding[axis]] * 2
    return lambda x, w, b: conv(F.pad(x, sides, spec.padding_mode), w, b, spec.stride, 0, spec.dilation, spec.groups)
