"""Feeding a model from batches of any common structure, with its state left as found."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from spectrim.errors import CalibrationError


def checked_batches(batches: Any) -> Any:
    """What is passed for batches, if one can go through it batch by batch.

    Raises
    ------
    CalibrationError
        For a single tensor or mapping, a dataset that gives samples, or what is no iterable.
    """
    if isinstance(batches, Tensor):
        raise CalibrationError(
            f"the batches are one tensor of shape {tuple(batches.shape)}: pass a list of batches, such as x.split(64), "
            "or a DataLoader"
        )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise CalibrationError(
            f"the batches are a {type(batches).__name__}, which gives single samples: pass "
            "DataLoader(dataset, batch_size=64)"
        )
    if isinstance(batches, (str, bytes, Mapping)) or not hasattr(type(batches), "__iter__"):
        raise CalibrationError(
            f"the batches are a {type(batches).__name__}: expected a list of batches or a DataLoader"
        )
    return batches


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
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        yield from tensors([getattr(batch, field.name) for field in dataclasses.fields(batch)])


def batch_size(batch: Any) -> int:
    """Length of the first tensor of a batch along its first axis.

    Raises
    ------
    CalibrationError
        If the batch holds no tensor with an axis.
    """
    for tensor in tensors(batch):
        if tensor.dim():
            return tensor.shape[0]
    raise CalibrationError(f"a batch of type {type(batch).__name__} holds no tensor with a batch axis")


def _moved(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if dtype is not None and value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {k: _moved(v, device, dtype) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return rebuilt(value, [_moved(v, device, dtype) for v in value])
    return value


def rebuilt(like: list[Any] | tuple[Any, ...], values: list[Any]) -> Any:
    """A list, tuple or named tuple of the same type with other values."""
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)


def _required(model: nn.Module) -> int:
    """How many arguments a model's forward must be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return 1
    return sum(p.kind in kinds and p.default is p.empty for p in signature.parameters.values())


def _takes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a model's forward has parameters for these arguments."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that a batch stands for, moved to the model.

    A tensor is the only argument. A mapping, such as tokenisers return, gives keyword arguments. A tuple or list is
    ``(inputs, targets, ...)`` as data loaders give it: its first element is taken, or as many as the model's
    ``forward`` requires. Inputs that are a mapping, tuple or list themselves are spread over the arguments where
    ``forward`` takes them so. Floating tensors are cast to the model's dtype if all its parameters have one.
    """
    floating = [p for p in model.parameters() if p.is_floating_point()]
    device = floating[0].device if floating else None
    kinds = {p.dtype for p in floating}
    batch = _moved(batch, device, kinds.pop() if len(kinds) == 1 else None)
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (list, tuple)) and batch:
        inputs = batch[0]
        if isinstance(inputs, Mapping) and _takes(model, (), inputs):
            return (), dict(inputs)
        if isinstance(inputs, (list, tuple)) and _takes(model, inputs, {}):
            return tuple(inputs), {}
        needed = _required(model)
        return (tuple(batch[:needed]) if 1 < needed <= len(batch) else (inputs,)), {}
    raise CalibrationError(
        f"cannot feed a batch of type {type(batch).__name__}: expected a tensor, a mapping, or (inputs, targets)"
    )


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch; see :func:`arguments` for what is passed."""
    args, kwargs = arguments(model, batch)
    return model(*args, **kwargs)


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors a model's output stands for: itself, its ``logits`` if it has any, or all tensors in it."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(getattr(output, "logits", None), Tensor):
        return [output.logits]
    found = list(tensors(output))
    if not found:
        raise CalibrationError(f"the model's output of type {type(output).__name__} holds no tensor")
    return found


def logits(output: Any) -> Tensor:
    """The first tensor that a model's output stands for; see :func:`output_tensors`."""
    return output_tensors(output)[0]


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is restored, one by one.

    Torch's fused transformer kernels are off meanwhile: they pass the layers by, so that hooks would not see them.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes:
            module.training = mode


def picked(value: Any, index: Tensor, size: int) -> Any:
    """The same structure with some of the ``size`` samples, by their numbers."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {k: picked(v, index, size) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return rebuilt(value, [picked(v, index, size) for v in value])
    return value


def resized(value: Any, size: int) -> Any:
    """The same structure with every tensor's first axis repeated or cut to ``size``."""
    if isinstance(value, Tensor):
        if not value.dim():
            return value
        repeats = -(-size // value.shape[0])
        return value.repeat(repeats, *[1] * (value.dim() - 1))[:size].contiguous()
    if isinstance(value, Mapping):
        return {k: resized(v, size) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return rebuilt(value, [resized(v, size) for v in value])
    return value
