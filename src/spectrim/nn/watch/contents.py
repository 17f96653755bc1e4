"""Records that a model keeps in lists, mappings, sets and arrays of plain values: passes leave them as they were."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterator
from types import NoneType
from typing import Any

import numpy as np
from torch import Tensor, nn

from spectrim.nn.watch.outside import COMMON

# No types that are derived from these: what clears and fills them may do more.
_KINDS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter, tuple, np.ndarray})
_PLAIN = frozenset({int, float, str, bool, bytes, NoneType})
# Entries up to which the records of one attribute are copied, so that they can be put back.
_MANY = 100_000


@contextlib.contextmanager
def contents_kept(*models: nn.Module) -> Iterator[None]:
    """Records that modules have as attributes hold in the end what they held, and are the same objects.

    So do those within them. Records of more than 100,000 entries are left as they are, and so is what holds tensors or
    modules, which is a part of what passes compute (:mod:`spectrim.nn.watch.state`).
    """
    spaces = (vars(module) for model in models for module in model.modules())
    values = (value for space in spaces for key, value in space.items() if type(value) in _KINDS and key not in COMMON)
    before = [(record, record.copy()) for value in values for record in _records(value)]
    try:
        yield
    finally:
        for record, copy in before:
            _refill(record, copy)


def _records(value: Any) -> list[Any]:
    """A record and those within it; none where there are tensors or modules, or too many entries."""
    waiting, found, seen, entries = [value], list[Any](), set[int](), 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor | nn.Module):
            return []
        if type(value) not in _KINDS or id(value) in seen:
            continue
        seen.add(id(value))
        entries += value.size if isinstance(value, np.ndarray) else len(value)
        if entries > _MANY:
            return []
        if not isinstance(value, tuple):
            found.append(value)
        if not isinstance(value, np.ndarray):
            parts = value.values() if isinstance(value, dict) else value
            waiting.extend(part for part in parts if type(part) not in _PLAIN)
    return found


def _refill(record: Any, copy: Any) -> None:
    if isinstance(record, np.ndarray):
        if record.flags.writeable and record.shape == copy.shape and record.tobytes() != copy.tobytes():
            record[...] = copy
    elif isinstance(record, list | deque):
        if not _same(record, copy):
            record.clear()
            record.extend(copy)
    elif isinstance(record, set):
        if record != copy:
            record.clear()
            record.update(copy)
    elif not (_same(record, copy) and _same(record.values(), copy.values())):
        record.clear()
        record.update(copy)


def _same(first: Collection[Any], second: Collection[Any]) -> bool:
    """Whether two hold the same objects in the same order: values may refuse to be compared."""
    return len(first) == len(second) and all(map(operator.is_, first, second))
