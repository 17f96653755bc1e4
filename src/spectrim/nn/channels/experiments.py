"""Find the places of channels by experiment: change some of what a layer delivers, and see which inputs change.

A graph of operations has to know what each of them does to the order of channels. Here nothing is known of operations:
all layers deliver random numbers, those of one layer are changed for the channels whose number has a certain binary
digit, and what changes in the inputs of the other layers tells channel by channel where they go. Two passes a digit
tell all channels of a layer, and an entry that changes in both is mixed of several and cannot be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectrim.network.coupling import IN, OUT, THROUGH, Axis, Side
from spectrim.nn.channels.lively import without_statistics
from spectrim.nn.channels.narrow import NORMS, axis_length
from spectrim.nn.channels.rules import layers_of, rule_of
from spectrim.nn.channels.trial import dim_of
from spectrim.nn.watch.batches import evaluating, output_tensors
from spectrim.nn.watch.observe import hooked, on_each

# By what the numbers of a channel are multiplied, and the relative change that is one.
_FACTOR, _LEAST = 1.7, 1e-5

Node = tuple[str, str, int]
"""Path of a module, name of one of its axes, and an entry of it."""


class MixedChannels(Exception):
    """Channels that cannot be told apart where they are read, and where that is."""


@dataclass(eq=False)
class Experiments:
    """Experiments on one model, whose weights do not matter (:func:`spectrim.nn.channels.lively.enlivened`)."""

    model: nn.Module
    example: Any
    run: Callable[..., Any]
    _decoded: dict[str, dict[Axis, list[tuple[int, int]]]] = field(default_factory=dict)
    _drawn: list[Tensor] = field(default_factory=list)
    _scales: list[Tensor] = field(default_factory=list)

    def sides(self, root: str) -> tuple[list[Side], int]:
        """Where the channels of a layer lie, those that can only go together as one, and how many there are."""
        atoms = self._atoms(root)
        places: dict[Axis, list[list[int]]] = {}
        for atom in atoms:
            held: dict[Axis, list[int]] = {}
            for name, axis, entry in atom:
                held.setdefault((name, axis), []).append(entry)
            for place, entries in held.items():
                places.setdefault(place, []).append(sorted(entries))
        if any(len(entries) != len(atoms) for entries in places.values()):
            raise MixedChannels("its channels go different ways, in different numbers")
        found = [
            Side(name, axis, torch.tensor(entries), self._length(name, axis))
            for (name, axis), entries in places.items()
        ]
        found.sort(key=lambda side: (side.name, side.axis) != (root, OUT))
        return found, len(atoms)

    def _atoms(self, root: str) -> list[list[Node]]:
        sets = _Sets()
        done: set[str] = set()
        sources = {root}
        while sources - done:
            for source in sources - done:
                done.add(source)
                for (name, axis), pairs in self._entries(source).items():
                    for channel, entry in pairs:
                        sets.join((source, OUT, channel), (name, axis, entry))
            reached = {name for name, axis, _ in sets.of(root) if axis != OUT}
            sources |= {source for source, touched in self._touched.items() if not touched.isdisjoint(reached)}
        # Sources that only share a module with the channels, and no entry of it, are of other channels.
        return _alike(sets.containing(root))

    def holder(self, root: str) -> str | None:
        """The first module called with what becomes of a layer's channels that has parameters and loses no channels."""
        others = {
            n: m
            for n, m in self.model.named_modules()
            if n not in self._layers and n not in self._passed and next(m.parameters(recurse=False), None) is not None
        }

        def seen(chosen: Tensor | None) -> list[tuple[str, list[Tensor]]]:
            calls: list[tuple[str, list[Tensor]]] = []

            def keep(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
                calls.append((name, [t.detach().clone() for t in output_tensors((args, kwargs))]))

            with hooked(on_each(others.items(), keep, before=True)):
                self._pass(lambda *_: None, None if chosen is None else root, chosen)
            return calls

        if not others:
            return None
        _ = self._base
        before, after = seen(None), seen(torch.ones(self._length(root, OUT), dtype=torch.bool))
        for (name, inputs), (_, changed) in zip(before, after, strict=True):
            if any(bool(_differ(a, b).any()) for a, b in zip(inputs, changed, strict=True)):
                return name
        return None

    def _length(self, name: str, axis: str) -> int:
        seen = self._base.inputs[name][0].shape[self._dim(name)] if axis == THROUGH else None
        size = seen or axis_length(self.model.get_submodule(name), axis)
        assert size is not None
        return size

    @cached_property
    def _layers(self) -> dict[str, nn.Module]:
        return {name: module for name, module in layers_of(self.model) if not _is_depthwise(module)}

    @cached_property
    def _passed(self) -> dict[str, nn.Module]:
        """Modules that hand channels on."""
        kinds = (*NORMS, nn.PReLU)
        return {
            name: module
            for name, module in self.model.named_modules()
            if name not in self._layers and (_is_depthwise(module) or isinstance(module, kinds) or rule_of(module))
        }

    def _dim(self, name: str) -> int:
        """The axis of a module's input that holds its channels."""
        module = self.model.get_submodule(name)
        if isinstance(module, (_ConvNd, nn.Linear)):
            return dim_of(module)
        rule = rule_of(module)
        return rule[1] if rule is not None else -1 if isinstance(module, nn.LayerNorm) else 1

    @cached_property
    def _touched(self) -> dict[str, set[str]]:
        """Modules whose inputs change with what a layer delivers."""
        found = {}
        for name in self._layers:
            inputs, _ = self._changed(name, lambda channels: torch.ones_like(channels, dtype=torch.bool))
            found[name] = {sink for sink, changed in inputs.items() if any(bool(c.any()) for c in changed)}
        return found

    def _entries(self, source: str) -> dict[Axis, list[tuple[int, int]]]:
        """Pairs of a channel of a layer and an entry that it reaches, by the module and its axis."""
        if source in self._decoded:
            return self._decoded[source]
        digits = max(1, (self._length(source, OUT) - 1).bit_length())
        sure: dict[str, list[Tensor]] = {}
        number: dict[str, list[Tensor]] = {}
        for digit in range(digits):
            one, out = self._changed(source, lambda c, d=digit: (c >> d) % 2 == 1)
            zero, also_out = self._changed(source, lambda c, d=digit: (c >> d) % 2 == 0)
            if out or also_out:
                raise MixedChannels("its channels are an output of the network")
            for name in one:
                for call, (a, b) in enumerate(zip(one[name], zero[name], strict=True)):
                    if bool((a & b).any()):
                        raise MixedChannels(f"{name}: its channels are mixed before they are read there")
                    if digit == 0:
                        sure.setdefault(name, []).append(a | b)
                        number.setdefault(name, []).append(a.long())
                    elif not torch.equal(sure[name][call], a | b):
                        raise MixedChannels(f"{name}: what reaches it depends on other channels")
                    else:
                        number[name][call] += a.long() << digit
        found: dict[Axis, list[tuple[int, int]]] = {}
        for name, calls in sure.items():
            axis = IN if name in self._layers else THROUGH
            pairs: set[tuple[int, int]] = set()
            for seen, channels in zip(calls, number[name], strict=True):
                dim = self._dim(name)
                entry = torch.arange(seen.shape[dim]).reshape(-1, *[1] * (seen.dim() - 1 - dim % seen.dim()))
                both = torch.stack([channels[seen], entry.expand_as(seen)[seen]], 1).unique(dim=0)
                pairs |= {(int(a), int(b)) for a, b in both.tolist()}
            if pairs:
                found[name, axis] = sorted(pairs)
        self._decoded[source] = found
        return found

    def _changed(self, source: str, which: Callable[[Tensor], Tensor]) -> tuple[dict[str, list[Tensor]], bool]:
        """Which entries of all inputs change with some channels of a layer, and whether outputs do."""
        base, chosen = self._base, which(torch.arange(self._length(source, OUT)))
        found: dict[str, list[Tensor]] = {}

        def compare(name: str, x: Tensor) -> None:
            calls = found.setdefault(name, [])
            calls.append(_differ(base.inputs[name][len(calls)], x))

        outputs = self._pass(compare, source, chosen)
        if {name: len(calls) for name, calls in found.items()} != base.calls:
            raise MixedChannels("which layers are called depends on the numbers inside the network")
        return found, any(bool(_differ(a, b).any()) for a, b in zip(base.outputs, outputs, strict=True))

    @cached_property
    def _base(self) -> _Recorded:
        inputs: dict[str, list[Tensor]] = {}
        outputs = self._pass(lambda name, x: inputs.setdefault(name, []).append(x.clone()))
        return _Recorded(inputs, [t.clone() for t in outputs])

    def _pass(
        self, see: Callable[[str, Tensor], None], source: str | None = None, chosen: Tensor | None = None
    ) -> list[Tensor]:
        """Outputs of a pass with random numbers for what layers deliver, changed for some channels of one of them.

        ``see`` is called with the name and the input of every module of interest.
        """
        numbers = iter(self._drawn)

        def read(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            see(name, (args[0] if args else next(iter(kwargs.values()))).detach())

        def write(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            drawn = next(numbers, None)
            if drawn is None:
                drawn = _noise(output, len(self._drawn))
                self._drawn.append(drawn)
            if name == source and chosen is not None:
                shape = [1] * drawn.dim()
                shape[self._dim(name)] = -1
                return drawn * torch.where(chosen, _FACTOR, 1.0).to(drawn).reshape(shape)
            # A network may write into what it gets.
            return drawn.clone()

        sinks = on_each((self._layers | self._passed).items(), read, before=True)
        hooks = [*sinks, *on_each(self._layers.items(), write)]
        with evaluating(self.model), without_statistics() as steps, hooked(hooks):
            if source is not None:
                steps.next = iter(self._scales)
            outputs = output_tensors(self.run(self.model, self.example))
        if source is None:
            self._scales += steps.held
        return [t.detach() for t in outputs if t.is_floating_point()]


@dataclass(frozen=True)
class _Recorded:
    """Inputs of the modules of interest call by call, and outputs."""

    inputs: Mapping[str, list[Tensor]]
    outputs: list[Tensor]

    @cached_property
    def calls(self) -> dict[str, int]:
        return {name: len(calls) for name, calls in self.inputs.items()}


def _noise(like: Tensor, number: int) -> Tensor:
    """Numbers of one sign a sample: an activation lets pass what is positive, also where a normalisation turns it."""
    generator = torch.Generator().manual_seed(number)
    drawn = 2 + 4 * torch.rand(like.shape, generator=generator)
    drawn[1::2] *= -1
    return drawn.to(like)


class _Sets:
    """Disjoint sets of nodes."""

    def __init__(self) -> None:
        self._parent: dict[Node, Node] = {}

    def join(self, a: Node, b: Node) -> None:
        self._parent[self._top(a)] = self._top(b)

    def _top(self, node: Node) -> Node:
        parent = self._parent.setdefault(node, node)
        while parent != node:
            self._parent[node] = parent = self._parent[parent]
            node, parent = parent, self._parent[parent]
        return node

    def containing(self, root: str) -> list[list[Node]]:
        """The sets with channels of a layer, in the order of its channels."""
        groups: dict[Node, list[Node]] = {}
        for node in list(self._parent):
            groups.setdefault(self._top(node), []).append(node)
        ours = {min(channels): nodes for nodes in groups.values() if (channels := _channels(nodes, root))}
        return [ours[first] for first in sorted(ours)]

    def of(self, root: str) -> list[Node]:
        return [node for nodes in self.containing(root) for node in nodes]


def _channels(nodes: list[Node], root: str) -> list[int]:
    return [entry for name, axis, entry in nodes if (name, axis) == (root, OUT)]


def _alike(sets: list[list[Node]]) -> list[list[Node]]:
    """Sets that lie on the same axes; of several kinds, as of halves, the first of each together, and so on.

    Halves of a split have to stay equally long.
    """
    kinds: dict[tuple[tuple[str, str], ...], list[list[Node]]] = {}
    for nodes in sets:
        kinds.setdefault(tuple(sorted((name, axis) for name, axis, _ in nodes)), []).append(nodes)
    if len({len(held) for held in kinds.values()}) > 1:
        numbers = ", ".join(str(len(held)) for held in kinds.values())
        raise MixedChannels(f"its channels go different ways, in different numbers ({numbers})")
    return [[node for nodes in several for node in nodes] for several in zip(*kinds.values(), strict=True)]


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def _differ(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise MixedChannels("the shapes inside the network depend on its numbers")
    if not a.is_floating_point():
        return (a != b).cpu()
    return ((a - b).abs() > _LEAST * a.abs().clamp_min(1e-6)).cpu()
