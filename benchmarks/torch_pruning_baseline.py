"""Torch-Pruning, global over a network and in small steps; on the CIFAR ResNets the inner channels of each block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.cifar import Block, ResNet

_STEPS = 400


def pruned(dense: ResNet, macs: float) -> tuple[nn.Module, float]:
    """A copy with at most ``macs`` MACs by group magnitude, and its MACs.

    Only the channels between the two convolutions of a block are pruned, as the option-A shortcuts tie the others.
    """
    import torch_pruning

    example = torch.randn(1, 3, 32, 32)
    outer = [m.conv2 for m in dense.modules() if isinstance(m, Block)]

    def count(model: nn.Module) -> float:
        return torch_pruning.utils.count_ops_and_params(model, example)[0]

    model = removed(dense, example, [dense.conv1, dense.linear, *outer], macs, count)
    return model, float(count(model))


def removed(
    dense: nn.Module,
    example: Any,
    ignored: Sequence[nn.Module],
    limit: float,
    cost: Callable[[nn.Module], float],
    *,
    importance: Literal["magnitude", "Taylor"] = "magnitude",
    loss: Callable[[nn.Module], Tensor] | None = None,
) -> nn.Module:
    """A copy that costs no more than the limit, in which the outputs of ``ignored`` layers of ``dense`` are left alone.

    ``loss`` is what ``Taylor`` takes the gradient of, before every step. ValueError if the limit cannot be reached.
    """
    import torch_pruning

    kinds = torch_pruning.importance
    model, given = copy.deepcopy((dense, list(ignored)))
    pruner = torch_pruning.pruner.MetaPruner(
        model,
        example,
        importance=kinds.GroupMagnitudeImportance(p=2) if importance == "magnitude" else kinds.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=0.98,
        max_pruning_ratio=0.98,
        iterative_steps=_STEPS,
        ignored_layers=given,
    )
    count = cost(model)
    while count > limit:
        before = count
        if loss is not None:
            model.zero_grad()
            loss(model).backward()
        pruner.step()
        count = cost(model)
        if count == before and pruner.current_step >= _STEPS:
            raise ValueError(f"Torch-Pruning stops at {count:,.0f}; {limit:,.0f} were asked for")
    model.zero_grad(set_to_none=True)
    return model.eval()
