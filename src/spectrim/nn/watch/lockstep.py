"""Two networks side by side, once: every forward pass stops at each layer of interest until that layer is fitted.

To fit a layer one needs what the dense network answers there and what the compressed network is given, once the layers
before it are compressed. So each network is run once over the batches, whatever its depth
(:mod:`spectrim.nn.watch.passes`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spectrim.nn.layers import spec_of
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.junctions import Junction, MadeUp
from spectrim.nn.watch.observe import hooked, on_each
from spectrim.nn.watch.passes import Passes, Runner, given
from spectrim.nn.watch.state import Location, State, evaluating


@dataclass(frozen=True)
class Seen:
    """What one batch shows at a layer: a tensor for each call of it."""

    batch: int  # its number
    inputs: Sequence[Tensor]  # of the compressed network's layer
    targets: Sequence[MadeUp]  # answers of the dense network's, with what they are to make up for


@dataclass(frozen=True)
class Ended:
    """A forward pass of one of the networks that has come to its end."""

    calls: Counter[str]  # of the layers of interest
    output: Any  # what the network gave


@dataclass(frozen=True)
class Hub:
    """The passes of both networks over the same batches."""

    model: nn.Module  # the dense network
    dense: Passes
    compressed: Passes
    # What layers' answers are added to, by the layer: they are to make up for what is missing there.
    sums: Mapping[str, Junction]

    def reach(self, name: str) -> list[Seen]:
        """Have all passes go on to a layer, and give what they show there, without those that never get there.

        Whatever has been put in the layer's place by the next call is what the compressed passes go on with.
        """
        inputs, answers = self.compressed.reach(name), self.dense.reach(name)
        targets = [[MadeUp(answer) for answer in each] for each in answers]
        if name in self.sums:
            self._make_up(name, answers, targets)
        both = enumerate(zip(inputs, targets, strict=True))
        return [Seen(number, given, wanted) for number, (given, wanted) in both if given and wanted]

    def _make_up(self, name: str, answers: Sequence[Sequence[Tensor]], targets: list[list[MadeUp]]) -> None:
        """Have the targets of a layer make up for what the other side of its sum misses, too."""
        there, here = self.dense.beside(name), self.compressed.beside(name)
        once = [number for number, each in enumerate(answers) if len(each) == 1]
        made = self.sums[name].targets(
            self.model, [answers[n][0] for n in once], [there[n] for n in once], [here[n] for n in once]
        )
        for number, target in zip(once, made, strict=True):
            targets[number] = [target]

    def ends(self, number: int) -> tuple[Ended, Ended]:
        """Have both passes of one batch, which have left all layers of interest, go on to their ends."""
        return Ended(*self.dense.finish(number)), Ended(*self.compressed.finish(number))

    def restart(self) -> None:
        """Have the compressed passes start again, with all that has been put in place by now."""
        self.compressed.restart()


@contextlib.contextmanager
def lockstep(
    dense: nn.Module,
    compressed: nn.Module,
    calls: Mapping[str, int],
    batches: Sequence[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    places: Sequence[Location] = (),
    sets_up: bool = False,
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
    sets_up
        Whether hooks that a pass gives the model are there to stay; else each pass has its own of these, too.
    sums
        What layers' answers are added to (:func:`spectrim.nn.watch.junctions.junctions`): a layer's target is then what
        brings the sum to that of the dense network.
    """
    run = Feed.of(forward)
    first, second = (
        Runner(model, lambda batch, model=model: run(model, batch), State(model), places, sets_up)
        for model in (dense, compressed)
    )
    hub = Hub(dense, Passes(first, batches, calls), Passes(second, batches, calls), sums or {})
    layers = [(name, dense.get_submodule(name)) for name in calls]
    targets = [*on_each(layers, lambda name, module, args, kwargs, output: hub.dense.wait(name, output))]
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
    spec = spec_of(layer, (name,))

    def answer(*args: Any, **kwargs: Any) -> Any:
        if spec.takes(given(args, kwargs).shape):
            wait(name, given(args, kwargs))
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
