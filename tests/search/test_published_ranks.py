"""Ranks from one rate: the paper's, and plans that can be carried out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import spectrim as st
from benchmarks.paper_resnets import PaperResNet
from spectrim.errors import MissingMomentsError
from spectrim.linalg.unfold import unfold, unfolding
from spectrim.network.groups import residual
from spectrim.network.sites import Sites, Statistics
from spectrim.search.published_ranks import at_rate, choices_at_rate

SCHEMES = ["svd", "ljsvd", "rjsvd-1", "rjsvd-2", "bi-jsvd"]


@pytest.fixture(scope="module")
def paper() -> dict[str, Sites]:
    torch.manual_seed(0)
    return {name: residual(st.find(PaperResNet(name))) for name in ("resnet18", "resnet34", "resnet50")}


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    torch.manual_seed(0)
    return PaperResNet("resnet18", width=4).eval()


class Stack(nn.Module):
    """Three linear layers at one place of repeated blocks, and one of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12, 20) for _ in range(3)])
        self.last = nn.Linear(12, 10, bias=False)


def joined(sites: Sites, rate: float, scheme: str, **options: float) -> dict[str, tuple[int, int]]:
    """Whole and left-shared rank by the name of the group's last layer."""
    found = choices_at_rate(sites, rate, scheme, **options)  # type: ignore[arg-type]
    several = [a for a in found if len(a.site.layers) > 1]
    return {a.site.layers[-1].name: (a.choice["rank"], a.choice["left_rank"]) for a in several}


def alone(sites: Sites, rate: float, scheme: str) -> dict[str, int]:
    return {a.site.name: a.choice["rank"] for a in choices_at_rate(sites, rate, scheme) if len(a.site.layers) == 1}


@pytest.mark.parametrize(
    ("scheme", "ranks"),
    [
        ("ljsvd", [15, 16, 34, 35, 54, 61]),
        ("rjsvd-2", [15, 16, 34, 35, 54, 61]),
        ("rjsvd-1", [17, 16, 36, 35, 64, 61]),
    ],
)
def test_resnet34_has_the_ranks_of_the_paper(paper: dict[str, Sites], scheme: str, ranks: list[int]):
    found = joined(paper["resnet34"], 0.08, scheme)
    places = [f"layer{stage}.{last}.conv{n}" for stage, last in ((2, 3), (3, 5), (4, 2)) for n in (1, 2)]
    assert [found[place][0] for place in places] == ranks


@pytest.mark.parametrize(
    ("proportion", "parts"),
    [(0.3, [(10, 23), (18, 43)]), (0.5, [(17, 17), (30, 30)]), (0.7, [(23, 10), (43, 18)])],
)
def test_both_parts_have_the_ranks_of_the_paper(
    paper: dict[str, Sites], proportion: float, parts: list[tuple[int, int]]
):
    found = joined(paper["resnet34"], 0.08, "bi-jsvd", proportion=proportion)
    split = [(found[place][1], found[place][0] - found[place][1]) for place in ("layer3.5.conv1", "layer4.2.conv2")]
    assert split == parts


def test_bottlenecks_have_the_ranks_of_the_paper(paper: dict[str, Sites]):
    places = ["layer3.5.conv1", "layer3.5.conv2", "layer3.5.conv3"]
    ranks = {s: [joined(paper["resnet50"], 0.04, s)[p][0] for p in places] for s in SCHEMES[1:4]}
    assert ranks == {"ljsvd": [28, 17, 12], "rjsvd-1": [12, 17, 30], "rjsvd-2": [12, 17, 30]}


def test_layers_of_half_the_depth_join_in_the_first_scheme_only(paper: dict[str, Sites]):
    sites = paper["resnet18"]
    assert joined(sites, 0.08, "rjsvd-1")["layer2.1.conv1"] == (14, 0)
    for scheme in ("rjsvd-2", "ljsvd", "bi-jsvd"):
        assert alone(sites, 0.08, scheme) == {f"layer{n}.{b}.conv1": 5 * 2**n // 2 for n in (2, 3, 4) for b in (0, 1)}
    assert len(alone(sites, 0.08, "svd")) == 12


def test_what_calibration_sees_does_not_change_the_groups():
    model = PaperResNet("resnet50", width=4).eval()
    example = torch.zeros(1, 3, 32, 32)
    sites = residual(st.find(model))
    seen = st.calibrate(model, sites, [example], statistics=False)
    assert joined(seen, 0.5, "rjsvd-1") == joined(sites, 0.5, "rjsvd-1")
    first = [a.site.layers[0].name for a in choices_at_rate(seen, 0.5, "rjsvd-1") if len(a.site.layers) > 1]
    assert "layer2.0.conv1" in first


@pytest.mark.parametrize("rate", [0.04, 0.11, 0.3])
@pytest.mark.parametrize("scheme", ["ljsvd", "rjsvd-1", "rjsvd-2"])
def test_shared_ranks_are_the_largest_with_the_parameters_of_separate_ones(
    paper: dict[str, Sites], scheme: str, rate: float
):
    for a in choices_at_rate(paper["resnet50"], rate, scheme):
        if len(a.site.layers) == 1:
            continue
        most = 0.0
        for spec in a.site.layers:
            pointwise = spec.kernel == (1, 1)
            width = min(spec.in_channels, spec.out_channels) if pointwise else spec.out_channels
            how = unfolding(spec.kernel, a.choice["unfolding"])
            most += rate * width * st.parameters(spec.factor(how, 1))
        one = st.parameters(a.method.layers(a.site, a.choice)) / a.choice["rank"]
        assert a.choice["rank"] * one <= most * (1 + 1e-9) < (a.choice["rank"] + 1) * one * (1 + 1e-9)


def test_proportions_0_and_1_are_the_one_sided_schemes(paper: dict[str, Sites]):
    for net in ("resnet34", "resnet50"):
        sites = paper[net]
        right = joined(sites, 0.08, "bi-jsvd", proportion=0.0)
        left = joined(sites, 0.08, "bi-jsvd", proportion=1.0)
        assert right == joined(sites, 0.08, "rjsvd-2")
        assert left == joined(sites, 0.08, "ljsvd")


@pytest.mark.table(every=2)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_is_carried_out_at_its_parameters_and_its_errors(narrow: nn.Module, scheme: str):
    sites = st.find(narrow, only=["layer2.*.conv*", "layer3.*.conv2"])
    plan = st.Plan.from_json(at_rate(sites, 0.3, scheme).to_json())
    small = st.apply(narrow, sites, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.costs["parameters"]
    assert sum(p.numel() for p in narrow.parameters()) == plan.dense_costs["parameters"]
    merged = st.merge(small)
    for entry in plan:
        lost = []
        for name in entry.sites:
            before, after = narrow.get_submodule(name).weight, merged.get_submodule(name).weight
            lost.append(float(((after - before).square().sum() / before.square().sum()).detach()))
        error = sum(lost) / len(lost)
        if scheme == "bi-jsvd" and entry.members:
            # More rounds are carried out than the plan has counted.
            assert 0.9 * entry.error < error <= entry.error + 1e-6
        else:
            assert error == pytest.approx(entry.error, abs=1e-5)


def test_a_plan_knows_what_is_left_alone_and_multiply_accumulates(narrow: nn.Module):
    example = torch.zeros(1, 3, 32, 32)
    seen = st.calibrate(narrow, residual(st.find(narrow)), [example], statistics=False)
    plan = at_rate(seen, 0.3, "ljsvd")
    everything = st.calibrate(narrow, st.find(narrow), [example], statistics=False)
    assert plan.dense_costs["macs"] == st.macs([site.spec for site in everything])
    assert plan.costs["macs"] < plan.dense_costs["macs"]
    assert plan.unit == "weight energy"
    assert plan.selector == "at_rate"
    assert {entry.choice.kind for entry in plan} == {"low_rank", "shared_basis"}


def test_calibrated_sites_lose_no_more_than_the_table_says(narrow: nn.Module):
    batches = [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    names = ["layer2.0.conv2", "layer2.1.conv2"]
    sites = st.calibrate(narrow, st.find(narrow, only=names), batches)
    plan = at_rate(sites, 0.3, "rjsvd-1")
    (entry,) = plan
    assert plan.unit == "output energy"
    (site,) = st.group(sites).joint()
    curve = st.JointSVD("right", unfoldings=("height-first",), multiple_of=1).curve(site)
    offered = {choice["rank"]: error for choice, error in zip(curve.choices, curve.errors, strict=True)}
    assert 0 < entry.error <= offered[entry.choice["rank"]] * (1 + 1e-6)


def test_some_calibrated_sites_are_refused(narrow: nn.Module):
    batches = [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    sites = st.calibrate(narrow, st.find(narrow, only=["layer2.0.conv*"]), batches)
    first = dataclasses.replace(sites.sites[0], statistics=Statistics())
    with pytest.raises(ValueError, match="different units"):
        at_rate(dataclasses.replace(sites, sites=(first, *sites.sites[1:])), 0.3, "svd")
    outputs = Statistics(output=sites.sites[0].statistics.input)
    empty = tuple(dataclasses.replace(site, statistics=outputs) for site in sites)
    with pytest.raises(MissingMomentsError, match="layer2.0.conv1"):
        at_rate(dataclasses.replace(sites, sites=empty), 0.3, "svd")


def test_linear_layers_take_a_share_of_their_fewer_channels():
    sites = st.find(Stack())
    assert alone(sites, 0.5, "svd") == {"blocks.0": 6, "blocks.1": 6, "blocks.2": 6, "last": 5}
    # 6 * 3 * (12 + 20) parameters over one shared and three own sides.
    assert joined(sites, 0.5, "ljsvd") == {"blocks.2": (576 // (12 + 60), 576 // (12 + 60))}
    assert joined(sites, 0.5, "rjsvd-1") == {"blocks.2": (576 // (20 + 36), 0)}
    assert alone(sites, 0.5, "ljsvd") == {"last": 5}


def test_given_groups_are_taken_and_of_nested_ones_the_largest():
    sites = st.find(Stack())
    some = st.group(sites, {"first two": ["blocks.0", "blocks.1"]})
    assert set(joined(some, 0.5, "ljsvd")) == {"blocks.1"}
    assert set(alone(some, 0.5, "ljsvd")) == {"blocks.2", "last"}
    nested = st.group(sites, {"two": ["blocks.0", "blocks.1"], "all": ["blocks.0", "blocks.1", "blocks.2"]})
    assert set(joined(nested, 0.5, "ljsvd")) == {"blocks.2"}


def test_ranks_are_at_least_1_and_at_most_full():
    sites = st.find(Stack())
    for scheme in SCHEMES:
        assert all(a.choice["rank"] == 1 for a in choices_at_rate(sites, 0.001, scheme))
    assert joined(sites, 1.0, "ljsvd") == {"blocks.2": (12, 12)}
    assert joined(sites, 1.0, "rjsvd-1") == {"blocks.2": (20, 0)}
    plan = at_rate(sites, 1.0, "rjsvd-1")
    assert all(entry.error == pytest.approx(0, abs=1e-6) for entry in plan)


def test_another_unfolding_may_be_asked_for(narrow: nn.Module):
    sites = residual(st.find(narrow))
    (choice, *_) = choices_at_rate(sites, 0.3, "ljsvd", unfolding="width-first")
    assert choice.choice["unfolding"] == "width-first"
    factors = choice.method.factorize(choice.site, choice.choice)
    unfolded = [unfold(w, factors.how) for w in choice.site.weights]  # type: ignore[attr-defined]
    rank = torch.linalg.matrix_rank(torch.cat([unfold(w, factors.how) for w in factors.dense()], -1), rtol=1e-4)  # type: ignore[attr-defined]
    assert int(rank) == choice.choice["rank"] < min(unfolded[0].shape[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "jsvd"}, "scheme is 'jsvd'; expected one of 'svd', 'rjsvd-1', 'rjsvd-2', 'ljsvd', 'bi-jsvd'"),
        ({"rate": 0.0}, "rate is 0.0; expected a share"),
        ({"rate": 4}, "rate is 4; expected a share"),
        ({"scheme": "bi-jsvd", "proportion": 2.0}, "proportion is 2.0"),
        ({"unfolding": "sideways"}, "unfoldings is \\('sideways',\\)"),
        ({"unfolding": "depth-first"}, "has no unfolding 'depth-first'"),
    ],
)
def test_what_cannot_be_is_refused(narrow: nn.Module, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        choices_at_rate(residual(st.find(narrow)), **{"rate": 0.3, **options})  # type: ignore[arg-type]
