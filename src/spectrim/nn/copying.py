"""Copies of models and of the functions that they hold, and what stands in their way."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from spectrim.errors import ProofError, UnsupportedLayerError, in_short
from spectrim.nn.parameters import parameters_of
from spectrim.nn.watch.outside import Variables, named_globals
from spectrim.nn.watch.state import ALONE

# How deep attributes of modules are looked into for tensors.
_DEPTH = 5
# What holds none, or none of the model's own, as a module of Python does.
_WITHOUT = (nn.Module, types.ModuleType, type, str, bytes, int, float)

# Why a copy may do something else, and what to do.
MEANS = (
    "Something there goes on meaning the original, as a global variable does, or an id() of a module that was noted "
    "down before, or was not copied, as what is in __slots__. Hand it the modules it needs, or have it look them up by "
    "attributes when it runs"
)


def cannot_run(model: nn.Module, error: Exception) -> ProofError:
    """What to raise where a copy of a model fails in a forward pass that the model itself gets through."""
    return ProofError(
        f"a copy of the {type(model).__name__} cannot be run, which the model can: {type(error).__name__}: "
        f"{in_short(error)}. {MEANS}"
    )


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy. Activations that a model keeps are copied without their graphs, which belong to what was computed.

    Functions that it holds, such as hooks, mean the modules of the copy there.
    What cannot be copied, such as a lock, raises UnsupportedLayerError, which names the module and the attribute.
    """
    with ALONE:
        return _copied(model, {})


def check_copyable(model: nn.Module, layers: Iterable[str] = ()) -> None:
    """Raise UnsupportedLayerError if a model, or one of these layers, cannot be copied, without copying weights."""
    with ALONE:
        copied = _copied(model, _shared(model))
    for name in layers:
        if copied.get_submodule(name) is model.get_submodule(name):
            raise UnsupportedLayerError(
                f"copy.deepcopy of the {type(model).__name__} gives layer {name!r} itself and no copy of it, so that "
                "compressing it would change the original: mend its __deepcopy__, or take that away"
            )


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    memo |= {id(tensor): tensor.detach().clone() for tensor in _inside_graphs(model)}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # what copies itself may raise anything
        where = _culprit(model)
        if where is None and (kind := _copies_itself(model)) is not None:
            raise UnsupportedLayerError(
                f"the model cannot be copied: __deepcopy__ of {kind} fails with {type(error).__name__}: "
                f"{in_short(error)}. It has to copy the modules that are there, which are not those that the class "
                "makes once layers are replaced: mend it, or take it away"
            ) from error
        where = where or "something on it"
        raise UnsupportedLayerError(
            f"the model cannot be copied: {where} cannot ({type(error).__name__}: {in_short(error)}). Take it off the "
            "model meanwhile, make it where it is used, or give its class a __deepcopy__"
        ) from error
    _copy_attributes(model, memo)
    for parameter in parameters_of(copied):
        # Torch computes those of scripted parts from the originals.
        if not parameter.is_leaf:
            parameter.detach_().requires_grad_()
    rebind(copied, memo)
    return copied


def _copy_attributes(model: nn.Module, memo: dict[int, Any]) -> None:
    """Have copied parameters be told what is written on the originals, as rates of learning: torch leaves that out."""
    for parameter in parameters_of(model):
        copied = memo.get(id(parameter))
        if isinstance(copied, nn.Parameter) and copied is not parameter:
            for name, value in vars(parameter).items():
                with contextlib.suppress(Exception):  # what cannot be copied alone is no number or flag
                    vars(copied).setdefault(name, copy.deepcopy(value, memo))


def _copies_itself(model: nn.Module) -> str | None:
    """The name of the first class of modules that is copied in a way of its own."""
    kinds = (type(module) for module in nn.Module.modules(model))
    return next((kind.__name__ for kind in kinds if hasattr(kind, "__deepcopy__")), None)


def _shared(model: nn.Module) -> dict[int, Any]:
    return {id(tensor): tensor for tensor in [*parameters_of(model), *model.buffers()]}


def _culprit(model: nn.Module) -> str | None:
    """The first attribute that cannot be copied by itself."""
    modules = {id(module): module for module in model.modules()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            memo = _shared(model) | modules | {id(t): t for t in _tensors(value, _DEPTH, set())}
            try:
                copy.deepcopy(value, memo)
            except Exception:
                what = f"hook ({key})" if "hooks" in key else f"attribute {key!r} ({type(value).__name__})"
                return f"{what} of {f'module {name!r}' if name else 'the model itself'}"
    return None


def _inside_graphs(model: nn.Module) -> Iterator[Tensor]:
    """Tensors on a model that were computed from others, which torch does not copy."""
    seen: set[int] = set()
    for module in model.modules():
        for value in vars(module).values():
            for tensor in _tensors(value, _DEPTH, seen):
                if not tensor.is_leaf:
                    yield tensor


def _tensors(value: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if not depth or id(value) in seen or isinstance(value, _WITHOUT):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    elif isinstance(value, functools.partial):
        inside = [*value.args, *value.keywords.values(), value.func]
    elif hasattr(value, "__self__"):
        inside = [value.__self__]
    else:
        inside = list(vars(value).values()) if hasattr(value, "__dict__") and not callable(value) else []
    for part in inside:
        yield from _tensors(part, depth - 1, seen)


def rebind(copied: nn.Module, copies: Mapping[int, Any]) -> None:
    """Have functions on a copied model that were made with its modules (hooks, closures, defaults) mean those copies.

    So do those that name the model by a global variable. Other variables stay what they share with the original's.

    Parameters
    ----------
    copies
        What became of each object that was copied, by its identity.
    """
    again = _Again(copies)
    for module in nn.Module.modules(copied):
        again.within(vars(module))


class _Again:
    """Makes functions anew where they hold modules that were copied."""

    def __init__(self, copies: Mapping[int, Any]) -> None:
        self._copies = copies
        # Several functions may be made with the same variable, and one of itself.
        self._made: dict[int, Any] = {}

    def within(self, held: dict[Any, Any] | list[Any]) -> None:
        """In attributes of a copied module, and in lists and mappings there, such as those of hooks."""
        for key, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
            if type(value) in (dict, OrderedDict, list):
                self.within(value)
            elif (new := self(value)) is not value:
                held[key] = new

    def __call__(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self._copies.get(id(value), value)
        if not self._means_copied(value, set()):
            return value
        if isinstance(value, types.FunctionType):
            return self._made.get(id(value)) or self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(self(value.__func__), self(value.__self__))
        named = {name: self(part) for name, part in value.keywords.items()}
        return functools.partial(self(value.func), *map(self, value.args), **named)

    def _means_copied(self, value: Any, seen: set[int]) -> bool:
        """Whether a value is a module that was copied, or a function that leads to one."""
        if isinstance(value, nn.Module):
            return id(value) in self._copies
        if id(value) in seen:
            return False
        seen.add(id(value))
        return any(self._means_copied(part, seen) for part in _parts(value))

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = tuple(map(self._cell, function.__closure__ or ()))
        # A function may be named by a variable of its own.
        if id(function) not in self._made:
            defaults = tuple(map(self, function.__defaults__ or ()))
            named = {name: part for name, part in named_globals(function) if self._means_copied(part, set())}
            variables = Variables(function.__globals__) if named else function.__globals__
            made = types.FunctionType(function.__code__, variables, function.__name__, defaults, cells)
            functools.update_wrapper(made, function)
            del made.__wrapped__  # type: ignore[attr-defined]
            vars(made).update((name, self(value)) for name, value in vars(function).items())
            made.__kwdefaults__ = {name: self(value) for name, value in (function.__kwdefaults__ or {}).items()}
            self._made[id(function)] = made
            variables |= {name: self(part) for name, part in named.items()}
        return self._made[id(function)]

    def _cell(self, cell: types.CellType) -> types.CellType:
        """A variable of functions: another one only where it leads to a module that was copied."""
        if id(cell) not in self._made and any(self._means_copied(value, set()) for value in _contents(cell)):
            self._made[id(cell)] = made = types.CellType()
            made.cell_contents = self(cell.cell_contents)
        return self._made.get(id(cell), cell)


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    """What is in a variable of a closure: nothing before it is set."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _parts(value: Any) -> Iterator[Any]:
    """What a function has been made with, or names."""
    if isinstance(value, types.FunctionType):
        yield from (part for _, part in named_globals(value))
        for cell in value.__closure__ or ():
            yield from _contents(cell)
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif type(value) is functools.partial:
        yield from (value.func, *value.args, *value.keywords.values())
