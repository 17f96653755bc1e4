"""A trace of a network for torch-pruning's graph, which is read off autograd: also where gradients are switched off."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectrim.nn.channels.rules import layers_of
from spectrim.nn.copying import copy_model
from spectrim.nn.parameters import parameters_of
from spectrim.nn.standing import as_containers
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.nesting import output_tensors
from spectrim.nn.watch.observe import hooked, observe, on_each

Around = Callable[[], contextlib.AbstractContextManager[Any]]
# Traces with one more layer taken for an output, where nothing leads on from it.
_ENDS = 4


@dataclass(eq=False)
class Trace:
    """What one pass of a copy of a model showed."""

    model: nn.Module
    graph: Any  # torch-pruning's
    called: list[nn.Module] = field(default_factory=list)  # the layers that ran, in order

    def lost(self) -> list[nn.Module]:
        """Layers that ran and that the graph does not know."""
        return [layer for layer in self.called if layer not in self.graph.module2node]


def comes_to(model: nn.Module, names: Collection[str], batch: Any, feed: Feed) -> bool:
    """Whether a copy of a model calls one of these layers with a batch; not if it cannot be run."""
    seen: set[str] = set()
    copied = copy_model(model)
    # Not those that the traced copy has made while it ran.
    there = [(name, module) for name, module in copied.named_modules() if name in names]
    hooks = on_each(there, lambda name, *_: seen.add(name))
    with observe(copied, hooks, forward=feed) as running:
        try:
            running(batch)
        except Exception:  # a model may raise anything; what the trace meets is told
            return False
    return bool(seen)


def traced(model: nn.Module, example: Any, run: Callable[..., Any], graph: Callable[[], Any], around: Around) -> Trace:
    """Trace a model as it is, and, if layers are lost that way, as if nothing switched gradients off.

    What a pass makes of its last layers may have no gradient (a choice of the largest, boxes); then the last layer that
    is lost counts as an output. ``graph`` makes torch-pruning's, and ``around`` is entered while it is built.
    """
    trace = _traced(model, example, run, graph, around, differentiable=False, ends=())
    ends: list[str] = []
    while (lost := trace.lost()) and len(ends) <= _ENDS:
        try:
            again = _traced(model, example, run, graph, around, differentiable=True, ends=ends)
        except Exception:  # what a pass does without gradients may be impossible with them
            break
        trace = again if len(again.lost()) < len(lost) else trace
        if trace.lost():
            names = {module: name for name, module in trace.model.named_modules()}
            ends.append(names[trace.lost()[-1]])
    return trace


def _traced(
    model: nn.Module, example: Any, run: Callable[..., Any], graph: Callable[[], Any], around: Around, *,
    differentiable: bool, ends: Sequence[str],
) -> Trace:  # fmt: skip
    copied = copy_model(model).eval()
    as_containers(copied)
    for parameter in parameters_of(copied):
        parameter.requires_grad_(parameter.is_floating_point())
    trace = Trace(copied, graph())
    further: list[Tensor] = []

    def see(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        trace.called.append(module)
        if name in ends:
            further.append(output)

    def forward(model: nn.Module, batch: Any) -> list[Tensor]:
        with _Followed(differentiable), _inference(differentiable):
            outputs = [*output_tensors(run(model, batch)), *further]
        return [tensor for tensor in outputs if tensor.requires_grad]

    with warnings.catch_warnings(), torch.enable_grad(), around(), hooked(on_each(layers_of(copied), see)):
        warnings.simplefilter("ignore")
        trace.graph.build_dependency(copied, example, forward_fn=forward, verbose=False)
    trace.called = list(dict.fromkeys(trace.called))
    return trace


class _Followed(TorchFunctionMode):
    """Operations that the graph does not know as others that give the same; if wanted, gradients stay on."""

    def __init__(self, differentiable: bool) -> None:
        super().__init__()
        self._differentiable = differentiable

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.glu:
            return _gated(*args, **kwargs)
        if self._differentiable and func is torch._C._set_grad_enabled:
            return None
        if self._differentiable and func is Tensor.detach:
            return args[0]
        return func(*args, **kwargs)


def _gated(input: Tensor, dim: int = -1) -> Tensor:  # noqa: A002 (torch's name, by which it may be given)
    values, gates = input.chunk(2, dim)
    return values * gates.sigmoid()


@contextlib.contextmanager
def _inference(differentiable: bool) -> Iterator[None]:
    """If gradients are to stay on, inference mode is not entered."""
    if not differentiable:
        yield
        return
    with mock.patch.object(torch._C, "_InferenceMode", return_value=contextlib.nullcontext()):
        yield
