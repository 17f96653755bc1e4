"""Layers with a part that other layers share: the same parameter in several modules."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.network.layer import LayerSpec
from spectrim.nn.layers import opened, run_with
from spectrim.nn.modules import whole
from spectrim.nn.parameters import version_of


class Wide(nn.Module):
    """One layer whose weight lies side by side in two parts, of which one is shared.

    Two branches ``V_n (U x) + V (U_n x)`` run as the one pair ``[V_n, V] [U; U_n] x``: their weights are laid side by
    side along the rank on every call, which costs little beside running two branches. One of the parts, plain layers,
    has the bias. The axis is of the canonical weight without its groups: 0 for parts of the outputs, 1 for parts of the
    inputs.
    """

    # The parts are not called, so that no other layer can take the place of one.
    reads_weights = True

    def __init__(self, parts: Sequence[nn.Module], original: LayerSpec, axis: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.original = original
        self.axis = axis
        # Of the weight in torch's layout, which has no axis of groups: transposed convolutions have the inputs first.
        self._dim = 1 - axis if original.transposed else axis
        self._grouped = not self._dim and original.groups > 1

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        spec = self.original
        # Plain look-ups: those of modules take as long as laying small weights side by side.
        one, two = self._modules["parts"]._modules.values()  # type: ignore[union-attr]
        host: Any = one
        weight = self._weight(one._parameters["weight"], two._parameters["weight"])  # type: ignore[union-attr]
        bias = one._parameters["bias"]  # type: ignore[union-attr]
        if bias is None:
            bias = two._parameters["bias"]  # type: ignore[union-attr]
        return run_with(host, spec, input, weight, bias)

    def _weight(self, one: Any, two: Any) -> Tensor:
        """Both weights side by side, in the layout of torch's layer."""
        if not self._grouped:
            return torch.cat((one, two), dim=self._dim)
        groups = self.original.groups
        opened = torch.cat([w.unflatten(0, (groups, -1)) for w in (one, two)], dim=1)
        return opened.flatten(0, 1)

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias."""
        return torch.cat([opened(part)[0] for part in self.parts], dim=1 + self.axis), self.bias

    @property
    def bias(self) -> Any:
        """That of the part which has it."""
        return next((part.bias for part in self.parts if part.bias is not None), None)

    def extra_repr(self) -> str:
        return f"{self.original.kind}, {self.original.in_channels} -> {self.original.out_channels}"


class Once(nn.Module):
    """A layer that several modules have alike and call with one tensor, computed by the first of them for all.

    Every module has a ``Once`` of its own (:meth:`beside`), whose layer holds the same parameters; ``calls`` says how
    many. What one of them answered is kept until all have been asked for the same tensor, unchanged, with the same
    parameters and in the same mode; any other question is answered anew. It is dropped as well when the tensor goes,
    and when gradients have flowed back through it. Compilers and exporters see plain layers, and find equal
    subexpressions themselves.

    Tensors made in inference mode do not count their changes in place: changed between two of the calls, such a tensor
    gets the answer from before. Calibration offers a layer to be computed once only where it has seen no such change.
    """

    def __init__(self, layer: nn.Module, original: LayerSpec, calls: int) -> None:
        super().__init__()
        self.layer = layer
        self.original = original
        self.calls = calls
        self._kept = _Kept()

    def beside(self, layer: nn.Module) -> Once:
        """The same for another module, with its own layer of the same parameters."""
        other = Once(layer, self.original, self.calls)
        other._kept = self._kept
        return other

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        # What stands for a tensor while a graph is recorded is no question that could come again.
        if torch.compiler.is_compiling() or not isinstance(input, Tensor):
            return self.layer(input)
        tensors = (input, *self.layer.parameters())
        state = (*_mode(input), *map(version_of, tensors))
        # Checkpointing sets hooks of its own for every region, and computes each again by itself.
        asked = (*tensors, *_saving_hooks())
        held = self._kept.held
        if held is not None and held.answers(asked, state):
            held.left -= 1
            if not held.left:
                self._kept.held = None
            return held.answer
        self._kept.held = None
        answer = self.layer(input)
        if self.calls > 1:
            self._kept.keep(answer, asked, state, self.calls - 1)
        return answer

    @property
    def bias(self) -> Any:
        """The layer's."""
        return self.layer.bias

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias."""
        return whole(self.layer)


@dataclass(eq=False)
class _Held:
    """An answer, and what was asked: tensors and hooks by identity, versions and modes by value."""

    asked: tuple[weakref.ref[Any], ...]
    state: tuple[Any, ...]
    answer: Tensor
    left: int

    def answers(self, asked: tuple[Any, ...], state: tuple[Any, ...]) -> bool:
        same = len(asked) == len(self.asked) and state == self.state
        return same and all(ref() is now for ref, now in zip(self.asked, asked, strict=True))


class _Kept:
    """What is held for the modules that have not asked yet. No copy takes it along: graphs cannot be copied."""

    def __init__(self) -> None:
        self.held: _Held | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"held": None}

    def keep(self, answer: Tensor, asked: tuple[Any, ...], state: tuple[Any, ...], left: int) -> None:
        here = weakref.ref(self)

        def forget(_: object) -> None:
            # This answer alone, and not what came after it. A strong reference to it would never be freed.
            kept = here()
            if kept is not None and kept.held is mine():
                kept.held = None

        if answer.requires_grad:
            # A backward pass frees the graph that the answer came from.
            answer.register_hook(forget)
        refs = (weakref.ref(asked[0], forget), *map(weakref.ref, asked[1:]))
        self.held = _Held(refs, state, answer, left)
        mine = weakref.ref(self.held)


def _saving_hooks() -> tuple[Any, ...]:
    """Hooks for tensors that are saved for the backward pass; torch tells of them in private only."""
    autograd = getattr(torch._C, "_autograd", None)
    told = getattr(autograd, "_top_saved_tensors_default_hooks", None)
    return () if told is None else told(True) or ()


def _mode(x: Tensor) -> tuple[Any, ...]:
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if cast else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), dtype
