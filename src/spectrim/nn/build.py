"""Factors to modules: one builder a factor type, dispatched on the type."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

from torch import Tensor, nn

from spectrim.errors import PlanError
from spectrim.factors import Factors, LowRank, kinds
from spectrim.nn.modules import Factored, make_layer
from spectrim.plan import Choice
from spectrim.sites import LayerSpec
from spectrim.unfold import first_weight, second_weight


@singledispatch
def build(factors: Factors, layers: Sequence[LayerSpec], biases: Sequence[Tensor | None]) -> tuple[nn.Module, ...]:
    """Modules for a site's factors, one in place of each of its layers.

    Parameters
    ----------
    factors
        What a method's ``factorize`` returned.
    layers, biases
        Of the site.
    """
    raise TypeError(f"no builder for factors of type {type(factors).__name__}; register one with build.register")


@build.register
def _(factors: LowRank, layers: Sequence[LayerSpec], biases: Sequence[Tensor | None]) -> tuple[nn.Module, ...]:
    (spec,), (bias,) = layers, biases
    if factors.shift is not None:
        bias = factors.shift if bias is None else bias + factors.shift
    first, second = spec.factor(factors.how, factors.rank, bias=bias is not None)
    return (
        Factored(
            make_layer(first, first_weight(factors.left, factors.how, factors.shape)),
            make_layer(second, second_weight(factors.right, factors.how, factors.shape), bias),
            unfolding=factors.how.name,
            original=spec,
        ),
    )


def skeleton(choice: Choice, layers: Sequence[LayerSpec]) -> tuple[nn.Module, ...]:
    """Modules of the shapes that a choice leads to, for weights to be loaded into.

    Raises
    ------
    PlanError
        If the choice's kind is unknown or its settings do not fit the layers.
    """
    known = kinds()
    if choice.kind not in known:
        raise PlanError(f"layer {layers[0].name!r}: unknown kind {choice.kind!r}; known are {', '.join(known)}")
    biased = choice.settings.get("bias", layers[0].bias)
    if not isinstance(biased, bool):
        raise PlanError(f"layer {layers[0].name!r}: setting 'bias' is {biased!r}; expected true or false")
    try:
        empty = known[choice.kind].empty([spec.shape for spec in layers], choice.settings)
        return build(empty, layers, [_zeros(spec) if biased else None for spec in layers])
    except KeyError as error:
        raise PlanError(f"layer {layers[0].name!r}: the choice {choice} lacks the setting {error}") from error
    except (ValueError, TypeError, RuntimeError) as error:
        name, kind = layers[0].name, layers[0].kind
        raise PlanError(f"layer {name!r}: the choice {choice} does not fit {kind}: {error}") from error


def _zeros(spec: LayerSpec) -> Tensor:
    import torch

    return torch.zeros(spec.out_channels, dtype=spec.dtype, device=spec.device)
