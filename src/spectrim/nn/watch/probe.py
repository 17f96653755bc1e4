"""What a forward pass is like: the order of its layers, what it holds alive, what it keeps on the model."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from spectrim.nn.dispatch import Mode
from spectrim.nn.parameters import parameters_of
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.observe import hooked, on_each, on_few
from spectrim.nn.watch.state import Location, State, evaluating, kept


@dataclass
class Probe:
    """What a forward pass is like."""

    order: list[str] = field(default_factory=list)  # layers in the order of their calls
    nbytes: float = 0.0  # most bytes of activations that it holds alive at one of them, a sample
    places: Sequence[Location] = ()  # where it keeps something on the model: activations, caches, counters
    sets_up: bool = False  # whether it leaves hooks of the model's own there

    @property
    def calls(self) -> dict[str, int]:
        """How often it calls each layer."""
        return dict(Counter(self.order))

    def ends(self) -> set[str]:
        """Layers after whose last call nothing is called again that was called before, and something was.

        A layer that is called several times is fitted at its last call, and what runs between its calls has seen the
        dense one. Behind such an end passes have to start again, so that the layers there see what they will be given.
        """
        found: set[str] = set()
        seen: set[str] = set()
        repeated = False
        rest = Counter(self.order)
        for name in self.order:
            repeated |= name in seen
            seen.add(name)
            rest[name] -= 1
            if repeated and not any(rest[each] for each in seen):
                found.add(name)
                repeated = False
        return found


def probe(
    model: nn.Module, names: Iterable[str], batch: Any, *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> Probe:
    """Watch one forward pass, of a single sample where the model takes one."""
    seen = Probe()
    feed = Feed.of(forward).decide(model, batch)

    def run(part: Any) -> None:
        nonlocal seen
        seen, alive, size = Probe(), _Alive(model), feed.layout.size(part)

        def note(name: str, *_: Any) -> None:
            state.look()
            seen.order.append(name)
            seen.nbytes = max(seen.nbytes, alive.nbytes / size)

        hooks = on_each(((name, model.get_submodule(name)) for name in names), note)
        with evaluating(model), kept(model):
            state, forward_pass = State(model), feed.ready(model, part)
            with hooked(hooks), alive:
                forward_pass()
            seen.places, seen.sets_up = state.of_pass(), state.sets_up

    on_few(run, batch, feed)
    return seen


class _Alive(Mode):
    """Counts the bytes of tensors made meanwhile that are still there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nbytes = 0
        # Views of parameters are no activations.
        weights = [*parameters_of(model), *model.buffers()]
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone() -> None:
            self._known.pop(key, None)
            self.nbytes -= size

        self.nbytes += size
        self._known[key] = weakref.finalize(storage, gone)
