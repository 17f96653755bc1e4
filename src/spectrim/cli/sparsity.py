"""Low rank plus sparse on the command line: which patterns fit, and how sparse layers run where time is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from spectrim.cli.methods import SPARSE
from spectrim.cli.references import UsageError
from spectrim.cost.runtimes import runtime_of
from spectrim.methods import LowRankPlusSparse, Method
from spectrim.network.printing import count
from spectrim.network.sites import Sites
from spectrim.nn.sparse.kernels import ChosenKernel, Kernel, choose_kernels
from spectrim.nn.sparse.packed import masked_layers


def check_patterns(methods: Iterable[Method], sites: Sites) -> None:
    """Refuse patterns of sparse weights that no layer can have."""
    for method in (each for each in methods if isinstance(each, LowRankPlusSparse)):
        for name in method.patterns:
            if not any(method.takes_pattern(name, layer.spec) for layer in sites):
                kinds = dict.fromkeys(f"{s.spec.kind}, {s.spec.in_channels} -> {s.spec.out_channels}" for s in sites)
                raise UsageError(f"--method {SPARSE}: pattern {name!r} fits no layer of the model ({'; '.join(kinds)})")


def fastest(model: nn.Module, example: Any, threads: int | None, runtime: str) -> tuple[ChosenKernel, ...]:
    """Let every layer with a sparse weight run as is fastest here, where the runtime runs the modules themselves
    (:func:`spectrim.nn.sparse.kernels.choose_kernels`)."""
    able = runtime_of(runtime).runs_modules and any(masked_layers(model))
    return choose_kernels(model, example, threads=threads) if able else ()


def kernel_values(chosen: Sequence[ChosenKernel]) -> list[dict[str, Any]]:
    """The kernels as JSON values."""
    return [
        {
            "layer": each.name,
            "kernel": each.kernel.value,
            "milliseconds": {kernel.value: ms for kernel, ms in each.milliseconds.items()},
        }
        for each in chosen
    ]


def kernel_notes(chosen: Sequence[ChosenKernel]) -> list[str]:
    """A sentence on how sparse layers were run, for people; none where there was nothing to choose."""
    if not chosen:
        return []
    packed = [each for each in chosen if each.kernel is not Kernel.DENSE]
    layers = f"{count(len(chosen), 'layer')} with a sparse weight"
    if not packed:
        return [f"Of {layers} none is faster here when its zeros are skipped: latency is that of dense kernels."]
    names = ", ".join(sorted({each.kernel.value.upper() for each in packed}))
    return [f"Of {layers} {len(packed)} skip their zeros ({names}), which was measured to be faster here."]
