"""Modules that multiply weights of their own, with nn.Linear layers in place of these: what layers are found in.

``nn.MultiheadAttention`` reads the weights of its layers and passes their forward by, and ``Conv1D`` of transformers
holds its weight the other way round. Neither can be compressed as it is, nor lose heads. Attention of vision
transformers is of nn.Linear layers, and loses heads once it reads its width off them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.errors import called_as
from spectrim.nn.copying import copy_model
from spectrim.nn.fused_attention import FusedAttention, has_parts, is_fused
from spectrim.nn.layers import paths_of
from spectrim.nn.shipping import REWRITTEN, take_along
from spectrim.nn.surgery import replace_module


class LinearAttention(nn.Module):
    """``nn.MultiheadAttention`` of nn.Linear layers: takes and gives the same. Heads keep their size when some go."""

    # Torch's fused kernels, which pass layers by, are not for this module.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        weights = (
            (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            if attention.in_proj_weight is None
            else attention.in_proj_weight.chunk(3)
        )
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        made = (_linear(weight, bias, attention) for weight, bias in zip(weights, biases, strict=True))
        self.q_proj, self.k_proj, self.v_proj = made
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias, attention.out_proj)

    @property
    def embed_dim(self) -> int:
        """Channels of queries."""
        return self.q_proj.in_features

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``; ``is_causal`` is a hint, and ``attn_mask`` is what is masked."""
        batched = query.dim() == 3
        along = 1 if self.batch_first else 0
        if not batched:
            along = 0
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        projected = (
            layer(each if batched else each.unsqueeze(1)).movedim(along, 1)
            for layer, each in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projected)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropped = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT * self.head_dim**-0.5
            shares = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(shares, dropped)
            attended = weights @ v
        else:
            attended = functional.scaled_dot_product_attention(q, k, v, mask, dropped)
        answer = self.out_proj(attended.transpose(1, 2).flatten(2)).movedim(1, along)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return (answer if batched else answer.squeeze(1)), weights

    def _mask(self, attention: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to scores ``[samples, heads, queries, keys]``."""
        added = None if padding is None else _added(padding, like)[:, None, None]
        if attention is None:
            return added
        several = _added(attention, like)
        if several.dim() == 3:
            several = several.unflatten(0, (-1, self.num_heads))
        return several if added is None else several + added


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers: where it is True nothing is attended to."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


@called_as("Write with_linear_layers(model)", model=nn.Module)
def with_linear_layers(model: nn.Module) -> nn.Module:
    """A copy of a model that computes the same, in which attention and ``Conv1D`` are made of nn.Linear layers.

    So they are found, become low rank and lose heads: ``nn.MultiheadAttention``, also in torch's encoder and decoder
    layers, and ``Conv1D`` of transformers, as in GPT-2. Attention with ``qkv`` and ``proj``, as in timm, loses heads:
    its code takes the width of its input for that of all heads, and is replaced where a trial gives the same. Files
    that are made of the copy say so: ``load`` and ``from_pretrained`` take a model as it is made by its own class.

    Parameters
    ----------
    model
        Left untouched. What another module holds the weights of stays as it is, and so does attention that appends
        keys (``add_bias_kv``, ``add_zero_attn``).

    Returns
    -------
    nn.Module
        In the same mode. Weights of attention are named ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    Notes
    -----
    Torch's fused encoder kernels run no such attention, as they run no layer that is compressed. Without them encoders
    of widths 256 and 512 took 1.04 to 1.10 times as long on one core. At padded positions, where these kernels have an
    encoder answer zero, it does so still. ``guard`` compares with the model it is given.

    Examples
    --------
    >>> import spectrim as st
    >>> from torch import nn
    >>> encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    >>> len(st.find(encoder)), len(st.find(st.with_linear_layers(encoder)))
    (2, 6)
    """
    return rewrite(copy_model(model))


def rewrite(model: nn.Module, only: Collection[str] | None = None) -> nn.Module:
    """As :func:`with_linear_layers`, in place; ``only`` names the modules, by default all that can be."""
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for module, names in paths_of(model).items():
        made = _way(module, known=only is not None)
        shared = any(holders[id(p)] > 1 for p in module.parameters())
        if made is None or shared or (only is not None and names[0] not in only):
            continue
        new = made(module)
        vars(new)[REWRITTEN] = True
        vars(new).update({name: held for name, held in vars(module).items() if name.endswith(("_hooks", "_kwargs"))})
        if "" in names:
            return new.train(module.training)
        replace_module(model, names, new)
    take_along(model)
    return model


def _way(module: nn.Module, *, known: bool) -> Callable[[Any], nn.Module] | None:
    """How a module is made of nn.Linear layers, if it can be; ``known`` if it has been before."""
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention) and kind.forward is nn.MultiheadAttention.forward:
        appends = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
        return None if appends else LinearAttention
    if has_parts(module):
        return FusedAttention if known or is_fused(module) else None
    # By its name, so that the library need not be there.
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return lambda conv: _linear(conv.weight.mT, conv.bias, conv)
    return None


@torch.no_grad()
def _linear(weight: Any, bias: Any, like: nn.Module) -> nn.Linear:
    """A layer of these values, trained as the module was whose they are."""
    outputs, inputs = weight.shape
    trained = next(like.parameters(recurse=False)).requires_grad
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), trained)
    return layer
