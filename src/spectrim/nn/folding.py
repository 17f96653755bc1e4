"""Biases that a layer did not have, folded into its weight: for architectures that have no place for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.linalg.moments import Moments, damped
from spectrim.nn.find import find
from spectrim.nn.layers import opened
from spectrim.nn.standing import laid_out
from spectrim.nn.watch.calibrate import calibrate


def fold_biases(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> tuple[str, ...]:
    """Take biases from layers, in place, and have their weights answer as nearly the same as they can.

    ``W x + b`` becomes ``(W + b v) x`` with the row ``v`` that minimises ``E (1 - v x)^2`` over the layer's inputs.
    Layers that calibration kept no second moment of inputs for keep their biases; their names are returned.
    """
    named = set(names)
    sites = calibrate(model, find(model, only=lambda path, _: path in named), batches, forward=forward)
    for layer in sites:
        module: Any = model.get_submodule(layer.name)
        moments = layer.statistics.input
        weight, bias = opened(module)
        if moments is not None and bias is not None and moments.mean.shape[1] == weight[0, 0].numel():
            with torch.no_grad():
                step = bias.double().reshape(*weight.shape[:2], 1) * _constant(moments).to(weight.device).unsqueeze(1)
                module.weight.copy_(laid_out(weight.double() + step.reshape(weight.shape), layer.spec))
            module.bias = None
            named.discard(layer.name)
    return tuple(sorted(named))


def _constant(inputs: Moments) -> Tensor:
    """The rows ``[g, d]`` whose products with the inputs come nearest to one."""
    mean = inputs.mean.double()
    spread = damped(inputs.covariance.double(), inputs.count)
    # What never varies is a direction of its own: the least part of the spread keeps it solvable.
    level = torch.finfo(torch.float32).eps * spread.diagonal(dim1=1, dim2=2).amax(1)
    spread = spread + torch.diag_embed(level.unsqueeze(1).expand_as(mean))
    row = torch.linalg.solve(spread, mean.unsqueeze(2)).squeeze(2)
    # Of mean and spread: the second moment is one rank more, so its solution is that of the spread, made shorter.
    return row / (1 + (row * mean).sum(1, keepdim=True))
