"""Functions that a copied model holds: Python copies none, so that they go on meaning the original's modules."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from spectrim.nn.watch.outside import Variables, named_globals


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
