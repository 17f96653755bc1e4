"""Counting what a whole model computes, and naming what cannot be counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from spectrim.nn.formulas import formula, is_unknown

_EVERYTHING = "Global"
# Products of real numbers in one of complex ones.
_FOUR = 4


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """What is computed meanwhile is nobody's: modes of torch, such as counters, do not see it, and cost no time."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


class _Counting(_FlopCounterMode):
    """Sees operations; of those that take functions, as fused attention with a score of one's own, what they give."""

    def _handle_higher_order_ops(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        out = super()._handle_higher_order_ops(func, types, args, kwargs)
        if out is not NotImplemented:
            return out
        return self.counter._count_flops(func, func(*args, **kwargs), args, kwargs)


class _Places(ModuleTracker):
    """Which modules run. Torch's hooks views of parameters for the backward pass also where gradients are off.

    There it fails: such a view says that it needs gradients and has no function that gives them.
    """

    def _fw_pre_hook(self, mod: nn.Module, input: Any) -> None:  # noqa: A002 (torch's name)
        super()._fw_pre_hook(mod, input if torch.is_grad_enabled() else ())

    def _fw_post_hook(self, mod: nn.Module, input: Any, output: Any) -> None:  # noqa: A002 (torch's name)
        super()._fw_post_hook(mod, input, output if torch.is_grad_enabled() else ())


class WorkCounter(FlopCounterMode):
    """torch's counter, silent, with the formulas of :mod:`spectrim.nn.formulas`; two operations are a MAC.

    Attributes
    ----------
    uncounted
        Operations that may multiply numbers and have no formula, with the modules they were called in, innermost last.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _Places()
        self.uncounted: dict[str, str] = {}

    def __enter__(self) -> WorkCounter:
        super().__enter__()
        # One and the same but for the class: torch makes it of its own.
        self.mode.__class__ = _Counting  # type: ignore[union-attr]
        return self

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func_packet, "_qualified_op_name", str(func_packet))
        count = formula(name)
        places = set(self.mod_tracker.parents)
        times = _FOUR if _is_complex(out) and not name.startswith("aten::_fft") else 1
        if count is not None:
            work = round(2 * times * count(*args, **kwargs, out=out))
            for place in places:
                self.flop_counts[place][func_packet] += work
            return out
        if func_packet not in self.flop_registry and is_unknown(name):
            self.uncounted.setdefault(name, max(places - {_EVERYTHING}, key=len, default=""))
        before = self.flop_counts[_EVERYTHING][func_packet]
        out = super()._count_flops(func_packet, out, args, kwargs)
        more = (times - 1) * (self.flop_counts[_EVERYTHING][func_packet] - before)
        for place in places if more else ():
            self.flop_counts[place][func_packet] += more
        return out

    def own_macs(self, model: nn.Module) -> dict[str, float]:
        """Multiply-accumulates of each module of a model itself, without those of the modules in it, by its path."""
        totals = {
            _path(model, place): sum(c.values()) / 2 for place, c in self.flop_counts.items() if place != _EVERYTHING
        }
        found = dict(totals)
        for path in totals:
            above = _above(path, totals)
            if above is not None:
                found[above] -= totals[path]
        return {path: work for path, work in found.items() if work > 0}

    def uncounted_in(self, model: nn.Module) -> dict[str, str]:
        """Operations that have no formula, with the path of the module that called them first."""
        return {name: _path(model, place) for name, place in self.uncounted.items()}


def _is_complex(out: Any) -> bool:
    return isinstance(out, Tensor) and out.is_complex()


def _above(path: str, known: dict[str, float]) -> str | None:
    """The innermost module around a path that was called too."""
    while path:
        path = path.rpartition(".")[0]
        if path in known:
            return path
    return None


def _path(model: nn.Module, place: str) -> str:
    """The path of a module, which torch names by the class of the module that was called first."""
    root, _, path = place.partition(".")
    if root == type(model).__name__:
        return path
    prefixes = [name for name, module in model.named_modules() if type(module).__name__ == root]
    return ".".join(filter(None, (prefixes[0] if len(prefixes) == 1 else root, path)))
