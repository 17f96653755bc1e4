"""Layer specs against torch's layers, and how sites are looked up."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from spectrim.errors import MissingMomentsError
from spectrim.linalg.unfold import unfoldings
from spectrim.network.sites import Site, Sites
from spectrim.nn.find import canonical, describe
from spectrim.nn.modules import make_layer
from tests.cases import LAYERS, small_site


@pytest.mark.parametrize("kind", LAYERS)
def test_a_spec_describes_the_layer_it_makes(kind: str) -> None:
    site, layer, inputs = small_site(kind, calibrated=False)
    assert describe(make_layer(site.spec), site.spec.names) == site.spec
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
    assert describe(module, ("x",)).kind == word


def test_moments_are_required_by_name() -> None:
    site, _, _ = small_site("conv1d")
    assert site.require("input", "a test") is site.moments["input"]
    with pytest.raises(MissingMomentsError) as caught:
        dataclasses.replace(site, name="encoder.0").require("gradient", "a test")
    assert str(caught.value) == (
        "site 'encoder.0' (Conv1d 5/2) holds no 'gradient' moments (held: input), which a test needs. "
        "Run calibrate(model, sites, batches) first."
    )


def test_sites_are_looked_up_by_name() -> None:
    one, _, _ = small_site("linear")
    two, _, _ = small_site("conv1d", calibrated=False)
    sites = Sites((one, dataclasses.replace(two, name="b")))
    assert len(sites) == 2
    assert [site.name for site in sites] == ["0", "b"]
    assert sites["b"].spec is two.spec
    assert "b" in sites
    assert "c" not in sites
    with pytest.raises(KeyError, match="no site 'c'; there are '0', 'b'"):
        sites["c"]
    with pytest.raises(KeyError, match="there are none"):
        Sites(())["c"]
    assert not sites.seen
    assert Sites((one,)).seen


def test_a_site_of_several_layers_has_no_single_spec() -> None:
    one, _, _ = small_site("linear")
    joint = Site("joint", one.layers * 2, one.weights * 2, one.biases * 2)
    with pytest.raises(ValueError, match="too many values to unpack"):
        _ = joint.spec
    with pytest.raises(ValueError, match="too many values to unpack"):
        _ = joint.weight


def test_a_joined_site_is_its_parts_again() -> None:
    parts = [small_site(kind)[0] for kind in ("linear", "conv1d")]
    parts = [
        dataclasses.replace(p, layers=(dataclasses.replace(p.spec, names=(n,)),), name=n)
        for p, n in zip(parts, "ab", strict=True)
    ]
    joint = Site.join("both", parts, same_input=True)
    assert [spec.name for spec in joint.layers] == ["a", "b"]
    assert sorted(joint.moments) == ["0/input", "1/input"]
    assert joint.same_input
    for part, again in zip(parts, joint.parts, strict=True):
        assert (again.name, again.layers, dict(again.moments)) == (part.name, part.layers, dict(part.moments))
        assert again.weight is part.weight
        assert again.biases[0] is part.biases[0]
    assert parts[0].parts == (parts[0],)


def test_groups_are_sites_too() -> None:
    one, _, _ = small_site("linear")
    singles = tuple(
        dataclasses.replace(one, name=n, layers=(dataclasses.replace(one.spec, names=(n,)),)) for n in "abc"
    )
    sites = Sites(singles, groups={"g": ("a", "c"), "gone": ("a", "x")}, same_inputs=(("a", "b", "c"),))
    assert [spec.name for spec in sites["g"].layers] == ["a", "c"]
    assert sites["g"].same_input
    assert "g" in sites
    assert len(sites) == 3  # groups stand beside the sites
    assert [site.name for site in sites.joint()] == ["g"]
    apart = dataclasses.replace(sites, same_inputs=(("a", "b"),))
    assert not apart["g"].same_input
    assert apart.together("h", ["a", "b"]).same_input
