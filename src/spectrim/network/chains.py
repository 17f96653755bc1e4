"""Three layers and more in place of a convolution: Tucker-2 and CP, as factors and as layers.

The layers of 1 x 1 come first and last. Those in between have the kernel, and its stride, padding and dilation: the
first sees the input without padding and has no bias, so that what the others pad with is what the layer pads with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.network.choices import CPChoice, TuckerChoice
from spectrim.network.factors import Factors, alone
from spectrim.network.layer import LayerSpec
from spectrim.network.structure import Chain


@dataclass(frozen=True, eq=False)
class Tucker2(Factors, kind="tucker"):
    """``W[o, i, k] = sum_qp outer[o, q] core[q, p, k] inner[i, p]``.

    Attributes
    ----------
    shift
        ``[o]``, added to the layer's bias, or None. It carries the mean of what the factors leave out.
    """

    inner: Float[Tensor, "i p"]
    core: Float[Tensor, "q p *k"]
    outer: Float[Tensor, "o q"]
    shift: Float[Tensor, " o"] | None = None

    def dense(self) -> tuple[Tensor, ...]:
        return (torch.einsum("oq,qp...,ip->oi...", self.outer, self.core, self.inner).unsqueeze(0),)

    def numel(self) -> int:
        return self.inner.numel() + self.core.numel() + self.outer.numel()

    @classmethod
    def empty(cls, shapes: Sequence[Sequence[int]], choice: TuckerChoice) -> Tucker2:
        _, o, i, *kernel = _convolution(shapes)
        p, q = choice.inputs, choice.outputs
        if p > i or q > o:
            raise ValueError(f"ranks {p} and {q}; expected at most the layer's {i} inputs and {o} outputs")
        return cls(torch.empty(i, p), torch.empty(q, p, *kernel), torch.empty(o, q))


@dataclass(frozen=True, eq=False)
class CP(Factors, kind="cp"):
    """``W[o, i, k] = sum_r outer[o, r] inner[i, r] prod_n kernels[n][r, k]``.

    Attributes
    ----------
    kernels
        ``[r, *k]`` each, with a size of one on the axes that another one has.
    shift
        As in :class:`Tucker2`.
    """

    inner: Float[Tensor, "i r"]
    kernels: tuple[Float[Tensor, " r *_"], ...]
    outer: Float[Tensor, "o r"]
    shift: Float[Tensor, " o"] | None = None

    def dense(self) -> tuple[Tensor, ...]:
        kernel = self.kernels[0]
        for other in self.kernels[1:]:
            kernel = kernel * other
        weight = torch.einsum("or,ir,rk->oik", self.outer, self.inner, kernel.flatten(1))
        return (weight.reshape(1, *weight.shape[:2], *kernel.shape[1:]),)

    def numel(self) -> int:
        return sum(tensor.numel() for tensor in (self.inner, *self.kernels, self.outer))

    @classmethod
    def empty(cls, shapes: Sequence[Sequence[int]], choice: CPChoice) -> CP:
        _, o, i, *kernel = _convolution(shapes)
        rank, full = choice.rank, full_rank((o, i, *kernel))
        if rank > full:
            raise ValueError(f"rank {rank}; expected at most {full}, at which the product is any weight")
        parts = [torch.empty(rank, *_shape(kernel, part)) for part in parts_of(kernel, choice.kernel)]
        return cls(torch.empty(i, rank), tuple(parts), torch.empty(o, rank))


def _convolution(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    shape = alone(shapes)
    if shape[0] > 1 or max(shape[3:], default=1) < 2:
        raise ValueError("it is for a convolution of one group whose kernel is larger than 1")
    return shape


def full_rank(shape: Sequence[int]) -> int:
    """Components with which a CP can be any weight ``(o, i, *k)``."""
    o, i, *kernel = shape
    return min(o, i) * math.prod(kernel)


def parts_of(kernel: Sequence[int], how: str) -> tuple[tuple[int, ...], ...]:
    """The axes that each depthwise layer has: all of them for ``whole``, else one of the wide ones."""
    wide = [axis for axis, size in enumerate(kernel) if size > 1]
    return ((*range(len(kernel)),),) if how == "whole" or len(wide) < 2 else tuple((axis,) for axis in wide)


def _shape(kernel: Sequence[int], part: Sequence[int]) -> tuple[int, ...]:
    return tuple(size if axis in part else 1 for axis, size in enumerate(kernel))


def kernel_of(mode: Float[Tensor, "n r"], kernel: Sequence[int], part: Sequence[int]) -> Float[Tensor, " r *k"]:
    """A mode over a part of the kernel as the depthwise layer has it."""
    return mode.mT.reshape(mode.shape[1], *_shape(kernel, part))


def tucker_layers(spec: LayerSpec, choice: TuckerChoice) -> Chain:
    """The layers of a Tucker-2 in place of one."""
    core = dataclasses.replace(spec, in_channels=choice.inputs, out_channels=choice.outputs, bias=False)
    return _between(spec, [core], choice.biased(spec.bias))


def cp_layers(spec: LayerSpec, choice: CPChoice) -> Chain:
    """The layers of a CP in place of one."""
    rank, layers, inputs = choice.rank, [], spec.inputs
    for part in parts_of(spec.kernel, choice.kernel):
        layer = dataclasses.replace(
            spec, in_channels=rank, out_channels=rank, groups=rank, bias=False, inputs=inputs, **spec.along(part)
        )
        layers.append(layer)
        inputs = tuple(layer.output_shape(shape) for shape in inputs)
    return _between(spec, layers, choice.biased(spec.bias))


def _between(spec: LayerSpec, layers: Sequence[LayerSpec], bias: bool) -> Chain:
    """Layers between two of 1 x 1."""
    if not chains_fit(spec):
        raise ValueError("it is for a convolution of one group whose kernel is larger than 1, and not transposed")
    ones, none = (1,) * len(spec.kernel), (0,) * len(spec.kernel)
    point = dataclasses.replace(
        spec, kernel=ones, stride=ones, padding=none, dilation=ones, padding_mode="zeros", bias=False
    )
    after = tuple(spec.output_shape(shape) for shape in spec.inputs)
    first = dataclasses.replace(point, out_channels=layers[0].in_channels)
    last = dataclasses.replace(point, in_channels=layers[-1].out_channels, bias=bias, inputs=after)
    return Chain((first, *layers, last))


def chains_fit(spec: LayerSpec) -> bool:
    """Whether chains can take the place of a layer: a convolution of one group whose kernel is larger than 1."""
    return not spec.transposed and spec.groups == 1 and max(spec.kernel, default=1) > 1
