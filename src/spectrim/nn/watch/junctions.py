"""Where what a layer answers is added to something that is known before: the sums of residual networks.

A layer that is fitted to the dense answer alone leaves in the sum what the other side already misses, and so
errors pile up along the shortcuts. Where the other side is known when the layer is reached, it is fitted to the
dense answer and what is missing beside it, so that the sum is what is approximated ([He et al. 2017]_, their
multi-branch enhancement, there for blocks of one form; here for any sum that a forward pass shows).

.. [He et al. 2017] Y. He, X. Zhang and J. Sun, "Channel pruning for accelerating very deep neural networks", ICCV 2017.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.observe import Hook, hooked, on_each, on_few
from spectrim.nn.watch.state import evaluating, kept

log = logging.getLogger(__name__)
_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
# What shortcuts without parameters do: nothing that depends on the number of samples, nothing in place.
_CUTS: frozenset[Any] = frozenset({Tensor.__getitem__, nn.functional.pad, nn.functional.avg_pool2d})


@dataclass(frozen=True)
class Tap:
    """A tensor that a pass shows at a module, and what is done to it on its way."""

    module: str  # its name
    after: bool  # whether it is among what the module gives, and not among what it is given
    leaf: int  # its number there
    ways: tuple[Callable[[Tensor], Tensor], ...] = ()  # what is done to it, one after the other

    def hook(self, model: nn.Module, take: Callable[[Tensor], None]) -> Hook:
        """Has a function take the tensor whenever a pass comes by."""
        module = model.get_submodule(self.module)

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            leaves = tree_leaves(output if self.after else (args, kwargs))
            if self.leaf < len(leaves) and isinstance(leaves[self.leaf], Tensor):
                take(leaves[self.leaf])

        return Hook(module, note, before=not self.after)


@dataclass(frozen=True)
class Junction:
    """A sum that a layer's answer goes into."""

    layer: str  # its name
    norm: str | None  # the BatchNorm that the answer goes through before, if any
    other: Tap  # what it is added to

    def targets(
        self,
        dense: nn.Module,
        answers: Sequence[Tensor],
        there: Sequence[Tensor | None],
        here: Sequence[Tensor | None],
    ) -> list[MadeUp]:
        """What the layer is to answer, so that the sum is that of the dense network.

        Parameters
        ----------
        dense
            The network that is approximated.
        answers
            Of its layer, one a batch.
        there, here
            The other side, in the dense and in the compressed network.
        """
        sides = [self._sides(answer, one, two) for answer, one, two in zip(answers, there, here, strict=True)]
        share = None if self.norm is None else _before(dense.get_submodule(self.norm), answers, sides)
        return [MadeUp(answer, both, share) for answer, both in zip(answers, sides, strict=True)]

    def _sides(self, answer: Tensor, there: Tensor | None, here: Tensor | None) -> tuple[Tensor, ...]:
        """The other side in both networks; nothing where it is not known."""
        if there is None or here is None:
            return ()
        for way in self.other.ways:
            there, here = way(there), way(here)
        # Where channels have gone the two sides cannot be compared.
        return (there, here) if there.shape == here.shape == answer.shape else ()


# Numbers that are worked on at a time.
_CACHED = 1 << 17


@dataclass(frozen=True)
class MadeUp:
    """A dense answer with what the other side of its sum misses.

    It is known place by place: as a tensor it would be as large as all activations of the layer, where a few rows are
    asked for.
    """

    answer: Tensor  # of the dense layer
    # The other side in the dense and in the compressed network; nothing where none is known.
    sides: tuple[Tensor, ...] = ()
    # ``[channels]``, what makes of something missing in the sum what the layer is to answer; None where they are one.
    share: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.answer.shape

    def at(self, places: Callable[[Tensor], Tensor]) -> Tensor:
        """What is answered at some places, ``[g, n, o]``, which a function takes of a tensor."""
        rows = places(self.answer)
        if not self.sides:
            return rows
        there, here = map(places, self.sides)
        gap = (there - here).to(rows.dtype)
        return rows + gap if self.share is None else torch.addcmul(rows, gap, self.share.view(len(rows), 1, -1))


def _before(norm: nn.Module, answers: Sequence[Tensor], sides: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """What makes of something missing behind a BatchNorm what is missing before it: a number a channel.

    A channel that the norm nearly silences would have to answer a multiple of what it does: it makes up for no more
    than its own energy.
    """
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    scale = torch.where(scale.abs() > torch.finfo(scale.dtype).tiny, scale, torch.inf).detach()
    known = (part for both in sides if both for part in zip(*map(_few, both), strict=True))
    missing = _energy((one - two for one, two in known), scale)
    share = (_energy(answers, scale) / (missing / scale.double().square()).clamp_min(1e-300)).sqrt().clamp_max(1)
    return (share / scale).to(scale.dtype)


def _few(samples: Tensor) -> tuple[Tensor, ...]:
    """As many samples at a time as stay in the cache."""
    return samples.split(max(1, _CACHED // max(1, samples[:1].numel())))


def _energy(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """Of every channel of tensors ``(samples, channels, ...)``."""
    energy = torch.zeros_like(like, dtype=torch.float64)
    for each in tensors:
        norms = torch.linalg.vector_norm(each.flatten(2) if each.dim() > 2 else each.unsqueeze(2), dim=2)
        energy += norms.double().square().sum(0)
    return energy


def junctions(
    model: nn.Module, names: Iterable[str], batch: Any, *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> dict[str, Junction]:
    """The sums that layers' answers go into, by the layer: found in one forward pass, of a sample where that is taken.

    A layer that a pass calls once has one if nothing but the sum reads its answer, with at most a BatchNorm in between,
    and if the other side is something that a module takes or gives before the layer is called, or a part of it.
    """
    feed = Feed.of(forward).decide(model, batch)
    found: dict[str, Junction] = {}

    def run(part: Any) -> None:
        with evaluating(model), kept(model), scanned(model, names, found):
            feed(model, part)

    try:
        on_few(run, batch, feed)
    except Exception as error:
        # Layers are then fitted to the dense answers alone, as where there are no sums.
        log.info("sums behind layers were not looked for: %s", error)
        return {}
    return found


@contextlib.contextmanager
def scanned(model: nn.Module, names: Iterable[str], found: dict[str, Junction]) -> Iterator[None]:
    """Have the forward pass that is made meanwhile show the sums behind layers."""
    scan = _Scan()
    with hooked(scan.hooks(model)), scan:
        yield
    found.clear()
    found.update({name: one for name in names if (one := scan.junction(name))})


@dataclass(frozen=True)
class _Call:
    """One call of a function on tensors."""

    function: Any
    args: Any
    kwargs: Mapping[str, Any]

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def added_to(self, one: Tensor, root: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The other side, if this adds two tensors of one shape."""
        named = (resolve_name(self.function) or getattr(self.function, "__name__", "")).rpartition(".")[2]
        sides = [root(side) for side in self.tensors()]
        if named not in _SUMS or len(sides) != 2 or self.kwargs.get("alpha", 1) != 1:
            return None
        other = sides[1] if sides[0] is one else sides[0]
        return other if other is not one and other.shape == one.shape else None

    def again(self, given: Tensor) -> Tensor:
        """The same on another tensor."""
        return self.function(given, *self.args[1:], **self.kwargs)


def _is_same(result: Any, given: Tensor) -> bool:
    """Whether a result is the tensor that was given, under this or another name."""
    if result is given:
        return True
    if not isinstance(result, Tensor) or result.layout != torch.strided or given.layout != torch.strided:
        return False
    where = result.data_ptr() == given.data_ptr() and result.dtype == given.dtype
    return where and (result.shape, result.stride()) == (given.shape, given.stride())


@dataclass
class _Shown:
    """What a module was given or gave, in one call of it; tensors with the value that they had."""

    number: int
    module: str
    after: bool
    leaves: list[Any]
    values: list[Any]


class _Scan(TorchFunctionMode):
    """Notes which tensors modules take and give, and which functions read them. All stay alive: they are told by id."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: list[_Shown] = []
        self._calls: Counter[str] = Counter()
        self._readers: dict[tuple[int, int], list[_Call]] = {}
        self._made: dict[int, _Call] = {}
        self._norms: dict[tuple[int, int], tuple[str, Tensor]] = {}
        self._roots: dict[int, Tensor] = {}
        self._alive: list[Any] = []
        self._given: dict[str, tuple[int, int]] = {}
        # Linear layers whose answers a norm would take by another axis than that of their outputs.
        self._sequences: set[str] = set()

    def hooks(self, model: nn.Module) -> Iterator[Hook]:
        """For all modules."""
        yield from on_each(model.named_modules(), self._before, before=True)
        yield from on_each(model.named_modules(), self._after)

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls[name] += 1
        self._show(name, False, (args, kwargs))
        if isinstance(module, _BatchNorm) and module.running_var is not None and args:
            self._given[name] = self._value(args[0])

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._show(name, True, output)
        if name in self._given and isinstance(output, Tensor):
            self._norms[self._given[name]] = name, output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _Call(func, args, kwargs or {})
        given = call.tensors()
        before = [self._value(tensor) for tensor in given]
        result = func(*args, **(kwargs or {}))
        self._alive.append((call, result))
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        if len(given) == 1 and _is_same(result, given[0]) and self._value(given[0]) == before[0]:
            # Such as dropout in evaluation mode.
            self._roots[id(result)] = self._root(given[0])
            return result
        for value in set(before):
            self._readers.setdefault(value, []).append(call)
        if func in _CUTS and len(given) == 1:
            self._made[id(result)] = call
        return result

    def _root(self, tensor: Tensor) -> Tensor:
        """The tensor that one is another name of."""
        return self._roots.get(id(tensor), tensor)

    def _value(self, tensor: Tensor) -> tuple[int, int]:
        """What a tensor holds now: another after something has written into it."""
        root = self._root(tensor)
        return id(root), root._version

    def _show(self, module: str, after: bool, tree: Any) -> None:
        leaves = tree_leaves(tree)
        values = [self._value(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        self._shown.append(_Shown(len(self._shown), module, after, leaves, values))

    def junction(self, name: str) -> Junction | None:
        """The sum behind a layer."""
        if self._calls[name] != 1:
            return None
        start, end = (shown for shown in self._shown if shown.module == name)
        if len(end.leaves) != 1 or not isinstance(end.leaves[0], Tensor):
            return None
        norm, answer, value = None, end.leaves[0], end.values[0]
        normed = value in self._norms and name not in self._sequences
        if normed and len(self._readers.get(value, ())) == 1:
            norm, answer = self._norms[value]
            if self._calls[norm] != 1:
                return None
            value = next(shown.values[0] for shown in self._shown if shown.module == norm and shown.after)
        readers = self._readers.get(value, ())
        other = readers[0].added_to(self._root(answer), self._root) if len(readers) == 1 else None
        tap = None if other is None else self._tap(other, start.number)
        return tap and Junction(name, norm, tap)

    def _tap(self, tensor: Tensor, number: int) -> Tap | None:
        """Where a tensor is shown before a moment, or what it is made of."""
        ways: list[Callable[[Tensor], Tensor]] = []
        while True:
            for shown in self._shown[:number]:
                for leaf, each in enumerate(shown.leaves):
                    named = isinstance(each, Tensor) and self._root(each) is tensor
                    if named and self._calls[shown.module] == 1:
                        return Tap(shown.module, shown.after, leaf, tuple(reversed(ways)))
            call = self._made.get(id(tensor))
            if call is None or not call.args or not isinstance(call.args[0], Tensor):
                return None
            ways.append(call.again)
            tensor = self._root(call.args[0])
