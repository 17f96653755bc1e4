"""Attention whose queries, keys and values come from one layer, as vision transformers write it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.nn.parameters import asked
from spectrim.nn.watch.state import evaluating

# What such a module holds: the layers, norms of queries and keys within a head, one of all heads, dropout.
_PARTS = frozenset({"qkv", "proj", "q_norm", "k_norm", "norm", "attn_drop", "proj_drop"})
# Samples and positions that are tried.
_TRIED = (2, 5)


class FusedAttention(nn.Module):
    """Attention with ``qkv`` and ``proj`` that computes what it is made of. Heads keep their size when some go.

    The usual code takes the width of its input for that of all heads together, ``x.reshape(B, N, C)``, which it no
    longer is once some are gone.
    """

    qkv: nn.Module
    proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    attn_drop: nn.Module
    proj_drop: nn.Module

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.proj.in_features // attention.num_heads
        self.scale = float(getattr(attention, "scale", self.head_dim**-0.5))
        held: dict[str, nn.Module] = dict(attention.named_children())
        for name in (*held, *sorted(_PARTS - held.keys())):
            self.add_module(name, held.get(name, nn.Identity()))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend within ``[samples, positions, channels]``; a mask is added to scores, or True where there is data."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        dropped = self.attn_drop.p if self.training and isinstance(self.attn_drop, nn.Dropout) else 0.0
        attended = functional.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask, dropped, is_causal, scale=self.scale
        )
        return self.proj_drop(self.proj(self.norm(attended.transpose(1, 2).flatten(2))))


def is_fused(module: nn.Module) -> bool:
    """Whether a module computes what :class:`FusedAttention` does: it has the parts, and gives the same on a trial."""
    return has_parts(module) and _same(module, FusedAttention(module))


def has_parts(module: Any) -> bool:
    """Whether a module has the parts of fused attention and no others."""
    qkv, proj, heads = (asked(module, name) for name in ("qkv", "proj", "num_heads"))
    return (
        not isinstance(module, FusedAttention)
        and isinstance(qkv, nn.Linear)
        and isinstance(proj, nn.Linear)
        and type(heads) is int
        and heads > 0
        and qkv.out_features == 3 * proj.in_features
        and proj.in_features % heads == 0
        and _PARTS.issuperset(name for name, _ in module.named_children())
        and isinstance(getattr(module, "attn_drop", None), nn.Dropout | nn.Identity | None)
        and next(module.parameters(recurse=False), None) is None
        and next(module.buffers(recurse=False), None) is None
        and _takes_one(module)
    )


def _takes_one(module: nn.Module) -> bool:
    """Whether forward takes a tensor, and a mask at the most."""
    others = list(inspect.signature(type(module).forward).parameters.values())[1:]
    named = [each for each in others if each.kind is not each.VAR_KEYWORD]
    return bool(named) and {each.name for each in named[1:]} <= {"attn_mask", "is_causal"}


@torch.no_grad()
def _same(module: nn.Module, other: nn.Module) -> bool:
    weight: Any = module.qkv.weight  # type: ignore[union-attr]
    if weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*_TRIED, weight.shape[1], generator=generator).to(weight)
    with evaluating(module), evaluating(other):
        try:
            wanted, given = module(x), other(x)
        except Exception:  # foreign code may raise anything
            return False
    return isinstance(wanted, Tensor) and wanted.shape == given.shape and bool(_near(given, wanted))


def _near(given: Tensor, wanted: Tensor) -> bool:
    """Within the rounding of another order of operations."""
    size = torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().amax().float()
    return bool((given - wanted).abs().amax().float() <= size)
