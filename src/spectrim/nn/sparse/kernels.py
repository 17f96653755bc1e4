"""Choose by measuring how the layers with sparse weights of a network are multiplied."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from spectrim.cost.rounds import Rounds, Timing, torch_threads, waiter
from spectrim.errors import called_as
from spectrim.nn.sparse.layers import Masked
from spectrim.nn.sparse.products import Kernel, products, takes, works
from spectrim.nn.watch.batches import arguments
from spectrim.nn.watch.nesting import copied
from spectrim.nn.watch.state import evaluating, left_as_found

__all__ = ["ChosenKernel", "Kernel", "choose_kernels"]

_WARM_UP = 2


@dataclass(frozen=True)
class ChosenKernel:
    """The kernel of one layer.

    Attributes
    ----------
    name
        Module path of the :class:`spectrim.nn.sparse.layers.Masked`.
    kernel
        Chosen.
    milliseconds
        Of all the layer's calls in one forward pass, for each kernel that was measured; the addition to a pair's output
        included.
    """

    name: str
    kernel: Kernel
    milliseconds: Mapping[Kernel, float]

    @property
    def ratio(self) -> float:
        """Time of the kernel / time of the dense layer."""
        return self.milliseconds[self.kernel] / self.milliseconds[Kernel.DENSE]


@called_as("Write choose_kernels(model, example), with one batch of inputs; of a result, its .model", model=nn.Module)
def choose_kernels(
    model: nn.Module,
    example: Any,
    *,
    threads: int | None = None,
    rounds: int = 15,
    margin: float = 0.03,
    budget: float = 60.0,
) -> tuple[ChosenKernel, ...]:
    """Time the possible kernels of each layer with a sparse weight, and let each layer run with the fastest.

    The whole model runs on the example, with each kernel in turn in all layers that may run with it, and every layer is
    timed where it stands: with the inputs it gets and in the cache it finds. Of the rounds in which the system took a
    core away least often the lower quartile counts, since load only adds to a time and must not decide. Up to three
    times ``rounds`` are taken while a layer has fewer than three rounds without a disturbance. A layer stays dense
    unless another kernel is faster by more than ``margin``; one that is not called is dense.

    Nothing is chosen without this call, since kernels differ in rounding and results should not depend on the noise of
    a timing unasked. A choice holds for this machine, this number of threads and this batch size. It stays when the
    model is copied or pickled and is not in its state; choose again after loading.

    Parameters
    ----------
    model
        In the dtype, memory format and place it will be run in. It runs in evaluation mode, which is restored.
    example
        A batch: a tensor, a tuple ``(inputs, targets)`` or a mapping, as in calibration.
    threads
        Of the CPU's operators while measuring; None leaves the number as it is.
    rounds
        Timed runs of the model with each kernel.
    margin
        Of the dense time.
    budget
        Seconds after which no further round is begun; three are taken in any case.

    Returns
    -------
    tuple of ChosenKernel
        One for each layer that was called and has a choice, in the order of the model's modules.

    Raises
    ------
    ValueError
        For fewer than one round or a negative margin.
    """
    if rounds < 1 or not 0 <= margin < 1:
        raise ValueError(f"expected at least one round and a margin from 0 to 1; got rounds={rounds}, margin={margin}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Masked)}
    former = {name: layer.kernel for name, layer in layers.items()}
    offered = {name: _offered(layer) for name, layer in layers.items()}
    kernels = [kernel for kernel in Kernel if any(kernel in found for found in offered.values())]
    turns = Rounds(rounds, most=3 * rounds if len(kernels) > 1 else 0, warmup=_WARM_UP, budget=budget)
    try:
        with torch_threads(threads), evaluating(model):
            _take_turns(model, layers, offered, kernels, turns, example)
        chosen = []
        for name, layer in layers.items():
            times = {k: _lower_quartile(turns[name, k]) for k in offered[name] if (name, k) in turns}
            layer.kernel = _fastest(times, margin)
            if len(times) > 1:
                chosen.append(ChosenKernel(name, layer.kernel, MappingProxyType(times)))
    except BaseException:
        for name, layer in layers.items():
            layer.kernel = former[name]
        raise
    return tuple(chosen)


def _take_turns(
    model: nn.Module,
    layers: Mapping[str, Masked],
    offered: Mapping[str, Sequence[Kernel]],
    kernels: Sequence[Kernel],
    turns: Rounds,
    example: Any,
) -> None:
    """Run the model with each kernel in every round, in all layers that may run with it, which are timed."""
    args, kwargs = arguments(model, example)
    with left_as_found(model, args, kwargs) as put_back, torch.inference_mode():
        for turn in turns:
            # Forwards and backwards, so that none always runs after the same one.
            for kernel in kernels if turn % 2 else reversed(kernels):
                with contextlib.ExitStack() as timed:
                    for name, layer in layers.items():
                        layer._kernel = kernel if kernel in offered[name] else Kernel.DENSE
                        if kernel in offered[name]:
                            timed.enter_context(_timed(layer, (name, kernel), turns))
                    put_back()
                    model(*copied(args), **copied(kwargs))


def _offered(layer: Masked) -> tuple[Kernel, ...]:
    weight: Any = layer.layer.weight
    found = products(layer.original, layer.pattern)
    able = [k for k, product in found.items() if takes(k, weight, layer.mask) and works(k, product, weight, layer.mask)]
    return (Kernel.DENSE, *able)


def _fastest(times: Mapping[Kernel, float], margin: float) -> Kernel:
    if not times:
        return Kernel.DENSE
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - margin) * times[Kernel.DENSE] else Kernel.DENSE


def _lower_quartile(timing: Timing) -> float:
    samples = sorted(timing.undisturbed())
    return samples[len(samples) // 4]


@contextlib.contextmanager
def _timed(layer: Masked, key: tuple[str, Kernel], turns: Rounds) -> Iterator[None]:
    """Time all calls of a layer."""
    wait = waiter(layer.mask.device)

    def before(*_: object) -> None:
        wait()
        turns.begin(key)

    def after(*_: object) -> None:
        wait()
        turns.end(key)

    handles = layer.register_forward_pre_hook(before), layer.register_forward_hook(after, prepend=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
