"""Heads of attention as coupled channels: what is left computes what the network with zeroed heads does."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import spectrim as st
from spectrim.methods import PrincipalFilters
from spectrim.network.choices import unit
from spectrim.network.coupling import IN, Coupling, axes_left
from spectrim.nn.channels.narrow import narrow
from spectrim.nn.watch.nesting import output_tensors

pytest.importorskip("torch_pruning")

WIDTH, HEADS = 16, 4


class Fused(nn.Module):
    """Queries, keys and values from one layer; ``order`` says whether a head's lie together."""

    def __init__(self, order: str = "apart") -> None:
        super().__init__()
        self.heads, self.order = HEADS, order
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        y = self.qkv(x)
        if self.order == "apart":
            q, k, v = y.reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = y.reshape(n, length, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Shared(nn.Module):
    """Pairs of queries share keys and values; rotary positions, a norm within each head, a bias for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.inner_dim = HEADS, 2, 4, WIDTH
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.q_norm = nn.LayerNorm(4)
        self.slope = nn.Parameter(torch.rand(HEADS, 1, 1))
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q_norm(self.q(x).view(n, length, self.num_heads, self.head_dim)).transpose(1, 2)
        k, v = (f(x).view(n, length, self.num_kv_heads, self.head_dim).transpose(1, 2) for f in (self.k, self.v))
        q, k = _rotated(q), _rotated(k)
        k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for t in (k, v))
        attended = (q @ k.transpose(-1, -2) / 2 + self.slope).softmax(-1) @ v
        return self.o(attended.transpose(1, 2).reshape(n, length, self.inner_dim))


class Vision(nn.Module):
    """As timm writes it: heads are as wide together as the input, and queries and keys normalised within each."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = HEADS, WIDTH // HEADS, 0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attention = (self.q_norm(q) * self.scale @ self.k_norm(k).transpose(-2, -1)).softmax(-1)
        return self.proj_drop(self.proj((self.attn_drop(attention) @ v).transpose(1, 2).reshape(n, length, width)))


class OfInput(Fused):
    """Takes the width of what it gets for the width of its heads."""

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width))


class Configured(nn.Module):
    """Reads how many heads there are off a configuration that all layers have, as Phi-3 does."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.num_kv_heads, self.head_dim = config, config.num_kv_heads, 4
        self.qkv_proj, self.o_proj = nn.Linear(WIDTH, WIDTH + 2 * 8), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.config.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in self.qkv_proj(x).split((queries, keys, keys), -1))
        attended = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class Twice(nn.Module):
    """Two layers of one configuration."""

    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(num_heads=HEADS, num_kv_heads=2, layers=HEADS)
        self.config, self.first, self.second = config, Configured(config), Configured(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


class Borrowed(nn.Module):
    """Torch's attention, of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class OneKey(nn.Module):
    """Multi-query attention from one layer: all heads share keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, WIDTH + 8), nn.Linear(WIDTH, WIDTH)
        self.inner, self.num_key_value_groups = WIDTH, HEADS

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split((self.inner, 4, 4), -1)
        q = q.unflatten(-1, (-1, 4)).transpose(1, 2)
        # Another way to run it would repeat both.
        attended = functional.scaled_dot_product_attention(q, *(each[:, None] for each in (k, v)), enable_gqa=True)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Biased(nn.Module):
    """Adds what it is given to the scores, or a table's entries by distance; hands on what it added, as T5 does."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        self.n_heads, self.inner_dim = HEADS, WIDTH
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.bias = nn.Embedding(6, HEADS) if table else None

    def forward(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        n, length, _ = x.shape
        q, k, v = (f(x).view(n, length, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        if added is None:
            added = torch.zeros(1, self.n_heads, length, length).to(x) if self.bias is None else _far(self.bias, x)
        attended = (q @ k.transpose(-1, -2) + added).softmax(-1) @ v
        return self.o(attended.transpose(1, 2).reshape(n, length, self.inner_dim)), added


class Stack(nn.Module):
    """Layers that add one bias for each head: of the first layer (0), of the stack (1), or zeros of the first (2)."""

    def __init__(self, where: int) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList([Biased(where == 0), Biased(False)])
        self.bias = nn.Embedding(6, HEADS) if where == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x, added = self.into(x), None if self.bias is None else _far(self.bias, x)
        for block in self.blocks:
            more, added = block(x, added)
            x = x + more
        return self.head(x)


def _far(table: nn.Module, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    return table((places - places[:, None]).abs()).permute(2, 0, 1)[None]


def _stack(where: int) -> Any:
    torch.manual_seed(0)
    return Stack(where).double().eval()


class Net(nn.Module):
    """A block of attention and a feed-forward layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.into, self.norm, self.att = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH), attention
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        x = x + self.att(self.norm(x))
        return self.head((x + self.mlp(x)).mean(1))


def _rotated(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[2]).to(x).unsqueeze(1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def _net(attention: nn.Module) -> Any:
    torch.manual_seed(0)
    return Net(attention).double().eval()


def _transformer(name: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    kind = "LlamaForCausalLM" if name == "Llama" else f"{name}Model"
    return getattr(transformers, kind)(config).double().eval()


IMAGES, ROWS = torch.randn(4, 3, 8, 8).double(), torch.randn(4, 6, 5).double()
NO_WORDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WORDS = {"input_ids": torch.arange(24).reshape(4, 6)}
NETS: dict[str, tuple[Any, Any, int]] = {
    "fused": (lambda: _net(Fused()), ROWS, 4),
    "fused head by head": (lambda: _net(Fused("together")), ROWS, 4),
    "shared keys": (lambda: _net(Shared()), ROWS, 2),
    "one key for all": (lambda: _net(OneKey()), ROWS, 4),
    "torch's": (lambda: st.with_linear_layers(_net(Borrowed())), ROWS, 4),
    "a bias of the first layer": (lambda: _stack(0), ROWS, 4),
    "a bias of the stack": (lambda: _stack(1), ROWS, 4),
    "no bias, of the first layer": (lambda: _stack(2), ROWS, 4),
    "as vision transformers write it": (lambda: st.with_linear_layers(_net(Vision())), ROWS, 4),
    "bert": (lambda: _transformer("Bert", vocab_size=30, max_position_embeddings=8), WORDS, 4),
    "vit": (lambda: _transformer("ViT", image_size=8, patch_size=4), IMAGES, 4),
    "llama": (lambda: _transformer("Llama", vocab_size=30, num_key_value_heads=2), WORDS, 2),
    "phi-3": (lambda: _transformer("Phi3", vocab_size=30, num_key_value_heads=2, **NO_WORDS), WORDS, 2),
}


def _coupled(model: nn.Module, example: Any) -> tuple[st.Sites, Coupling]:
    sites = st.couple(model, st.find(model), example)
    (heads,) = (coupling for coupling in sites.couplings if coupling.products)
    return sites, heads


def _outputs(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        return output_tensors(model(**x) if isinstance(x, dict) else model(x))


@pytest.mark.table(every=4)
@pytest.mark.parametrize("name", NETS)
def test_what_is_left_computes_what_zeroed_heads_do(name: str):
    make, x, count = NETS[name]
    model = make()
    sites, heads = _coupled(model, x)
    assert heads.channels == count
    assert {unit(coupling.places) for coupling in sites.couplings if coupling is not heads} <= {"channel"}
    assert unit(heads.places) == "head"
    zeroed, small = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for reader in heads.on(IN):
            zeroed.get_submodule(reader.name).weight[:, reader.positions[1]] = 0
    narrow(small, axes_left(sites.couplings, {heads.name: [n for n in range(count) if n != 1]}))
    for dense, wanted, given in zip(*(_outputs(m, x) for m in (model, zeroed, small)), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(dense, wanted, rtol=1e-3)


def test_numbers_of_a_module_follow_and_sizes_of_a_head_stay():
    model = _net(Shared())
    sites, heads = _coupled(model, ROWS)
    narrow(model, axes_left(sites.couplings, {heads.name: [1]}))
    attention = model.att
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.inner_dim) == (2, 1, 4, 8)
    assert attention.q_norm.normalized_shape == (4,)
    assert attention.slope.shape == (2, 1, 1)
    assert (attention.q.out_features, attention.k.out_features, attention.o.in_features) == (8, 4, 8)


def test_what_all_heads_read_stays():
    model = _net(OneKey())
    sites, heads = _coupled(model, ROWS)
    narrow(model, axes_left(sites.couplings, {heads.name: [0, 3]}))
    attention = model.att
    assert (attention.inner, attention.num_key_value_groups, attention.qkv.out_features) == (8, 2, 16)


@pytest.mark.parametrize("where", [0, 1])
def test_layers_that_add_one_bias_lose_heads_together(where: int):
    model = _stack(where)
    sites, heads = _coupled(model, ROWS)
    assert [side.name for side in heads.on(IN)] == ["blocks.0.o", "blocks.1.o"]
    narrow(model, axes_left(sites.couplings, {heads.name: [0, 3]}))
    assert [(block.n_heads, block.inner_dim) for block in model.blocks] == [(2, 8), (2, 8)]
    assert (model.bias if where else model.blocks[0].bias).weight.shape == (6, 2)


class Sloped(Stack):
    """Makes a slope for each head of how many there are, as Bloom does."""

    def __init__(self) -> None:
        super().__init__(2)
        self.n_heads = HEADS
        for block in self.blocks:
            block.inner_dim = -1

    def forward(self, x: Tensor) -> Tensor:
        slopes = torch.arange(1.0, self.n_heads + 1).to(x) / self.n_heads
        places = torch.arange(x.shape[1]).to(x)
        x, added = self.into(x), (slopes[:, None, None] * places)[None]
        for block in self.blocks:
            x = x + block(x, added)[0]
        return self.head(x)


def test_heads_whose_slopes_are_made_of_their_number_stay_with_the_reason():
    torch.manual_seed(0)
    sites = st.couple(model := Sloped().double().eval(), st.find(model), ROWS)
    assert not any(coupling.products for coupling in sites.couplings)
    reasons = [each.reason for each in sites.skipped if each.name.endswith(".q:out")]
    assert len(reasons) == 2
    assert all(why.startswith("together with those of blocks: without half of") for why in reasons)


def test_heads_that_code_counts_otherwise_stay_with_the_reason():
    sites = st.couple(model := _net(OfInput()), st.find(model), ROWS)
    assert not any(coupling.products for coupling in sites.couplings)
    (reason,) = (each.reason for each in sites.skipped if each.name == "att.qkv:out")
    assert "invalid for input" in reason
    assert "write -1" in reason


def test_one_layer_loses_heads_and_the_configuration_that_all_have_stays(tmp_path: Path):
    model = _net(Twice())
    sites = st.couple(model, st.find(model), ROWS)
    found = {coupling.name: coupling for coupling in sites.couplings if coupling.products}
    assert set(found) == {"att.first.qkv_proj:out", "att.second.qkv_proj:out"}
    heads = found["att.first.qkv_proj:out"]
    zeroed, small = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        zeroed.att.first.o_proj.weight[:, heads.on(IN)[0].positions[1]] = 0
    narrow(small, axes_left(sites.couplings, {heads.name: [0]}))
    torch.testing.assert_close(small(ROWS), zeroed(ROWS), rtol=1e-12, atol=1e-12)
    first, second, whole = small.att.first.config, small.att.second.config, small.att.config
    assert (first.num_heads, second.num_heads, whole.num_heads, first.layers) == (2, 4, 4, 4)
    whole.layers = 7
    assert copy.deepcopy(small).att.first.config.layers == first.layers == 7
    result = st.compress(model, list(ROWS.split(2)), {"macs": 0.8}, methods=PrincipalFilters(), only=["att.*"])
    st.save(result, tmp_path / "small.safetensors")
    again = st.load(_net(Twice()), tmp_path / "small.safetensors").eval()
    torch.testing.assert_close(again(ROWS), result.model(ROWS))


def test_a_vision_transformer_is_told_what_lets_its_heads_go(tmp_path: Path):
    model = _net(Vision())
    sites = st.couple(model, st.find(model), ROWS)
    reason = next(each.reason for each in sites.skipped if each.name == "att.qkv:out")
    assert reason.endswith("those of spectrim.with_linear_layers(model) can go")
    result = st.compress(
        st.with_linear_layers(model), list(ROWS.split(2)), {"macs": 0.8}, methods=PrincipalFilters(), only=["att.*"]
    )
    small: Any = result.model
    assert 12 * small.att.num_heads == small.att.qkv.out_features < 48
    st.save(result, tmp_path / "small.safetensors")
    torch.testing.assert_close(st.load(_net(Vision()), tmp_path / "small.safetensors").eval()(ROWS), small(ROWS))


def test_a_plan_that_removes_heads_counts_products_and_is_saved(tmp_path: Path):
    model = _net(Shared())
    batches = [torch.randn(8, 6, 5).double() for _ in range(4)]
    sites = st.calibrate(model, st.couple(model, st.find(model), batches[0]), batches)
    (heads,) = (coupling for coupling in sites.couplings if coupling.products)
    table = st.tabulate(sites, [PrincipalFilters()])
    (row,) = (row for row in table.rows if row.site == heads.name)
    assert row.kind == "2 heads"
    assert "2 heads in 1 group can be removed" in str(dataclasses.replace(sites, couplings=(heads,)))
    dense, option = row.options
    # Queries 8, keys and values 4 of 16 each; outputs 16 of 8; scores and sums of 2 heads of 4.
    assert dense.costs["macs"] - option.costs["macs"] == 6 * (8 * 16 + 2 * 4 * 16 + 16 * 8) + 2 * 2 * 6 * 6 * 4
    result = st.compress(model, batches, {"macs": 0.75}, methods=PrincipalFilters(), only=["att.*"])
    small: Any = result.model.eval()
    assert small.att.num_heads == 2
    assert [entry.kind for entry in result.plan if entry.of_channels] == ["2 heads"]
    read = st.Plan.from_json(result.plan.to_json())
    assert [entry.of_channels for entry in read] == [entry.of_channels for entry in result.plan]
    st.save(result, tmp_path / "small.safetensors")
    again = st.load(_net(Shared()), tmp_path / "small.safetensors")
    torch.testing.assert_close(again.eval()(batches[0]), small(batches[0]))


def test_heads_go_by_the_energy_that_the_others_cannot_make_up_for():
    model = _net(Fused())
    with torch.no_grad():
        model.att.proj.weight[:, 8:12] *= 1e-3
    batches = [torch.randn(32, 6, 5).double() for _ in range(2)]
    sites = st.calibrate(model, st.couple(model, st.find(model), batches[0]), batches)
    site = next(site for site in sites.coupled() if site.coupling.products)
    curve = PrincipalFilters().curve(site)
    choices: Any = curve.choices
    assert [len(choice.kept) for choice in choices] == [3, 2, 1]
    assert choices[0].kept == (0, 1, 3)
    assert 0 <= curve.errors[0] < 1e-4 < curve.errors[1] < curve.errors[2] < 1


def test_padding_is_no_response_of_a_head():
    model = _transformer("Bert", vocab_size=30, max_position_embeddings=8)
    words, mask = WORDS["input_ids"], torch.ones(4, 6, dtype=torch.int64)
    long = {"input_ids": torch.cat([words, words[:, :2]], 1), "attention_mask": torch.cat([mask, 0 * mask[:, :2]], 1)}
    sites, heads = _coupled(model, WORDS)
    short, padded = (
        st.calibrate(model, sites, [batch]).pooled[heads.name].max
        for batch in ({"input_ids": words, "attention_mask": mask}, long)
    )
    assert short is not None
    assert padded is not None
    torch.testing.assert_close(padded.mean, short.mean, rtol=1e-9, atol=1e-9)
