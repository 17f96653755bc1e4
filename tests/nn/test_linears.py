"""Attention and Conv1D as nn.Linear layers: they compute the same, lose heads, and files know of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.nn.linears import LinearAttention
from spectrim.nn.shipping import rewritten

SAMPLES, LENGTH = 3, 5
KINDS: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "batch second, without bias": {"bias": False},
    "other keys and values": {"kdim": 6, "vdim": 7, "batch_first": True},
}
PADDED = torch.zeros(SAMPLES, LENGTH, dtype=torch.bool)
PADDED[0, -2:] = True
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "causal": {"attn_mask": torch.ones(LENGTH, LENGTH).triu(1).bool()},
    "padding": {"key_padding_mask": PADDED},
    "each head's numbers": {"attn_mask": torch.randn(SAMPLES * 4, LENGTH, LENGTH).double()},
    "both": {
        "attn_mask": torch.randn(LENGTH, LENGTH).double(),
        "key_padding_mask": torch.zeros(SAMPLES, LENGTH).double().masked_fill(PADDED, -torch.inf),
    },
}


def _inputs(attention: nn.MultiheadAttention) -> list[Tensor]:
    shape = (SAMPLES, LENGTH) if attention.batch_first else (LENGTH, SAMPLES)
    return [torch.randn(*shape, width).double() for width in (16, attention.kdim, attention.vdim)]


def _same(given: Any, wanted: Any) -> None:
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("asked", [{}, {"need_weights": False}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_attention_of_linear_layers_takes_and_gives_the_same(kind: Any, masks: Any, asked: Any) -> None:
    attention = nn.MultiheadAttention(16, 4, **kind).double().eval()
    linear, inputs = st.with_linear_layers(attention), _inputs(attention)
    assert isinstance(linear, LinearAttention)
    assert linear.embed_dim == 16
    _same(linear(*inputs, **masks, **asked), attention(*inputs, **masks, **asked))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_one_sequence_without_samples(kind: Any) -> None:
    attention = nn.MultiheadAttention(16, 4, **kind).double().eval()
    inputs = [torch.randn(LENGTH, width).double() for width in (16, attention.kdim, attention.vdim)]
    masks = {"key_padding_mask": PADDED[0]}
    given, wanted = (each(*inputs, **masks) for each in (st.with_linear_layers(attention), attention))
    _same(given, wanted)
    assert given[0].shape == (LENGTH, 16)


def _encoder() -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    return nn.ModuleDict({"into": nn.Linear(5, 16), "encoder": encoder, "head": nn.Linear(16, 3)}).eval()


def _run(model: Any, x: Tensor, **options: Any) -> Tensor:
    return model["head"](model["encoder"](model["into"](x), **options))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_torchs_encoder_with_padding_and_without_its_fused_kernels() -> None:
    model = _encoder().requires_grad_(False)
    linear, x = st.with_linear_layers(model), torch.randn(SAMPLES, LENGTH, 5)
    assert rewritten(linear) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    assert not rewritten(model)
    assert not any(p.requires_grad for p in linear.parameters())
    for options in ({}, {"src_key_padding_mask": PADDED}):
        kept = ~PADDED if options else slice(None)
        torch.testing.assert_close(
            _run(linear, x, **options)[kept], _run(model, x, **options)[kept], rtol=1e-5, atol=1e-5
        )


def test_heads_go_and_a_file_is_loaded_into_the_network_as_it_is_made(tmp_path: Path) -> None:
    model, x = st.with_linear_layers(_encoder()), torch.randn(16, LENGTH, 5)
    result = st.compress(model, [x], {"macs": 0.7}, methods=[st.PrincipalFilters()], forward=_run)
    small: Any = result.model
    layers = small["encoder"].layers
    assert "4 heads" in {entry.kind for entry in result.plan if entry.of_channels}
    assert min(layer.self_attn.num_heads for layer in layers) < 4
    st.save(result, tmp_path / "small.safetensors")
    torch.testing.assert_close(_run(st.load(_encoder(), tmp_path / "small.safetensors"), x), _run(small, x))


@pytest.mark.parametrize(
    "attention",
    [nn.MultiheadAttention(16, 4, add_bias_kv=True), nn.MultiheadAttention(16, 4, add_zero_attn=True)],
    ids=["add_bias_kv", "add_zero_attn"],
)
def test_attention_that_appends_keys_stays(attention: nn.Module) -> None:
    assert type(st.with_linear_layers(attention)) is nn.MultiheadAttention


def test_what_another_module_holds_the_weights_of_stays() -> None:
    attention = nn.MultiheadAttention(16, 4)
    head = nn.Linear(16, 16)
    head.weight = attention.out_proj.weight
    assert not rewritten(st.with_linear_layers(nn.ModuleList([attention, head])))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="with_linear_layers"):
        st.with_linear_layers([torch.zeros(3)])  # type: ignore[arg-type]


class Fused(nn.Module):
    """Attention of one layer for queries, keys and values."""

    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = 4, more.pop("scale", 0.5)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        for name, module in more.items():
            setattr(self, name, module)

    def attended(self, x: Tensor, **masks: Any) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        made = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale, **masks)
        return self.proj(made.transpose(1, 2).reshape(n, length, width))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self.attended(x, attn_mask=attn_mask)


class Causal(Fused):
    """Attends to what came before."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attended(x, is_causal=True)


class Telling(Fused):
    """Returns a pair."""

    def forward(self, x: Tensor) -> Any:
        return self.attended(x), None


def test_attention_of_one_layer_takes_and_gives_the_same_and_keeps_its_names() -> None:
    model = nn.ModuleDict({"attn": Fused(proj_drop=nn.Dropout(0.5))}).double().eval()
    linear, x = st.with_linear_layers(model), torch.randn(SAMPLES, LENGTH, 16).double()
    assert rewritten(linear) == ["attn"]
    assert list(linear.state_dict()) == list(model.state_dict())
    mask = torch.ones(LENGTH, LENGTH).tril().bool()
    for asked in ({}, {"attn_mask": mask}, {"attn_mask": torch.randn(LENGTH, LENGTH).double()}):
        _same(linear["attn"](x, **asked), model["attn"](x, **asked))


@pytest.mark.parametrize(
    "module",
    [Causal(), Telling(), Fused(gate=nn.Linear(16, 16)), Fused(attn_drop=nn.Softmax(-1)), Fused().to("meta")],
    ids=["causal", "a pair", "another part", "no dropout", "no numbers"],
)
def test_attention_that_computes_something_else_stays_as_it_is(module: nn.Module) -> None:
    assert type(st.with_linear_layers(nn.Sequential(module))[0]) is type(module)
