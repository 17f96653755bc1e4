from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.cost.counted import parameters, size_bytes
from spectrim.errors import PlanError
from spectrim.linalg.packing import packed_bytes
from spectrim.network.choices import Choice
from spectrim.nn.build import skeleton
from spectrim.nn.find import find
from spectrim.nn.layers import spec_of
from spectrim.nn.modules import Factored
from spectrim.nn.sparse.layers import Cropped, Masked, Slim, Summed
from spectrim.nn.surgery import merge, parameter_count, replace_module, size_in_bytes
from spectrim.nn.watch.norms import reestimate_batchnorm
from tests.nn.layers import ConvNet, Wrapped, close
from tests.nn.nets import CHOICES, compressed, low_rank, settle, sparse


@pytest.mark.parametrize("training", [True, False])
def test_replace_keeps_the_mode_and_reaches_all_names(training):
    inner = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(inner, nn.ReLU()), "b": nn.ModuleList([inner])}).train(training)
    new = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)).train(not training)
    replace_module(model, ["a.0", "b.0"], new)
    assert model["a"][0] is model["b"][0] is new
    assert all(m.training == training for m in model.modules())


def test_replace_puts_the_new_module_on_the_device_of_the_old():
    model = nn.Sequential(nn.Linear(3, 3, device="meta"))
    replace_module(model, ["0"], nn.Linear(3, 3))
    assert model[0].weight.is_meta


@pytest.mark.parametrize("name", ["body.missing", "nobody.fc", "body.0.weight"])
def test_replace_names_a_module_that_is_not_there(name):
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 3))})
    with pytest.raises(PlanError, match="no module '" + name):
        replace_module(model, [name], nn.Identity())


def test_a_pair_in_a_transformer_block_keeps_the_block_working():
    for make in (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    ):
        model = make().eval()
        prefix = "layers.0." if hasattr(model, "layers") else ""
        wide = {prefix + "linear1": low_rank(8), prefix + "linear2": low_rank(8)}
        small = compressed(copy.deepcopy(model), wide)
        x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        with torch.no_grad():
            assert small(x).shape == (2, 5, 8)
            masked = small(x, src_key_padding_mask=mask)
            assert close(masked[0], small(x)[0])
            # The dense twin of the pair, without fused kernels, is the reference.
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                wanted = merge(small)(x)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
            assert close(small(x), wanted, 1e-4)


def pairs(model):
    return [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Factored)]


def test_merge_gives_the_original_layers_that_compute_the_same():
    dense = ConvNet().eval()
    small = compressed(copy.deepcopy(dense), CHOICES).eval()
    before = copy.deepcopy(small.state_dict())
    merged = merge(small)
    assert pairs(small) == ["stem", "grouped", "up"]
    assert not pairs(merged)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}
    x = torch.randn(2, 3, 6, 6)
    assert close(merged(x), small(x), 1e-4)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert not any(m.training for m in merged.modules())


def test_merge_of_a_shared_pair_stays_shared():
    inner = nn.Linear(6, 6)
    model = compressed(nn.ModuleDict({"a": nn.Sequential(inner), "b": inner}), {"a.0": low_rank(2)})
    merged = merge(model)
    assert merged["a"][0] is merged["b"]
    assert isinstance(merged["b"], nn.Linear)
    assert close(merged["b"].weight, model["b"][1].weight @ model["b"][0].weight)


def test_merge_of_pairs_inside_pairs():
    model = compressed(Wrapped(nn.Conv2d(4, 6, 3)), {"layer": low_rank(5, "height-first")})
    compressed(model, {"layer.0": low_rank(4), "layer.1": low_rank(3, "input")})
    assert pairs(model) == ["layer", "layer.0", "layer.1"]
    x = torch.randn(2, 4, 5, 5)
    merged = merge(model)
    assert type(merged.layer) is nn.Conv2d
    assert close(merged(x), model(x), 1e-4)


def test_merge_of_a_pair_alone():
    pair = compressed(Wrapped(nn.Linear(4, 5)), {"layer": low_rank(2)}).layer.eval()
    merged = merge(pair)
    assert isinstance(merged, nn.Linear)
    assert not merged.training
    x = torch.randn(3, 4)
    assert close(merged(x), pair(x))


def test_shared_parameters_and_buffers_count_once():
    inner = nn.BatchNorm1d(4)
    model = nn.ModuleList([inner, inner, nn.Linear(4, 4).half(), nn.Linear(4, 4, bias=False)])
    model[3].weight = model[2].weight
    assert parameter_count(model) == 8 + 20
    assert size_in_bytes(model) == 8 * 4 + 8 * 4 + 8 + 20 * 2


def shared(share: dict, names: list[str]) -> list[nn.Module]:
    """Pairs of layers that share factors, with random weights."""
    specs = [spec_of(nn.Linear(6, 6), [name]) for name in names]
    modules = skeleton(Choice("shared_basis", "m", {"unfolding": "channel", **share}), specs)
    for parameter in nn.ModuleList(modules).parameters():
        nn.init.normal_(parameter, std=0.4)
    return list(modules)


SHARES = {
    "left": {"rank": 2, "left_rank": 2},
    "right": {"rank": 2, "left_rank": 0},
    "both": {"rank": 3, "left_rank": 1},
    "once": {"rank": 2, "left_rank": 2, "once": True},
}


@pytest.mark.parametrize("share", SHARES)
def test_replacing_and_merging_pairs_that_share_factors(share):
    dense = nn.ModuleDict({name: nn.Linear(6, 6) for name in "abc"}).eval()
    small = copy.deepcopy(dense)
    for name, module in zip("abc", shared(SHARES[share], list("abc")), strict=True):
        replace_module(small, [name], module)
    assert not any(m.training for m in small.modules())
    assert parameter_count(small) < sum(parameter_count(pair) for pair in small.values())
    merged = merge(small)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}
    x = torch.randn(3, 6)
    assert all(close(merged[name](x), small[name](x)) for name in "abc")
    assert parameter_count(merged) == parameter_count(dense)


def test_replacing_under_several_names_keeps_one_module_and_its_partners():
    inner = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": inner, "again": inner, "b": nn.Linear(6, 6)})
    one, other = shared(SHARES["both"], ["a", "b"])
    replace_module(model, ["a", "again"], one)
    replace_module(model, ["b"], other)
    assert model["a"] is model["again"]
    assert model["a"][0].parts[0].weight is model["b"][0].parts[0].weight
    merged = merge(model)
    assert merged["a"] is merged["again"]
    assert not torch.equal(merged["a"].weight, merged["b"].weight)


@pytest.mark.parametrize("share", SHARES)
def test_layers_that_share_factors_are_not_taken_apart_again(share):
    """Their weights stand in several places, or are one part of what is computed: neither can be factored alone."""
    model = nn.ModuleDict(dict(zip("abc", shared(SHARES[share], list("abc")), strict=True)))
    sites = find(model)
    own = {"left": ["1"], "right": ["0"], "both": [], "once": ["1"]}[share]
    assert [site.name for site in sites] == [f"{name}.{number}" for name in "abc" for number in own]
    assert all("tied" in skipped.reason or "part" in skipped.reason for skipped in sites.skipped)
    counted = parameters([*(site.spec for site in sites), *sites.untouched]) + sites.other_parameters
    assert counted == parameter_count(model)


def test_statistics_are_estimated_through_shared_factors():
    pairs = shared(SHARES["once"], ["a", "b"])
    model = nn.ModuleDict(
        {"a": nn.Sequential(pairs[0], nn.BatchNorm1d(6)), "b": nn.Sequential(pairs[1], nn.BatchNorm1d(6))}
    )
    batches = [torch.randn(16, 6) for _ in range(2)]

    def forward(net, x):
        return net["a"](x) + net["b"](x)

    assert reestimate_batchnorm(model, batches, forward=forward) == 2
    with torch.no_grad():
        for name in "ab":
            responses = torch.cat([model[name][0](x) for x in batches])
            assert close(model[name][1].running_mean, responses.mean(0), 1e-5)


SPARSE = {
    "stem": sparse(0, 0.3, "unstructured"),
    "grouped": sparse(2, 0.3, "rows", "height-first"),
    "up": sparse(3, 0.25, "2x2", "input"),
    "head": sparse(1, 0.5, "channels"),
}
PHYSICAL = {
    "stem": sparse(2, 0.1, "taps-1x2@1x0"),
    "grouped": sparse(0, 0.5, "channels"),
    "up": sparse(2, 0.5, "channels", "width-first"),
    "head": sparse(0, 0.5, "2:4"),
}


def kinds(model):
    return [m for m in model.modules() if isinstance(m, (Summed, Masked, Slim, Cropped))]


@pytest.mark.parametrize("choices", [SPARSE, PHYSICAL], ids=["masked", "physical"])
def test_merge_adds_up_sparse_layers(choices):
    dense = ConvNet().eval()
    dense.head = nn.Linear(6, 8 if choices is SPARSE else 5)
    if choices is PHYSICAL:
        choices = {**choices, "head": sparse(0, 0.5, "rows")}
    small = compressed(copy.deepcopy(dense), choices).eval()
    assert len(kinds(small)) >= 5
    settle(small)
    merged = merge(small)
    assert not kinds(merged)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}
    x = torch.randn(2, 3, 6, 6)
    assert close(merged(x), small(x), 1e-4)


@pytest.mark.parametrize("kind", [sparse(2, 0.3, "unstructured"), sparse(0, 0.5, "channels"), sparse(2, 0.1, "rows")])
def test_merge_of_a_sparse_layer_alone(kind):
    layer = compressed(Wrapped(nn.Linear(6, 8)), {"layer": kind}).layer.eval()
    settle(layer)
    merged = merge(layer)
    assert type(merged) is nn.Linear
    assert not merged.training
    x = torch.randn(3, 6)
    assert close(merged(x), layer(x))


def test_layers_inside_sparse_ones_are_sites_and_can_be_compressed_again():
    model = compressed(ConvNet(), {**SPARSE, "stem": sparse(2, 0.1, "taps-1x2@1x0")})
    settle(model)
    sites = find(model)
    assert {s.name for s in sites} == {
        "stem.pair.0", "stem.pair.1", "stem.sparse.layer", "grouped.pair.0", "grouped.pair.1",
        "up.pair.0", "up.pair.1", "head.pair.0", "head.pair.1", "head.sparse.layer",
    }  # fmt: skip
    reasons = {s.name: s.reason for s in sites.skipped}
    assert reasons.keys() == {"grouped.sparse", "up.sparse"}
    assert all(why.startswith("sparse: its weight is zero outside a mask.") for why in reasons.values())
    assert all("spectrim.merge" in why for why in reasons.values())
    again = compressed(
        model,
        {
            "stem.pair.0": low_rank(1), "stem.sparse.layer": sparse(1, 0.2, "rows"),
            "up.pair.1": sparse(1, 0.2, "unstructured"), "head.sparse.layer": low_rank(2),
            "head.pair.1": sparse(0, 0.5, "unstructured"),
        },
    ).eval()  # fmt: skip
    settle(again)
    merged = merge(again)
    assert not kinds(merged)
    assert not pairs(merged)
    x = torch.randn(2, 3, 6, 6)
    assert close(merged(x), again(x), 1e-4)


def test_a_compressed_network_costs_what_is_stored():
    model = compressed(ConvNet(), SPARSE)
    sites = find(model)
    counted = sum(parameters([spec]) for spec in [*(site.spec for site in sites), *sites.untouched])
    assert counted + sites.other_parameters == parameter_count(model)
    size = sum(size_bytes([spec]) for spec in [*(site.spec for site in sites), *sites.untouched])
    assert size + sites.other_bytes == size_in_bytes(model)
    # Fewer than all, and values and positions: 65 of 216 numbers of the stem.
    assert parameter_count(nn.ModuleList([model.stem])) == 65
    assert size_in_bytes(nn.ModuleList([model.stem])) == 65 * 4 + packed_bytes(216, 65)


def test_layers_with_a_mask_under_two_names_count_once():
    inner = nn.Linear(6, 6, bias=False)
    model = compressed(nn.ModuleDict({"a": nn.Sequential(inner), "b": inner}), {"a.0": sparse(0, 0.25, "rows")})
    assert parameter_count(model) == 6 * 2
    assert size_in_bytes(model) == 12 * 4 + packed_bytes(36, 12)


class Twice(nn.Module):
    """A block under two names, the first of them its own."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.again, self.head = nn.Sequential(self.block), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.again(x))


def test_merge_of_sums_in_a_block_under_two_names():
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(256, 16) @ torch.randn(16, 32)
    small = st.compress(model, list(x.split(64)), "parameters=60%", methods=st.LowRankPlusSparse(share=0.3)).model
    assert any(isinstance(module, Summed) for module in small.modules())
    merged = merge(small)
    assert merged.block[0] is merged.again[0][0]
    assert type(merged.block[0]) is nn.Linear
    close(merged(x), small(x), 1e-4)
