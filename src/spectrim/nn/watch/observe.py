"""Running a model with hooks on its layers: whatever happens, the hooks are gone and the model is as it was."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.state import evaluating, kept


@dataclass(frozen=True)
class Hook:
    """A function to be called whenever this thread calls a module: another one may be using the model meanwhile.

    It sees what the module itself is given and answers, whatever hooks of the model's own make of that.
    """

    module: nn.Module
    # ``(module, args, kwargs, output)``; before the module is run ``(module, args, kwargs)``.
    function: Callable[..., Any]
    before: bool = False  # whether it is called before the module is run

    def register(self) -> Any:
        """Put it on the module; what is returned takes it away."""
        ours = threading.get_ident()

        def function(*call: Any) -> Any:
            return self.function(*call) if threading.get_ident() == ours else None

        if self.before:
            return self.module.register_forward_pre_hook(function, with_kwargs=True)
        return self.module.register_forward_hook(function, with_kwargs=True, prepend=True)


def on_each(
    modules: Iterable[tuple[str, nn.Module]], function: Callable[..., Any], *, before: bool = False
) -> Iterator[Hook]:
    """A hook a module, whose function is given the module's name before all else."""
    return (Hook(module, functools.partial(function, name), before) for name, module in modules)


@contextlib.contextmanager
def hooked(hooks: Iterable[Hook]) -> Iterator[None]:
    """Hooks on modules, taken away on leaving."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.register().remove)
        yield


def on_few(run: Callable[[Any], None], batch: Any, feed: Feed, few: int = 1) -> Any:
    """Run something on so ``few`` samples of a batch, which are given.

    On the whole one where a model refuses them, or it cannot be cut.
    """
    if feed.layout.size(batch) != few:
        with contextlib.suppress(Exception):  # what is wrong with the whole one is told
            run(part := feed.resized(batch, few))
            return part
    run(batch)
    return batch


@contextlib.contextmanager
def observe(
    model: nn.Module,
    hooks: Iterable[Hook] = (),
    *,
    gradients: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Iterator[Callable[[Any], Any]]:
    """A function that runs a model on a batch and gives its output, with hooks, in evaluation mode.

    What the model puts on itself meanwhile, such as an activation with its graph, is gone afterwards.

    Parameters
    ----------
    gradients
        Record what backward passes need.
    forward
        Runs the model on a batch in another way than :func:`spectrim.nn.watch.batches.Feed`.
    """
    run = forward or Feed()
    with evaluating(model), kept(model) as state, torch.set_grad_enabled(gradients), hooked(hooks):

        def once(batch: Any) -> Any:
            # Each pass finds the activations and caches that the first one found, whatever is before it in the run.
            state.put_back(state.changed_tensors())
            return run(model, batch)

        yield once
