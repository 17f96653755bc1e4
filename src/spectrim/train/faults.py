"""Why a network cannot be trained: what its forward or backward pass raises, at which layer, and what can be done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import SpectrimError, TrainingError, in_short
from spectrim.nn.watch.nesting import tensors
from spectrim.nn.watch.observe import hooked, on_each

_WITHOUT = "compress(model, batches, budget) needs no gradients"
_CURES = {
    "inplace operation": "Write what changes a tensor in place out of place (x = x * 2 for x.mul_(2), inplace=False)",
    "second time": "Compute what is kept from one batch to the next without gradients (detach), or anew",
    "requires grad": "Compute with tensors alone in training mode",
}


@contextlib.contextmanager
def training_forward(model: nn.Module) -> Iterator[None]:
    """Run a model's forward. Raises TrainingError for what it raises."""

    def said(error: Exception) -> str:
        return f"{type(model).__name__} raises {type(error).__name__} when it is trained on a batch"

    with _telling(said, "Give batches as it was trained on, (inputs, targets)"):
        yield


def backward(loss: Tensor, model: nn.Module, again: Callable[[], Tensor]) -> None:
    """Compute the gradients of a loss, which ``again`` computes once more, to see how far they come.

    Raises TrainingError if there are none; the message names the layer as far as that is seen, the reason and the cure.
    """
    if not loss.requires_grad:
        raise TrainingError(
            f"{type(model).__name__} cannot be trained: its loss does not depend on a weight that is trained. Compute "
            "the outputs with gradients (no torch.no_grad, detach or argmax on the way) and leave weights "
            f"requires_grad=True; {_WITHOUT}"
        )

    def said(error: Exception) -> str:
        where = _where(model, again)
        return f"{type(model).__name__} cannot be trained: {where} the backward pass raises {type(error).__name__}"

    with _telling(said, "Mend its backward, or freeze the layers in front of it with requires_grad_(False)"):
        loss.backward()


@contextlib.contextmanager
def _telling(said: Callable[[Exception], str], usual: str) -> Iterator[None]:
    """Run foreign code, which may raise anything: what is said of it, its reason and the cure, or the usual one."""
    try:
        yield
    except (SpectrimError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = in_short(error).rstrip(".")
        raise TrainingError(f"{said(error)}: {reason}. {_cure(error, usual)}; {_WITHOUT}") from error


def _cure(error: Exception, usual: str) -> str:
    return next((cure for words, cure in _CURES.items() if words in str(error)), usual)


def _where(model: nn.Module, again: Callable[[], Tensor]) -> str:
    """Between which layers gradients are lost, in the order of calls."""
    called: list[str] = []
    reached: set[str] = set()

    def watch(name: str, *call: Any) -> None:
        *_, output = call
        for each in tensors(output):
            if each.requires_grad:
                called.append(name)
                each.register_hook(partial(lambda name, gradient: reached.add(name), name))

    layers = {name: m for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    with hooked(on_each(layers.items(), watch)), contextlib.suppress(Exception):
        again().backward()
    before = next((name for name in reversed(called) if name not in reached), None)
    behind = next((name for name in called if name in reached), None)
    if before is None:
        return "on its way" if behind is None else f"at layer {behind!r}"
    return f"behind layer {before!r}" if behind is None else f"between layers {before!r} and {behind!r}"
