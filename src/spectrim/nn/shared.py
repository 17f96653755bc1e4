"""Layers with a part that other layers share: the same parameter in several modules."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.nn.find import canonical
from spectrim.sites import LayerSpec

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Wide(nn.Module):
    """One layer whose weight lies side by side in two parts, of which one is shared.

    Two branches ``V_n (U x) + V (U_n x)`` run as the one pair ``[V_n, V] [U; U_n] x``: their weights are laid side by
    side along the rank on every call, which costs little beside running two branches.

    Attributes
    ----------
    parts
        Plain layers whose weights are the parts; one of them has the bias.
    original
        Spec of the whole layer.
    axis
        Of the canonical weight without its groups: 0 for parts of the outputs, 1 for parts of the inputs.
    """

    def __init__(self, parts: Sequence[nn.Module], original: LayerSpec, axis: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.original = original
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        host: Any = self.parts[0]
        spec = self.original
        weight, bias = self._weight(), self._bias()
        if spec.is_linear:
            return F.linear(x, weight, bias)
        if spec.transposed:
            run = _TRANSPOSED[len(spec.kernel)]
            return run(x, weight, bias, host.stride, host.padding, host.output_padding, host.groups, host.dilation)
        # torch's own way to run a convolution with another weight: it knows every padding.
        return host._conv_forward(x, weight, bias)

    def _weight(self) -> Tensor:
        """In the layout of torch's layer."""
        weights: list[Any] = [part.weight for part in self.parts]
        # Transposed convolutions have the inputs first.
        axis = 1 - self.axis if self.original.transposed else self.axis
        groups = self.original.groups
        if axis or groups == 1:
            return torch.cat(weights, dim=axis)
        opened = torch.cat([w.unflatten(0, (groups, -1)) for w in weights], dim=1)
        return opened.flatten(0, 1)

    def _bias(self) -> Any:
        return next((part.bias for part in self.parts if part.bias is not None), None)

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias."""
        bias = self._bias()
        weights = [canonical(part)[0] for part in self.parts]
        return torch.cat(weights, dim=1 + self.axis), None if bias is None else bias.detach()

    def extra_repr(self) -> str:
        return f"{self.original.kind}, {self.original.in_channels} -> {self.original.out_channels}"


class Once(nn.Module):
    """A layer that several modules call with one tensor, and that computes it once.

    What it answered is kept until it has been asked ``calls`` times for the same tensor, unchanged, with the same
    weight and in the same mode; any other question is answered anew. Compilers and exporters see the plain layer, and
    find equal subexpressions themselves.

    Attributes
    ----------
    layer
        The plain layer.
    original
        Its spec.
    calls
        Modules that share it.
    """

    def __init__(self, layer: nn.Module, original: LayerSpec, calls: int) -> None:
        super().__init__()
        self.layer = layer
        self.original = original
        self.calls = calls
        self._held: tuple[Any, tuple[Any, ...], Tensor, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.layer(x)
        weight: Any = self.layer.weight
        key = (
            _version(x),
            id(weight),
            _version(weight),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(x.device.type),
            torch.get_autocast_dtype(x.device.type),
        )
        held = self._held
        if held is not None and held[0]() is x and held[1] == key:
            _, _, answer, left = held
            self._held = (held[0], key, answer, left - 1) if left > 1 else None
            return answer
        answer = self.layer(x)
        self._held = (weakref.ref(x), key, answer, self.calls - 1) if self.calls > 1 else None
        return answer

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias."""
        return canonical(self.layer)

    def __getstate__(self) -> dict[str, Any]:
        # What is kept between two calls belongs to no copy, and graphs cannot be copied.
        return {**self.__dict__, "_held": None}


def _version(tensor: Tensor) -> int:
    """Counts changes in place; inference tensors have no counter."""
    return -1 if tensor.is_inference() else tensor._version
