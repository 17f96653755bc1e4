"""Which layers' weights are computed with by others than the layer itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from spectrim.network.layer import LayerSpec
from spectrim.nn.standing import tells
from spectrim.nn.watch.observe import Hook, hooked


class _Readers(TorchFunctionMode):
    """Notes the layers whose weight goes into an operation while the layer itself does not run."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.running: list[str] = []
        self.read: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not tells(func):
            names = {self.weights.get(id(value)) for value in tree_iter((args, kwargs))}
            self.read.update(name for name in names if name is not None and name not in self.running)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def reading(model: nn.Module, specs: Iterable[LayerSpec]) -> Iterator[set[str]]:
    """Names of the layers whose weights are read by others inside the context.

    Asking for shape, dtype or device is no reading: what stands for a layer answers that too.
    """
    layers = {spec.name: model.get_submodule(spec.name) for spec in specs}
    readers = _Readers({id(layer.weight): name for name, layer in layers.items()})
    hooks = [
        hook
        for name, layer in layers.items()
        for hook in (
            Hook(layer, lambda *_, name=name: readers.running.append(name), before=True),
            Hook(layer, lambda *_, name=name: readers.running.remove(name)),
        )
    ]
    with hooked(hooks), readers:
        yield readers.read
