"""What a forward pass writes into the model's own parameters, as tables with ``max_norm`` and moving averages do.

That is seen in the first pass of a model, which leaves its parameters as they were. From then on they are a part of
what the model keeps on itself (:mod:`spectrim.nn.watch.state`): of each pass its own, and put back in the end.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from greenlet import getcurrent
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_iter

from spectrim.errors import CalibrationError
from spectrim.nn.dispatch import Mode
from spectrim.nn.flops import unwatched

_SEEN: WeakKeyDictionary[nn.Module, frozenset[tuple[str, str]]] = WeakKeyDictionary()
_WAITING: WeakKeyDictionary[nn.Module, WeakSet[Learner]] = WeakKeyDictionary()


class Learner(Protocol):
    """What wants to know of parameters that are written into, once that is seen and they are as they were."""

    def learn(self) -> None: ...


def tell(model: nn.Module, learner: Learner) -> None:
    """Have somebody know after the first pass of a model; nothing where there was one."""
    if model not in _SEEN:
        _WAITING.setdefault(model, WeakSet()).add(learner)


def written(model: nn.Module) -> frozenset[tuple[str, str]]:
    """Paths of modules and names of those of their parameters that passes of a model so far have written into."""
    return _SEEN.get(model, frozenset())


@contextlib.contextmanager
def seen_writing(model: nn.Module) -> Iterator[None]:
    """See in the first pass of a model which parameters it writes into, and put these back after it.

    One that raises has not shown all of them: the next is the first then.
    """
    if model in _SEEN:
        yield
        return
    with unwatched():
        held = [_AsItWas(name, module, key, p) for name, module in model.named_modules() for key, p in _plain(module)]
    whole = False
    try:
        with _Writes(held), _in_place(model):
            yield
        whole = True
    finally:
        with unwatched(), torch.no_grad():
            found = frozenset((each.module, each.key) for each in held if each.put_back())
            if whole:
                _SEEN[model] = found
                for learner in list(_WAITING.pop(model, ())):
                    learner.learn()


def moved_away(name: str) -> str:
    """What is said of a forward pass that moves modules about."""
    return (
        f"forward puts another module in the place of {name!r}, so that what is compressed under that name would not "
        "be what runs: choose between modules by calling one or the other"
    )


@contextlib.contextmanager
def _in_place(model: nn.Module) -> Iterator[None]:
    """Raise CalibrationError if modules are not where they were by the end, and put them back; what was made stays.

    A pass that waits at layers goes on with what is put in their places meanwhile.
    """
    if getcurrent().parent is not None:
        yield
        return
    before = [
        (path, module, key, held, _items(held))
        for path, module in model.named_modules()
        for key, held in list(vars(module).items())
        if isinstance(held, list | deque | dict) and any(isinstance(part, nn.Module) for _, part in _items(held))
    ]
    try:
        yield
    finally:
        for path, module, key, held, items in before:
            moved = _moved(items, _items(vars(module).get(key)))
            if moved is None:
                continue
            there = {name for name, _ in items}
            made = [(name, part) for name, part in _items(held) if name not in there] if key == "_modules" else []
            held.clear()
            held.update(items + made) if isinstance(held, dict) else held.extend(part for _, part in items)
            vars(module)[key] = held
            above = f"{path}." if path else ""
            raise CalibrationError(
                moved_away(f"{above}{moved}")
                if key == "_modules"
                else f"forward takes modules out of {above + key!r} and leaves it in another order, so that each pass "
                "runs others: go through it by a loop or by numbers, and take nothing out"
            )


def _moved(before: Sequence[tuple[Any, Any]], now: Iterable[tuple[Any, Any]]) -> Any | None:
    """The place of the first module that is not where it was, whatever was added; None where there is none."""
    there = {name for name, _ in before}
    pairs = itertools.zip_longest(before, [each for each in now if each[0] in there], fillvalue=(None, None))
    return next((name for (name, part), (other, one) in pairs if name != other or part is not one), None)


def _items(held: Any) -> list[tuple[Any, Any]]:
    """What is in a list or mapping, by its place; nothing in anything else."""
    if isinstance(held, list | deque):
        return list(enumerate(held))
    return list(held.items()) if isinstance(held, dict) else []


def _plain(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that have numbers in a memory of their own; scripted modules hold theirs out of reach."""
    for key, parameter in module._parameters.items() if isinstance(module._parameters, dict) else ():
        if type(parameter) is nn.Parameter and parameter.layout is torch.strided and not parameter.is_meta:
            yield key, parameter


class _AsItWas:
    """A parameter as it was, without a copy as long as nobody writes."""

    def __init__(self, name: str, module: nn.Module, key: str, parameter: nn.Parameter) -> None:
        self.module, self.key = name, key
        # What is written into this alias is no change to a backward pass that comes yet.
        self._owner, self._parameter, self._numbers = module, parameter, parameter.data
        self._copy: Tensor | None = None

    @property
    def memory(self) -> int:
        """Which memory its numbers lie in."""
        return self._numbers.untyped_storage()._cdata

    def keep(self) -> None:
        """Copy the numbers, which are about to be written."""
        if self._copy is None:
            self._copy = self._numbers.clone()

    def put_back(self) -> bool:
        """Have the module hold the parameter with its numbers; whether it did not.

        A layer in whose place something was put meanwhile holds it no longer.
        """
        there = self._owner._parameters.get(self.key, self._parameter) is self._parameter
        own = self._parameter.data_ptr() == self._numbers.data_ptr()
        if not there:
            self._owner._parameters[self.key] = self._parameter
        if not own:
            self._parameter.data = self._numbers
        if self._copy is not None:
            self._numbers.copy_(self._copy)
        return not there or not own or self._copy is not None


class _Writes(Mode):
    """Has parameters copied before an operation writes into their memory."""

    def __init__(self, held: list[_AsItWas]) -> None:
        super().__init__()
        self._held: dict[int, list[_AsItWas]] = {}
        for each in held:
            self._held.setdefault(each.memory, []).append(each)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                for value in tree_iter(given):
                    self._before(value)
        return func(*args, **kwargs)

    def _before(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.layout is torch.strided:
            for each in self._held.get(value.untyped_storage()._cdata, ()):
                each.keep()
