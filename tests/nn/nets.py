"""Networks with pairs in them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from spectrim.network.choices import Choice
from spectrim.nn.build import skeleton
from spectrim.nn.find import find
from spectrim.nn.sparse.layers import Masked
from spectrim.nn.surgery import replace_module
from spectrim.selection.plan import Entry, Plan


def low_rank(rank: int, unfolding: str = "channel", **more: object) -> Choice:
    return Choice("low_rank", "some-method", {"rank": rank, "unfolding": unfolding, **more})  # type: ignore[dict-item]


def sparse(rank: int, density: float, pattern: str, unfolding: str = "channel", **more: object) -> Choice:
    settings = {"rank": rank, "density": density, "pattern": pattern, "unfolding": unfolding, **more}
    return Choice("low_rank_plus_sparse", "some-method", settings)  # type: ignore[arg-type]


def plan_of(choices: Mapping[str, Choice]) -> Plan:
    entries = tuple(Entry(site, "layer", choice, 0.1, {"parameters": 1.0}, {"parameters": 2.0})
                    for site, choice in choices.items())  # fmt: skip
    return Plan(entries, costs={"parameters": 1.0}, dense_costs={"parameters": 2.0})


def compressed(model: nn.Module, choices: Mapping[str, Choice]) -> nn.Module:
    """The model with pairs of random weights, changed in place."""
    sites = find(model, parts=any(name not in find(model) for name in choices))
    for name, choice in choices.items():
        if choice.is_dense:
            continue
        spec = sites[name].spec
        (pair,) = skeleton(choice, [spec])
        for parameter in pair.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        replace_module(model, spec.names, pair)
    return model


def settle(model: nn.Module) -> None:
    """Put the weights to zero outside their masks."""
    for module in model.modules():
        if isinstance(module, Masked):
            module.settle()


CHOICES = {
    "stem": low_rank(3, "height-first"),
    "grouped": low_rank(2, "channel", bias=True),
    "up": low_rank(4, "input"),
    "head": Choice(),
}
