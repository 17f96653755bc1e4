"""Torch's encoders without their fused kernels: they answer zero at padded positions still.

In evaluation without gradients ``nn.TransformerEncoder`` leaves padded positions out by nested tensors, and answers
zero there. Layers that are watched, or are no longer plain, cannot be run so, and what reads all positions of an
encoder, as a mean over them, would be given other numbers.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

# Devices that torch has nested tensors on.
_NESTED = frozenset({"cpu", "cuda", "xpu"})
# Encoders of compiled models, while these are watched.
_COMPILED: WeakSet[nn.Module] = WeakSet()


class ZeroPadded(nn.TransformerEncoder):
    """An encoder that runs layer by layer and gives zero where torch's fused kernels would."""

    # Whether the fused kernels are off only for as long as a model is watched: padded positions are zero whether or not
    # gradients are recorded, since whoever runs the model records none.
    watched = False

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if src_key_padding_mask is None or mask is not None or not self._zeroes(src):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        added = src_key_padding_mask.to(src.dtype)
        if src_key_padding_mask.dtype == torch.bool:
            added = torch.zeros_like(added).masked_fill(src_key_padding_mask, -torch.inf)
        padding = added != 0
        # Torch leaves padding out only where it lies behind the data of every sample. No branch: this can be exported.
        padding = padding & (padding == (padding.cumsum(1) > 0)).all()
        # A sample of padding alone would attend to nothing, which is NaN; what it gives is not read.
        added = added.masked_fill(padding, -torch.inf).masked_fill(padding.all(1, keepdim=True), 0.0)
        output = src
        for layer in self.layers:
            output = layer(output, src_key_padding_mask=added)
        output = output.masked_fill(padding.unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _zeroes(self, src: Tensor) -> bool:
        """Whether torch's fused kernels would run on this input, but for a mask."""
        first: Any = self.layers[0]
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (src, *first.parameters()))
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return False  # torch's compiler has padded positions computed
        fused = torch.backends.mha.get_fastpath_enabled() and not recorded
        return (
            (fused or (ZeroPadded.watched and self not in _COMPILED))
            and not first.training
            and src.dim() == 3
            and not src.is_nested
            and src.device.type in _NESTED
            and not torch.is_autocast_enabled()
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if type(self) is ZeroPadded:
            return reduced
        # Types made while running cannot be found by their names.
        return (_made_again, (type(self).__mro__[1],), *reduced[2:])


def leave_fused_kernels(encoder: nn.TransformerEncoder) -> None:
    """Have an encoder run layer by layer from now on, with the answers that it had."""
    if getattr(encoder, "use_nested_tensor", False):
        encoder.__class__ = _zero_padded(type(encoder))
        encoder.use_nested_tensor = False


@contextlib.contextmanager
def unfused(*models: nn.Module) -> Iterator[None]:
    """Torch's fused transformer kernels are off; encoders answer as with them, where they were on."""
    fused, watched = torch.backends.mha.get_fastpath_enabled(), ZeroPadded.watched
    encoders = [m for model in models for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    compiled = {m for model in models for whole in _compiled(model) for m in whole.modules()}.intersection(encoders)
    added = compiled.difference(_COMPILED)
    kinds = {m: type(m) for m in encoders if fused and m not in compiled and getattr(m, "use_nested_tensor", False)}
    try:
        _COMPILED.update(added)
        for encoder, kind in kinds.items():
            encoder.__class__ = _zero_padded(kind)
        ZeroPadded.watched = watched or fused
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        ZeroPadded.watched = watched
        _COMPILED.difference_update(added)
        for encoder, kind in kinds.items():
            # Those of which layers were replaced meanwhile stay.
            if encoder.use_nested_tensor:
                encoder.__class__ = kind


def _compiled(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that torch compiles where a user runs them; of ``module.compile()`` no copy knows."""
    return (module for module in model.modules() if "_orig_mod" in module._modules)


@functools.cache
def _zero_padded(kind: type[nn.TransformerEncoder]) -> type[nn.TransformerEncoder]:
    """A type of encoders that gives zero where padding is: between a user's own type and torch's."""
    if issubclass(kind, ZeroPadded):
        return kind
    if kind is nn.TransformerEncoder:
        return ZeroPadded
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return types.new_class(kind.__name__, (kind, ZeroPadded), exec_body=lambda space: space.update(named))


def _made_again(kind: type[nn.TransformerEncoder]) -> nn.TransformerEncoder:
    made = _zero_padded(kind)
    return made.__new__(made)
