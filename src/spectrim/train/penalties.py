"""Weight decay on the product of two factors instead of on each factor.

Plain weight decay on both factors of ``W = V U`` is not the decay of ``W``: the smallest ``||U||^2 + ||V||^2`` over all
factors of one ``W`` is twice its nuclear norm, so it drives the rank down further while training. Decaying the product
keeps the meaning that weight decay had in the dense layer: ``decay / 2 * ||V U||_F^2``.

The product is never formed. With ``U [r, (i, k)]`` and ``V [(o, l), r]`` whose kernels lie on different axes, the
weight they stand for is ``W[o, i, k, l] = sum_r V[o, l, r] U[r, i, k]`` and ::

    ||W||_F^2 = tr((U U^T) (V^T V)),     dU = decay * (V^T V) U,     dV = decay * V (U U^T)

with two r x r Gram matrices, at a cost of ``O(r^2 (i k + o l))``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class FactoredPair:
    """The weights of two layers that run one after the other with nothing in between.

    Attributes
    ----------
    name
        Name of the pair in its model.
    first
        Weight of the first layer, ``[g r, i, *k]`` with ``i`` inputs a group.
    second
        Weight of the second, ``[g o, r, *l]`` with ``o`` outputs a group.
    groups
        ``g``.
    """

    name: str
    first: Tensor
    second: Tensor
    groups: int = 1

    def rows(self) -> tuple[Tensor, Tensor]:
        """Both factors with one row for each of the ``r`` directions: ``[g, r, i k]`` and ``[g, r, o l]``."""
        g, rank = self.groups, self.second.shape[1]
        second = self.second.reshape(g, -1, rank, self.second[0, 0].numel())
        return self.first.reshape(g, rank, -1), second.transpose(1, 2).reshape(g, rank, -1)

    def square(self) -> Tensor:
        """``||V U||_F^2`` as a scalar that can be differentiated."""
        first, second = self.rows()
        return ((first @ first.mT) * (second @ second.mT)).sum()

    @torch.no_grad()
    def half_gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of ``||V U||_F^2 / 2`` in the shapes of the two weights."""
        first, second = self.rows()
        to_first = (second @ second.mT) @ first
        to_second = (first @ first.mT) @ second
        g, rank, _ = second.shape
        to_second = to_second.reshape(g, rank, -1, self.second[0, 0].numel()).transpose(1, 2)
        return to_first.reshape(self.first.shape), to_second.reshape(self.second.shape)


def factored_pairs(model: nn.Module) -> tuple[FactoredPair, ...]:
    """The pairs of a model whose product is the weight of one layer.

    A pair is an ``nn.Sequential`` marked with ``is_factored = True`` that holds two linear layers, or two convolutions
    with equal groups whose kernels are wide on different axes. Marked modules of another form are not pairs: no product
    of two matrices describes them, and :func:`spectrim.train.fine_tune` decays their weights one by one.
    """
    found = ((name, module, _pair(name, module)) for name, module in model.named_modules())
    return tuple(pair for _, _, pair in found if pair is not None)


def product_penalty(model: nn.Module, decay: float) -> Tensor:
    """``decay / 2`` times the sum of ``||V U||_F^2`` over the pairs of a model, as a term to add to a loss."""
    terms = [pair.square() for pair in factored_pairs(model)]
    return decay / 2 * (torch.stack(terms).sum() if terms else torch.zeros(()))


@torch.no_grad()
def add_product_decay(pairs: Iterable[FactoredPair], decay: float, *, shrink: bool = False) -> None:
    """Apply the gradient of ``decay / 2 * ||V U||_F^2`` in closed form.

    Parameters
    ----------
    pairs
        From :func:`factored_pairs`. A weight that occurs in several pairs gets the sum.
    decay
        Factor of the penalty.
    shrink
        False adds to ``.grad``, as in SGD with L2 decay. True subtracts from the weights themselves, as in decoupled
        decay (AdamW); ``decay`` is then the product of decay and learning rate.
    """
    steps = [(p, g) for pair in pairs for p, g in zip((pair.first, pair.second), pair.half_gradients(), strict=True)]
    for parameter, gradient in steps:
        if not parameter.requires_grad:
            continue
        if shrink:
            parameter.sub_(gradient, alpha=decay)
        elif parameter.grad is None:
            parameter.grad = torch.empty_like(parameter).copy_(gradient).mul_(decay)
        else:
            parameter.grad.add_(gradient, alpha=decay)


def _pair(name: str, module: nn.Module) -> FactoredPair | None:
    if not (isinstance(module, nn.Sequential) and getattr(module, "is_factored", False) and len(module) == 2):
        return None
    first, second = module[0], module[1]
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return FactoredPair(name, first.weight, second.weight)
    if not (isinstance(first, _CONVOLUTIONS) and isinstance(second, _CONVOLUTIONS) and first.groups == second.groups):
        return None
    if any(min(k) > 1 for k in zip(first.kernel_size, second.kernel_size, strict=True)):
        return None
    return FactoredPair(name, first.weight, second.weight, first.groups)
