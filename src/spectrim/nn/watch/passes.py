"""Forward passes that stop at each layer of interest until they are told to go on, all of a network's together.

Every forward pass is a greenlet that waits with its tensor in hand. Nothing is traced; any graph of modules will do.
What it takes in memory is what the waiting passes hold alive.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn, overrides
from torch._C import _len_torch_dispatch_stack
from torch.utils import _python_dispatch

from spectrim.nn.layers import is_layer, spec_of
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.chance import generators_of
from spectrim.nn.watch.observe import hooked, on_each
from spectrim.nn.watch.readers import check_unheld
from spectrim.nn.watch.state import Location, State, evaluating, install, taken
from spectrim.nn.watch.switches import switches_kept, switches_of_pass

T = TypeVar("T")


@dataclass(frozen=True)
class Runner:
    """One of the two networks."""

    model: nn.Module
    run: Callable[[Any], Any]
    # What it kept on itself when the passes began, and where a pass changes that.
    state: State
    places: Sequence[Location] = ()
    sets_up: bool = False  # whether hooks that a pass gives the model are there to stay, for all passes

    @functools.cached_property
    def generators(self) -> Sequence[Any]:
        """What it draws random numbers from, beside the generators of the process."""
        return generators_of(self.model)

    def put_back(self) -> None:
        """Have the model keep what it did at first."""
        self.state.put_back(self.places)


class _Modes(NamedTuple):
    """The modes of torch that are entered, outermost first: of functions, and of the operations below them."""

    functions: Sequence[Any]
    operations: Sequence[Any]

    @classmethod
    def now(cls) -> _Modes:
        """Those of this thread."""
        operations: list[Any] = [_python_dispatch._pop_mode() for _ in range(_len_torch_dispatch_stack())][::-1]
        for mode in operations:
            _python_dispatch._push_mode(mode)
        return cls(overrides._get_current_function_mode_stack(), operations)

    def instead(self, others: _Modes) -> None:
        """Leave these, which are entered now, and enter others."""
        for _ in self.functions:
            overrides._pop_mode()
        for _ in self.operations:
            _python_dispatch._pop_mode()
        for mode in others.functions:
            overrides._push_mode(mode)
        for mode in others.operations:
            _python_dispatch._push_mode(mode)


class _Pass(greenlet):
    """One forward pass that waits at layers."""

    def __init__(self, network: Runner, batch: Any) -> None:
        super().__init__(lambda: network.run(batch))
        self.at: str | None = None  # the layer it waits at
        self.seen: dict[str, list[Tensor]] = {}  # tensors by the layer, until they are taken
        # The other side of the sum behind a layer, by the layer, until it is taken.
        self.beside: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()  # how often it has come to each layer of interest
        self.output: Any = None  # what the model gave, once it is done
        self.gr_context = contextvars.copy_context()
        self._beneath = _Modes.now()  # those that are not the pass's own
        # What the model keeps on itself in this pass: others that run in between keep something else there.
        self._network, self.own = network, network.state.fresh(network.places)
        # Hooks that it takes away at its end.
        self._hooks: list[tuple[dict[int, Any], int, Any]] = []

    def advance(self, name: str, left: set[str]) -> None:
        """Go on to a layer, but past none that is not left yet."""
        while not self.dead and self.at != name and (self.at is None or self.at in left):
            with switches_kept(self._network.generators):
                install(self._network.model, self.own)
                for hooks, key, hook in self._hooks:
                    hooks[key] = hook
                self._beneath = _Modes.now()
                given = self.switch()
                self.output = given if self.dead else None
                self.own = taken(self._network.model, self._network.places)
                self._hooks = [] if self.dead or self._network.sets_up else self._network.state.take_hooks()

    def end(self) -> None:
        """Give up what is not done."""
        with switches_kept(self._network.generators):
            install(self._network.model, self.own)
            self._beneath = _Modes.now()
            self.throw(GreenletExit)

    @contextlib.contextmanager
    def modes_apart(self) -> Iterator[None]:
        """Without the modes that the pass has entered: they belong to the thread, where others go on meanwhile."""
        own = _Modes.now()
        own.instead(self._beneath)
        try:
            yield
        finally:
            _Modes.now().instead(own)


class Passes:
    """All forward passes of one network, and how far they have come.

    Parameters
    ----------
    network
        How it is run on one batch.
    batches
        Each is run once.
    calls
        How often a pass calls each layer of interest: it stops at the last of the calls.
    """

    def __init__(self, network: Runner, batches: Sequence[Any], calls: Mapping[str, int]) -> None:
        self._network, self._batches, self._calls = network, batches, calls
        self._left: set[str] = set()
        self._passes = [_Pass(network, batch) for batch in batches]

    def reach(self, name: str) -> list[Sequence[Tensor]]:
        """Have all passes go on to a layer, and give what each shows there: nothing where it never gets there.

        Layers are reached in the order of execution; a pass that waits at a later one goes on waiting.
        """
        for one in self._passes:
            one.advance(name, self._left)
        self._left.add(name)
        return [one.seen.pop(name, ()) for one in self._passes]

    def beside(self, name: str) -> list[Tensor | None]:
        """What each pass showed beside a layer (:meth:`note`)."""
        return [one.beside.pop(name, None) for one in self._passes]

    def note(self, name: str, tensor: Tensor) -> None:
        """What a pass comes by that a layer's answer will be added to, unless that layer is left."""
        here = getcurrent()
        if isinstance(here, _Pass) and name not in self._left:
            here.beside[name] = tensor

    def finish(self, number: int) -> tuple[Counter[str], Any]:
        """Have one pass go on to its end: how often it called each layer of interest, and what the model gave."""
        one = self._passes[number]
        one.advance("", self._left)
        return one.calls, one.output

    def restart(self) -> None:
        """Have the passes start again, past what is left."""
        for one in self._passes:
            one.end()
        self._passes = [_Pass(self._network, batch) for batch in self._batches]

    def wait(self, name: str, tensor: Tensor) -> None:
        """What a pass does at a layer: it waits until all have got there, unless the layer is called again or left."""
        here = getcurrent()
        if not isinstance(here, _Pass):
            return
        here.calls[name] += 1
        if name in self._left:
            return
        calls = here.seen.setdefault(name, [])
        if len(calls) + 1 < self._calls[name]:
            # A copy: what runs before the last call may overwrite it in place.
            calls.append(tensor.clone())
            return
        calls.append(tensor)
        here.at = name
        check_unheld(name)
        with switches_of_pass(self._network.generators), here.modes_apart():
            here.parent.switch()  # type: ignore[union-attr]

    def end(self) -> None:
        """Give up all that is not done, and leave the network as it was."""
        for one in self._passes:
            one.end()
        self._network.put_back()


def waves(sized: Iterable[tuple[T, float]], memory: float) -> Iterator[list[T]]:
    """What goes together, by its bytes: as many as fit, at least one at a time."""
    wave: list[T] = []
    taken_up = 0.0
    for each, nbytes in sized:
        if wave and taken_up + nbytes > memory:
            yield wave
            wave, taken_up = [], 0.0
        wave.append(each)
        taken_up += nbytes
    if wave:
        yield wave


@contextlib.contextmanager
def passes(
    model: nn.Module,
    calls: Mapping[str, int],
    batches: Sequence[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    places: Sequence[Location] = (),
) -> Iterator[Passes]:
    """Run one network over the batches as far as asked for; passes stop before a layer answers (:func:`lockstep`)."""
    run = Feed.of(forward)
    every = Passes(Runner(model, lambda batch: run(model, batch), State(model), places), batches, calls)

    def stop(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in specs or specs[name].takes(given(args, kwargs).shape):
            every.wait(name, given(args, kwargs))

    layers = [(name, model.get_submodule(name)) for name in calls]
    specs = {name: spec_of(layer, (name,)) for name, layer in layers if is_layer(layer)}
    with evaluating(model), hooked(on_each(layers, stop, before=True)):
        try:
            yield every
        finally:
            every.end()


def given(args: Any, kwargs: Any) -> Tensor:
    """What a layer is called with."""
    return args[0] if args else kwargs["input"]
