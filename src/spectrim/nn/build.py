"""Factors to modules: one builder a factor type, dispatched on the type."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import singledispatch

import torch
from torch import Tensor, nn

from spectrim.errors import PlanError
from spectrim.linalg.unfold import first_weight, second_weight, unfolding
from spectrim.network.chains import CP, Tucker2, cp_layers, tucker_layers
from spectrim.network.choices import Choice, CPChoice, TuckerChoice
from spectrim.network.factors import AdditiveFactors, Factors, LowRank, SharedBasis, TiedPair, kinds
from spectrim.network.layer import LayerSpec
from spectrim.network.structure import Chain
from spectrim.nn.layers import spec_of
from spectrim.nn.modules import Chained, Factored, FactoredHead, FactoredTable, make_layer
from spectrim.nn.shared import Once, Wide
from spectrim.nn.sparse.layers import Summed, sparse_layer


@singledispatch
def build(factors: Factors, layers: Sequence[LayerSpec], biases: Sequence[Tensor | None]) -> tuple[nn.Module, ...]:
    """Modules for a site's factors, as a method's ``factorize`` returned them, one in place of each of its layers."""
    raise TypeError(f"no builder for factors of type {type(factors).__name__}; register one with build.register")


@build.register
def _(factors: LowRank, layers: Sequence[LayerSpec], biases: Sequence[Tensor | None]) -> tuple[nn.Module, ...]:
    (spec,), (bias,) = layers, biases
    return (_pair(factors, spec, _shifted(bias, factors.shift)),)


@build.register
def _(factors: AdditiveFactors, layers: Sequence[LayerSpec], biases: Sequence[Tensor | None]) -> tuple[nn.Module, ...]:
    (spec,), (bias,) = layers, biases
    bias = _shifted(bias, factors.shift)
    pair = None
    if factors.rank:
        shape = tuple(factors.sparse.shape[1:])
        pair = _pair(LowRank(factors.left, factors.right, None, factors.how, shape), spec, bias)
        if not bool(factors.mask.any()):
            return (pair,)
        bias = None
    alone = dataclasses.replace(spec, bias=bias is not None)
    sparse = sparse_layer(alone, factors.sparse, factors.mask, factors.pattern, bias)
    return (sparse if pair is None else Summed(pair, sparse, spec),)


@build.register
def _(factors: TiedPair, layers: Sequence[LayerSpec], biases: Sequence[Tensor | None]) -> tuple[nn.Module, ...]:
    (table, head), (_, bias) = layers, biases
    pair = LowRank(factors.rows[None], factors.columns[None], None, unfolding((), "channel"), table.shape[1:])
    stands_for_table = _pair(pair, table, None)
    assert isinstance(stands_for_table, FactoredTable)
    last = head.factor(pair.how, pair.rank, bias=bias is not None)[1]
    return stands_for_table, FactoredHead(stands_for_table, make_layer(last, None, bias), original=head)


def _shifted(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    if shift is None:
        return bias
    return shift if bias is None else bias + shift


def _pair(factors: LowRank, spec: LayerSpec, bias: Tensor | None) -> Factored:
    first, second = spec.factor(factors.how, factors.rank, bias=bias is not None)
    kind = FactoredTable if spec.looks_up else Factored
    return kind(
        make_layer(first, first_weight(factors.left, factors.how, factors.shape)),
        make_layer(second, second_weight(factors.right, factors.how, factors.shape), bias),
        unfolding=factors.how.name,
        original=spec,
    )


@build.register
def _(factors: Tucker2, layers: Sequence[LayerSpec], biases: Sequence[Tensor | None]) -> tuple[nn.Module, ...]:
    (spec,), (bias,) = layers, biases
    bias = _shifted(bias, factors.shift)
    chain = tucker_layers(spec, TuckerChoice(factors.inner.shape[1], factors.outer.shape[1], bias is not None))
    return (_chained(chain, [factors.inner.mT, factors.core, factors.outer], bias, "Tucker-2", spec),)


@build.register
def _(factors: CP, layers: Sequence[LayerSpec], biases: Sequence[Tensor | None]) -> tuple[nn.Module, ...]:
    (spec,), (bias,) = layers, biases
    bias = _shifted(bias, factors.shift)
    kernel = "whole" if len(factors.kernels) == 1 else "axes"
    chain = cp_layers(spec, CPChoice(factors.inner.shape[1], kernel, bias is not None))
    return (_chained(chain, [factors.inner.mT, *factors.kernels, factors.outer], bias, "CP", spec),)


def _chained(chain: Chain, weights: Sequence[Tensor], bias: Tensor | None, name: str, spec: LayerSpec) -> Chained:
    pairs = zip(chain.specs, weights, strict=True)
    made = [make_layer(part, weight.reshape(part.shape), bias if part.bias else None) for part, weight in pairs]
    return Chained(*made, name=name, original=spec)


@build.register
def _(factors: SharedBasis, layers: Sequence[LayerSpec], biases: Sequence[Tensor | None]) -> tuple[nn.Module, ...]:
    left_rank, right_rank = factors.ranks
    if len({spec.family for spec in layers}) > 1:
        found = ", ".join(f"{spec.name!r} ({spec.kind}, {spec.dtype}, {spec.device})" for spec in layers)
        raise ValueError(f"layers that share a factor agree in kernel, groups, dtype and device; these are {found}")
    rows = zip(factors.own_lefts, factors.own_rights, factors.shifts, layers, biases, factors.shapes, strict=True)
    built: list[Factored] = []
    for own_left, own_right, shift, spec, bias, shape in rows:
        bias = _shifted(bias, shift)
        first, second = spec.factor(factors.how, left_rank + right_rank, bias=bias is not None)
        lefts = [first_weight(part, factors.how, shape) for part in (factors.shared_left, own_left)]
        rights = [second_weight(part, factors.how, shape) for part in (own_right, factors.shared_right)]
        like = built[0].in_order() if built else (None, None)
        built.append(
            Factored(
                _side_by_side(first, lefts, None, 0, like[0]),
                _side_by_side(second, rights, bias, 1, like[1]),
                unfolding=factors.how.name,
                original=spec,
            )
        )
    if factors.once:
        if len({spec_of(pair.first, ("first",)) for pair in built}) > 1:
            raise ValueError("first factors with different strides, paddings or dilations cannot be computed once")
        once = Once(built[0].first, spec_of(built[0].first, ("first",)), len(built))
        for number, pair in enumerate(built):
            pair[0] = once.beside(pair.first) if number else once
    return tuple(built)


def _side_by_side(
    spec: LayerSpec, weights: Sequence[Tensor], bias: Tensor | None, shared: int, like: nn.Module | None
) -> nn.Module:
    """A layer of two parts side by side along the rank, of which one may have a rank of 0.

    The ``shared``-th part has the parameter of the layer ``like``.
    """
    axis = 1 if shared == 0 else 2  # the rank, in a canonical weight
    parts: list[nn.Module] = []
    tied: list[nn.Module | None] = []
    for number, weight in enumerate(weights):
        rank = weight.shape[axis] * spec.groups
        if not rank:
            continue
        size = {"out_channels": rank} if shared == 0 else {"in_channels": rank}
        # The layer's own part has the bias; what is shared whole keeps one for each layer.
        biased = spec.bias and (number != shared or not weights[1 - shared].shape[axis])
        part = dataclasses.replace(spec, bias=biased, **size)
        parts.append(make_layer(part, weight, bias if biased else None))
        owner = like.parts[len(parts) - 1] if isinstance(like, Wide) else like
        tied.append(owner if number == shared else None)
    for part, owner in zip(parts, tied, strict=True):
        if owner is not None:
            part.weight = owner.weight
    return parts[0] if len(parts) == 1 else Wide(parts, spec, axis - 1)


def skeleton(choice: Choice, layers: Sequence[LayerSpec]) -> tuple[nn.Module, ...]:
    """Modules of the shapes that a choice leads to, for weights to be loaded into; PlanError where it does not fit."""
    known = kinds()
    name, kind = layers[0].name, layers[0].kind
    if choice.kind not in known:
        raise PlanError(f"layer {name!r}: a {choice.kind!r} choice has no factors; those of {', '.join(known)} have")
    try:
        empty = known[choice.kind].empty([spec.shape for spec in layers], choice)
        return build(empty, layers, [_zeros(spec) if choice.biased(spec.bias) else None for spec in layers])
    except (ValueError, TypeError, RuntimeError) as error:
        raise PlanError(f"layer {name!r}: the choice {str(choice)!r} does not fit {kind}: {error}") from error


def _zeros(spec: LayerSpec) -> Tensor:
    return torch.zeros(spec.out_channels, dtype=spec.dtype, device=spec.device)
