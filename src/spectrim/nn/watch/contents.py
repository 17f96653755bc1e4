"""Lists, mappings, sets and arrays that a model keeps, and tensors in them: passes leave them as they were."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterator
from types import NoneType
from typing import Any

import numpy as np
import torch
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

    So do those within them, and tensors in them that passes write into, which are no parameters and buffers. Records of
    more than 100,000 entries and numbers of tensors are left as they are, and so is what holds modules.
    """
    spaces = (vars(module) for model in models for module in model.modules())
    values = (value for space in spaces for key, value in space.items() if type(value) in _KINDS and key not in COMMON)
    own = {id(t) for model in models for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())}
    before = [(part, _copied(part)) for value in values for part in _parts(value) if id(part) not in own]
    try:
        yield
    finally:
        for part, copy in before:
            _refill(part, copy)


def _parts(value: Any) -> list[Any]:
    """A record, those within it and tensors in them; none where there are modules, or too many entries."""
    waiting, found, seen, entries = [value], list[Any](), set[int](), 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            return []
        if not (type(value) in _KINDS or _is_plain(value)) or id(value) in seen:
            continue
        seen.add(id(value))
        entries += value.size if isinstance(value, np.ndarray) else value.numel() if _is_plain(value) else len(value)
        if entries > _MANY:
            return []
        if not isinstance(value, tuple):
            found.append(value)
        if not isinstance(value, np.ndarray | Tensor):
            parts = value.values() if isinstance(value, dict) else value
            waiting.extend(part for part in parts if type(part) not in _PLAIN)
    return found


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor that says when it was written into."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_inference()


def _copied(part: Any) -> Any:
    return (part.detach().clone(), part._version) if isinstance(part, Tensor) else part.copy()


def _refill(record: Any, copy: Any) -> None:
    if isinstance(record, Tensor):
        numbers, version = copy
        if record._version != version:
            with torch.no_grad():
                record.copy_(numbers)
    elif isinstance(record, np.ndarray):
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
