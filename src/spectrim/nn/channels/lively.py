"""Models whose numbers hide nothing of their structure: random weights, and no statistics that mix channels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectrim.nn.copying import copy_model
from spectrim.nn.flops import unwatched
from spectrim.nn.parameters import parameters_of
from spectrim.nn.standing import as_containers

# Functions that draw numbers of the shape of their input.
_DRAWING = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


def as_is(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that can be narrowed."""
    copied = copy_model(model).eval()
    as_containers(copied)
    return copied


@torch.no_grad()
def enlivened(model: nn.Module) -> nn.Module:
    """A copy with random weights, as large as keeps the size of what passes.

    Whether channels can go depends on the structure. Weights as they come may hide that they cannot: attention that is
    still uniform, a normalisation over channels that is still off, a layer scale of 1e-6.
    """
    copied = as_is(model)
    kinds = (_ConvNd, nn.Linear, nn.Embedding)
    layers = {id(p) for m in copied.modules() if isinstance(m, kinds) and isinstance(p := m.weight, nn.Parameter)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in parameters_of(copied):
            if parameter.is_floating_point() and parameter.numel():
                # Numbers of one byte can be copied, and nothing else.
                numbers = parameter.float() if parameter.element_size() == 1 else parameter
                noise = torch.randn(parameter.shape).to(numbers)
                if id(parameter) in layers:
                    parameter.copy_(noise * math.sqrt(parameter.shape[0] / parameter.numel()))
                else:
                    parameter.copy_(numbers.add(noise, alpha=0.2))
    return copied


class _Scales:
    """Scales by which normalisations divide in the first run, for the second."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self.next: Iterator[Tensor] | None = None

    def again(self) -> None:
        self.next = iter(self.held)

    def scaled(self, x: Tensor) -> Tensor:
        if self.next is None:
            with unwatched():
                self.held.append(x.square().mean().sqrt().clamp_min(1e-12))
            return x / self.held[-1]
        return x / next(self.next)


def _undropped(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002 (torch's name)
    return input


@contextlib.contextmanager
def without_statistics() -> Iterator[_Scales]:
    """Layer and group normalisation divide by one number a call: their own statistics mix the channels.

    They are run all the same, for what they say of the number of channels that they are given. Dropout that is asked
    for drops nothing: it draws other numbers for another number of channels.
    """
    scales, functional = _Scales(), torch.nn.functional
    before = functional.layer_norm, functional.group_norm, functional.scaled_dot_product_attention

    def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        x = scales.scaled(x)
        x = x if weight is None else x * weight.reshape(shape)
        return x if bias is None else x + bias.reshape(shape)

    def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        with unwatched():
            before[0](x, shape, weight, bias, eps)
        return scaled(x, weight, bias, tuple(shape))

    def group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        with unwatched():
            before[1](x, groups, weight, bias, eps)
        return scaled(x, weight, bias, (1, -1, *(1,) * (x.dim() - 2)))

    def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not key.numel():  # torch 2.9 and older end the process there
            raise ValueError("attention is left without a head of keys")
        return before[2](query, key, value, *args, **kwargs)

    attention = {"scaled_dot_product_attention": scaled_dot_product_attention}
    undropped = dict.fromkeys(_DRAWING, _undropped)
    with mock.patch.multiple(functional, layer_norm=layer_norm, group_norm=group_norm, **attention, **undropped):
        yield scales
