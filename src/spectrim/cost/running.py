"""Chains of layers as functions that can be timed, with random weights: dense ones and, for sparse weights, CSR."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.linalg import csr
from spectrim.network.layer import LayerSpec
from spectrim.network.structure import Addend, Chain

_POOL_BYTES = 64 * 2**20  # more than the last-level cache that one process usually gets
_COPIES = 8  # of a weight; a layer so small that eight copies stay in the cache stays there in its network too


def rounded_density(spec: LayerSpec) -> float:
    """To two digits: a table need not tell apart what takes the same time."""
    return float(f"{spec.density:.2g}")


def csr_product(spec: LayerSpec) -> Callable[..., Tensor] | None:
    """How this layer is multiplied in CSR: a function ``(packed, x, bias, onto=None)``; None where it is not.

    Linear layers are, and convolutions over two axes without groups whose padding is zeros, as many on either side.
    """
    if spec.is_linear:
        return csr.linear
    if len(spec.kernel) != 2 or spec.transposed or spec.groups > 1 or spec.padding_mode != "zeros":
        return None
    if isinstance(spec.padding, str):
        both = [d * (k - 1) for k, d in zip(spec.kernel, spec.dilation, strict=True)]
        if any(n % 2 for n in both):
            return None
        padding = tuple(n // 2 for n in both)
    else:
        padding = spec.padding

    def product(packed: Tensor, x: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
        return csr.conv2d(packed, x, bias, spec.kernel, spec.stride, padding, spec.dilation, onto)  # type: ignore[arg-type]

    return product


@dataclasses.dataclass(frozen=True)
class Run:
    """One way to run a chain.

    Attributes
    ----------
    chill
        Puts the weights out of the cache, for runs that do not take turns with copies of them.
    """

    call: Callable[[], Tensor]
    chill: Callable[[], object] | None = None

    def __call__(self) -> Tensor:
        return self.call()


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


def number_pool(chains: Sequence[Chain], dtype: torch.dtype, device: str, batch: int) -> Tensor:
    """Random numbers that all weights and inputs are views of, so that memory does not grow with the chains."""
    sizes = [2 * _numel(chain) for chain in chains]
    sizes += [math.prod(_input_shape(chain[0], batch)) for chain in chains]
    numel = max([_POOL_BYTES // dtype.itemsize, *sizes])
    # A block of numbers repeated: drawing all of them would take longer than some measurements.
    drawn = (0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))).to(dtype)
    return drawn.repeat(-(-numel // drawn.numel())).to(device)


def ways(chain: Chain, pool: Tensor, batch: int, channels_last: bool) -> list[Run]:
    """The ways to run a chain: as dense layers, and in CSR where it is one sparse layer that can be."""
    found = [dense_run(chain, pool, batch, channels_last)]
    if len(chain) == 1 and chain[0].density < 1 and pool.device.type == "cpu" and pool.dtype in csr.DTYPES:
        product = csr_product(chain[0]) if csr.is_available() else None
        if product is not None:
            found.append(_csr_run(chain, product, pool, batch, channels_last))
    return found


def _view(pool: Tensor, offset: int, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    flat = pool[offset : offset + math.prod(shape)]
    if channels_last and len(shape) in (4, 5):
        return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return flat.view(shape)


def _csr_run(chain: Chain, product: Callable[..., Tensor], pool: Tensor, batch: int, channels_last: bool) -> Run:
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
    between = (_COPIES - 1) * packed.values().numel() * entry // pool.itemsize
    return Run(lambda: product(packed, x, bias, onto), lambda: pool[:between].sum())


def dense_run(chain: Chain, pool: Tensor, batch: int, channels_last: bool) -> Run:
    """Runs the chain with dense weights, others than the last time."""

    def view(offset: int, shape: tuple[int, ...]) -> Tensor:
        return _view(pool, offset, shape, channels_last)

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
        return y if onto is None else onto + y

    onto = None
    if isinstance(chain, Addend):
        onto = torch.zeros_like(run())
    return Run(run)


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
