from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import spectrim as st
from spectrim.cost.counted import parameters, size_bytes
from spectrim.errors import UnsupportedLayerError
from spectrim.nn.find import find
from spectrim.nn.layers import canonical, spec_of
from spectrim.nn.surgery import parameter_count, size_in_bytes
from tests.nn.layers import LAYERS, ConvNet, Wrapped

FUNCTIONAL = {
    (1, False): F.conv1d, (2, False): F.conv2d, (3, False): F.conv3d,
    (1, True): F.conv_transpose1d, (2, True): F.conv_transpose2d, (3, True): F.conv_transpose3d,
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_kind_is_a_site_that_describes_it(name):
    make, _ = LAYERS[name]
    model = Wrapped(make())
    sites = find(model)
    site = sites["layer"]
    assert (len(sites), sites.skipped, sites.untouched) == (1, (), ())
    assert site.weight.shape == site.spec.shape
    assert (site.biases[0] is not None) == site.spec.bias == (model.layer.bias is not None)
    assert not site.weight.requires_grad
    assert parameters(site.layers) == parameter_count(model)
    assert site.weight.data_ptr() == model.layer.weight.data_ptr()
    again = site.weight.transpose(1, 2) if site.spec.transposed else site.weight
    assert torch.equal(again.reshape(model.layer.weight.shape), model.layer.weight)


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("name", [n for n in LAYERS if "conv" in n or "transposed" in n])
def test_the_spec_holds_all_that_the_layer_computes_with(name):
    make, shape = LAYERS[name]
    layer, inputs = make(), torch.randn(shape)
    spec = spec_of(layer, ["layer"])
    if spec.padding_mode != "zeros":
        assert spec.padding_mode == layer.padding_mode
        return
    options = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation, "groups": spec.groups}
    if spec.transposed:
        options["output_padding"] = spec.output_padding
    run = FUNCTIONAL[len(spec.kernel), spec.transposed]
    assert torch.equal(run(inputs, layer.weight, layer.bias, **options), layer(inputs))


def test_describe_refuses_other_modules():
    with pytest.raises(UnsupportedLayerError, match="'norm' is a BatchNorm1d"):
        spec_of(nn.BatchNorm1d(3), ["norm"])


class Shouting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Named(nn.Linear):
    """A subclass that changes nothing."""


class Alien(Tensor):
    pass


def patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


def with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def with_buffer(name: str) -> nn.Module:
    layer = nn.Linear(4, 4)
    value = getattr(layer, name).detach()
    delattr(layer, name)
    layer.register_buffer(name, value)
    return layer


QAT = torch.ao.quantization.get_default_qat_qconfig()


def observed(layer):
    layer.activation_post_process = torch.ao.quantization.MinMaxObserver()
    return layer


SKIPPED = {
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), "depthwise"),
    "depthwise-transposed": (lambda: nn.ConvTranspose1d(4, 8, 3, groups=4), "depthwise"),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), "parametrised"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "parametrised"),
    "old weight norm": (lambda: old_weight_norm(nn.Linear(4, 4)), "parametrised"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "parametrised"),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), "parametrised"),
    "weight in a buffer": (lambda: with_buffer("weight"), "its weight is a buffer and no parameter: make it an nn.Par"),
    "bias in a buffer": (lambda: with_buffer("bias"), "its bias is a buffer and no parameter: make it an nn.Par"),
    "sharded": (lambda: with_weight(torch.ones(7)), "its weight is of shape (7,)"),
    "observed": (lambda: observed(nn.Linear(4, 4)), "compress the network before that"),
    "trained for quantisation": (lambda: torch.ao.nn.qat.Linear(4, 4, qconfig=QAT), "compress the network before that"),
    "lazy linear": (lambda: nn.LazyLinear(4), "lazy"),
    "lazy conv": (lambda: nn.LazyConv2d(4, 3), "lazy"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "meta device"),
    "subclass": (lambda: Shouting(4, 4), "Shouting overrides forward"),
    "inner subclass": (lambda: Standardised(4, 4, 3), "Standardised overrides forward"),
    "patched": (patched, "its forward was replaced on this object"),
    "integer": (lambda: with_weight(torch.ones(4, 4, dtype=torch.int8)), "torch.int8"),
    "complex": (lambda: with_weight(torch.ones(4, 4, dtype=torch.complex64)), "torch.complex64"),
    "float8": (lambda: with_weight(torch.ones(4, 4).to(torch.float8_e4m3fn)), "torch.float8_e4m3fn"),
    "tensor subclass": (lambda: with_weight(torch.ones(4, 4).as_subclass(Alien)), "Alien"),
    "sparse": (lambda: with_weight(torch.eye(4).to_sparse()), "sparse"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_layers_that_cannot_be_factorised_are_skipped_with_the_reason(name):
    make, reason = SKIPPED[name]
    model = nn.Sequential(nn.Linear(4, 4), make())
    sites = find(model)
    assert [site.name for site in sites] == ["0"]
    (skipped,) = sites.skipped
    assert skipped.name == "1"
    assert reason in skipped.reason


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantised_layers_are_skipped():
    if not torch.backends.quantized.supported_engines:
        pytest.skip("no quantised kernels on this machine")
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {nn.Linear})
    sites = find(model)
    assert not len(sites)
    assert [(s.name, s.kind, s.reason.partition(":")[0]) for s in sites.skipped] == [
        ("0", "Linear", "quantised, or prepared for it")
    ]


def test_a_subclass_that_changes_nothing_is_a_site():
    assert "0" in find(nn.Sequential(Named(3, 4)))


def test_a_weight_tied_to_an_embedding():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "mid": nn.Linear(4, 4), "out": nn.Linear(4, 10, bias=False)})
    model["out"].weight = model["embed"].weight
    sites = find(model)
    assert [s.name for s in sites] == ["mid"]
    assert [[part.name for part in tied.parts] for tied in sites.tied] == [["embed", "out"]]
    assert not sites.skipped
    for alone in (sites.untied(), find(model, skip="out")):
        reasons = {left.name: left.reason.partition(":")[0] for left in alone.skipped}
        assert reasons["embed"] == "its weight is tied to out"
        assert counted(alone) == parameter_count(model)


def test_two_layers_with_one_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    sites = find(model)
    assert [s.name for s in sites] == ["1"]
    assert [s.reason.partition(":")[0] for s in sites.skipped] == ["its weight is tied to 2", "its weight is tied to 0"]
    assert counted(sites) == parameter_count(model)


def test_a_weight_that_the_model_itself_holds_too():
    model = Wrapped(nn.Linear(4, 4))
    model.table = model.layer.weight
    assert find(model).skipped[0].reason.startswith("its weight is tied to the model itself: ")


def test_attention_keeps_its_output_projection():
    sites = find(nn.TransformerEncoderLayer(8, 2, 16))
    assert [s.name for s in sites] == ["linear1", "linear2"]
    # Its other weights are no layer's, and are listed with the module that holds them.
    assert [(s.name, s.kind) for s in sites.skipped] == [
        ("self_attn.out_proj", "Linear"), ("self_attn", "MultiheadAttention")
    ]  # fmt: skip
    assert "MultiheadAttention" in sites.skipped[0].reason


def test_a_layer_as_the_whole_model():
    (skipped,) = find(nn.Linear(4, 4)).skipped
    assert "wrap it in nn.Sequential" in skipped.reason


def test_a_module_under_two_names_is_one_site():
    inner = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(inner), "b": inner})
    sites = find(model)
    assert len(sites) == 1
    assert sites["a.0"].spec.names == ("a.0", "b")
    assert counted(sites) == parameter_count(model)
    assert not len(find(model, skip="b"))


@pytest.mark.table
@pytest.mark.parametrize("methods", [None, [st.PrincipalFilters()]])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.ConvTranspose1d])
def test_sizes_are_those_of_weights_that_were_cut_by_hand(kind: Any, methods: Any) -> None:
    size = () if kind is nn.Linear else (3,)
    model = nn.Sequential(kind(8, 32, *size), nn.ReLU(), kind(32, 24, *size), nn.ReLU(), kind(24, 4, *size)).eval()
    outputs, inputs = (1, 0) if kind is nn.ConvTranspose1d else (0, 1)
    for layer, axis in ((model[0], outputs), (model[2], inputs)):
        layer.weight = nn.Parameter(layer.weight.detach().narrow(axis, 0, 20).clone())
    model[0].bias = nn.Parameter(model[0].bias.detach()[:20].clone())
    batches = [torch.randn(64, 8) if kind is nn.Linear else torch.randn(8, 8, 12) for _ in range(2)]
    spec = find(model)["2"].layers[0]
    assert (spec.in_channels, spec.out_channels) == (20, 24)
    result = st.compress(model, batches, "parameters=70%", methods=methods)
    assert result.plan.dense_costs["parameters"] == parameter_count(model)
    assert result.plan.costs["parameters"] == parameter_count(result.model)


def counted(sites) -> float:
    specs = [*(spec for site in sites for spec in site.layers), *sites.untouched]
    return parameters(specs) + sites.other_parameters


@pytest.mark.parametrize(
    "name", ["depthwise", "parametrised", "old weight norm", "old spectral norm", "pruned", "meta"]
)
def test_parameters_and_bytes_add_up_with_skipped_layers(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), SKIPPED[name][0]())
    sites = find(model)
    specs = [*(site.spec for site in sites), *sites.untouched]
    assert counted(sites) == parameter_count(model)
    assert size_bytes(specs) + sites.other_bytes == size_in_bytes(model)


def test_parameters_and_bytes_add_up_on_a_network_of_half_precision():
    model = ConvNet().half()
    sites = find(model, skip="stem")
    specs = [*(site.spec for site in sites), *sites.untouched]
    assert counted(sites) == parameter_count(model)
    assert size_bytes(specs) + sites.other_bytes == size_in_bytes(model)


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        ({"skip": "stem"}, ["grouped", "up", "head"]),
        ({"skip": ["st*", "head"]}, ["grouped", "up"]),
        ({"skip": nn.Linear}, ["stem", "grouped", "up"]),
        ({"skip": [nn.ConvTranspose2d, "head"]}, ["stem", "grouped"]),
        ({"skip": lambda name, module: "u" in name}, ["stem", "head"]),
        ({"only": ["stem", "head"]}, ["stem", "head"]),
        ({"only": nn.Conv2d, "skip": lambda n, m: n == "grouped"}, ["stem"]),
        ({"only": lambda n, m: m.bias is None}, ["stem"]),
        ({"skip": "*"}, []),
        ({}, ["stem", "grouped", "up", "head"]),
    ],
)
def test_layers_are_chosen_by_pattern_type_and_predicate(chosen, wanted):
    sites = find(ConvNet(), **chosen)
    assert [s.name for s in sites] == wanted
    left = {"stem", "grouped", "up", "head"} - set(wanted)
    assert {s.name for s in sites.skipped} == {s.name for s in sites.untouched} == left
    assert {s.reason for s in sites.skipped} <= {"skipped on request", "not among the layers asked for"}


@pytest.mark.parametrize("keyword", ["skip", "only"])
def test_a_pattern_that_matches_no_layer_is_an_error_that_lists_the_layers(keyword):
    with pytest.raises(ValueError, match="'fc' matches no layer; layers are: stem, grouped, up, head"):
        find(ConvNet(), **{keyword: ["head", "fc"]})


def test_a_part_without_its_star_is_an_error():
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(3, 3)), "fc": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match="'block' matches no layer"):
        find(model, skip="block")
    assert [s.name for s in find(model, skip="block.*")] == ["fc"]


def test_a_selector_of_another_kind_is_an_error():
    with pytest.raises(TypeError, match="cannot choose layers by 3"):
        find(ConvNet(), skip=[3])


def test_find_leaves_the_model_alone():
    model = ConvNet()
    before = copy.deepcopy(model.state_dict())
    find(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_canonical_has_no_bias_where_the_layer_has_none():
    assert canonical(nn.Linear(3, 2, bias=False))[1] is None


def test_a_layer_that_holds_modules_or_a_bias_that_is_computed_is_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5), "c": nn.Linear(6, 5)})
    model["a"].act = nn.ReLU()
    prune.random_unstructured(model["b"], "bias", 0.3)
    sites = find(model)
    reasons = {each.name: each.reason for each in sites.skipped}
    assert [site.name for site in sites] == ["c"]
    assert reasons["a"].startswith("it holds modules of its own (act)")
    assert reasons["b"].startswith("parametrised")
    specs = [site.spec for site in sites] + list(sites.untouched)
    assert sites.other_parameters + parameters(specs) == parameter_count(model)
