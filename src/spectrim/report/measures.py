"""Numbers of one model: its score, its size and its work."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.nn.watch.batches import arguments, batch_size, call, evaluating, logits
from spectrim.nn.watch.observe import Hook, hooked

Evaluate = Callable[[nn.Module], float]


def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """Share of samples, in percent, whose largest output is at the label.

    Parameters
    ----------
    batches
        Tuples ``(inputs, labels)``, or mappings with ``labels`` among the model's arguments.

    Raises
    ------
    ValueError
        If a batch holds no labels, or there is none at all.
    """
    right = seen = 0
    with evaluating(model):
        for batch in batches:
            if isinstance(batch, Mapping) or hasattr(batch, "keys"):
                labels = batch["labels"] if "labels" in list(batch.keys()) else None
            else:
                labels = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
            if not isinstance(labels, Tensor):
                raise ValueError(
                    f"a batch of type {type(batch).__name__} holds no labels: expected (inputs, labels) or a mapping "
                    "with 'labels'"
                )
            guess = logits(call(model, batch)).argmax(-1)
            right += int((guess == labels.to(guess.device)).sum())
            seen += labels.numel()
    if not seen:
        raise ValueError("no batches to evaluate on: the iterable was empty")
    return 100.0 * right / seen


def macs(model: nn.Module, example: Any) -> float:
    """Multiply-accumulates for one sample: half of what the counter of :mod:`spectrim.nn.flops` reports.

    The zeros of sparse weights are left out, as they are in :func:`spectrim.macs`, whether or not the layer is run with
    a kernel that skips them: that is what measured time is for.
    """
    from spectrim.nn.flops import flop_counter

    with evaluating(model), _zeros(model) as zeros, flop_counter() as counter:
        call(model, example)
    return (counter.get_total_flops() / 2 - sum(zeros)) / batch_size(held(example))


@contextmanager
def _zeros(model: nn.Module) -> Iterator[list[int]]:
    """How often layers with a sparse weight multiply by one of its zeros, call by call; they run dense meanwhile."""
    from spectrim.nn.sparse.packed import masked_layers
    from spectrim.nn.sparse.products import Kernel

    found: list[int] = []

    def count(layer: Any, given: Any, kwargs: Any, response: Tensor) -> None:
        spec = layer.original
        seen = given[0] if spec.transposed else response
        positions = seen.numel() // (spec.in_channels if spec.transposed else spec.out_channels)
        found.append(positions * int((~layer.mask).sum()))

    layers = [layer for _, _, layer in masked_layers(model)]
    kernels = [layer.kernel for layer in layers]
    try:
        for layer in layers:
            layer.kernel = Kernel.DENSE
        with hooked(Hook(layer, count) for layer in layers):
            yield found
    finally:
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.kernel = kernel


def file_size(model: nn.Module) -> int:
    """Bytes of the weights as a safetensors file: shared tensors stored once, sparse weights packed."""
    from safetensors.torch import save_file

    from spectrim.nn.sparse.packed import masked_layers, packed_mask, values_inside

    owners: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if owners.setdefault(place, name) == name:
            tensors[name] = tensor
    for weight, mask, layer in masked_layers(model):
        if weight in tensors:
            tensors[weight], tensors[mask] = values_inside(layer), packed_mask(layer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
        return path.stat().st_size


def inputs(model: nn.Module, example: Any) -> Any:
    """What to pass to a model, on its device: a tuple of arguments or a dict."""
    args, kwargs = arguments(model, example)
    return kwargs or args


def held(example: Any) -> Any:
    """Token batches behave as mappings without being one."""
    return list(example.values()) if hasattr(example, "values") and not isinstance(example, torch.Tensor) else example
