"""What forward passes may keep outside of the modules: in variables beside their functions, in closures and classes.

Hooks that put features into a dict and a head that takes them from there, a skip that goes by a global, a stack of the
thread: passes that wait side by side would take what another has left there.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import random
import threading
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Generator, Tensor, nn

# What draws random numbers.
GENERATORS = (Generator, random.Random, np.random.RandomState, np.random.Generator)
# Of these values is state made; longer ones are tables.
_KINDS = (Tensor, list, dict, set, deque, tuple, int, float, types.NoneType, *GENERATORS)
_LONG = 256
_DEPTH = 2  # of functions that functions call
_FOREIGN = frozenset({"torch", "spectrim", "builtins", "collections", "abc", "typing", "transformers"})
# What every module has; slots of passes come and go by themselves.
COMMON = frozenset((*vars(nn.Module()), "forward"))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True, eq=False)
class Holder:
    """What has variables: a mapping of them, a class, or a cell of a closure."""

    owner: dict[str, Any] | type | types.CellType

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Holder) and other.owner is self.owner

    def __hash__(self) -> int:
        return id(self.owner)

    def get(self, key: str, default: Any = None) -> Any:
        """As that of a mapping."""
        if isinstance(self.owner, types.CellType):
            try:
                return self.owner.cell_contents
            except ValueError:
                return default
        return (vars(self.owner) if isinstance(self.owner, type) else self.owner).get(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(self.owner, types.CellType):
            self.owner.cell_contents = value
        elif isinstance(self.owner, type):
            setattr(self.owner, key, value)
        else:
            self.owner[key] = value

    def pop(self, key: str, default: Any = None) -> Any:
        """As that of a mapping."""
        before = self.get(key, default)
        if isinstance(self.owner, types.CellType):
            del self.owner.cell_contents
        elif isinstance(self.owner, type):
            if key in vars(self.owner):
                delattr(self.owner, key)
        else:
            self.owner.pop(key, None)
        return before


class Variables(dict[str, Any]):
    """Global variables of a function for which some have another value than in its module of Python."""

    def __init__(self, beyond: dict[str, Any]) -> None:
        super().__init__({name: beyond[name] for name in ("__name__", "__builtins__") if name in beyond})
        self.beyond = beyond

    def __missing__(self, name: str) -> Any:
        return self.beyond[name]


def named_globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Global variables that a function of somebody's own may read, and their values; none where it sets some."""
    if _root(function.__module__) in _FOREIGN or _sets_globals(function.__code__):
        return
    for name in names_in(function.__code__):
        with contextlib.suppress(KeyError):
            yield name, function.__globals__[name]


def outside(model: nn.Module) -> dict[tuple[Holder, str], Any]:
    """The variables that the functions of a model's own modules and hooks name, and their values."""
    found: dict[tuple[Holder, str], Any] = {}
    for holder, key in dict.fromkeys(each for function in _functions(model) for each in _named(function)):
        value = holder.get(key, _Nothing)
        if _is_state(value):
            found[holder, key] = value
        for inner, name, part in _parts(value, holder):
            found[inner, name] = part
    return found


class _Nothing:
    """No variable."""


def _is_state(value: Any) -> bool:
    if not isinstance(value, _KINDS):
        return False
    return not isinstance(value, list | dict | set | deque | tuple) or len(value) <= _LONG


def _parts(value: Any, holder: Holder) -> Iterator[tuple[Holder, str, Any]]:
    """The variables of an object, a class or modules beside the functions, or of a thread's own."""
    for inner, space in _spaces(value, holder):
        for name, part in list(space.items()):
            if not name.startswith("__") and name not in COMMON and _is_state(part):
                yield inner, name, part


def _spaces(value: Any, holder: Holder) -> Iterator[tuple[Holder, Any]]:
    """What has variables there, and these."""
    if isinstance(value, type):
        if is_own(value) and not issubclass(value, nn.Module):
            yield Holder(value), vars(value)
    elif isinstance(value, nn.Module):
        # Of a copy whose functions still mean the model that it was made of.
        yield from ((Holder(vars(module)), vars(module)) for module in nn.Module.modules(value))
    elif isinstance(value, threading.local) or (own_object(value) is value and _is_near(value, holder)):
        yield Holder(value.__dict__), value.__dict__


def own_object(value: Any) -> Any:
    """The object of somebody's own class that a value is, or is a method of; None where there is none."""
    value = value.func if type(value) is functools.partial else value
    value = value.__self__ if isinstance(value, types.MethodType) else value
    if isinstance(value, (nn.Module, type, types.FunctionType, types.ModuleType, *_KINDS)):
        return None
    own = is_own(type(value)) and isinstance(getattr(value, "__dict__", None), dict)
    return value if own else None


def _is_near(value: Any, holder: Holder) -> bool:
    """Whether a function that names an object may be meant to write into it; what it has imported is not."""
    return not isinstance(holder.owner, dict) or type(value).__module__ == holder.owner.get("__name__")


def is_own(value: Any) -> bool:
    """Whether a class or a function is somebody's own, and none of torch, this library or the like."""
    return _root(getattr(value, "__module__", None)) not in _FOREIGN


def watches(hook: Any) -> bool:
    """Whether a hook is this library's or torch's, and none that a model has set up."""
    return _root(getattr(hook, "__module__", None)) in ("spectrim", "torch")


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _functions(model: nn.Module) -> Iterator[types.FunctionType]:
    """Those of the modules' own classes, of hooks, and of forwards that were put in place."""
    kinds: dict[type, None] = {}
    for module in model.modules():
        kinds |= dict.fromkeys(type(module).__mro__)
        hooks = [hook for kind in _HOOKS for hook in vars(module)[kind].values()]
        for value in (*hooks, vars(module).get("forward")):
            yield from _function(value)
    for kind in kinds:
        yield from _of_class(kind)


@functools.lru_cache(maxsize=1024)
def _of_class(kind: type) -> tuple[types.FunctionType, ...]:
    if not is_own(kind):
        return ()
    return tuple(each for value in vars(kind).values() for each in _function(value))


def _function(value: Any) -> Iterator[types.FunctionType]:
    value = getattr(value, "func", value)  # of a partial
    value = getattr(value, "__func__", value)  # of a method
    value = getattr(value, "fget", value)  # of a property
    if isinstance(value, types.FunctionType) and _root(value.__module__) not in _FOREIGN:
        yield value


def _named(function: types.FunctionType, depth: int = 0) -> Iterator[tuple[Holder, str]]:
    """Where the variables are that a function names, and those of its own that it calls."""
    variables = getattr(function.__globals__, "beyond", function.__globals__)
    found = [(Holder(variables), name) for name in names_in(function.__code__) if name in variables]
    found += [(Holder(cell), "") for cell in function.__closure__ or ()]
    for holder, name in found:
        value = holder.get(name)
        if not isinstance(value, types.FunctionType):
            yield holder, name
        elif depth < _DEPTH and _root(value.__module__) == _root(function.__module__):
            yield from _named(value, depth + 1)


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """Names of variables and attributes that a function reads, and those that are written within it."""
    return tuple(dict.fromkeys((*code.co_names, *(name for each in _inner(code) for name in names_in(each)))))


@functools.lru_cache(maxsize=4096)
def _sets_globals(code: types.CodeType) -> bool:
    sets = any(each.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for each in dis.get_instructions(code))
    return sets or any(map(_sets_globals, _inner(code)))


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """The functions that are written within one."""
    return (each for each in code.co_consts if isinstance(each, types.CodeType))
