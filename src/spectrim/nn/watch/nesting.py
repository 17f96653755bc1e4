"""Batches as nested structures of tensors: gone through, copied, moved, resized."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from spectrim.errors import CalibrationError
from spectrim.nn.parameters import parameters_of


def checked_batches(batches: Any) -> Any:
    """What is passed for batches, if one can go through it batch by batch.

    Raises
    ------
    CalibrationError
        For a single tensor, array or mapping, a dataset that gives samples, or what is no iterable.
    """
    if isinstance(batches, Tensor):
        raise CalibrationError(
            f"the batches are one tensor of shape {tuple(batches.shape)}: pass a list of batches, such as x.split(64), "
            "or a DataLoader"
        )
    if is_array(batches):
        raise CalibrationError(
            f"the batches are one numpy array of shape {tuple(batches.shape)}: pass a list of batches, such as "
            "torch.from_numpy(x).split(64), or a DataLoader"
        )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise CalibrationError(
            f"the batches are a {type(batches).__name__}, which gives single samples: pass "
            "DataLoader(dataset, batch_size=64)"
        )
    if batches is None:
        raise CalibrationError(
            "the batches are None: expected a list of batches or a DataLoader; without data weights alone choose, by "
            "select(tabulate(find(model), WeightSVD()), 'parameters=50%')"
        )
    if isinstance(batches, (str, bytes, Mapping)) or not hasattr(type(batches), "__iter__"):
        raise CalibrationError(
            f"the batches are a {type(batches).__name__}: expected a list of batches or a DataLoader"
        )
    return batches


def reads_once(batches: Any) -> bool:
    """Whether batches can be gone through once only: an iterator, or what gives the same iterator again."""
    if isinstance(batches, (list, tuple, DataLoader)):
        return False
    first = iter(batches)
    return first is batches or first is iter(batches)


def copied_batches(batches: Iterable[Any]) -> list[Any]:
    """All batches at once; copies, since a loader may fill one and the same tensor again and again."""
    if isinstance(batches, (list, tuple, DataLoader)):
        return list(batches)
    return [copied(batch) for batch in batches]


def at_hand(batches: Iterable[Any], *, alike: bool) -> Iterable[Any]:
    """Batches that can be read several times, and are ``alike`` each time though a loader shuffles them."""
    return copied_batches(batches) if reads_once(checked_batches(batches)) or alike else batches


def begun(batches: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The first batch, before anything is done with it, and all batches.

    Raises
    ------
    CalibrationError
        If there is none.
    """
    rest = iter(batches)
    for first in rest:
        return first, itertools.chain((first,), rest)
    raise CalibrationError(
        "no calibration batches, so no gradient or statistic: the iterable was empty, or was read before and does not "
        "start over; pass a list"
    )


def is_array(value: object) -> bool:
    """Whether a value is an array of numpy, without loading numpy."""
    return type(value).__module__ == "numpy" and hasattr(value, "shape") and hasattr(value, "dtype")


def check_numbers(inputs: Any) -> None:
    """Raise CalibrationError for inputs of arrays or lists of numbers alone, in place of tensors, or of odd ones."""
    if any(tensor.is_nested for tensor in tensors(inputs)):
        raise CalibrationError(
            "a batch holds a nested tensor, whose samples differ in length: pass a padded one (to_padded_tensor(0)), "
            "and mask=, which says what is no padding; or a list of tensors, one a sample"
        )
    if any(tensor.is_meta for tensor in tensors(inputs)):
        raise CalibrationError(
            "a batch holds a tensor on the meta device, which has a shape and no numbers: pass tensors of data"
        )
    if next(tensors(inputs), None) is not None:
        return
    if is_array(inputs):
        raise CalibrationError(
            f"a batch holds a numpy array of shape {tuple(inputs.shape)} and {inputs.dtype} where models take tensors: "
            "pass torch.from_numpy(x), or a DataLoader, which makes tensors of arrays"
        )
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if not isinstance(parts, list | tuple):
        return
    if parts and isinstance(parts, list) and all(isinstance(part, int | float) for part in parts):
        raise CalibrationError(
            f"a batch holds a list of {len(parts)} numbers where models take tensors: pass torch.tensor(x)"
        )
    for part in parts:
        check_numbers(part)


def kind_of(value: Any) -> type:
    """Tensor, Mapping or Sequence, where a value is one of these; else its type."""
    kinds: tuple[tuple[type, Any], ...] = ((Tensor, Tensor), (Mapping, Mapping), (Sequence, list | tuple))
    return next((kind for kind, held in kinds if isinstance(value, held)), type(value))


def in_words(batch: Any) -> str:
    """A batch in words."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a mapping of {', '.join(map(repr, batch))}"
    if not isinstance(batch, list | tuple):
        return f"a {type(batch).__name__}"
    kinds = ", ".join(type(part).__name__ for part in itertools.islice(batch, 4))
    return f"a {type(batch).__name__} of {len(batch)} ({kinds}{', ...' if len(batch) > 4 else ''})"


def is_record(value: Any) -> bool:
    """Whether a value is a dataclass object, whose fields are parts of a batch."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors in a nested batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors(value)
    elif is_record(batch):
        for part in dataclasses.fields(batch):
            yield from tensors(getattr(batch, part.name, None))


def transformed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        return PackedSequence(change(value.data), *value[1:])
    if isinstance(value, Mapping):
        return _mapping(value, {k: transformed(v, change) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return rebuilt(value, [transformed(v, change) for v in value])
    if is_record(value):
        other = copy.copy(value)
        for part in dataclasses.fields(value):
            # Frozen ones too; what their constructors would do has been done.
            object.__setattr__(other, part.name, transformed(getattr(value, part.name, None), change))
        return other
    return value


def without_numbers(batch: Any) -> Any:
    """A batch of the same shapes on the meta device; None where a tensor cannot be there."""
    try:
        return transformed(batch, lambda x: x.detach().to("meta"))
    except (RuntimeError, NotImplementedError):  # sparse, quantised
        return None


def noise(shaped: Any, device: torch.device) -> Any:
    """A batch of shapes from :func:`without_numbers`: normal numbers, zeros for whole ones, and nothing masked."""
    generator = torch.Generator().manual_seed(15)

    def filled(x: Tensor) -> Tensor:
        if x.is_floating_point() or x.is_complex():
            return torch.randn(x.shape, dtype=x.dtype, generator=generator).to(device)
        return torch.full(x.shape, x.dtype == torch.bool, dtype=x.dtype, device=device)

    return transformed(shaped, filled)


def _mapping(like: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """A mapping of the same type, such as a tokeniser's, with other values; a dict where that cannot be made."""
    if type(like) is dict:
        return values
    try:
        other: Any = copy.copy(like)
        for key, value in values.items():
            other[key] = value
    except Exception:
        return values
    # A copy may share what it holds with the mapping itself.
    return other if other is not like and all(other[key] is value for key, value in values.items()) else values


def copied(batch: Any) -> Any:
    """A batch whose tensors may be written to. Objects of other types copy themselves."""
    if isinstance(batch, Tensor | Mapping | list | tuple) or is_record(batch):
        return transformed(batch, torch.clone)
    return copy.deepcopy(batch)


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of all floating parameters of a model; None where they have several, or there are none."""
    kinds = {p.dtype for p in parameters_of(model) if p.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else None


def moved(batch: Any, model: nn.Module) -> Any:
    """A copy of a batch on a model's device, its floating tensors in the model's dtype if all its parameters have one.

    Always a copy: a model may write into what it is given, and others read the batch after it.
    """
    device = next((p.device for p in parameters_of(model) if p.is_floating_point()), None)
    dtype = dtype_of(model)

    def put(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=True)

    return transformed(batch, put)


def rebuilt(like: list[Any] | tuple[Any, ...], values: list[Any]) -> Any:
    """A list, tuple or named tuple of the same type with other values."""
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors a model's output stands for: itself, its ``logits`` if it has any, or all tensors in it.

    A single number, as a loss, is none beside others: it is of another size, and would hide how far they are apart.
    """
    if isinstance(output, Tensor):
        return [dense(output)]
    if isinstance(getattr(output, "logits", None), Tensor):
        return [dense(output.logits)]
    found = [dense(tensor) for tensor in tensors(output)]
    if not found:
        raise CalibrationError(
            f"the model's output of type {type(output).__name__} holds no tensor: pass forward=, a function (model, "
            "batch) that runs the model and returns tensors"
        )
    return [tensor for tensor in found if tensor.dim()] or found


def named_logits(output: Any) -> Any:
    """What an output calls its logits, as an attribute or a key; None if nothing."""
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def dense(output: Tensor) -> Tensor:
    """A tensor of all that a sparse one holds, or a nested one, whose rows are padded with zeros.

    Of complex numbers both parts, along one more axis.
    """
    if output.is_nested:
        return torch.nested.to_padded_tensor(output, 0.0)
    output = output if output.layout is torch.strided else output.to_dense()
    return torch.view_as_real(output.resolve_conj()) if output.is_complex() else output


def compared(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs in float64, as numbers that can be subtracted.

    Where both are one infinity, as scores of what a mask leaves out are, both are zero. Where one alone is infinite
    they are as far apart as the numbers there are large: one entry misses one entry.
    """
    a, b = dense(a), dense(b)
    infinite = a.isinf() | b.isinf()
    if not bool(infinite.any()):
        return a.double(), b.double()
    first, second = (x.double().masked_fill(infinite, 0) for x in (a, b))
    size = (first.square().sum() / (~infinite).sum().clamp_min(1)).sqrt()
    return first, torch.where(infinite & (a != b), size, second)


def logits(output: Any) -> Tensor:
    """The first tensor that a model's output stands for; see :func:`output_tensors`."""
    return output_tensors(output)[0]


def resized(value: Any, size: int) -> Any:
    """The same structure with every tensor's first axis repeated or cut to ``size``."""

    def change(tensor: Tensor) -> Tensor:
        return tensor[torch.arange(size) % len(tensor)] if tensor.dim() and len(tensor) else tensor

    return transformed(value, change)
