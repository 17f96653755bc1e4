"""Torch-Pruning on the CIFAR ResNets: group magnitude, global, inner channels of each block."""

from __future__ import annotations

import copy

import torch
from torch import nn

from benchmarks.cifar import Block, ResNet


def pruned(dense: ResNet, macs: float) -> tuple[nn.Module, float]:
    """A copy with at most ``macs`` MACs, and its MACs.

    Only the channels between the two convolutions of a block are pruned, as the option-A shortcuts tie the others.
    """
    import torch_pruning

    model = copy.deepcopy(dense)
    example = torch.randn(1, 3, 32, 32)
    outer = [m.conv2 for m in model.modules() if isinstance(m, Block)]
    pruner = torch_pruning.pruner.MetaPruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.98,
        max_pruning_ratio=0.98,
        iterative_steps=400,
        ignored_layers=[model.conv1, model.linear, *outer],
    )
    count = torch_pruning.utils.count_ops_and_params(model, example)[0]
    while count > macs:
        before = count
        pruner.step()
        count = torch_pruning.utils.count_ops_and_params(model, example)[0]
        if count == before and pruner.current_step >= 400:
            raise ValueError(f"Torch-Pruning stops at {count:,.0f} MACs; {macs:,.0f} were asked for")
    return model, float(count)
