"""What a state holds beside plain tensors, such as packed int8 weights: as plain tensors, and records for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))


def is_ordinary(value: object) -> bool:
    """Whether a value of a state is an ordinary tensor, to be stored as it is."""
    return isinstance(value, Tensor) and not value.is_quantized


def plain_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The ordinary tensors of a state, on the CPU."""
    return {name: value.cpu() for name, value in state.items() if is_ordinary(value)}


def taken_apart(name: str, value: Any) -> tuple[Any, dict[str, Tensor]]:
    """A value of a state as a record for JSON and plain tensors, by names that begin with its own.

    Raises TypeError if a part of it is of a type that cannot be stored; the message names the type.
    """
    if isinstance(value, _PLAIN):
        return {"value": value}, {}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}, {}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        parts = [taken_apart(f"{name}:{number}", part) for number, part in enumerate(value)]
        records = [record for record, _ in parts]
        return {type(value).__name__: records}, {k: t for _, tensors in parts for k, t in tensors.items()}
    if isinstance(value, Tensor) and value.is_quantized:
        return _quantised(name, value)
    if isinstance(value, Tensor):
        return {"tensor": name}, {name: value}
    raise TypeError(type(value).__name__)


def _quantised(name: str, value: Tensor) -> tuple[Any, dict[str, Tensor]]:
    record: dict[str, Any] = {"quantised": name, "dtype": str(value.dtype).removeprefix("torch.")}
    if value.qscheme() == torch.per_tensor_affine:
        record |= {"scale": value.q_scale(), "zero_point": value.q_zero_point()}
        return record, {name: value.int_repr()}
    if value.qscheme() == torch.per_channel_affine:
        scales, zeros = value.q_per_channel_scales(), value.q_per_channel_zero_points()
        tensors = {name: value.int_repr(), f"{name}:scales": scales, f"{name}:zero_points": zeros}
        return {**record, "axis": value.q_per_channel_axis()}, tensors
    raise TypeError(f"tensor quantised by {value.qscheme()}")


def put_together(record: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, frozenset[str]]:
    """The value of a record, and the names of the tensors that it is made of.

    Raises ValueError if it is no such record, or tensors that it needs are missing or do not fit.
    """
    used: set[str] = set()
    try:
        return _made(record, tensors, used), frozenset(used)
    except (KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"a value that cannot be made: {error}") from error


def _made(record: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Any:
    if "value" in record:
        if not isinstance(record["value"], _PLAIN):
            raise TypeError("no number or text")
        return record["value"]
    for kind in (list, tuple):
        if kind.__name__ in record:
            return kind(_made(part, tensors, used) for part in record[kind.__name__])
    if "tensor" in record:
        return _used(record["tensor"], tensors, used)
    kind = getattr(torch, record["dtype"])
    if not isinstance(kind, torch.dtype):
        raise TypeError(f"{record['dtype']!r} is no dtype")
    if "quantised" not in record:
        return kind
    name = record["quantised"]
    numbers = _used(name, tensors, used)
    if "axis" not in record:
        scales, zeros = float(record["scale"]), int(record["zero_point"])
        made = torch.ops.aten._make_per_tensor_quantized_tensor(numbers, scales, zeros)
    else:
        scales, zeros = (_used(f"{name}:{part}", tensors, used) for part in ("scales", "zero_points"))
        made = torch.ops.aten._make_per_channel_quantized_tensor(numbers, scales, zeros, int(record["axis"]))
    if made.dtype != kind:
        raise TypeError(f"{numbers.dtype} numbers are not those of {kind}")
    return made


def _used(name: str, tensors: Mapping[str, Tensor], used: set[str]) -> Tensor:
    used.add(name)
    return tensors[name]


def alike(value: Any, other: Any) -> bool:
    """Whether two values of states have the same form: types, shapes, and what is no tensor."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and value.dtype == other.dtype
    if isinstance(value, list | tuple) and type(value) is type(other):
        return len(value) == len(other) and all(map(alike, value, other))
    return type(value) is type(other) and (not isinstance(value, torch.dtype) or value == other)


def equal(value: Any, other: Any) -> bool:
    """Whether two values of states are the same, bit for bit."""
    if isinstance(value, list | tuple):
        return alike(value, other) and all(map(equal, value, other))
    return alike(value, other) and (torch.equal(value, other) if isinstance(value, Tensor) else value == other)
