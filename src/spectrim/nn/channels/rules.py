"""How modules that are no layers of torch lose channels: rules that users register, and what modules tell themselves.

A rule is about a module that hands channels on as it gets them: a normalisation of one's own, a scale, a reshape with a
number of channels among its attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from spectrim.nn.parameters import in_place_of

_OF_TORCH = (
    *(_ConvNd, nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.PReLU),
    *(_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm),
)


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Convolutions and linear layers, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, (_ConvNd, nn.Linear))]


class ChannelRule(Protocol):
    """What :func:`register_channels` takes: how many channels a module gets, and how it loses some."""

    def size(self, module: Any) -> int:
        """Length of the axis of its input that holds the channels."""
        ...

    def cut(self, module: Any, kept: Tensor) -> None:
        """Keep these entries of the axis, ascending positions, in place."""
        ...


@dataclass(frozen=True)
class Held:
    """Parameters and buffers that hold a number for each channel along an axis."""

    axes: Mapping[str, int]

    def size(self, module: nn.Module) -> int:
        name, axis = next(iter(self.axes.items()))
        return getattr(module, name).shape[axis]

    @torch.no_grad()
    def cut(self, module: nn.Module, kept: Tensor) -> None:
        for name, axis in self.axes.items():
            held = getattr(module, name, None)
            if held is not None:
                setattr(module, name, picked(held, axis, kept))


def picked(held: Tensor, axis: int, kept: Tensor) -> Tensor:
    """Some entries of an axis of a parameter or buffer, as such."""
    cut = held.detach().index_select(axis, kept.to(held.device))
    return in_place_of(held, cut) if isinstance(held, nn.Parameter) else cut


class _Unflattened:
    """``nn.Unflatten(1, (C, h, w))``: the number of channels is an attribute."""

    def size(self, module: nn.Unflatten) -> int:
        sizes = self._sizes(module)
        if sizes[0] < 1:
            raise ValueError("the number of channels is not among its sizes")
        return math.prod(sizes)

    def cut(self, module: Any, kept: Tensor) -> None:
        first, *rest = self._sizes(module)
        module.unflattened_size = (first * len(kept) // self.size(module), *rest)

    @staticmethod
    def _sizes(module: nn.Unflatten) -> tuple[int, ...]:
        sizes = module.unflattened_size
        if isinstance(sizes, int) or any(not isinstance(each, int) for each in sizes):
            raise ValueError("its sizes have names")
        return tuple(sizes)  # type: ignore[arg-type]


_RULES: dict[type[nn.Module], tuple[ChannelRule, int]] = {nn.Unflatten: (_Unflattened(), 1)}


def register_channels(kind: type[nn.Module], rule: ChannelRule | Mapping[str, int], *, dim: int = 1) -> None:
    """Tell how modules of a class lose channels, for :func:`spectrim.couple`.

    The removal is tried on the network all the same before it is believed. A process that loads a checkpoint of such a
    network has to register the rule too.

    Parameters
    ----------
    kind
        The class, and what derives from it; a rule that is there for it is replaced.
    rule
        Names of parameters and buffers with the axis that holds a number for each channel, or an object with
        ``size(module)``, the number of channels, and ``cut(module, kept)``, which keeps these positions in place.
    dim
        The axis of the module's first input that holds the channels.

    Raises
    ------
    TypeError
        For what is no class of modules, or no rule.

    Examples
    --------
    >>> import spectrim as st
    >>> from torch import nn
    >>> class FrozenBatchNorm2d(nn.Module): ...
    >>> st.register_channels(FrozenBatchNorm2d, {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0})
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register_channels is given {kind!r}: expected a class of modules")
    if isinstance(rule, Mapping):
        if not rule or not all(isinstance(k, str) and isinstance(v, int) for k, v in rule.items()):
            raise TypeError(f"the rule is {rule!r}: expected names of parameters and buffers with the axis of channels")
        rule = Held(dict(rule))
    if not callable(getattr(rule, "size", None)) or not callable(getattr(rule, "cut", None)):
        raise TypeError(f"the rule is {rule!r}: expected a mapping of names to axes, or methods size and cut")
    _RULES[kind] = rule, dim


def is_registered(module: nn.Module) -> bool:
    """Whether there is a rule for the class of a module, or one that it derives from."""
    return any(kind in _RULES for kind in type(module).__mro__)


def rule_of(module: nn.Module) -> tuple[ChannelRule, int] | None:
    """The rule for a module and the axis of its input: registered, or read off what it holds."""
    for kind in type(module).__mro__:
        if kind in _RULES:
            return _RULES[kind]
    if isinstance(module, _OF_TORCH) or next(module.children(), None) is not None:
        return None
    # Vectors of one length and nothing else: a frozen normalisation, a scale.
    held = {name: t for name, t in [*module.named_parameters(), *module.named_buffers()] if t.numel() > 1}
    axes = {name: [axis for axis, size in enumerate(t.shape) if size > 1] for name, t in held.items()}
    lengths = {t.numel() for t in held.values()}
    if len(lengths) != 1 or any(len(each) != 1 for each in axes.values()):
        return None
    return Held({name: axis for name, (axis,) in axes.items()}), 1
