"""Layer specs against torch's layers, and how sites are looked up."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from spectrim.errors import MissingMomentsError
from spectrim.linalg.moments import Moments
from spectrim.linalg.unfold import unfoldings
from spectrim.network.sites import Group, Layer, Sites, Statistics
from spectrim.nn.layers import canonical, spec_of
from spectrim.nn.modules import make_layer
from tests.cases import LAYERS, small_site


@pytest.mark.parametrize("kind", LAYERS)
def test_a_spec_describes_the_layer_it_makes(kind: str) -> None:
    site, layer, inputs = small_site(kind, calibrated=False)
    assert spec_of(make_layer(site.spec), site.spec.names) == site.spec
    assert tuple(site.weight.shape) == site.spec.shape
    assert site.spec.features == site.weight[0, 0].numel()
    again = make_layer(site.spec, site.weight, site.biases[0])
    with torch.no_grad():
        assert torch.equal(again(inputs), layer(inputs))
    weight, bias = canonical(again)
    assert torch.equal(weight, site.weight)
    assert bias is None if site.biases[0] is None else torch.equal(bias, site.biases[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_output_shape_is_torchs(kind: str) -> None:
    site, layer, inputs = small_site(kind, calibrated=False)
    if site.spec.is_linear:
        assert site.spec.output_shape((7,)) == (7,)
        return
    for extra in range(3):
        grown = torch.nn.functional.pad(inputs[:1], (0, extra) * len(site.spec.kernel))
        assert site.spec.output_shape(tuple(grown.shape[2:])) == tuple(layer(grown).shape[2:])


@pytest.mark.table(every=2)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_pair_has_the_shapes_of_its_layer(kind: str) -> None:
    site, layer, inputs = small_site(kind)
    for how in unfoldings(site.spec.kernel):
        first, second = site.spec.factor(how, 3)
        assert first.out_channels == second.in_channels == 3 * site.spec.groups
        assert (first.bias, second.bias) == (False, site.spec.bias)
        assert site.spec.factor(how, 3, bias=True)[1].bias
        middle = make_layer(first, torch.zeros(first.shape))(inputs[:1])
        output = make_layer(second, torch.zeros(second.shape))(middle)
        assert output.shape == layer(inputs[:1]).shape
        if not site.spec.is_linear:
            assert second.inputs == (tuple(middle.shape[2:]),)


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (nn.Linear(3, 4), "Linear"),
        (nn.Conv1d(4, 4, 3), "Conv1d 3"),
        (nn.Conv2d(4, 4, 3), "Conv2d 3x3"),
        (nn.Conv2d(4, 4, 3, stride=2), "Conv2d 3x3/2"),
        (nn.Conv2d(4, 4, (1, 5), stride=(2, 1), groups=2), "Conv2d 1x5/2x1 g2"),
        (nn.ConvTranspose3d(4, 4, 2, stride=2), "ConvTranspose3d 2x2x2/2"),
    ],
)
def test_kinds_are_words_for_people(module: nn.Module, word: str) -> None:
    assert spec_of(module, ("x",)).kind == word


def named(site: Layer, name: str) -> Layer:
    return dataclasses.replace(site, spec=dataclasses.replace(site.spec, names=(name,)))


def test_moments_are_required_by_name() -> None:
    site, _, _ = small_site("conv1d")
    assert site.require("input", "a test") is site.statistics.input
    with pytest.raises(MissingMomentsError) as caught:
        named(site, "encoder.0").require("gradient", "a test")
    assert str(caught.value) == (
        "site 'encoder.0' (Conv1d 5/2) holds no 'gradient' moments (held: input), which a test needs. "
        "Run calibrate(model, sites, batches) first."
    )


def test_sites_are_looked_up_by_name() -> None:
    one, _, _ = small_site("linear")
    two, _, _ = small_site("conv1d", calibrated=False)
    sites = Sites((one, named(two, "b")))
    assert len(sites) == 2
    assert [site.name for site in sites] == ["0", "b"]
    assert sites["b"].spec is sites.sites[1].spec
    assert "b" in sites
    assert "c" not in sites
    with pytest.raises(KeyError, match="no site 'c'; there are '0', 'b'"):
        sites["c"]
    with pytest.raises(KeyError, match="there are none"):
        Sites(())["c"]
    assert not sites.seen
    assert Sites((one,)).seen


def test_rows_count_weights_biases_and_what_is_left_alone() -> None:
    one, _, _ = small_site("linear")
    spec = one.spec
    sites = Sites((one,), untouched=(dataclasses.replace(spec, names=("left",)),), other_parameters=7, other_macs=11)
    weights = spec.in_channels * spec.out_channels
    (row,) = sites.rows()
    assert row["parameters"] == weights + spec.out_channels
    assert row["macs"] == weights * spec.positions
    lines = str(sites).splitlines()
    (whole,) = (line.split() for line in lines if line.startswith("whole network"))
    assert whole[-1] == str(2 * (weights + spec.out_channels) + 7)
    assert whole[-2] == str(2 * weights * spec.positions + 11)


def test_what_is_several_layers_has_no_single_spec() -> None:
    sites = Sites(tuple(named(small_site("linear")[0], name) for name in "abc"), groups={"all": ("a", "b", "c")})
    for what in ("spec", "weight"):
        with pytest.raises(AttributeError) as caught:
            getattr(sites["all"], what)
        assert str(caught.value) == (
            f"site 'all' is 3 layers (a, b, c) and has no {what} of its own: ask each of its parts"
        )
    assert sites["all"].kind == "3 x Linear"
    assert sites["all"].members == ("a", "b", "c")
    assert sites["a"].members == ()


def test_a_group_keeps_its_layers() -> None:
    parts = tuple(named(small_site(kind)[0], name) for kind, name in (("linear", "a"), ("conv1d", "b")))
    group = Group("both", parts, same_input=True)
    assert group.parts is parts
    assert group.layers == (parts[0].spec, parts[1].spec)
    assert all(weight is part.weight for weight, part in zip(group.weights, parts, strict=True))
    assert all(bias is part.bias for bias, part in zip(group.biases, parts, strict=True))
    assert group.calibrated
    assert not Group("bare", tuple(dataclasses.replace(part, statistics=Statistics()) for part in parts)).calibrated
    assert parts[0].parts == (parts[0],)


def test_statistics_say_what_is_there() -> None:
    assert not Statistics()
    assert Statistics().names == ()
    some = Statistics(output=Moments(1, 2), slices={"input": Moments(1, 3)})
    assert some
    assert some.names == ("output", "slices")


def test_statistics_of_channels_that_are_left() -> None:
    rows = torch.randn(1, 50, 6, dtype=torch.float64)
    whole, single = Moments(1, 6), Moments(1, 3)
    whole.update(rows)
    single.update(rows[..., ::2])
    left = Statistics(input=whole, channels=single).of_inputs(torch.tensor([[0, 2]]), 3)
    assert torch.equal(left.input.covariance, whole.covariance[:, [0, 1, 4, 5]][:, :, [0, 1, 4, 5]])
    assert torch.equal(left.channels.mean, single.mean[:, [0, 2]])
    assert left.input.count == 50
    outputs = Statistics(output=whole, gradient=whole, channels=single).of_outputs(torch.tensor([[5]]))
    assert torch.equal(outputs.output.covariance, whole.covariance[:, 5:, 5:])
    assert outputs.gradient.mean.shape == (1, 1)
    assert outputs.channels is single


def test_groups_are_sites_too() -> None:
    singles = tuple(named(small_site("linear")[0], name) for name in "abc")
    sites = Sites(singles, groups={"g": ("a", "c"), "gone": ("a", "x")}, same_inputs=(("a", "b", "c"),))
    assert [spec.name for spec in sites["g"].layers] == ["a", "c"]
    assert sites["g"].same_input
    assert "g" in sites
    assert len(sites) == 3  # groups stand beside the sites
    assert [site.name for site in sites.joint()] == ["g"]
    apart = dataclasses.replace(sites, same_inputs=(("a", "b"),))
    assert not apart["g"].same_input
    assert apart.together("h", ["a", "b"]).same_input
