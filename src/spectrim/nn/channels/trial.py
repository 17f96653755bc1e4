"""Try a removal of channels: zeroing the weights that read them has to give what removing them gives.

A graph of dependencies takes operations that it does not know for elementwise ones. So no group of channels is believed
in before half of it has been removed from a copy, and all layers of the copy deliver what those of a model do whose
weights were zeroed instead, and whatever it decides it decides by the same numbers.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectrim.errors import in_short
from spectrim.network.coupling import IN, OUT, THROUGH, Axis, Coupling, axes_left
from spectrim.nn.channels.decisions import Decision, Decisions, other_decision, ways
from spectrim.nn.channels.lively import without_statistics
from spectrim.nn.channels.narrow import narrow
from spectrim.nn.channels.rules import layers_of
from spectrim.nn.copying import copy_model
from spectrim.nn.encoders import unfused
from spectrim.nn.layers import canonical
from spectrim.nn.modes import asks_for_mode, fault_in_training
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.nesting import compared, output_tensors
from spectrim.nn.watch.observe import hooked, on_each

# Share of the outputs' magnitude by which a narrowed model may differ from one with zeroed weights.
_TOLERANCE = 1e-4
# Operations that keep channels apart; others are named when a group cannot be pruned.
_HARMLESS = re.compile(
    r"(add|sub|mul|div|relu|silu|gelu|sigmoid|tanh|hardswish|hardsigmoid|hardtanh|clamp|elu|leaky|mish|pow|sqrt|mean|"
    r"sum|pool|dropout|identity|unsafeview|clone|contiguous|tobackward|tocopy|alias|upsample|interpolate|neg|exp|"
    r"abs|convolution|norm|addmm|view|reshape|permute|transpose|squeeze|^t$|concat|cat)",
    re.IGNORECASE,
)
# What torch says where a number of channels is written down.
_FIXED = re.compile(
    r"invalid for input|don't multiply up|cannot be multiplied|must match the (existing )?size|split_with_sizes|"
    r"divisible|normalized_shape|should contain"
)
_CURE = (
    "Where code or a module holds a number of channels, write -1, read it off a layer, or register how the module "
    "loses channels (spectrim.register_channels)"
)
# What mixes channels, as autograd calls it, in words.
_WORDS = (
    (re.compile(r"^(b|badd)?mm$|matmul|bilinear|einsum|^mv$|^dot$", re.IGNORECASE), "a product of matrices"),
    (re.compile(r"attention", re.IGNORECASE), "attention"),
    (re.compile(r"softmax|logsumexp", re.IGNORECASE), "a softmax"),
    (re.compile(r"slice|select|index|gather|narrow|split|chunk|unbind|take", re.IGNORECASE), "picking by position"),
    (re.compile(r"pad|roll|flip|repeat|expand|unfold|fold", re.IGNORECASE), "padding, shifting or repeating"),
    (re.compile(r"fft", re.IGNORECASE), "a Fourier transform"),
)
_OTHER = "without half of these channels the network computes something else"
_STAYS = "These channels have to stay, and nothing needs to be done: the layers may still become low rank"
_MOVING = re.compile(r"view|reshape|permute|transpose|cat", re.IGNORECASE)


# Of a network, of its layers at every call by name, and what it decided.
_Outputs = tuple[list[Tensor], dict[str, list[Tensor]], list[Decision]]
Draw = Callable[[int, int], Tensor]
"""Which of so many channels are kept, ascending: one of so many."""


def _part(channels: int, share: int) -> int:
    """About one channel of so many, in a number that no group or head of attention divides by chance."""
    wanted = range(max(1, channels // share), channels)
    return next((number for number in wanted if number % 2 and math.gcd(number, channels) == 1), 1)


def _at_random(channels: int, share: int) -> Tensor:
    drawn = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
    return drawn[: _part(channels, share)].sort().values


# A removal may be right for some channels by chance, where the others are moved along.
DRAWS: tuple[Draw, ...] = (
    _at_random,
    lambda channels, share: torch.arange(_part(channels, share)),
    lambda channels, share: torch.arange(channels)[-_part(channels, share) :],
    lambda channels, share: torch.arange(channels - 1),
    lambda channels, share: torch.arange(1, channels),
)


@dataclass(eq=False)
class Trial:
    """Removes channels from copies and compares."""

    model: nn.Module
    example: Any
    run: Feed

    def sort_out(
        self, couplings: Sequence[Coupling], operations: Mapping[str, Sequence[str]]
    ) -> tuple[list[Coupling], list[tuple[str, int, str]]]:
        """The couplings whose removal does what it says, and the others with the reason."""
        if not couplings or self.fault(couplings) is None:
            return list(couplings), []
        alone = {coupling.name: self.fault([coupling]) for coupling in couplings}
        faults = {name: self._named(fault, operations[name]) for name, fault in alone.items() if fault is not None}
        good, apart = self.together([coupling for coupling in couplings if alone[coupling.name] is None])
        faults |= {name: f"together with the others: {fault}" for name, fault in apart.items()}
        channels = {coupling.name: coupling.channels for coupling in couplings}
        return good, [(name, channels[name], fault) for name, fault in faults.items()]

    def together(
        self, couplings: Sequence[Coupling], others: Sequence[Coupling] = (), draws: Sequence[Draw] = DRAWS[:1]
    ) -> tuple[list[Coupling], dict[str, str]]:
        """Of couplings that work alone those that do beside each other and ``others``, and why the rest does not.

        Two groups that one module keeps equal work alone, and not together.
        """

        def fault(beside: Sequence[Coupling]) -> str | None:
            faults = (self.fault([*others, *beside], draw) for draw in draws)
            return next((fault for fault in faults if fault is not None), None)

        if not couplings or fault(couplings) is None:
            return list(couplings), {}
        good: list[Coupling] = []
        faults: dict[str, str] = {}
        for coupling in couplings:
            if (why := fault([*good, coupling])) is None:
                good.append(coupling)
            else:
                faults[coupling.name] = why
        return good, faults

    def fault(self, couplings: Sequence[Coupling], draw: Draw = _at_random) -> str | None:
        """What goes wrong when half of the channels are removed, or None; ``draw`` chooses those that are kept."""
        # Neighbouring groups keep different shares: two that have to be equally wide must not be equal by chance.
        kept = {c.name: half(c, 2 + 2 * (number % 2), draw) for number, c in enumerate(couplings)}
        axes = axes_left(couplings, kept)
        try:
            with torch.no_grad(), without_statistics() as steps:
                # First, since most of what goes wrong goes wrong here.
                small = copy_model(self.model)
                narrow(small, axes)
                given = self._outputs(small)
                steps.again()
                reference = copy_model(self.model)
                for (name, axis), left in axes.items():
                    if axis == IN:
                        _silence(reference.get_submodule(name), left)
                wanted = self._outputs(reference)
        except Exception as error:
            return f"the narrowed model fails with {type(error).__name__}: {in_short(error)}"
        if difference := _difference(reference, wanted, given, axes):
            return difference
        if self.trains and (error := self._in_training(small)) is not None:
            return (
                f"in training mode the narrowed model fails with {type(error).__name__}: {in_short(error)}. What "
                "reads channels there alone keeps its inputs"
            )
        return None

    def ways(self) -> list[tuple[str, frozenset[bool]]] | None:
        """How the model with all channels decides (:func:`spectrim.nn.channels.decisions.ways`); None if it fails."""
        samples = self.run.layout.size(self.example)
        try:
            copied = copy_model(self.model)
            with torch.no_grad(), unfused(copied), without_statistics(), Decisions(samples) as decisions:
                self.run(copied, self.example)
        except Exception:  # a model may raise anything; calibration tells it
            return None
        return ways(decisions.made, samples)

    def _outputs(self, model: nn.Module) -> _Outputs:
        with unfused(model), _recorded(model) as inside, Decisions() as decisions:
            return output_tensors(self.run(model, self.example)), inside, decisions.made

    @cached_property
    def trains(self) -> bool:
        """Whether the model does something else in training mode, such as a head beside others, and runs there."""
        return asks_for_mode(self.model) and self._in_training(copy_model(self.model)) is None

    def _in_training(self, model: nn.Module) -> Exception | None:
        return fault_in_training(model, lambda trained: self.run(trained, self.example))

    @staticmethod
    def _named(fault: str, operations: Sequence[str]) -> str:
        unusual = [name for name in operations if not _HARMLESS.search(name)]
        # Harmless by themselves, but the only ones left that can move channels about.
        unusual = unusual or [name for name in operations if _MOVING.search(name)]
        by = list(dict.fromkeys(map(_in_words, unusual)))
        return explained(f"{fault}, after {' and '.join(by[:3])}" if by else fault)


def _in_words(operation: str) -> str:
    return next((words for known, words in _WORDS if known.search(operation)), f"the operation {operation}")


def is_other(fault: str) -> bool:
    """Whether a fault is that the network runs, and computes something else."""
    return fault.startswith(_OTHER)


def explained(fault: str) -> str:
    """What goes wrong, with what to do where a number is written down somewhere, or that nothing can be done."""
    if is_other(fault):
        return f"{fault}. {_STAYS}"
    return f"{fault}. {_CURE}" if _FIXED.search(fault) else fault


def _difference(reference: nn.Module, wanted: _Outputs, given: _Outputs, axes: Mapping[Axis, Tensor]) -> str | None:
    """Where a narrowed model gives something else than the ``reference`` with zeroed weights, whose outputs are
    ``wanted``; ``axes`` say which entries are left."""
    for a, b in zip(wanted[0], given[0], strict=True):
        if a.shape != b.shape:
            return f"the output would have the shape {tuple(b.shape)} in place of {tuple(a.shape)}"
        if a.is_floating_point() and not _close(a, b):
            return _OTHER
    for name, held in wanted[1].items():
        owner, left = reference.get_submodule(name), axes.get((name, OUT), axes.get((name, THROUGH)))
        calls = given[1].get(name, [])
        if len(held) != len(calls):
            return f"the narrowed model calls {name} {len(calls)} times in place of {len(held)}"
        for a, b in zip(held, calls, strict=True):
            a = a if left is None else a.index_select(dim_of(owner), left.to(a.device))
            if a.shape != b.shape or not _close(a, b):
                return f"{_OTHER} at {name}"
    other = other_decision(wanted[2], given[2], _close)
    return f"{_OTHER}: {other.words} is made with what they are taken together" if other else None


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Outputs of every layer: those of the network may hide a fault, behind a last ReLU or a layer scale of 1e-6."""
    held: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        held.setdefault(name, []).append(output.clone())

    with hooked(on_each(layers_of(model), keep)):
        yield held


def half(coupling: Coupling, share: int = 2, draw: Draw = _at_random) -> list[int]:
    pool = coupling.channels // coupling.pools
    chosen = draw(pool, share)
    return [p * pool + c for p in range(coupling.pools) for c in chosen.tolist()]


def _silence(module: nn.Module, left: Tensor) -> None:
    """Zero the weights that read what is not left."""
    weight, _ = canonical(module)
    g, _, i, *_ = weight.shape
    gone = torch.ones(g * i, dtype=torch.bool)
    gone[left] = False
    gone = gone.to(weight.device).reshape(g, i)
    weight.mul_((~gone).reshape(g, 1, i, *(1,) * (weight.dim() - 3)).to(weight.dtype))


def _close(a: Tensor, b: Tensor) -> bool:
    # Half precision rounds at every layer, and differently with fewer channels.
    tolerance = max(_TOLERANCE, 16 * torch.finfo(a.dtype).eps)
    a, b = compared(a, b)
    scale = a.abs().max().clamp_min(1e-30) if a.numel() else a.new_ones(())
    return bool(torch.isfinite(a).all()) and bool(((a - b).abs() <= tolerance * scale).all())


def dim_of(layer: nn.Module) -> int:
    """The axis of what a layer takes or gives that holds its channels."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1
