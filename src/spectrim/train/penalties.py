"""Weight decay on the product of two factors instead of on each factor.

Plain weight decay on both factors of ``W = V U`` is not the decay of ``W``: the smallest ``||U||^2 + ||V||^2`` over all
factors of one ``W`` is twice its nuclear norm, so it drives the rank down further while training. Decaying the product
keeps the meaning that weight decay had in the dense layer: ``decay / 2 * ||V U||_F^2``.

The product is never formed. With ``U [r, (i, k)]`` and ``V [(o, l), r]`` whose kernels lie on different axes, the
weight they stand for is ``W[o, i, k, l] = sum_r V[o, l, r] U[r, i, k]`` and ::

    ||W||_F^2 = tr((U U^T) (V^T V)),     dU = decay * (V^T V) U,     dV = decay * V (U U^T)

with two r x r Gram matrices, at a cost of ``O(r^2 (i k + o l))``.

In the sum of a pair and a sparse weight ``S`` both are decayed for themselves, ``||V U||_F^2 + ||S||_F^2``, the sparse
one by the optimizer as any weight. The decay of the dense layer, ``||V U + S||_F^2``, has ``2 <V U, S>`` besides: three
products of the size of the weight at every step, and no hold on entries of the two parts that grow against each other.

A factor may lie in parts side by side along the rank, of which other layers share some. The gradient of the whole is
cut into those of the parts, and a shared part gets the sum over its layers: each decays as the dense layer would.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.nn.shared import Once, Wide
from spectrim.nn.standing import StandIn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class FactoredPair:
    """The weights of two layers that run one after the other with nothing in between.

    Attributes
    ----------
    name
        Name of the pair in its model.
    firsts
        Weight of the first layer, ``[g r, i, *k]`` with ``i`` inputs a group: one tensor, or its parts along ``r``.
    seconds
        Weight of the second, ``[g o, r, *l]`` with ``o`` outputs a group, in the same way.
    groups
        ``g``.
    """

    name: str
    firsts: tuple[Tensor, ...]
    seconds: tuple[Tensor, ...]
    groups: int = 1

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All that the two weights are made of."""
        return (*self.firsts, *self.seconds)

    @property
    def first(self) -> Tensor:
        """Weight of the first layer as a whole."""
        if len(self.firsts) == 1:
            return self.firsts[0]
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in self.firsts], dim=1).flatten(0, 1)

    @property
    def second(self) -> Tensor:
        """Weight of the second layer as a whole."""
        return self.seconds[0] if len(self.seconds) == 1 else torch.cat(self.seconds, dim=1)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Both factors with one row for each of the ``r`` directions: ``[g, r, i k]`` and ``[g, r, o l]``."""
        g, first, second = self.groups, self.first, self.second
        rank = second.shape[1]
        moved = second.reshape(g, -1, rank, second[0, 0].numel()).transpose(1, 2)
        return first.reshape(g, rank, -1), moved.reshape(g, rank, -1)

    def square(self) -> Tensor:
        """``||V U||_F^2`` as a scalar that can be differentiated."""
        first, second = self.rows()
        return ((first @ first.mT) * (second @ second.mT)).sum()

    @torch.no_grad()
    def half_gradients(self) -> tuple[Tensor, ...]:
        """Gradients of ``||V U||_F^2 / 2`` in the shapes of :attr:`parameters`."""
        first, second = self.rows()
        g, rank, _ = second.shape
        to_first = ((second @ second.mT) @ first).split([part.shape[0] // g for part in self.firsts], dim=1)
        to_second = ((first @ first.mT) @ second).reshape(g, rank, -1, self.seconds[0][0, 0].numel()).transpose(1, 2)
        cut = to_second.split([part.shape[1] for part in self.seconds], dim=2)
        return tuple(
            gradient.reshape(part.shape) for gradient, part in zip((*to_first, *cut), self.parameters, strict=True)
        )


def factored_pairs(model: nn.Module) -> tuple[FactoredPair, ...]:
    """The pairs of a model whose product is the weight of one layer.

    A pair is an ``nn.Sequential`` marked with ``is_factored = True`` that holds two linear layers, or two convolutions
    with equal groups whose kernels are wide on different axes. Either may share its weight, or a part of it, with other
    pairs. Marked modules of another form are not pairs: no product of two matrices describes them, and
    :func:`spectrim.train.fine_tune` decays their weights one by one.
    """
    pairs = (_pair(name, module) for name, module in model.named_modules())
    return tuple(pair for pair in pairs if pair is not None)


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
    steps = [(p, g) for pair in pairs for p, g in zip(pair.parameters, pair.half_gradients(), strict=True)]
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
    firsts, seconds = _parts(module[0]), _parts(module[1])
    layers = [*firsts, *seconds]
    first, second = firsts[0], seconds[0]
    groups = 1
    if any(isinstance(layer, StandIn) for layer in layers):
        return None
    if all(isinstance(layer, _CONVOLUTIONS) for layer in layers):
        if first.groups != second.groups or any(
            min(k) > 1 for k in zip(first.kernel_size, second.kernel_size, strict=True)
        ):
            return None
        groups = first.groups
    elif not all(isinstance(layer, nn.Linear) for layer in layers):
        return None
    return FactoredPair(name, tuple(layer.weight for layer in firsts), tuple(layer.weight for layer in seconds), groups)


def _parts(layer: nn.Module) -> list[Any]:
    """The layers whose weights make up a layer's."""
    if isinstance(layer, Once):
        return _parts(layer.layer)
    return list(layer.parts) if isinstance(layer, Wide) else [layer]
