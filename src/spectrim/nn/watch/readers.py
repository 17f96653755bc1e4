"""What a forward pass does with layers besides calling them: computing with their weights, putting others in place.

A layer whose weight others compute with is left alone. A module whose layers are not the same from one pass to the next
is refused: what stands under a name would not be what runs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from spectrim.errors import CalibrationError
from spectrim.network.layer import LayerSpec
from spectrim.nn.parameters import own_kinds
from spectrim.nn.standing import aliases, read_of
from spectrim.nn.watch.observe import hooked, on_each
from spectrim.nn.watch.writes import moved_away, written

_READ = (
    "another module computes with its weight, which a pair of layers in its place would multiply out in every pass: "
    "call the layer instead"
)
_ITSELF = (
    "its forward is called past the layer itself, where hooks do not see it: write layer(x) in place of "
    "layer.forward(x)"
)
_BOUND = (
    "forward puts another weight or bias in place of its own, such as by functional_call, which a pair of layers in "
    "its place does not have: call the layer instead"
)
_AMID = (
    "it is called while forward has put other weights in place of some layer's own, which passes that wait at it side "
    "by side would mix up: call it before or after"
)
# Python files whose functions have C++ code call back.
_HOLDING = {
    os.path.join("torch", "jit", "_async.py"): "torch.jit.fork",
    os.path.join("torch", "_library", "custom_ops.py"): "an operator of torch.library",
}
_LOCKS = (type(threading.Lock()), threading.Semaphore)
_PATIENCE = 0.2  # seconds
_DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


@dataclass
class Reading:
    """What was seen of the layers of a model in a pass."""

    refused: dict[str, str] = field(default_factory=dict)  # why a layer has to be left alone, by its name


class _Readers(TorchFunctionMode):
    """Notes the layers whose weight goes into an operation while the layer itself does not run."""

    def __init__(self, layers: Mapping[str, nn.Module], seen: Reading, locks: Mapping[str, Any]) -> None:
        super().__init__()
        self.layers, self.seen = layers, seen
        self.weights: dict[int, set[str]] = {}
        for name, layer in layers.items():
            self.weights.setdefault(id(layer.weight), set()).add(name)
        self.others: list[Tensor] = []  # other objects of the same numbers, whose identities are theirs while they live
        self.own = {name: dict(layer._parameters) for name, layer in layers.items()}
        self.locks = locks
        self.running: list[str] = []
        self.amid: dict[str, set[str]] = {}
        self.differentiable: str | None = None
        self.inside: str | None = None

    def start(self, name: str) -> None:
        """A layer is called."""
        levels = torch.autograd.forward_ad._current_level
        if levels >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
            raise CalibrationError(
                f"layer {name!r} is called inside a transformation of torch.func (vmap, grad, jvp), where what it sees "
                "cannot be watched. Compress the module that is transformed by itself, on the batches it is given, or "
                f"skip={name!r}"
            )
        check_unheld(name)
        _check_unlocked(name, self.locks)
        if self.inside is not None:
            raise CalibrationError(
                f"layer {name!r} is called inside torch's {self.inside}, where functions are compiled or run for "
                f"nothing, so that what it sees cannot be watched: write it as plain Python (if, for), or skip={name!r}"
            )
        self.amid.setdefault(name, set()).update(filter(self._is_altered, self.seen.refused))
        self.running.append(name)
        if torch.is_grad_enabled():
            self.differentiable = self.differentiable or name

    def end(self, for_good: Collection[str]) -> None:
        """The pass is over: what was put in place for good does not come in between, since each pass has its own."""
        for name, bound in self.amid.items():
            if not all(each in for_good or self._is_altered(each) for each in bound):
                self.seen.refused.setdefault(name, _AMID)

    def _is_altered(self, name: str) -> bool:
        """Whether a layer has other parameters at the moment than its own."""
        now, own = self.layers[name]._parameters, self.own[name]
        return now.keys() != own.keys() or any(now[key] is not own[key] for key in own)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DERIVATIVES:
            return self._differentiate(func, args, kwargs or {})
        for value in tree_iter(read_of(func, args, kwargs)):
            # What several layers have in common is read by any of them.
            names = self.weights.get(id(value), set())
            if names.isdisjoint(self.running):
                self.seen.refused |= {name: _ITSELF if _runs(self.layers[name]) else _READ for name in names}
        if isinstance(func, HigherOrderOperator):
            return self._within(func, args, kwargs or {})
        given = func(*args, **(kwargs or {}))
        if args and aliases(func) and id(args[0]) in self.weights:
            self.weights[id(given)] = self.weights[id(args[0])]
            self.others.append(given)
        return given

    def _within(self, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        """Run an operation that takes functions."""
        before, self.inside = self.inside, func.name()
        try:
            return func(*args, **kwargs)
        finally:
            self.inside = before

    def _differentiate(self, func: Any, args: Any, kwargs: Any) -> Any:
        what = (
            "the model differentiates in its forward (torch.autograd), and layers that a gradient goes through work "
            "there as well, which is neither fitted nor counted"
        )
        cure = "Compress the network whose gradient is taken by itself, on the batches it is given"
        if self.differentiable is not None:
            raise CalibrationError(f"{what}; the first is {self.differentiable!r}. {cure}")
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            raise CalibrationError(f"{what}; without gradients it fails. {cure}") from error


def check_unheld(name: str) -> None:
    """Raise CalibrationError if a layer is called by C++ code, which dies where passes wait in it side by side."""
    frame = sys._getframe()
    while frame is not None:
        if held := next((what for path, what in _HOLDING.items() if frame.f_code.co_filename.endswith(path)), None):
            raise CalibrationError(
                f"layer {name!r} is called from within {held}, whose C++ code cannot be left while other passes go on: "
                f"call it from plain Python, or skip={name!r}"
            )
        frame = frame.f_back


def _check_unlocked(name: str, locks: Mapping[str, Any]) -> None:
    """Raise CalibrationError if a layer is called while a lock is held, which another pass would wait for for ever."""
    for lock, held in locks.items():
        # Another thread gives it back before long.
        if not held.acquire(timeout=_PATIENCE):
            raise CalibrationError(
                f"layer {name!r} is called while the lock {lock!r} is held, which other passes, that go on meanwhile, "
                "would wait for: take it where the model is called and not in forward, or use a threading.RLock"
            )
        held.release()


def _locks(model: nn.Module) -> dict[str, Any]:
    """Locks that the modules of a model may take, by their names: those beside their classes, and of the classes."""
    own = own_kinds(model)
    spaces = {kind.__module__: vars(sys.modules[kind.__module__]) for kind in own if kind.__module__ in sys.modules}
    spaces |= {f"{kind.__module__}.{kind.__qualname__}": vars(kind) for kind in own}
    return {
        f"{where}.{key}": value
        for where, space in spaces.items()
        for key, value in list(space.items())
        if isinstance(value, _LOCKS)
    }


def _runs(layer: nn.Module) -> bool:
    """Whether some function that is running now is the layer's forward."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_locals.get("self") is layer:
            return True
        frame = frame.f_back
    return False


class _Noting(dict[str, Any]):
    """Parameters or modules of a module, as it holds them, and whoever puts others in their place is noted."""

    def __init__(self, held: Mapping[str, Any], note: Callable[[str], None]) -> None:
        super().__init__(held)
        self._note = note

    def __setitem__(self, key: str, value: Any) -> None:
        self._note(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._note(key)
        super().__delitem__(key)

    def pop(self, key: str, *default: Any) -> Any:
        """As that of a dict."""
        self._note(key)
        return super().pop(key, *default)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


@contextlib.contextmanager
def reading(model: nn.Module, specs: Iterable[LayerSpec]) -> Iterator[Reading]:
    """What others do with the layers of a model inside the context, besides calling them.

    Asking for shape, dtype or device is no reading: what stands for a layer answers that too.

    Raises
    ------
    CalibrationError
        If the model makes modules or moves layers about while it runs, differentiates what they give, or runs them in
        a transformation; the message says what to do.
    """
    layers = {spec.name: model.get_submodule(spec.name) for spec in specs}
    seen = Reading()
    readers = _Readers(layers, seen, _locks(model))
    starts = on_each(layers.items(), lambda name, *_: readers.start(name), before=True)
    ends = on_each(layers.items(), lambda name, *_: readers.running.remove(name))
    with hooked([*starts, *ends]), _elsewhere(layers, readers.amid), _held(model, layers, seen), readers:
        yield seen
        readers.end({path for path, _ in written(model)})


@contextlib.contextmanager
def _elsewhere(layers: Mapping[str, nn.Module], here: Collection[str]) -> Iterator[None]:
    """Refuse layers that are called in other threads alone: there they are neither watched nor counted."""
    ours, called = threading.get_ident(), dict[str, None]()

    def note(name: str) -> None:
        if threading.get_ident() != ours:
            called[name] = None

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda *_, name=name: note(name))
            stack.callback(handle.remove)
        yield
    if name := next((name for name in called if name not in here), None):
        raise CalibrationError(
            f"layer {name!r} is called in a thread of its own, where it can be neither watched nor counted: call "
            "it in the thread that runs the model, at least while it is compressed"
        )


@contextlib.contextmanager
def _held(model: nn.Module, layers: Mapping[str, nn.Module], seen: Reading) -> Iterator[None]:
    """Note who puts other weights into layers; refuse who puts other modules in the place of any."""
    moved: dict[str, bool] = {}
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_noted(layer, "_parameters", lambda _, name=name: seen.refused.update({name: _BOUND})))
        for path, module in model.named_modules():
            known = frozenset(name for name, _ in module._modules.items())

            def note(key: str, path: str = path, known: frozenset[str] = known) -> None:
                moved.setdefault(f"{path}.{key}" if path else key, key in known)

            stack.enter_context(_noted(module, "_modules", note))
        yield
    if moved:
        name, known = next(iter(moved.items()))
        raise CalibrationError(
            moved_away(name)
            if known
            else f"forward makes the module {name!r} while it runs: make it in __init__, or, if it is made once, run "
            "the model on a batch first"
        )


@contextlib.contextmanager
def _noted(module: nn.Module, kind: str, note: Callable[[str], None]) -> Iterator[None]:
    held = vars(module).get(kind)
    if type(held) is not dict:
        # Compiled modules hold theirs in their own way.
        yield
        return
    vars(module)[kind] = _Noting(held, note)
    try:
        yield
    finally:
        vars(module)[kind] = held
