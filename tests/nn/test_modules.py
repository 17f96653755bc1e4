"""Factors as modules: built, multiplied out again, and refused where a plan does not fit."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from spectrim.errors import PlanError
from spectrim.linalg.unfold import unfold, unfolding, unfoldings
from spectrim.network.choices import Choice, ZeroChoice
from spectrim.network.factors import Factors, LowRank
from spectrim.nn.build import build, skeleton
from spectrim.nn.layers import canonical, spec_of
from spectrim.nn.modules import Factored, make_layer
from tests.nn.layers import LAYERS, close

CASES = [
    (name, how.name) for name, (make, _) in LAYERS.items() for how in unfoldings(spec_of(make(), ["layer"]).kernel)
]


def factorised(layer, how, rank=None, shift=None):
    """The layer and its best pair of some rank, full by default."""
    weight, bias = canonical(layer)
    spec = spec_of(layer, ["layer"])
    how = unfolding(spec.kernel, how)
    u, s, v = torch.linalg.svd(unfold(weight, how).double(), full_matrices=False)
    rank = rank or s.shape[-1]
    factors = LowRank(u[..., :rank] * s[:, None, :rank], v[:, :rank], shift, how, spec.shape[1:])
    (pair,) = build(factors, [spec], [bias])
    return pair, factors


@pytest.mark.table
@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_pair_of_full_rank_equals_the_layer_and_merges_back_to_it(name, how):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    pair, _ = factorised(layer, how)
    assert close(pair(x), layer(x), 1e-4)
    merged = pair.merged()
    assert type(merged) is type(layer)
    assert spec_of(merged, ["layer"]) == spec_of(layer, ["layer"])
    assert close(merged.weight, layer.weight)
    assert (merged.bias is None) == (layer.bias is None)
    assert merged.bias is None or torch.equal(merged.bias, layer.bias)


@pytest.mark.table
@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_pair_computes_what_its_factors_stand_for(name, how):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    spec = spec_of(layer, ["layer"])
    shift = torch.randn(spec.out_channels, dtype=torch.float64)
    pair, factors = factorised(layer, how, 1, shift)
    assert pair.rank == factors.rank == 1
    assert sum(p.numel() for n, p in pair.named_parameters() if "weight" in n) == factors.numel()
    bias = shift if layer.bias is None else shift + layer.bias.detach()
    dense = make_layer(dataclasses.replace(spec, bias=True), factors.dense()[0], bias)
    assert close(pair(x), dense(x), 1e-4)
    assert close(pair.merged()(x), dense(x), 1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_make_layer_rebuilds_a_layer_from_its_spec(name):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    again = make_layer(spec_of(layer, ["layer"]), *canonical(layer))
    assert torch.equal(again(x), layer(x))
    empty = make_layer(spec_of(layer, ["layer"]))
    assert empty.weight.shape == layer.weight.shape
    assert empty.bias is None or not empty.bias.any()


def test_copies_and_state_dicts_keep_what_a_pair_is():
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)
    pair, _ = factorised(layer, "height-first", 3)
    twin = copy.deepcopy(pair)
    assert (twin.rank, twin.unfolding, twin.original) == (3, "height-first", pair.original)
    assert torch.equal(twin(x), pair(x))
    assert torch.equal(twin.merged().weight, pair.merged().weight)
    assert list(pair.state_dict()) == ["0.weight", "1.weight", "1.bias"]
    other, _ = factorised(nn.Conv2d(4, 6, 3), "height-first", 3)
    other.load_state_dict(pair.state_dict())
    assert torch.equal(other(x), pair(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pairs_have_the_dtype_of_their_layer(dtype):
    layer, x = nn.Conv2d(4, 6, 3).to(dtype), torch.randn(2, 4, 5, 5).to(dtype)
    pair, _ = factorised(layer, "channel")
    assert {p.dtype for p in pair.parameters()} == {dtype}
    assert close(pair(x), layer(x), 1e-12 if dtype == torch.float64 else 0.03)
    assert pair.merged().weight.dtype == dtype
    assert pair.float().merged().weight.dtype == torch.float32


def test_the_printed_form_says_what_it_stands_for():
    pair, _ = factorised(nn.Conv2d(4, 6, 3, stride=2), "width-first", 2)
    assert "Conv2d 3x3/2, width-first, rank 2" in repr(pair)


def test_a_pair_whose_layers_are_pairs_merges_in_one_go():
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)
    pair, _ = factorised(layer, "height-first", 5)
    wanted = pair(x)
    pair[0], pair[1] = factorised(pair[0], "channel")[0], factorised(pair[1], "input")[0]
    assert pair.rank == 5
    assert "rank 5" in repr(pair)
    assert close(pair(x), wanted, 1e-4)
    assert close(pair.merged()(x), wanted, 1e-4)


@pytest.mark.table
@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_skeleton_has_the_shapes_of_the_pair(name, how):
    layer = LAYERS[name][0]()
    pair, _ = factorised(layer, how, 1)
    settings = {"rank": 1, "unfolding": how}
    (bare,) = skeleton(Choice("low_rank", "m", settings), [spec_of(layer, ["layer"])])
    assert isinstance(bare, Factored)
    assert {k: (v.shape, v.dtype) for k, v in bare.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in pair.state_dict().items()
    }
    for bias in (True, False):
        (bare,) = skeleton(Choice("low_rank", "m", {**settings, "bias": bias}), [spec_of(layer, ["layer"])])
        assert (bare[1].bias is not None) == bias
        assert spec_of(bare.merged(), ["layer"]).bias == bias


HOSTILE = [
    {"rank": 0},
    {"rank": -3},
    {"rank": 5},
    {"rank": 10**12},
    {"rank": 2**62},
    {"rank": "2"},
    {"rank": 2.0},
    {"rank": 1e300},
    {"rank": float("nan")},
    {"rank": True},
    {"rank": (1, 2)},
    {"rank": None},
    {"unfolding": "height-first"},
    {"unfolding": 3},
    {"unfolding": "../../etc"},
    {"bias": "no"},
    {"bias": 1},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_settings_that_do_not_fit_are_refused_before_memory_is_taken(change, monkeypatch):
    spec = spec_of(nn.Linear(4, 6), ["body.fc"])
    asked = []
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: asked.append(size) or plain(*size, **kw))
    with pytest.raises(PlanError, match=next(iter(change))):
        skeleton(Choice("low_rank", "m", {"rank": 2, "unfolding": "channel", **change}), [spec])
    assert not asked


def test_a_kind_without_factors_is_refused_and_those_that_have_some_are_listed():
    with pytest.raises(PlanError, match="'fc': a 'zero' choice has no factors; those of .*low_rank"):
        skeleton(ZeroChoice(0), [spec_of(nn.Linear(4, 6), ["fc"])])


def test_a_choice_for_one_layer_does_not_fit_two():
    specs = [spec_of(nn.Linear(4, 6), [name]) for name in "ab"]
    with pytest.raises(PlanError, match="'a': .* it is for one layer, not for 2"):
        skeleton(Choice("low_rank", "m", {"rank": 2, "unfolding": "channel"}), specs)


def test_factors_without_a_builder_are_an_error():
    class Strange:
        pass

    assert not issubclass(Strange, Factors)
    with pytest.raises(TypeError, match="no builder for factors of type Strange"):
        build(Strange(), [], [])
