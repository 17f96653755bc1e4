"""Layers with a sparse weight, and the sum of such a layer and a low-rank pair."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.linalg.patterns import Pattern, Taps, WholeChannels
from spectrim.network.layer import LayerSpec
from spectrim.nn.layers import opened, run_with
from spectrim.nn.modules import Factored, make_layer, whole
from spectrim.nn.sparse.products import Kernel, Packed, is_plain_call, products, takes
from spectrim.nn.standing import StandIn, laid_open, laid_out


class _OfLayer(StandIn):
    """Stands for a layer by one plain layer."""

    def __init__(self, layer: nn.Module, original: LayerSpec) -> None:
        super().__init__()
        self.layer = layer
        self.original = original

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias  # type: ignore[return-value]


class Masked(_OfLayer):
    """A layer whose weight is zero outside a mask. Files hold what is inside (:mod:`spectrim.nn.checkpoint`).

    Only entries inside the mask, a buffer in the layout of the layer's weight, get gradients, so that any optimizer
    leaves the others at zero.

    In evaluation without gradients it may run through a kernel that skips the zeros (:class:`Kernel`), which
    :func:`spectrim.nn.sparse.kernels.choose_kernels` chooses by measuring. What such a kernel needs is packed at the
    first call and again when weight or mask have changed, in memory besides the weight's, and is in no file and no
    copy. Changes through ``weight.data`` go unseen until :meth:`settle`, :meth:`train` or :meth:`eval` is called.
    """

    # The layer is not called, so that no other one can take its place.
    reads_weights = True
    mask: Tensor
    _kernel = Kernel.DENSE
    _packed: Packed | None = None

    def __init__(self, layer: nn.Module, mask: Tensor, pattern: Pattern, original: LayerSpec) -> None:
        super().__init__(layer, original)
        self.pattern = pattern
        self.register_buffer("mask", mask)
        self.settle()
        self.register_load_state_dict_post_hook(_settle)

    def forward(self, input: Tensor, onto: Tensor | None = None) -> Tensor:  # noqa: A002
        """The layer's response, added to ``onto`` if that is given, which kernels besides ``DENSE`` do in place."""
        host: Any = self.layer
        weight = host.weight
        if self._kernel is not Kernel.DENSE and not self.training:
            taken = takes(self._kernel, weight, self.mask)
            if taken and is_plain_call(input, self.original, weight, host.bias, onto):
                return self._pack(weight)(input, host.bias, onto)
        if torch.is_grad_enabled() and weight.requires_grad:
            weight = weight * self.mask
        y = run_with(host, self.original, input, weight, host.bias)
        return y if onto is None else onto + y

    @property
    def kernel(self) -> Kernel:
        return self._kernel

    @kernel.setter
    def kernel(self, kernel: Kernel) -> None:
        if kernel not in self.kernels:
            raise ValueError(
                f"a {self.original.kind} with the pattern {self.pattern.name!r} cannot run with {kernel}; it can with "
                f"{', '.join(map(str, self.kernels))}"
            )
        self._kernel, self._packed = kernel, None

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels it may be run with, by its shape and pattern."""
        return (Kernel.DENSE, *products(self.original, self.pattern))

    def _pack(self, weight: Tensor) -> Packed:
        packed = self._packed
        if packed is None or not packed.is_of(self._kernel, weight, self.mask):
            product = products(self.original, self.pattern)[self._kernel]
            packed = self._packed = Packed.of(self._kernel, weight, self.mask, product)
        return packed

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Read weight and mask also as files hold them."""
        from spectrim.nn.sparse.packed import opened_state

        *_, errors = others
        try:
            opened_state(self, state_dict, f"{prefix}layer.weight", f"{prefix}mask")
        except (ValueError, RuntimeError) as error:
            errors.append(f"{prefix}mask: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files are without what is packed."""
        return {**self.__dict__, "_packed": None}

    def _apply(self, *arguments: Any, **options: Any) -> Masked:
        self._packed = None
        return super()._apply(*arguments, **options)

    def train(self, mode: bool = True) -> Masked:
        self._packed = None
        return super().train(mode)

    @torch.no_grad()
    def settle(self) -> None:
        """Put the weight to zero outside the mask."""
        weight: Any = self.layer.weight
        weight.masked_fill_(~self.mask, 0)
        self._packed = None

    @property
    def support(self) -> Tensor:
        """The mask as canonical ``[g, o, i, *k]``."""
        return laid_open(self.mask, self.original)

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias."""
        return opened(self.layer)

    def extra_repr(self) -> str:
        density = float(self.mask.double().mean())
        skips = "" if self._kernel is Kernel.DENSE else f", {self._kernel.value}"
        return f"{self.original.kind}, {self.pattern.name}, density {density:.3g}{skips}"


def _settle(module: Masked, incompatible: object) -> None:
    module.settle()


class Slim(_OfLayer):
    """A layer that sees some of its input channels: the others are multiplied by zero in the weight it stands for."""

    channels: Tensor  # buffer of those it sees, ascending

    def __init__(self, layer: nn.Module, channels: Tensor, original: LayerSpec) -> None:
        super().__init__(layer, original)
        self.register_buffer("channels", channels.to(torch.int32))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.layer(input.index_select(-1 - len(self.original.kernel), self.channels))

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias."""
        g, o, i, *kernel = self.original.shape
        part, bias = whole(self.layer)
        weight = part.new_zeros(g, i, o, *kernel)
        kept = self.channels.reshape(g, -1).long() - i * torch.arange(g, device=self.channels.device).unsqueeze(1)
        for group in range(g):
            weight[group, kept[group]] = part[group].transpose(0, 1)
        return weight.transpose(1, 2), bias

    def extra_repr(self) -> str:
        return f"{self.original.kind}, {self.channels.numel()} of {self.original.in_channels} channels"


class Cropped(_OfLayer):
    """A convolution with a box of the kernel positions of the one it stands for, without padding."""

    def __init__(self, layer: nn.Module, pattern: Taps, original: LayerSpec) -> None:
        super().__init__(layer, original)
        self.pattern = pattern
        margins = [n for pair in reversed(original.margins(pattern)) for n in pair]
        self._wider, self._narrower = [max(n, 0) for n in margins], [min(n, 0) for n in margins]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        # One after the other, since more may be cut off than the input alone has.
        x = input
        for margins in (self._wider, self._narrower):
            if any(margins):
                x = F.pad(x, margins)
        return self.layer(x)

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias."""
        part, bias = whole(self.layer)
        weight = part.new_zeros(self.original.shape)
        weight[(..., *self.pattern.box)] = part
        return weight, bias

    def extra_repr(self) -> str:
        return f"{self.original.kind}, {self.pattern.name}"


class Summed(StandIn):
    """A low-rank pair, which has the bias, and a sparse layer on the same input, their outputs added."""

    def __init__(self, pair: Factored, sparse: nn.Module, original: LayerSpec) -> None:
        super().__init__()
        self.pair = pair
        self.sparse = sparse
        self.original = original

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        y = self.pair(input)
        # A masked layer adds by itself, which some kernels do at no cost.
        return self.sparse(input, y) if isinstance(self.sparse, Masked) else y + self.sparse(input)

    @property
    def bias(self) -> Tensor | None:
        return self.pair.bias if self.sparse.bias is None else self.whole()[1]  # type: ignore[return-value]

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias."""
        (left, bias), (right, shift) = whole(self.pair), whole(self.sparse)
        if shift is not None:
            # A part that was compressed again has a bias of its own.
            bias = shift if bias is None else bias + shift
        return (left.double() + right.double()).to(left.dtype), bias


def sparse_layer(
    spec: LayerSpec, weight: Tensor, mask: Tensor, pattern: Pattern, bias: Tensor | None
) -> Masked | Slim | Cropped:
    """The module of a sparse weight, canonical as its mask ``[g, o, i, *k]``; ``spec`` is of the layer it is for."""
    if isinstance(pattern, Taps):
        small = spec.sparse(pattern, 1.0)
        return Cropped(make_layer(small, weight[(..., *pattern.box)], bias), pattern, spec)
    if isinstance(pattern, WholeChannels):
        g, o, i, *kernel = spec.shape
        kept = mask.transpose(1, 2).reshape(g, i, -1).any(-1)
        numbers = kept.reshape(-1).nonzero().squeeze(1)
        part = weight.transpose(1, 2)[kept].reshape(g, -1, o, *kernel).transpose(1, 2)
        small = dataclasses.replace(spec, in_channels=numbers.numel())
        return Slim(make_layer(small, part, bias), numbers.to(spec.device), spec)
    layer = make_layer(spec, weight, bias)
    return Masked(layer, laid_out(mask, spec).to(spec.device), pattern, spec)
