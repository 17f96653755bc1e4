"""What layers cost, counted: parameters, multiply-accumulates and bytes.

A choice turns the layer specs of a site into other specs (``LayerSpec.factor`` gives the two layers of a low-rank
pair), so every cost is a function of the specs that are executed one after the other. Measured time is in
:mod:`spectrim.cost.latency`; another cost is another function.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from spectrim.errors import check_function
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Sites

Cost = Callable[[Sequence[LayerSpec]], float]

# A multiple may not be coarser than 1/16 of the full rank, or a narrow layer has too few ranks to choose from.
_CHOICES = 16
_REGISTER_WIDTH: ContextVar[int | None] = ContextVar("register_width", default=None)


def _of_layers(cost: Cost) -> Cost:
    """Let a cost that is given a network, or anything but layer specs, say what it is a cost of."""

    @functools.wraps(cost)
    def counted(specs: Sequence[LayerSpec]) -> float:
        try:
            return cost(specs)
        except (TypeError, AttributeError):
            given = specs if isinstance(specs, Sequence) else [specs]
            other = next((each for each in given if not isinstance(each, LayerSpec)), None)
            if other is None:
                raise
            name = cost.__name__
            raise TypeError(
                f"{name} is given {type(other).__name__}: expected a list of layer specs, as {name}([site.spec for "
                "site in sites]) of sites = find(model). What a whole network costs is in print(sites), and in numbers "
                "in tabulate(sites, WeightSVD()).dense; MACs after sites = calibrate(model, find(model), batches)"
            ) from None

    return counted


@_of_layers
def parameters(specs: Sequence[LayerSpec]) -> float:
    """Numbers stored: weights times their density, and biases.

    What a spec shares with another one, which counts it, is left out (``LayerSpec.shared``); its bias is its own.
    """
    return float(sum(spec.stored - spec.shared + spec.out_channels * spec.bias for spec in specs))


@_of_layers
def size_bytes(specs: Sequence[LayerSpec]) -> float:
    """Bytes of the stored numbers in each spec's dtype, and of what says where the entries of sparse weights are."""
    return float(sum(parameters([spec]) * spec.dtype.itemsize + spec.index_bytes for spec in specs))


@_of_layers
def macs(specs: Sequence[LayerSpec]) -> float:
    """Multiply-accumulates for one sample, over all calls in one forward pass, biases not counted.

    Every weight is used once for each output position of a convolution, input position of a transposed convolution, or
    row of a linear layer; positions in the padding count. Half of what ``torch.utils.flop_counter`` reports.

    Raises
    ------
    ValueError
        If the input shapes of a layer are not known.
    """
    for spec in specs:
        require_inputs(spec)
    return float(sum(spec.products for spec in specs))


_BUILT_IN: Mapping[str, Cost | None] = {"parameters": parameters, "bytes": size_bytes, "macs": macs, "latency": None}


def further(costs: Mapping[str, Cost] | None) -> Mapping[str, Cost]:
    """Costs of a user's own by name.

    Raises TypeError for what is no mapping of functions, ValueError for a name that no budget can be written with.
    """
    wanted = "functions of layers by name, such as {'joules': joules}"
    if costs is not None and not isinstance(costs, Mapping):
        raise TypeError(f"costs is {costs!r}: expected {wanted}")
    for name, cost in (costs or {}).items():
        if not isinstance(name, str) or not callable(cost):
            raise TypeError(f"costs has {name!r}: {cost!r}; expected {wanted}")
        if cost is not _BUILT_IN.get(name.lower(), cost):
            raise ValueError(f"costs has {name!r}, which the library counts or measures itself: give it another name")
        if not name or re.search(r"[=,\s]", name):
            raise ValueError(
                f"costs has {name!r}: give a name without spaces, = and commas, for budgets as 'joules=50%'"
            )
        check_function(f"costs[{name!r}]", cost, ("a layer",), f"a function of a layer: {wanted}")
    return costs or {}


def known(sites: Sites, more: Mapping[str, Cost] | None = None) -> dict[str, Cost]:
    """The costs that can be counted, by name: MACs once the network has been run, and more of the user's own."""
    functions: dict[str, Cost] = {"parameters": parameters, "bytes": size_bytes}
    if sites.seen and all(spec.inputs for spec in sites.untouched):
        functions["macs"] = macs
    return {**functions, **further(more)}


def require_inputs(spec: LayerSpec) -> tuple[tuple[float, ...], ...]:
    """The input shapes of a layer. Raises ValueError if there are none."""
    if not spec.inputs:
        raise ValueError(
            f"layer {spec.name!r} ({spec.kind}) has no input shapes, so what it computes cannot be counted or timed. "
            "Run calibrate(model, sites, batches), or find() with an example input, first."
        )
    return spec.inputs


def register_width() -> int:
    """How many float32 numbers one vector register of the CPU holds that networks are made for.

    That of a :class:`~spectrim.cost.latency.Latency` inside :func:`made_for`, else ``$SPECTRIM_REGISTER_WIDTH``, else
    this machine's: 16 with AVX-512, 8 otherwise.
    """
    if pinned := _REGISTER_WIDTH.get():
        return pinned
    told = os.environ.get("SPECTRIM_REGISTER_WIDTH", "")
    if told and (not told.isdecimal() or int(told) < 1):
        raise ValueError(f"SPECTRIM_REGISTER_WIDTH={told!r} is no whole number of float32 numbers, such as 8 or 16")
    return int(told) if told else 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


@contextmanager
def made_for(facts: Mapping[str, Any]) -> Iterator[None]:
    """Let methods choose for the machine that latencies were measured on, by their facts, and not for this one."""
    token = _REGISTER_WIDTH.set(facts.get("register_width"))
    try:
        yield
    finally:
        _REGISTER_WIDTH.reset(token)


def rank_multiple(device: str, dtype: torch.dtype, full_rank: int, width: int | None = None) -> int:
    """The multiple that ranks are rounded to by default; ``full_rank`` is the largest of each group of a layer.

    Channel counts that do not fill the vector registers (or, in half precision on a GPU, the tensor cores) are padded
    by the kernels, so ranks in between cost the time of the next multiple or more. Wide layers get that multiple: one
    register of float32 on a CPU (``width``, or :func:`register_width`), whose kernels use the same blocks of channels
    in half precision, and 8 on a GPU. Narrow layers get the largest power of two that still leaves 16 ranks.
    """
    wide = 8
    if torch.device(device).type == "cpu":
        wide = width or register_width()
        if dtype == torch.float64:
            wide //= 2
    most = max(1, full_rank // _CHOICES)
    return min(wide, 1 << (most.bit_length() - 1))
