"""Which layers are offered as groups, by the names and shapes of well-known networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim as st
from benchmarks.cifar import ResNet
from benchmarks.paper_resnets import PaperResNet
from spectrim.methods.joint_layers import compatible
from spectrim.network.groups import residual
from spectrim.network.sites import Sites


def seen(model: nn.Module, *shape: int) -> Sites:
    """The sites with their input shapes, and which see one tensor."""
    return st.calibrate(model.eval(), st.find(model), [torch.randn(2, *shape)], statistics=False)


def forest(groups: Mapping[str, Sequence[str]]) -> None:
    """Every two groups are nested or apart, and each has two sites or more, once."""
    sets = [set(members) for members in groups.values()]
    for n, one in enumerate(sets):
        assert len(one) == len(list(groups.values())[n]) > 1
        assert all(one < other or other < one or not one & other for other in sets[:n])


@pytest.fixture(scope="module")
def resnet20() -> Sites:
    return seen(ResNet(3), 3, 32, 32)


def test_repeated_modules_of_a_cifar_resnet(resnet20: Sites) -> None:
    assert dict(resnet20.groups) == {}
    grouped = st.group(resnet20)
    forest(grouped.groups)
    wide = {name: members for name, members in grouped.groups.items() if len(members) == 3}
    assert wide == {
        f"layer{stage}.[0-2].conv{position}": tuple(f"layer{stage}.{block}.conv{position}" for block in range(3))
        for stage in (1, 2, 3)
        for position in (1, 2)
    }
    # The first of a stage has half the input depth: without it the others can share both factors.
    for stage in (2, 3):
        assert grouped.groups[f"layer{stage}.[1-2].conv1"] == (f"layer{stage}.1.conv1", f"layer{stage}.2.conv1")
        assert compatible(grouped[f"layer{stage}.[1-2].conv1"].layers, "both")
        assert not compatible(grouped[f"layer{stage}.[0-2].conv1"].layers, "left")
        assert compatible(grouped[f"layer{stage}.[0-2].conv1"].layers, "right")
    # Halves of three are two and one, and one is no group.
    assert grouped.groups["layer1.[0-1].conv1"] == ("layer1.0.conv1", "layer1.1.conv1")
    assert "layer1.[2-2].conv1" not in grouped.groups
    assert grouped.sites is resnet20.sites


def test_halves_are_nested_down_to_two() -> None:
    grouped = st.group(st.find(ResNet(9)), rules=("repeated",))
    forest(grouped.groups)
    names = [name for name in grouped.groups if name.startswith("layer1.") and name.endswith("conv2")]
    assert names == [
        f"layer1.[{a}-{b}].conv2" for a, b in ((0, 8), (0, 4), (0, 2), (0, 1), (3, 4), (5, 8), (5, 6), (7, 8))
    ]
    flat = st.group(st.find(ResNet(9)), nested=False)
    assert [name for name in flat.groups if name.startswith("layer1.")] == ["layer1.[0-8].conv1", "layer1.[0-8].conv2"]
    # The core of equal layers stays on offer beside the wider group.
    assert {"layer2.[0-8].conv1", "layer2.[1-8].conv1"} <= set(flat.groups)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_the_papers_networks(name: str) -> None:
    sites = seen(PaperResNet(name, width=8), 3, 32, 32)
    kept = residual(sites)
    blocks = {"resnet18": (2, 2, 2), "resnet34": (4, 6, 3), "resnet50": (4, 6, 3)}[name]
    positions = 3 if name == "resnet50" else 2
    expected = {
        f"layer{stage}.{block}.conv{position}"
        for stage, count in zip((2, 3, 4), blocks, strict=True)
        for block in range(count)
        for position in range(1, positions + 1)
    }
    assert {site.name for site in kept} == expected
    left = {site.name for site in sites} - expected
    assert {"conv1", "fc", "layer1.0.conv1", "layer2.0.downsample.0"} <= left
    assert {s.name for s in kept.skipped if s.reason == "kept dense by the preset"} == left
    # What is left alone still costs.
    for cost in (st.parameters, st.macs):
        whole, fewer = (cost([*s.untouched, *(site.spec for site in s)]) for s in (sites, kept))
        assert fewer == pytest.approx(whole)
    groups = st.group(kept, nested=False).groups
    forest(groups)
    for stage, count in zip((2, 3, 4), blocks, strict=True):
        for position in range(1, positions + 1):
            pattern = f"layer{stage}.[0-{count - 1}].conv{position}"
            assert groups[pattern] == tuple(f"layer{stage}.{b}.conv{position}" for b in range(count))
        # RJSVD-1 takes the layer of half the input depth in, RJSVD-2 leaves it out, where two or more are left.
        assert (f"layer{stage}.[1-{count - 1}].conv1" in groups) is (count > 2)


def test_the_preset_asks_for_stages() -> None:
    with pytest.raises(ValueError, match="the names of these 2 sites show 1 stage.s. of repeated blocks.*two or more"):
        residual(st.find(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))))


def test_a_flat_sequence_is_grouped_by_shapes() -> None:
    widths = [3, 8, 8, "pool", 16, 16, 16, "pool", 16, 16]
    layers: list[nn.Module] = []
    before = widths[0]
    for width in widths[1:]:
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]  # type: ignore[arg-type]
        before = width
    model = nn.Sequential()
    model.features = nn.Sequential(*layers)
    grouped = st.group(seen(model, 3, 16, 16), nested=False)
    forest(grouped.groups)
    # Layers of one stage have one output size; the pools and activations between them take numbers too.
    assert grouped.groups["features.[5,7,9]"] == ("features.5", "features.7", "features.9")
    assert grouped.groups["features.[7,9]"] == ("features.7", "features.9")
    assert grouped.groups["features.[12,14]"] == ("features.12", "features.14")
    assert grouped.groups["features.[0,2]"] == ("features.0", "features.2")
    assert len(grouped.groups) == 4


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(F.gelu(self.up(x)))


def transformer(blocks: int = 3, width: int = 12) -> nn.Module:
    model = nn.Sequential()
    model.layers = nn.Sequential(*(Block(width) for _ in range(blocks)))
    return model


def test_a_transformers_projections() -> None:
    sites = seen(transformer(), 5, 12)
    assert sites.same_inputs == tuple(tuple(f"layers.{n}.attention.{p}" for p in "qkv") for n in range(3))
    grouped = st.group(sites, nested=False)
    forest(grouped.groups)
    one_input = {f"layers.{n}.attention.q+k+v": tuple(f"layers.{n}.attention.{p}" for p in "qkv") for n in range(3)}
    repeated = {
        f"layers.[0-2].{p}": tuple(f"layers.{n}.{p}" for n in range(3)) for p in ("attention.out", "up", "down")
    }
    assert dict(grouped.groups) == one_input | repeated
    assert grouped["layers.1.attention.q+k+v"].same_input
    assert not grouped["layers.[0-2].up"].same_input
    # The other way round the same projection is shared across blocks, and nothing is left for the inputs.
    across = st.group(sites, rules=("repeated", "inputs"), nested=False).groups
    assert across["layers.[0-2].attention.q"] == tuple(f"layers.{n}.attention.q" for n in range(3))
    assert len(across) == 6
    assert dict(st.group(sites, rules=("inputs",)).groups) == one_input
    # What is seen is known after a run only.
    assert dict(st.group(st.find(transformer()), rules=("inputs",)).groups) == {}


def test_groups_by_hand(resnet20: Sites) -> None:
    listing: dict[str, Any] = dict(st.group(resnet20).groups)
    del listing["layer3.[0-2].conv2"]
    listing["mine"] = ["layer3.1.conv2", "layer3.2.conv1"]
    del listing["layer3.[0-1].conv2"], listing["layer3.[0-2].conv1"], listing["layer3.[1-2].conv1"]
    edited = st.group(resnet20, listing)
    assert dict(edited.groups) == {name: tuple(members) for name, members in listing.items()}
    site = edited["mine"]
    assert [spec.name for spec in site.layers] == listing["mine"]
    assert [part.name for part in site.parts] == listing["mine"]
    for part in site.parts:
        assert part.weight is resnet20[part.name].weight
    assert "mine" in edited
    assert dict(st.group(edited, {}).groups) == {}
    assert st.group(edited, {}).joint() == ()
    # Calibration keeps them.
    again = st.calibrate(ResNet(3).eval(), edited, [torch.randn(1, 3, 32, 32)], statistics=False)
    assert dict(again.groups) == dict(edited.groups)
    # A group whose sites are not all there is nothing to choose.
    fewer = dataclasses.replace(edited, sites=tuple(s for s in edited.sites if s.name != "layer3.1.conv2"))
    assert {s.name for s in edited.joint()} - {s.name for s in fewer.joint()} == {"mine"}


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ({"g": ["layer1.0.conv1", "layer9"]}, "group 'g' names 'layer9', which is no site; see sites.sites"),
        ({"g": ["layer1.0.conv1"]}, r"group 'g' has sites \['layer1.0.conv1'\]; expected two or more, each once"),
        ({"g": []}, "expected two or more"),
        ({"g": ["layer1.0.conv1", "layer1.0.conv1"]}, "expected two or more, each once"),
        ({"conv1": ["layer1.0.conv1", "layer1.1.conv1"]}, "group 'conv1' has the name of a site; give it another one"),
        (
            {"a": ["layer1.0.conv1", "layer1.1.conv1"], "b": ["layer1.1.conv1", "layer1.2.conv1"]},
            "groups 'a' and 'b' overlap; of two groups one contains more sites",
        ),
        ({"a": ["layer1.0.conv1", "layer1.1.conv1"], "b": ["layer1.1.conv1", "layer1.0.conv1"]}, "'a' and 'b' overlap"),
    ],
)
def test_groups_that_make_no_sense_are_refused(resnet20: Sites, groups: dict[str, list[str]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        st.group(resnet20, groups)


@pytest.mark.parametrize("rules", [("names",), "repeated", ("repeated", "stage")])
def test_unknown_rules_are_refused(resnet20: Sites, rules: Any) -> None:
    with pytest.raises(ValueError, match="expected some of 'inputs', 'repeated'"):
        st.group(resnet20, rules=rules)
