"""Modules that hold a result. They are plain torch containers: nothing in them hides the rank."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.linalg.unfold import Unfolding, fold, unfolding
from spectrim.network.factors import LowRank
from spectrim.network.layer import LayerSpec, Lookup
from spectrim.nn.layers import opened
from spectrim.nn.standing import StandIn, laid_out

_TYPES: dict[tuple[int, bool], type[nn.Module]] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


@functools.cache
def _without_values(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"reset_parameters": lambda self: None})


def _unfilled(kind: type[nn.Module], *sizes: Any, **options: Any) -> nn.Module:
    """A layer of no particular values. ``nn.utils.skip_init`` takes several times as long: it draws them on meta."""
    layer = _without_values(kind)(*sizes, **options)
    layer.__class__ = kind
    return layer


def make_layer(spec: LayerSpec, weight: Tensor | None = None, bias: Tensor | None = None) -> nn.Module:
    """The plain torch layer that a spec describes, with a canonical weight ``[g, o, i, *k]``, else uninitialised.

    The bias is ``[o_total]``; zero if None and the spec has one.
    """
    if isinstance(spec, Lookup):
        layer: nn.Module = _unfilled(
            nn.Embedding, spec.in_channels, spec.out_channels, padding_idx=spec.padding_idx, device=spec.device,
            dtype=spec.dtype,
        )  # fmt: skip
    elif spec.is_linear:
        layer = _unfilled(
            nn.Linear, spec.in_channels, spec.out_channels, bias=spec.bias, device=spec.device, dtype=spec.dtype
        )
    else:
        shared = ("stride", "padding", "dilation", "groups", "bias", "padding_mode", "device", "dtype")
        options = {name: getattr(spec, name) for name in shared}
        if spec.transposed:
            options["output_padding"] = spec.output_padding
        kind = _TYPES[len(spec.kernel), spec.transposed]
        layer = _unfilled(kind, spec.in_channels, spec.out_channels, spec.kernel, **options)
    with torch.no_grad():
        if weight is not None:
            layer.weight.copy_(laid_out(weight, spec))  # type: ignore[operator, arg-type]
        if (own := layer._parameters.get("bias")) is not None:
            own.zero_() if bias is None else own.copy_(bias)
    return layer


class Factored(StandIn, nn.Sequential):
    """A low-rank pair in place of one layer: two plain layers, one after the other.

    The name of the unfolding tells how the kernel is shared out; ``original`` is the spec of the layer it stands for.
    """

    is_factored = True

    def __init__(self, first: nn.Module, second: nn.Module, *, unfolding: str, original: LayerSpec) -> None:
        super().__init__(first, second)
        self.unfolding = unfolding
        self.original = original

    def in_order(self) -> tuple[nn.Module, ...]:
        return tuple(self)

    @property
    def first(self) -> nn.Module:
        return self[0]

    @property
    def second(self) -> nn.Module:
        return self[1]

    @property
    def rank(self) -> int:
        """For each group."""
        made: Any = getattr(self.first, "original", self.first)
        return (made.out_channels if hasattr(made, "out_channels") else made.out_features) // self.original.groups

    def extra_repr(self) -> str:
        return f"{self.original.kind}, {self.unfolding}, rank {self.rank}"

    def merged(self) -> nn.Module:
        """One dense layer that computes the same; errors as for :meth:`whole`."""
        return dense_layer(self)

    @property
    def bias(self) -> Tensor | None:
        return self.second.bias if self.first.bias is None else self.whole()[1]  # type: ignore[return-value]

    def bias_parameter(self) -> nn.Parameter | None:
        """The second layer's, unless the first, compressed again, has one as well."""
        return None if getattr(self.first, "bias", None) is not None else super().bias_parameter()

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight, multiplied out in float64, and bias. A layer that is a pair itself is put together first.

        Raises ValueError if no dense layer computes the same: the first layer has a bias, which the second pads with
        zeros.
        """
        how = unfolding(self.original.kernel, self.unfolding)
        first, middle = whole(self.first)
        second, bias = whole(self.second)
        g, rank = first.shape[:2]
        left = first.double().reshape(g, rank, -1).transpose(1, 2)
        right = second.double().transpose(1, 2).reshape(g, rank, -1)
        (weight,) = LowRank(left, right, None, how, self.original.shape[1:]).dense()
        if middle is not None:
            bias = self._moved(second, middle, bias)
        return weight.to(second.dtype), bias

    def _moved(self, second: Tensor, middle: Tensor, bias: Tensor | None) -> Tensor:
        """The bias of the pair whose first layer, compressed again, has one as well."""
        spec = self.original
        inside = [a for a in range(len(spec.kernel)) if a not in unfolding(spec.kernel, self.unfolding).axes]
        padded = isinstance(spec.padding, str) or any(spec.padding[a] for a in inside)
        wide = any(spec.kernel[a] > 1 for a in inside)
        if wide and (spec.transposed or (padded and spec.padding_mode == "zeros")):
            raise ValueError(
                f"layer {spec.name!r} ({spec.kind}): the first layer of its pair has a bias, which the second pads "
                "with zeros; no dense layer computes the same, so it cannot be merged"
            )
        g = spec.groups
        moved = torch.einsum(
            "gor,gr->go", second.double().reshape(*second.shape[:3], -1).sum(-1), middle.double().reshape(g, -1)
        )
        return (moved.reshape(-1) if bias is None else bias.double() + moved.reshape(-1)).to(second.dtype)


class FactoredTable(Factored):
    """A low-rank pair in place of an embedding: a narrower table that is looked up, and a linear layer."""

    @property
    def rank(self) -> int:
        return whole(self.first)[0].shape[1]

    @property
    def bias(self) -> None:
        """Every row of the table has it (:meth:`whole`)."""
        return None

    def whole(self) -> tuple[Tensor, None]:
        """Canonical weight, multiplied out in float64: the pair's bias is in every row, since one row is looked up."""
        weight, bias = super().whole()
        return (weight if bias is None else weight + bias.reshape(1, -1, 1)), None


class Transposed(nn.Module):
    """A linear layer without bias whose weight ``[inputs, outputs]`` is that of another one, transposed."""

    bias = None

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return nn.functional.linear(input, self.weight.mT)

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    def whole(self) -> tuple[Tensor, None]:
        """Canonical weight; no bias."""
        return self.weight.mT[None], None

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} -> {self.weight.shape[1]}"


class FactoredHead(Factored):
    """A low-rank pair in place of a linear layer, of the factors that stand for a table of the same weight.

    A row of the table is ``U[i] V``, what the head answers is ``x V^T U^T``.
    """

    def __init__(self, table: FactoredTable, last: nn.Module, *, original: LayerSpec) -> None:
        held: Any = table.second
        last.weight = table.first.weight
        super().__init__(Transposed(held.weight), last, unfolding=table.unfolding, original=original)

    def adopt(self, layer: nn.Module) -> None:
        """The layer's bias is its own still, and may be another module's too."""
        bias = layer._parameters.get("bias")
        if bias is not None:
            self.second.bias = bias


class Chained(StandIn, nn.Sequential):
    """Three plain convolutions or more in place of one. The name of the decomposition is for people."""

    def __init__(self, *layers: nn.Module, name: str, original: LayerSpec) -> None:
        super().__init__(*layers)
        self.decomposition = name
        self.original = original

    def extra_repr(self) -> str:
        return f"{self.original.kind}, {self.decomposition}"

    def in_order(self) -> tuple[nn.Module, ...]:
        return tuple(self)

    @property
    def bias(self) -> Tensor | None:
        """The last layer's."""
        return self[-1].bias  # type: ignore[return-value]

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight, multiplied out in float64, and bias.

        Raises ValueError if no dense layer computes the same: a layer before the last, compressed again, has a bias.
        """
        layers = list(self)
        weight, bias = whole(layers[0])
        product = weight[0].double()
        for number, layer in enumerate(layers[1:]):
            if bias is not None:
                spec = self.original
                raise ValueError(
                    f"layer {spec.name!r} ({spec.kind}): the layer {number} of its chain has a bias, which those after "
                    "it may pad with zeros; no dense layer computes the same, so it cannot be merged"
                )
            weight, bias = whole(layer)
            product = _composed(product, weight.double())
        return product.unsqueeze(0).to(weight.dtype), bias


def _composed(first: Tensor, second: Tensor) -> Tensor:
    """``[o, i, *k]`` of a convolution ``[m, i, *k]`` and a canonical one behind it; each axis is of one of the two."""
    g, o, m, *kernel = second.shape
    i, sizes = first.shape[1], first.shape[2:]
    how = Unfolding("", tuple(axis for axis, size in enumerate(sizes) if size > 1))
    left = first.reshape(g, m, -1).transpose(1, 2)
    right = second.transpose(1, 2).reshape(g, m, -1)
    shape = (o, i, *(max(pair) for pair in zip(sizes, kernel, strict=True)))
    return fold(left @ right, how, shape).flatten(0, 1)


def whole(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Canonical weight and bias of a layer of a pair, put together or multiplied out where it is not a plain one."""
    parts = getattr(layer, "whole", None)
    return opened(layer) if parts is None else parts()


@torch.no_grad()
def dense_layer(layer: Any) -> nn.Module:
    """One plain layer that computes what a compressed one does, which has an ``original`` and is :func:`whole`."""
    weight, bias = whole(layer)
    spec = dataclasses.replace(
        layer.original, bias=bias is not None, dtype=weight.dtype, device=str(weight.device), density=1.0, index_bytes=0
    )
    return make_layer(spec, weight, bias)
