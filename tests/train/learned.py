"""What tests of learned ranks share: weights that move, the best approximation by definition, a timer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.linalg.unfold import fold, unfold, unfolding
from spectrim.network.layer import LayerSpec
from spectrim.nn.standing import laid_out
from spectrim.selection.plan import Entry
from spectrim.selection.trajectory import Record
from spectrim.train.c_step import ZERO


def perturb(model: nn.Module, amount: float = 0.2) -> None:
    """What training might do to the weights of layers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(amount * parameter.std() * torch.randn_like(parameter))


def with_weights_of(result: st.Result, model: nn.Module) -> nn.Module:
    """A copy of a model with the weights that the sites of a result hold."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for site in result.sites:
            layer: Any = model.get_submodule(site.name)
            layer.weight.copy_(laid_out(site.weight, site.spec))
            if site.bias is not None:
                layer.bias.copy_(site.bias)
    return model


def canonical(layer: nn.Module, tensor: Tensor) -> Tensor:
    """``[g, o, i, *k]`` in float64 from the layout of a layer's weight."""
    groups = getattr(layer, "groups", 1)
    parted = tensor.detach().double().unflatten(0, (groups, -1))
    return parted.transpose(1, 2) if "Transpose" in type(layer).__name__ else parted


def truncated(weight: Tensor, entry: Entry) -> Tensor:
    """The best approximation of a canonical weight with the rank and unfolding of a plan's entry."""
    if entry.choice == ZERO:
        return torch.zeros_like(weight)
    how = unfolding(tuple(weight.shape[3:]), entry.choice["unfolding"])
    left, values, right = torch.linalg.svd(unfold(weight.double(), how), full_matrices=False)
    rank = entry.choice["rank"]
    return fold((left[..., :rank] * values[:, None, :rank]) @ right[:, :rank], how, tuple(weight.shape[1:]))


def fake_latency(each: float = 0.05) -> st.Latency:
    """Milliseconds in step with MACs, and a fixed time for each layer."""

    def timer(chains: Sequence[Sequence[LayerSpec]], **_: object) -> list[float]:
        return [sum(st.macs([spec]) * 1e-4 + each for spec in chain) for chain in chains]

    return st.Latency(cache=None, timer=timer)


def timeless(records: Sequence[Record]) -> list[Record]:
    return [dataclasses.replace(record, seconds=0) for record in records]
