"""Counting what a whole model computes, and naming what cannot be counted."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from spectrim.network.layer import COMPLEX
from spectrim.nn.dispatch import Uncompiled
from spectrim.nn.formulas import formula, is_unknown

_EVERYTHING = "Global"


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """What is computed meanwhile is nobody's: modes of torch, such as counters, do not see it, and cost no time."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


# Torch's own, without what would load its compiler.
_dispatched = inspect.unwrap(_FlopCounterMode.__torch_dispatch__)


class _Counting(Uncompiled, _FlopCounterMode):
    """Sees operations; of those that take functions, as fused attention with a score of one's own, what they give."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Torch's counter would take what is done to nested tensors apart, which fails.
        if _nested(args):
            out = func(*args, **(kwargs or {}))
            return self.counter._count_flops(func._overloadpacket, out, args, kwargs or {})
        return _dispatched(self, func, types, args, kwargs)

    def _handle_higher_order_ops(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        out = super()._handle_higher_order_ops(func, types, args, kwargs)
        if out is not NotImplemented:
            return out
        return self.counter._count_flops(func, func(*args, **kwargs), args, kwargs)


class _Places(ModuleTracker):
    """Which modules run in this thread: torch is told of those of all threads, and would count work as theirs.

    It hooks views of parameters for the backward pass also where gradients are off. There it fails: such a view says
    that it needs gradients and has no function that gives them.
    """

    def __init__(self) -> None:
        super().__init__()
        # The modules themselves, innermost last: torch names what a container outside of the model holds anew.
        self.running: list[nn.Module] = []
        self._thread = threading.get_ident()

    def _fw_pre_hook(self, mod: nn.Module, input: Any) -> None:  # noqa: A002 (torch's name)
        if threading.get_ident() != self._thread:
            return
        super()._fw_pre_hook(mod, input if torch.is_grad_enabled() else ())
        self.running.append(mod)

    def _fw_post_hook(self, mod: nn.Module, input: Any, output: Any) -> None:  # noqa: A002 (torch's name)
        if threading.get_ident() != self._thread:
            return
        super()._fw_post_hook(mod, input, output if torch.is_grad_enabled() else ())
        # Past those that have raised, and were caught.
        while self.running and self.running.pop() is not mod:
            pass


class WorkCounter(FlopCounterMode):
    """torch's counter, silent, with the formulas of :mod:`spectrim.nn.formulas`; two operations are a MAC."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _Places()
        self.uncounted: dict[str, tuple[nn.Module, ...]] = {}
        # By the identities of the modules that ran, which live as long.
        self._own: dict[tuple[int, ...], float] = {}
        self._ran: dict[tuple[int, ...], tuple[nn.Module, ...]] = {}

    def __enter__(self) -> WorkCounter:
        super().__enter__()
        # One and the same but for the class: torch makes it of its own.
        self.mode.__class__ = _Counting  # type: ignore[union-attr]
        return self

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func_packet, "_qualified_op_name", str(func_packet))
        count, modules = formula(name), tuple(self.mod_tracker.running)
        times = COMPLEX if _is_complex(out) and not name.startswith("aten::_fft") else 1
        before = self.flop_counts[_EVERYTHING][func_packet]
        if count is not None:
            work = round(2 * times * count(*args, **kwargs, out=out))
        else:
            # Formulas of torch's ask for sizes that nested tensors do not have.
            counted = func_packet in self.flop_registry and not _nested(args)
            if not counted and (func_packet in self.flop_registry or is_unknown(name)):
                self.uncounted.setdefault(name, modules)
            out = super()._count_flops(func_packet, out, args, kwargs) if counted else out
            work = times * (self.flop_counts[_EVERYTHING][func_packet] - before)
        self.flop_counts[_EVERYTHING][func_packet] = before + work
        if work:
            running = tuple(map(id, modules))
            self._ran[running] = modules
            self._own[running] = self._own.get(running, 0) + work
        return out

    def own_macs(self, model: nn.Module) -> dict[str, float]:
        """Multiply-accumulates of each module of a model itself, without those of the modules in it, by its path."""
        paths, found = _paths(model), dict[str, float]()
        for running, work in self._own.items():
            path = _innermost(paths, self._ran[running])
            found[path] = found.get(path, 0.0) + work / 2
        return found

    def uncounted_in(self, model: nn.Module) -> dict[str, str]:
        """Operations that have no formula, with the path of the module that called them first."""
        paths = _paths(model)
        return {name: _innermost(paths, modules) for name, modules in self.uncounted.items()}


def _is_complex(out: Any) -> bool:
    return isinstance(out, Tensor) and out.is_complex()


def _nested(args: Any) -> bool:
    """Whether an operation is given a nested tensor."""
    return any(isinstance(each, Tensor) and each.is_nested for each in args)


def _paths(model: nn.Module) -> dict[int, str]:
    return {id(module): path for path, module in nn.Module.named_modules(model)}


def _innermost(paths: Mapping[int, str], running: Sequence[nn.Module]) -> str:
    """Of the modules that run the path of the innermost one that is a part of the model."""
    return next((paths[id(module)] for module in reversed(running) if id(module) in paths), "")
