"""Count the multiply-accumulates of a model that is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from spectrim.nn.flops import WorkCounter
from spectrim.nn.sparse.packed import masked_layers
from spectrim.nn.sparse.products import Kernel
from spectrim.nn.watch.observe import Hook, hooked


@dataclass
class WorkCount:
    """What has been counted so far."""

    counter: WorkCounter  # of all operations
    zeros: list[int] = field(default_factory=list)  # products with the zeros of sparse weights, call by call

    @property
    def macs(self) -> float:
        """Multiply-accumulates, without those by the zeros of sparse weights."""
        return self.counter.get_total_flops() / 2 - sum(self.zeros)


@contextmanager
def counting(model: nn.Module) -> Iterator[WorkCount]:
    """Count what a model computes inside the context.

    The zeros of sparse weights are left out, as they are in :func:`spectrim.macs`, whether or not the layer is run with
    a kernel that skips them: that is what measured time is for. Such layers run dense meanwhile.
    """

    def count(layer: Any, given: Any, kwargs: Any, response: Tensor) -> None:
        spec = layer.original
        seen = given[0] if spec.transposed else response
        positions = seen.numel() // (spec.in_channels if spec.transposed else spec.out_channels)
        work.zeros.append(positions * int((~layer.mask).sum()))

    layers = [layer for _, _, layer in masked_layers(model)]
    kernels = [layer.kernel for layer in layers]
    try:
        for layer in layers:
            layer.kernel = Kernel.DENSE
        with hooked(Hook(layer, count) for layer in layers), WorkCounter() as counter:
            work = WorkCount(counter)
            yield work
    finally:
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.kernel = kernel
