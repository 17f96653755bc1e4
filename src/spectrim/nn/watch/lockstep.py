"""Two networks side by side, once: every forward pass stops at each layer of interest until that layer is fitted.

To fit a layer one needs what the dense network answers there and what the compressed network is given, once the layers
before it are compressed. Every forward pass is a greenlet, every layer of interest a slot in which it waits with its
tensor in hand. So each network is run once over the batches, whatever its depth; nothing is traced, and any graph of
modules will do. What it takes in memory is what the waiting passes hold alive.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.junctions import Junction
from spectrim.nn.watch.observe import Hook, hooked, on_few
from spectrim.nn.watch.state import Place, State, evaluating, install, kept, taken

_Forward = Callable[[nn.Module, Any], Any]
_Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Seen:
    """What one batch shows at a layer: a tensor for each call of it.

    Attributes
    ----------
    batch
        Its number.
    inputs
        Of the compressed network's layer.
    targets
        Answers of the dense network's.
    """

    batch: int
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]


@dataclass(frozen=True)
class _Network:
    """One of the two networks.

    Attributes
    ----------
    state, places
        What it kept on itself when the passes began, and where a pass changes that.
    """

    model: nn.Module
    run: _Run
    state: State
    places: Sequence[Place] = ()

    def put_back(self) -> None:
        """Have the model keep what it did at first."""
        self.state.put_back(self.places)


class _Pass(greenlet):
    """One forward pass that waits at layers.

    Attributes
    ----------
    at
        The layer it waits at.
    seen
        Tensors by the layer, until they are taken.
    beside
        The other side of the sum behind a layer, by the layer, until it is taken.
    own
        What the model keeps on itself in this pass: others that run in between keep something else there.
    """

    def __init__(self, network: _Network, batch: Any) -> None:
        super().__init__(lambda: network.run(batch))
        self.at: str | None = None
        self.seen: dict[str, list[Tensor]] = {}
        self.beside: dict[str, Tensor] = {}
        self._network, self.own = network, network.state.fresh(network.places)

    def advance(self, name: str, left: set[str]) -> None:
        """Go on to a layer, but past none that is not left yet."""
        while not self.dead and self.at != name and (self.at is None or self.at in left):
            with _state_kept():
                install(self._network.model, self.own)
                self.switch()
                self.own = taken(self._network.model, self._network.places)

    def end(self) -> None:
        """Give up what is not done."""
        with _state_kept():
            install(self._network.model, self.own)
            self.throw(GreenletExit)


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

    def __init__(self, network: _Network, batches: Sequence[Any], calls: Mapping[str, int]) -> None:
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

    def restart(self) -> None:
        """Have the passes start again, past what is left."""
        for one in self._passes:
            one.end()
        self._passes = [_Pass(self._network, batch) for batch in self._batches]

    def wait(self, name: str, tensor: Tensor) -> None:
        """What a pass does at a layer: it waits until all have got there, unless the layer is called again or left."""
        here = getcurrent()
        if not isinstance(here, _Pass) or name in self._left:
            return
        calls = here.seen.setdefault(name, [])
        if len(calls) + 1 < self._calls[name]:
            # A copy: what runs before the last call may overwrite it in place.
            calls.append(tensor.clone())
            return
        calls.append(tensor)
        here.at = name
        with _state_of_pass():
            here.parent.switch()  # type: ignore[union-attr]

    def end(self) -> None:
        """Give up all that is not done, and leave the network as it was."""
        for one in self._passes:
            one.end()
        self._network.put_back()


@dataclass(frozen=True)
class Hub:
    """The passes of both networks over the same batches.

    Attributes
    ----------
    model
        The dense network.
    sums
        What layers' answers are added to, by the layer: they are to make up for what is missing there.
    """

    model: nn.Module
    dense: Passes
    compressed: Passes
    sums: Mapping[str, Junction]

    def reach(self, name: str) -> list[Seen]:
        """Have all passes go on to a layer, and give what they show there, without those that never get there.

        Whatever has been put in the layer's place by the next call is what the compressed passes go on with.
        """
        inputs, targets = self.compressed.reach(name), self.dense.reach(name)
        if name in self.sums:
            targets = self._made_up(name, targets)
        both = enumerate(zip(inputs, targets, strict=True))
        return [Seen(number, given, answers) for number, (given, answers) in both if given and answers]

    def _made_up(self, name: str, targets: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
        """Targets of a layer that also make up for what the other side of its sum misses."""
        there, here = self.dense.beside(name), self.compressed.beside(name)
        once = [number for number, answers in enumerate(targets) if len(answers) == 1]
        made = self.sums[name].targets(
            self.model, [targets[n][0] for n in once], [there[n] for n in once], [here[n] for n in once]
        )
        fresh: list[Sequence[Tensor]] = list(targets)
        for number, target in zip(once, made, strict=True):
            fresh[number] = [target]
        return fresh

    def restart(self) -> None:
        """Have the compressed passes start again, with all that has been put in place by now."""
        self.compressed.restart()


@contextlib.contextmanager
def passes(
    model: nn.Module,
    calls: Mapping[str, int],
    batches: Sequence[Any],
    *,
    forward: _Forward | None = None,
    places: Sequence[Place] = (),
) -> Iterator[Passes]:
    """Run one network over the batches as far as asked for; passes stop before a layer answers (:func:`lockstep`)."""
    run = Feed.of(forward)
    every = Passes(_Network(model, lambda batch: run(model, batch), State(model), places), batches, calls)

    def stop(name: str) -> Hook:
        return Hook(
            model.get_submodule(name), lambda module, args, kwargs: every.wait(name, _input(args, kwargs)), before=True
        )

    with evaluating(model), hooked([stop(name) for name in calls]):
        try:
            yield every
        finally:
            every.end()


def _input(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["input"]


@contextlib.contextmanager
def lockstep(
    dense: nn.Module,
    compressed: nn.Module,
    calls: Mapping[str, int],
    batches: Sequence[Any],
    *,
    forward: _Forward | None = None,
    places: Sequence[Place] = (),
    sums: Mapping[str, Junction] | None = None,
) -> Iterator[Hub]:
    """Run both networks over the batches as far as asked for (:meth:`Hub.reach`).

    Parameters
    ----------
    dense, compressed
        In evaluation mode and without gradients while this lasts; hooks and slots are gone afterwards, whatever
        happens.
    calls
        Layers that passes stop at, and how often a pass calls each: it stops at the last of the calls.
    batches
        All their passes wait at a layer together.
    forward
        Runs a model on a batch in another way.
    places
        Where a forward pass keeps something on the model (:func:`probe`): each pass has its own there.
    sums
        What layers' answers are added to (:func:`spectrim.nn.watch.junctions.junctions`): a layer's target is then what
        brings the sum to that of the dense network.
    """
    run = Feed.of(forward)
    first, second = (
        _Network(model, lambda batch, model=model: run(model, batch), State(model), places)
        for model in (dense, compressed)
    )
    hub = Hub(dense, Passes(first, batches, calls), Passes(second, batches, calls), sums or {})
    targets = [
        Hook(dense.get_submodule(name), lambda module, args, kwargs, output, name=name: hub.dense.wait(name, output))
        for name in calls
    ]
    for model, side in ((dense, hub.dense), (compressed, hub.compressed)):
        targets += [
            one.other.hook(model, lambda tensor, side=side, name=name: side.note(name, tensor))
            for name, one in hub.sums.items()
        ]
    with evaluating(dense, compressed), hooked(targets), _slots(compressed, calls, hub.compressed.wait):
        try:
            yield hub
        finally:
            hub.compressed.end()
            hub.dense.end()


@contextlib.contextmanager
def _slots(model: nn.Module, names: Iterable[str], wait: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Have layers wait before they answer, and what has taken their place by then answer for them.

    The layer itself stays what its parent calls: its attributes can be read, and whoever holds it in another way than
    by its name comes to the same slot.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            layer = model.get_submodule(name)
            own = layer.__dict__.get("forward")
            stack.callback(_give_back, layer, own)
            layer.forward = _slot(model, name, layer, own, wait)
        yield


def _slot(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    own: Callable[..., Any] | None,
    wait: Callable[[str, Tensor], None],
) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        wait(name, _input(args, kwargs))
        now = model.get_submodule(name)
        if now is not layer:
            return now(*args, **kwargs)
        # Its class may have changed meanwhile.
        return own(*args, **kwargs) if own else type(layer).forward(layer, *args, **kwargs)

    return answer


def _give_back(layer: nn.Module, own: Any) -> None:
    if own is None:
        del layer.__dict__["forward"]
    else:
        layer.forward = own


@dataclass(frozen=True)
class _Autocast:
    """Torch's automatic casting on a device, which belongs to the thread and not to a greenlet."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls) -> list[_Autocast]:
        kinds = [kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)]
        return [cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]

    def set(self) -> None:
        torch.set_autocast_enabled(self.device, self.enabled)
        torch.set_autocast_dtype(self.device, self.dtype)


@contextlib.contextmanager
def _state_kept() -> Iterator[None]:
    """Gradients and casting as they were, whatever a pass that goes on meanwhile leaves them as."""
    gradients, casting = torch.is_grad_enabled(), _Autocast.now()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        for cast in casting:
            cast.set()


@contextlib.contextmanager
def _state_of_pass() -> Iterator[None]:
    """The same for a pass while others go on. Inference mode, which cannot be set, is left and entered again."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_state_kept())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        yield


@dataclass
class Probe:
    """What a forward pass is like.

    Attributes
    ----------
    order
        Layers in the order of their calls.
    nbytes
        Most bytes of activations that it holds alive at one of them, a sample.
    places
        Where it keeps something on the model: activations, caches, counters.
    """

    order: list[str] = field(default_factory=list)
    nbytes: float = 0.0
    places: Sequence[Place] = ()

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


def probe(model: nn.Module, names: Iterable[str], batch: Any, *, forward: _Forward | None = None) -> Probe:
    """Watch one forward pass, of a single sample where the model takes one."""
    seen = Probe()
    feed = Feed.of(forward).decide(model, batch)

    def run(part: Any) -> None:
        nonlocal seen
        seen, alive, size = Probe(), _Alive(model), feed.layout.size(part)

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, *, name: str) -> None:
            seen.order.append(name)
            seen.nbytes = max(seen.nbytes, alive.nbytes / size)

        hooks = [Hook(model.get_submodule(name), _named(note, name)) for name in names]
        with evaluating(model), kept(model):
            state, forward_pass = State(model), feed.ready(model, part)
            with hooked(hooks), alive:
                forward_pass()
            seen.places = state.of_pass()

    on_few(run, batch, feed)
    return seen


def _named(note: Callable[..., None], name: str) -> Callable[..., None]:
    return lambda module, args, kwargs, output: note(module, args, kwargs, output, name=name)


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors made meanwhile that are still there."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nbytes = 0
        # Views of parameters are no activations.
        weights = [*model.parameters(), *model.buffers()]
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
