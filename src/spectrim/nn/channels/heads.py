"""Find the heads of attention, and remove them as channels of the layers around it.

One head has several entries in everything that attention reads and in what it delivers, and heads that share keys and
values can only go together. Nothing is known of how attention is written: layers deliver random numbers, and gradients
tell which of them reach which run of entries of the layer behind. What a module knows of the number of its heads is
found by trial. Where no head of one attention can go, those at the same place of all layers of a list are tried
together: they may get one bias for each head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.network.coupling import IN, OUT, Axis, Coupling, Side
from spectrim.nn.channels.attention import Attention, in_lists, sets
from spectrim.nn.channels.rules import layers_of
from spectrim.nn.channels.trial import DRAWS, Trial, dim_of, explained, is_other
from spectrim.nn.fused_attention import has_parts
from spectrim.nn.watch.nesting import output_tensors
from spectrim.nn.watch.observe import hooked, on_each
from spectrim.nn.watch.state import evaluating
from spectrim.nn.watch.switches import quiet_derivatives

_REWRITTEN = "; those of spectrim.with_linear_layers(model) can go"
# Sets of numbers that are tried for one attention.
_TRIED = 16


class MixedHeads(Exception):
    """Attention whose heads cannot be told apart, and why."""


@dataclass(eq=False)
class Heads:
    """Attention of a network, taken apart into heads."""

    trial: Trial  # on a model whose weights do not matter (spectrim.nn.channels.lively.enlivened)
    known: frozenset[str]  # layers that may lose inputs and outputs
    _ways: dict[tuple[Any, ...], frozenset[tuple[str, str]] | str] = field(default_factory=dict)

    def couplings(self, others: Sequence[Coupling]) -> tuple[list[Coupling], dict[str, str]]:
        """Heads whose removal does what it says, also beside other channels, and why others stay, by first layer."""
        taken: set[Axis] = {(side.name, side.axis) for coupling in others for side in coupling.sides}
        try:
            found = list(self._attentions(taken))
        except Exception:  # a pass with random numbers runs foreign code, which may raise anything
            return [], {}
        good: list[Coupling] = []
        failed: dict[str, Attention] = {}
        reasons: dict[str, str] = {}
        for attention in found:
            coupling = self._known(attention)
            if isinstance(coupling, str):
                reasons[attention.name], failed[attention.name] = coupling, attention
            else:
                good.append(coupling)
        for attention in in_lists(failed.values()):
            coupling = self._tried(attention)
            together = [name for name, each in failed.items() if each.owners[0] in attention.owners]
            if isinstance(coupling, Coupling):
                good.append(coupling)
                reasons = {name: why for name, why in reasons.items() if name not in together}
            elif is_other(coupling):
                # It tells more than why one of them cannot go alone.
                reasons |= dict.fromkeys(together, f"together with those of {attention.listed}: {coupling}")
        good, faults = self.trial.together(good, others, DRAWS)
        return good, reasons | faults

    def _attentions(self, taken: set[Axis]) -> Iterator[Attention]:
        model = self.trial.model
        seen = _Seen.of(model, self.trial)
        readers: dict[str, set[str]] = {}
        reaching = {name: seen.sources(calls) for name, calls in seen.inputs.items()}
        for reader, writers in [*reaching.items(), ("", seen.sources(seen.outputs))]:
            for writer in writers:
                readers.setdefault(writer, set()).add(reader)
        for reader, writers in reaching.items():
            alone = {w for w in self.known.intersection(writers) if readers[w] == {reader} and (w, OUT) not in taken}
            if not alone or reader not in self.known or (reader, IN) in taken:
                continue
            try:
                sides, shares = seen.heads(reader, writers)
            except MixedHeads:
                continue
            if not {side.name for side in sides if side.axis == OUT} <= alone:
                continue
            yield Attention((_above([side.name for side in sides]),), sides, shares=shares)

    def _known(self, attention: Attention) -> Coupling | str:
        """As :meth:`_tried`; what holds for one of a kind holds for all."""
        model = self.trial.model
        kind = attention.alike(model)
        if (known := self._ways.get(kind)) is not None:
            if isinstance(known, str):
                return known
            return attention.coupled(model, (n for n in attention.numbers(model) if (n.path, n.axis) in known))
        coupling = self._tried(attention)
        if isinstance(coupling, str):
            self._ways[kind] = coupling
        else:
            places = {(side.name, side.axis) for side in coupling.sides}
            followed = (n for n in attention.numbers(model) if (n.places[0][0], n.axis) in places)
            self._ways[kind] = frozenset((n.path, n.axis) for n in followed)
        return coupling

    def _tried(self, attention: Attention) -> Coupling | str:
        """The channels of attention with the numbers that have to follow, or what goes wrong."""
        faults: list[str] = []
        candidates = sets(attention, self.trial.model)
        for numbers in itertools.islice(candidates, _TRIED):
            coupling = attention.coupled(self.trial.model, numbers)
            fault = self.trial.fault([coupling])
            if fault is None:
                return coupling
            faults.append(fault)
        way = any(has_parts(self.trial.model.get_submodule(owner)) for owner in attention.owners)
        return f"{explained(faults[0])}{_REWRITTEN if way else ''}"


@dataclass(eq=False)
class _Seen:
    """A pass in which every layer delivers random numbers: these, and what layers read and the network gives."""

    model: nn.Module
    drawn: dict[str, list[Tensor]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, trial: Trial) -> _Seen:
        seen = cls(model)
        generator = torch.Generator().manual_seed(0)
        layers = layers_of(model)

        def read(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.inputs.setdefault(name, []).append(args[0] if args else next(iter(kwargs.values())))

        def write(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            drawn = torch.randn(output.shape, generator=generator).to(output).requires_grad_()
            seen.drawn.setdefault(name, []).append(drawn)
            # A network may write into what it gets.
            return drawn.clone()

        hooks = [*on_each(layers, read, before=True), *on_each(layers, write)]
        with evaluating(model), hooked(hooks), torch.enable_grad():
            seen.outputs = output_tensors(trial.run(model, trial.example))
        return seen

    def sources(self, tensors: Sequence[Tensor]) -> list[str]:
        """Layers whose numbers reach these tensors without passing another layer, in order of execution."""
        tensors = [tensor for tensor in tensors if tensor.requires_grad]
        if not tensors:
            return []
        return [name for name, touched in self._touched(tensors, list(self.drawn)).items() if bool(touched.any())]

    def heads(self, reader: str, writers: Sequence[str]) -> tuple[tuple[Side, ...], bool]:
        """Where heads lie in the layers around attention, in runs as short as keep them apart, and whether they share.

        What they share is in all heads, as keys and values of multi-query attention, and stays. Raises Mixed if no runs
        keep heads apart, or if single entries do, which is no attention.
        """
        dim = dim_of(self.model.get_submodule(reader))
        size = self.inputs[reader][0].shape[dim]
        for run in (run for run in range(1, size // 2 + 1) if size % run == 0):
            try:
                belongs = self._runs(reader, writers, dim, run)
            except MixedHeads:
                continue
            behind = Side(reader, IN, torch.arange(size).reshape(-1, run), size)
            if run == 1:
                raise MixedHeads("each of its entries is apart")
            sides = [_side(*each, size // run) for each in belongs.items() if bool((each[1] >= 0).any())]
            if not sides:
                raise MixedHeads("all of what it reads is in all of its entries")
            return (*sides, behind), any(bool((each < 0).any()) for each in belongs.values())
        raise MixedHeads("its entries are mixed")

    def _runs(self, reader: str, writers: Sequence[str], dim: int, run: int) -> dict[str, Tensor]:
        """The run of entries of a layer's input that each number of other layers reaches; -1 for all or none."""
        size = self.inputs[reader][0].shape[dim]
        number = torch.arange(size) // run
        found = {writer: torch.zeros(self._width(writer), dtype=torch.int64) for writer in writers}
        apart: dict[str, Tensor] = {}
        for digit in range((size // run - 1).bit_length()):
            zero, one = (self._reached(reader, writers, dim, (number >> digit) % 2 == value) for value in (0, 1))
            for writer in writers:
                differs = zero[writer] ^ one[writer]
                if not torch.equal(differs, apart.setdefault(writer, differs)):
                    raise MixedHeads(f"{writer}: what it delivers reaches several runs")
                found[writer] += one[writer].long() << digit
        return {writer: torch.where(apart[writer], number, -1) for writer, number in found.items()}

    def _reached(self, reader: str, writers: Sequence[str], dim: int, chosen: Tensor) -> dict[str, Tensor]:
        shape = [-1, *(1,) * (-dim - 1)]
        return self._touched([x * chosen.to(x).reshape(shape) for x in self.inputs[reader]], writers)

    def _touched(self, tensors: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Which entries of what layers deliver have a gradient from tensors."""
        drawn = [(name, each) for name in names for each in self.drawn[name]]
        generator = torch.Generator().manual_seed(1)
        # A sum of positive and negative weights: what is normalised adds up to what does not change.
        weights = [torch.randn(t.shape, generator=generator).to(t) for t in tensors]
        total = sum((t * weight).sum() for t, weight in zip(tensors, weights, strict=True))
        ends = [each for _, each in drawn]
        with quiet_derivatives():
            gradients = torch.autograd.grad(total, ends, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        found = {name: torch.zeros(self._width(name), dtype=torch.bool) for name in names}
        for (name, each), gradient in zip(drawn, gradients, strict=True):
            if gradient is not None:
                dim = dim_of(self.model.get_submodule(name)) % each.dim()
                rows = (gradient != 0).movedim(dim, -1).reshape(-1, each.shape[dim])
                found[name] |= rows.any(0).cpu()
        return found

    def _width(self, name: str) -> int:
        return self.drawn[name][0].shape[dim_of(self.model.get_submodule(name))]


def _side(writer: str, belongs: Tensor, heads: int) -> Side:
    """Where the heads lie in a layer that attention reads."""
    entries = (belongs >= 0).nonzero().flatten()
    if not bool((belongs[entries].bincount(minlength=heads) == len(entries) // heads).all()):
        raise MixedHeads(f"{writer}: its heads are not equally wide")
    return Side(writer, OUT, entries[belongs[entries].argsort(stable=True)].reshape(heads, -1), len(belongs))


def _above(paths: Sequence[str]) -> str:
    """The innermost module that has all of these."""
    columns = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return ".".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, columns))
