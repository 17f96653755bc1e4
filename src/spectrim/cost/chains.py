"""Layers run one after the other with random weights, and how long that takes.

What makes the sum over layers agree with the time of the network, on a CPU:

- Weights are cold. Inside a network of some size each weight comes from memory and is brought into the kernels' own
  order on each call; timing one weight again and again finds it in the cache and can report half of the real time. So
  the calls rotate through copies. Inputs are warm, since the layer before has just written them.
- Load changes. All chains take turns, and of undisturbed rounds (:mod:`spectrim.cost.rounds`) the median counts.

A sparse weight is timed with random positions, multiplied as a dense one and, where that is possible, in CSR. The less
of the two counts, which is what :func:`spectrim.nn.sparse.kernels.choose_kernels` makes the network run. The sparse
layer beside a low-rank pair is timed with the addition to the pair's output. What a thinner layer takes to gather its
channels, and one with a smaller kernel to pad or crop its input, is not timed.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.cost.counted import require_inputs
from spectrim.cost.rounds import FEWEST, Rounds, torch_threads
from spectrim.linalg import csr
from spectrim.network.layer import LayerSpec
from spectrim.network.structure import Addend, Chain, structure_of
from spectrim.progress import Steps

_BLOCK_MS = 2.0
_BLOCK_CALLS = 50
_CHILLED_S = 0.05  # a block's time with weights made cold in between, once it has three calls
_POOL_BYTES = 64 * 2**20  # more than the last-level cache that one process usually gets
COPIES = 8  # of a weight; a layer so small that eight copies stay in the cache stays there in its network too


def calls(layers: Sequence[LayerSpec]) -> list[Chain]:
    """The chains that layers are made of, once for each call in a forward pass; a plain sequence is one chain."""
    chains: list[Chain] = []
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
        chains += [chain.at(inputs) for inputs in zip(*shapes, strict=True)]
    return chains


def describe(chain: Chain) -> str:
    """The shape of a chain as text: all that its time depends on besides the machine and how it is run."""

    def numbers(values: tuple[float, ...] | str) -> str:
        return values if isinstance(values, str) else "x".join(f"{n:.6g}" if n % 1 else str(n) for n in values)

    def one(spec: LayerSpec) -> str:
        (shape,) = spec.inputs
        text = f"{spec.in_channels}>{spec.out_channels}{'+bias' if spec.bias else ''} @{numbers(shape)}"
        if spec.density < 1:
            text += f" density {rounded_density(spec):g}"
        if isinstance(chain, Addend) and spec is chain[-1]:
            text += " added"
        if spec.looks_up:
            return f"table {text}"
        if spec.is_linear:
            return f"linear {text}"
        parts = f"k{numbers(spec.kernel)} s{numbers(spec.stride)} p{numbers(spec.padding)} d{numbers(spec.dilation)}"
        extra = f" o{numbers(spec.output_padding)}" if spec.transposed else ""
        name = "transposed" if spec.transposed else "conv"
        return f"{name} {text} {parts}{extra} g{spec.groups} {spec.padding_mode}"

    return "; ".join(map(one, chain))


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
    runs: Callable[[Chain, Tensor, int, bool], list[Variant]] | None = None,
    progress: Steps | None = None,
) -> list[float]:
    """Milliseconds of each chain: warm-up, then rounds over all chains, and the median of the undisturbed rounds.

    One timing is a block of calls of about 2 ms together. Further rounds are taken, up to three times ``rounds``, while
    a chain has fewer than three undisturbed ones; after ``budget`` seconds none but the first three is begun. ``runs``
    says how a chain is run, :func:`variants` by default: the least time counts. ``channels_last`` applies to
    convolutions over two and three axes.

    Memory: 64 MiB, or the largest input or twice the largest weight if larger, the activations of one chain, and the
    sparse weights in CSR.
    """
    block = _cuda_block if torch.device(device).type == "cuda" else _block
    with torch_threads(threads), torch.inference_mode():
        pool = number_pool(chains, dtype, device, batch)
        alternatives = [(runs or variants)(chain, pool, batch, memory_format == "channels_last") for chain in chains]
        timed = [run for several in alternatives for run in several]
        counts = []
        for run in timed:
            run()
            counts.append(max(1, min(_BLOCK_CALLS, math.ceil(_BLOCK_MS / block(run, 1)))))
        turns = Rounds(rounds, most=3 * rounds, budget=budget)
        for turn in turns:
            for index, (run, count) in enumerate(zip(timed, counts, strict=True)):
                if turn < rounds or not turns.is_settled(index):
                    turns.begin(index)
                    turns.end(index, block(run, count))
                if progress is not None and turn < rounds:
                    progress(turn * len(timed) + index + 1, rounds * len(timed))
    times = iter([statistics.median(turns[index].undisturbed()) for index in range(len(timed))])
    return [min(itertools.islice(times, len(several))) for several in alternatives]


def _block(run: Variant, count: int) -> float:
    """Median milliseconds of ``count`` calls, or of fewer where making each one's weights cold takes long."""
    taken, begun = [], time.perf_counter()
    for _ in range(count):
        if run.chill is not None:
            run.chill()
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
        if run.chill is not None and time.perf_counter() - begun > _CHILLED_S and len(taken) >= FEWEST:
            break
    return max(statistics.median(taken), 1e-9) * 1e3


def _cuda_block(run: Variant, count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / count, 1e-6)


@dataclass(frozen=True)
class Variant:
    """One way to run a chain; ``chill`` makes its weights cold where it does not take turns with copies of them."""

    call: Callable[[], object]
    chill: Callable[[], object] | None = None

    def __call__(self) -> Any:
        return self.call()


def _weight_shape(spec: LayerSpec) -> tuple[int, ...]:
    if spec.transposed:
        return (spec.in_channels, spec.out_channels // spec.groups, *spec.kernel)
    return (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)


def _input_shape(spec: LayerSpec, batch: int) -> tuple[int, ...]:
    (shape,) = spec.inputs
    if spec.is_linear:
        rows = max(1, round(batch * shape[0]))
        return (rows,) if spec.looks_up else (rows, spec.in_channels)
    return (batch, spec.in_channels, *map(int, shape))


def _input(spec: LayerSpec, pool: Tensor, batch: int, channels_last: bool) -> Tensor:
    """Numbers of the pool; of a table places in it, drawn."""
    shape = _input_shape(spec, batch)
    if not spec.looks_up:
        return _view(pool, 0, shape, channels_last)
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(spec.in_channels, shape, generator=drawn).to(pool.device)


def _aligned(numel: int) -> int:
    return -(-numel // 64) * 64


def numel_of(chain: Chain) -> int:
    return sum(_aligned(math.prod(_weight_shape(spec))) + _aligned(spec.out_channels) for spec in chain)


def number_pool(chains: Sequence[Chain], dtype: torch.dtype, device: str, batch: int) -> Tensor:
    """Random numbers that all weights and inputs are views of, so that memory does not grow with the chains."""
    sizes = [2 * numel_of(chain) for chain in chains]
    sizes += [math.prod(_input_shape(chain[0], batch)) for chain in chains]
    numel = max([_POOL_BYTES // dtype.itemsize, *sizes])
    # A block of numbers repeated: drawing all of them would take longer than some measurements.
    drawn = (0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))).to(dtype)
    return drawn.repeat(-(-numel // drawn.numel())).to(device)


def variants(chain: Chain, pool: Tensor, batch: int, channels_last: bool) -> list[Variant]:
    """The ways to run a chain: as dense layers, and in CSR where it is one sparse layer that can be."""
    runs = [dense_run(chain, pool, batch, channels_last)]
    if len(chain) == 1 and chain[0].density < 1 and pool.device.type == "cpu" and pool.dtype in csr.DTYPES:
        product = csr_product(chain[0]) if csr.is_available() else None
        if product is not None:
            runs.append(_csr_run(chain, product, pool, batch, channels_last))
    return runs


def _view(pool: Tensor, offset: int, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    flat = pool[offset : offset + math.prod(shape)]
    if channels_last and len(shape) in (4, 5):
        return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return flat.view(shape)


def _csr_run(chain: Chain, product: Callable[..., Tensor], pool: Tensor, batch: int, channels_last: bool) -> Variant:
    """Runs a sparse layer in CSR. Before each call as much is read as the copies of :func:`dense_run` would be."""
    (spec,) = chain
    rows, columns = spec.out_channels, spec.features
    weight = _view(pool, 0, (rows, columns), False)
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < rounded_density(spec)
    packed = csr.pack(weight * kept)
    bias = pool[: spec.out_channels] if spec.bias else None
    x = _view(pool, 0, _input_shape(spec, batch), channels_last)
    onto = torch.zeros_like(product(packed, x, bias)) if isinstance(chain, Addend) else None
    entry = pool.itemsize + packed.col_indices().itemsize
    between = (COPIES - 1) * packed.values().numel() * entry // pool.itemsize
    return Variant(lambda: product(packed, x, bias, onto), lambda: pool[:between].sum())


def dense_run(chain: Chain, pool: Tensor, batch: int, channels_last: bool) -> Variant:
    """Runs the chain with dense weights, others than the last time."""
    copies, offset = [], 0
    for _ in range(min(COPIES, pool.numel() // numel_of(chain))):
        layers, offset = _weights(chain, pool, offset, channels_last)
        copies.append(layers)
    operators = [_operator(spec) for spec in chain]
    turns = itertools.cycle(copies)
    x = _input(chain[0], pool, batch, channels_last)

    def run() -> Tensor:
        y = x
        for operator, (weight, bias) in zip(operators, next(turns), strict=True):
            y = operator(y, weight, bias)
        return y

    if not isinstance(chain, Addend):
        return Variant(run)
    onto = torch.zeros_like(run())
    return Variant(lambda: onto + run())


class Operators(nn.Module):
    """A chain of layers as one module with these weights; a second input is added to the output."""

    def __init__(self, chain: Chain, layers: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.operators = [_operator(spec) for spec in chain]
        self.weights, self.biases = [weight for weight, _ in layers], [bias for _, bias in layers]

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        for operator, weight, bias in zip(self.operators, self.weights, self.biases, strict=True):
            x = operator(x, weight, bias)
        return x if onto is None else x + onto


def random_layers(chain: Chain, pool: Tensor, batch: int, channels_last: bool) -> tuple[Operators, tuple[Tensor, ...]]:
    """A chain as a module, and inputs for it; all numbers are views of the pool."""
    layers, _ = _weights(chain, pool, 0, channels_last)
    x = _input(chain[0], pool, batch, channels_last)
    module = Operators(chain, layers).eval()
    return module, (x, torch.zeros_like(module(x))) if isinstance(chain, Addend) else (x,)


def _weights(
    chain: Chain, pool: Tensor, offset: int, channels_last: bool
) -> tuple[list[tuple[Tensor, Tensor | None]], int]:
    """Weights and biases of the layers of a chain from some place of the pool on, and the place behind them."""
    weights: list[tuple[Tensor, Tensor | None]] = []
    for spec in chain:
        weight = _view(pool, offset, _weight_shape(spec), channels_last)
        offset += _aligned(weight.numel())
        weights.append((weight, _view(pool, offset, (spec.out_channels,), channels_last) if spec.bias else None))
        offset += _aligned(spec.out_channels)
    return weights, offset


def _operator(spec: LayerSpec) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What the module of this layer calls."""
    if spec.looks_up:
        return lambda x, w, b: F.embedding(x, w)
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
    sides = list(itertools.chain(*reversed(spec.sides)))  # last axis first, as F.pad takes them
    return lambda x, w, b: conv(F.pad(x, sides, spec.padding_mode), w, b, spec.stride, 0, spec.dilation, spec.groups)


def rounded_density(spec: LayerSpec) -> float:
    """To two digits: measuring need not tell apart what takes the same time."""
    return float(f"{spec.density:.2g}")


def csr_product(spec: LayerSpec) -> Callable[..., Tensor] | None:
    """How this layer is multiplied in CSR: a function ``(packed, x, bias, onto=None)``; None where it is not.

    Linear layers are, and convolutions over two axes without groups whose padding is zeros, as many on either side.
    """
    if spec.is_linear:
        return csr.linear
    if len(spec.kernel) != 2 or spec.transposed or spec.groups > 1 or spec.padding_mode != "zeros":
        return None
    if any(before != after for before, after in spec.sides):
        return None
    padding = tuple(before for before, _ in spec.sides)

    def product(packed: Tensor, x: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
        return csr.conv2d(packed, x, bias, spec.kernel, spec.stride, padding, spec.dilation, onto)  # type: ignore[arg-type]

    return product
