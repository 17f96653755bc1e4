"""JointSVD: the contract on groups of every kind of sharing, what fits, what is counted, and how it adds up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.cost import counted as costs
from spectrim.errors import MissingMomentsError
from spectrim.linalg.moments import Moments
from spectrim.linalg.unfold import unfold, unfolding, unfoldings
from spectrim.methods import ActivationSVD, JointSVD, WeightSVD, from_record, statistics
from spectrim.methods.joint_layers import compatible, pose
from spectrim.network.factors import SharedBasis
from spectrim.network.sites import Group, Site, Statistics
from spectrim.nn.build import build, skeleton
from spectrim.testing import check_joint_method, measured_error, small_group

SHARES = (JointSVD("right", sweeps=2), JointSVD("left", sweeps=2), JointSVD("both", sweeps=2))
BARE = JointSVD("both", proportion=0.3)


# Each share, groups, transposed and padded layers; all of them on every kind are marked slow.
CONTRACTS = [
    *((method, "linear") for method in SHARES[:2]),
    (JointSVD("right", sweeps=1, unfoldings=("height-first",)), "conv2d"),
    (JointSVD("left", sweeps=1, unfoldings=("channel",), multiple_of=4), "transposed2d-grouped-no-bias"),
    (JointSVD("both", sweeps=2, unfoldings=("width-first",)), "transposed2d"),
    (JointSVD("both", proportion=1.0, sweeps=2), "linear-tokens-no-bias"),
    (JointSVD("both", proportion=0.0, sweeps=1, unfoldings=("input",), multiple_of=4), "conv2d-reflect"),
]


@pytest.mark.table(every=3)
@pytest.mark.parametrize(
    ("method", "kind"), CONTRACTS, ids=lambda value: value if isinstance(value, str) else value.name
)
def test_it_keeps_the_contract(method: JointSVD, kind: str) -> None:
    assert check_joint_method(method, layers=[kind]) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("method", SHARES, ids=lambda m: m.name)
def test_it_keeps_the_contract_on_every_layer_kind(method: JointSVD) -> None:
    assert check_joint_method(method) >= 300


@pytest.mark.slow
@pytest.mark.parametrize("method", [SHARES[1]], ids=lambda m: m.name)
def test_it_keeps_the_contract_in_double_precision(method: JointSVD) -> None:
    assert check_joint_method(method, layers=["linear"], dtype=torch.float64) >= 6


@pytest.mark.parametrize("same_input", [False, True])
def test_first_factors_are_fitted_by_each_layers_own_outputs(same_input: bool) -> None:
    """Fitting them again, by the weight of the layer's own outputs and not of the common ones, gains nothing more."""
    method = SHARES[0]
    site, *_ = small_group(
        "conv2d-1x1", narrow=None, same_input=same_input, dtype=torch.float32, calibrated=True, weighted=True
    )
    curve = method.curve(site)
    for choice in curve.choices[:3]:
        factors = again = method.factorize(site, choice)
        for number, part in enumerate(site.parts):
            again = method.refit(part, again, number)
        lost, least = (measured_error(site, each.dense(), curve.unit) for each in (factors, again))
        assert lost <= least * 1.003


def test_what_is_carried_out_loses_no_more_than_is_stated() -> None:
    """Both parts are improved by a common weight of the outputs: by their own the layers may lose more."""
    torch.manual_seed(0)
    first, second, third = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
    for layer in (second, third):
        layer.weight.data = 0.6 * first.weight.data + 0.4 * layer.weight.data
    ends = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, *ends)
    batches = [torch.randn(100, 8, 6, 6)]
    sites = st.sensitivity(net, st.calibrate(net, st.find(net), batches, rows=None), batches)
    site = st.group(sites, {"group": ["0", "2", "4"]})["group"]
    method = JointSVD("both", unfoldings=("width-first",), sweeps=3)
    curve = method.curve(site)
    assert len(curve.choices) > 3
    for choice, error in zip(curve.choices, curve.errors, strict=True):
        assert measured_error(site, method.factorize(site, choice).dense(), curve.unit) <= error * (1 + 1e-4)


@dataclasses.dataclass(frozen=True)
class Twice(JointSVD):
    """Counts what is shared for every layer."""

    def layers(self, site: Site, choice: Any) -> Any:
        return tuple(dataclasses.replace(spec, shared=0) for spec in super().layers(site, choice))


@dataclasses.dataclass(frozen=True)
class Worse(JointSVD):
    def refit(self, site: Site, factors: SharedBasis, number: int) -> SharedBasis:
        return dataclasses.replace(factors, own_lefts=tuple(0 * u for u in factors.own_lefts))


@pytest.mark.parametrize(
    ("method", "complaint"),
    [(Twice("left"), "costs count"), (Twice("right"), "costs count"), (Worse("right"), "once refitted")],
)
def test_the_check_finds_what_is_wrong(method: JointSVD, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_joint_method(method, layers=["linear"])


def test_a_method_for_one_layer_offers_nothing_for_groups() -> None:
    with pytest.raises(AssertionError, match="WeightSVD offers nothing for any of the groups"):
        check_joint_method(WeightSVD(), layers=["linear"])


@pytest.mark.parametrize("share", ["right", "left"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_without_data_the_error_is_that_of_the_stacked_svd(share: str, kind: str) -> None:
    site, _, _ = small_group(kind, calibrated=False, dtype=torch.float64)
    curve = JointSVD(share).curve(site)
    assert (curve.unit, curve.scale) == ("weight energy", 3.0)
    for choice, error in list(zip(curve.choices, curve.errors, strict=True))[::3]:
        how = unfolding(site.layers[0].kernel, choice["unfolding"])
        # Every layer counts with the share of its energy that is lost.
        scaled = [unfold(w / w.norm(), how) for w in site.weights]
        s = torch.linalg.svdvals(torch.cat(scaled, dim=-2 if share == "right" else -1))
        assert error == pytest.approx(float(s[..., choice["rank"] :].square().sum()) / 3, abs=1e-10)


@pytest.mark.parametrize("share", ["right", "left"])
def test_plain_energy_is_the_objective_of_the_paper(share: str) -> None:
    # Chen et al., equations 4 and 9: the SVD of the stack as it is, in which a layer of large weights counts more.
    site, _, _ = small_group("conv2d", calibrated=False, dtype=torch.float64)
    site = with_weights(site, [w * size for w, size in zip(site.weights, (1.0, 5.0, 0.2), strict=True)])
    method = JointSVD(share, unfoldings=("height-first",), energy="plain")
    curve = method.curve(site)
    choice, error = curve.choices[1], curve.errors[1]
    how, dim = unfolding((3, 3), "height-first"), -2 if share == "right" else -1
    matrices = [unfold(w, how) for w in site.weights]
    u, s, v = torch.linalg.svd(torch.cat(matrices, dim=dim), full_matrices=False)
    r = choice["rank"]
    stack = (u[..., :r] * s[..., None, :r]) @ v[..., :r, :]
    products = [unfold(w, how) for w in method.factorize(site, choice).dense()]
    torch.testing.assert_close(torch.cat(products, dim=dim), stack)
    shares = [(m - p).square().sum() / m.square().sum() for m, p in zip(matrices, products, strict=True)]
    assert error == pytest.approx(float(sum(shares)) / 3)
    # Less of the plain sum is lost than by the choice in which every layer counts alike, and more of the shares.
    alike = JointSVD(share, unfoldings=("height-first",))
    others = [unfold(w, how) for w in alike.factorize(site, dataclasses.replace(choice, method=alike.name)).dense()]
    lost = [sum((m - p).square().sum() for m, p in zip(matrices, each, strict=True)) for each in (products, others)]
    assert lost[0] < lost[1]
    assert (
        dict(zip(alike.curve(site).choices, alike.curve(site).errors, strict=True))[
            dataclasses.replace(choice, method=alike.name)
        ]
        < error
    )


@pytest.mark.slow
def test_plain_energy_keeps_the_contract() -> None:
    assert check_joint_method(JointSVD("both", sweeps=2, multiple_of=4, energy="plain"), layers=["linear"]) > 0


def test_a_layer_of_half_the_input_depth_joins_by_the_second_factor() -> None:
    site, layers, inputs = small_group("conv2d", narrow="inputs")
    assert [spec.in_channels for spec in site.layers] == [6, 6, 3]
    assert JointSVD("left").curve(site).choices == ()
    assert JointSVD("both").curve(site).choices == ()
    method = JointSVD("right", unfoldings=("height-first",))
    curve = method.curve(site)
    choice = curve.choices[-1]
    factors = method.factorize(site, choice)
    rank = choice["rank"]
    assert [u.shape[-2] for u in factors.own_lefts] == [18, 18, 9]
    assert factors.numel() == rank * (18 + 18 + 9 + 24)
    pairs = build(factors, site.layers, site.biases)
    assert len({id(pair.second.weight) for pair in pairs}) == 1
    with torch.no_grad():
        for pair, layer, x in zip(pairs, layers, inputs, strict=True):
            assert pair(x).shape == layer(x).shape


def altered(group: Group, number: int, **changes: Any) -> Group:
    """The group with other numbers of one layer's spec."""
    return with_part(group, number, spec=dataclasses.replace(group.layers[number], **changes))


def with_part(group: Group, number: int, **changes: Any) -> Group:
    parts = list(group.parts)
    parts[number] = dataclasses.replace(parts[number], **changes)
    return dataclasses.replace(group, parts=tuple(parts))


def with_weights(group: Group, weights: Sequence[Tensor]) -> Group:
    parts = zip(group.parts, weights, strict=True)
    return dataclasses.replace(group, parts=tuple(dataclasses.replace(part, weight=weight) for part, weight in parts))


def with_gradient(group: Group, number: int, gradient: Moments) -> Group:
    statistics = dataclasses.replace(group.parts[number].statistics, gradient=gradient)
    return with_part(group, number, statistics=statistics)


def test_what_does_not_fit_is_offered_nothing() -> None:
    site, _, _ = small_group("conv2d")
    narrow, _, _ = small_group("conv2d", narrow="outputs")
    assert JointSVD("left").curve(narrow).choices
    for method in (JointSVD("right"), JointSVD("both")):
        assert method.curve(narrow).choices == ()
    for method in SHARES:
        assert not isinstance(site.parts[0], method.takes)
        for changes in ({"kernel": (5, 3)}, {"groups": 2}, {"transposed": True}, {"dtype": torch.float64}):
            assert method.curve(altered(site, 1, **changes)).choices == ()
    # A factor is a weight: how it is laid over the input is each layer's own.
    for changes in ({"stride": (2, 2)}, {"padding": (0, 0)}, {"dilation": (2, 2)}):
        assert all(compatible(altered(site, 1, **changes).layers, m.share) for m in SHARES)


@pytest.mark.parametrize("method", SHARES, ids=lambda m: m.name)
def test_layers_of_other_strides_share_weights(method: JointSVD) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(6, 8, 3, stride=s, padding=1) for s in (1, 2)]
    site, _, inputs = small_group("conv2d", number=2, calibrated=False)
    weights = tuple(layer.weight.detach()[None] for layer in layers)
    site = with_weights(altered(site, 1, stride=(2, 2)), weights)
    choice = method.choice(
        site, unfolding((3, 3), "height-first"), method.full_rank(site, unfoldings((3, 3))[2]), bias=True
    )
    factors = method.factorize(site, choice)
    pairs = build(factors, site.layers, tuple(layer.bias.detach() for layer in layers))
    for pair, layer, x, weight in zip(pairs, layers, inputs, factors.dense(), strict=True):
        expected = nn.functional.conv2d(x, weight[0], layer.bias, layer.stride, 1)
        torch.testing.assert_close(pair(x), expected, atol=1e-5, rtol=1e-4)


def test_the_first_factor_is_computed_once_where_all_see_one_input() -> None:
    site, _, _ = small_group("linear", same_input=True)
    method = JointSVD("left")
    choice = method.choice(site, unfoldings(())[0], 3, bias=True)
    assert choice["once"] is True
    specs = method.layers(site, choice)
    assert len(specs) == 4  # one first layer and three second ones
    rank, rows, columns = 3, 12, 8
    assert costs.parameters(specs) == rank * (rows + 3 * columns) + 3 * columns
    assert costs.macs(specs) == rank * (rows + 3 * columns)
    pairs = build(method.factorize(site, choice), site.layers, site.biases)
    assert len({id(pair.first.layer.weight) for pair in pairs}) == 1
    apart, _, _ = small_group("linear")
    plain = method.choice(apart, unfoldings(())[0], 3, bias=True)
    assert "once" not in plain.settings
    assert costs.parameters(method.layers(apart, plain)) == costs.parameters(specs)
    assert costs.macs(method.layers(apart, plain)) == 3 * rank * (rows + columns)
    # Not where only a part of the first factor is shared, nor where layers lay it differently over the input.
    both = JointSVD("both")
    assert "once" not in both.choice(site, unfoldings(())[0], 4, bias=True).settings
    strided, _, _ = small_group("conv2d", same_input=True)
    strided = altered(strided, 1, stride=(2, 2))
    assert "once" not in method.choice(strided, unfolding((3, 3), "channel"), 3, bias=True).settings
    assert method.choice(strided, unfolding((3, 3), "input"), 3, bias=True)["once"] is True


def test_shared_factors_are_counted_once() -> None:
    site, _, _ = small_group("conv2d-grouped")
    how = unfolding((3, 3), "height-first")
    g, rows, columns = 2, 4 * 3, 6 * 3
    for method, left, rank in ((SHARES[0], 0, 5), (SHARES[1], 5, 5), (BARE, 2, 6)):
        choice = method.choice(site, how, rank, bias=True)
        assert choice["left_rank"] == left
        own, shared = (rank - left) * rows + left * columns, left * rows + (rank - left) * columns
        assert costs.parameters(method.layers(site, choice)) == g * (3 * own + shared) + 3 * 12
        assert method.factorize(site, choice).numel() == g * (3 * own + shared)


@pytest.mark.table
@pytest.mark.parametrize("method", SHARES, ids=lambda m: m.name)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_scale_of_a_group_is_the_sum_of_its_rows(method: JointSVD, weighted: bool) -> None:
    site, _, _ = small_group("conv2d", weighted=weighted)
    curve = method.curve(site)
    alone = [ActivationSVD(sweeps=0).curve(part) for part in site.parts]
    assert curve.unit == alone[0].unit == ("weighted output energy" if weighted else "output energy")
    assert curve.scale == pytest.approx(sum(c.scale for c in alone), rel=1e-6)
    if not weighted:
        assert curve.scale == 3


@pytest.mark.parametrize("share", ["left", "right"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_is_lost_at_full_rank_and_sharing_loses_more_than_rows_apart(share: str, weighted: bool) -> None:
    site, _, _ = small_group("linear", weighted=weighted, dtype=torch.float64)
    method = JointSVD(share, multiple_of=1, to_full_rank=True)
    curve = method.curve(site)
    assert len(curve.choices) == method.full_rank(site, unfoldings(())[0])
    assert curve.errors[-1] == pytest.approx(0, abs=1e-6)
    assert list(curve.errors) == sorted(curve.errors, reverse=True)
    rows = [ActivationSVD(multiple_of=1, to_full_rank=True, sweeps=0).curve(part) for part in site.parts]
    for rank in range(1, min(len(curve.errors), 8)):
        apart = sum(row.scale * row.errors[rank - 1] for row in rows)
        assert curve.scale * curve.errors[rank - 1] >= apart * (1 - 0.05)


def test_with_equal_weights_sharing_is_free() -> None:
    site, _, _ = small_group("linear", calibrated=False, dtype=torch.float64)
    site = with_weights(site, (site.weights[0], 2 * site.weights[0], -site.weights[0]))
    alone = WeightSVD(multiple_of=1).curve(site.parts[0])
    for method in (JointSVD("left", multiple_of=1), JointSVD("right", multiple_of=1)):
        curve = method.curve(site)
        assert list(curve.errors[: len(alone.errors)]) == pytest.approx(list(alone.errors))


def test_sensitive_layers_are_kept_better() -> None:
    site, _, _ = small_group("linear", weighted=True, dtype=torch.float64)
    before, moments = site.parts[0].statistics.gradient, Moments(1, 8)
    moments.count, moments.mean, moments.scatter = before.count, 10 * before.mean, 100 * before.scatter
    keen = with_gradient(site, 0, moments)

    def lost(what: Group, method: JointSVD) -> float:
        choice = method.choice(what, unfoldings(())[0], 3, bias=True)
        part = dataclasses.replace(what.parts[0])
        return measured_error(part, method.factorize(what, choice).dense()[:1], "weighted output energy")

    for method in SHARES[:2]:
        assert method.curve(keen).scale > 10 * method.curve(site).scale
        assert lost(keen, method) < lost(site, method)


@pytest.mark.table
@pytest.mark.parametrize("method", SHARES, ids=lambda m: m.name)
@pytest.mark.parametrize(("kind", "weighted"), [("linear", False), ("linear", True), ("conv2d", False)])
def test_a_refit_keeps_what_is_shared_and_does_not_raise_the_error(method: JointSVD, kind: str, weighted: bool) -> None:
    site, _, _ = small_group(kind, weighted=weighted, dtype=torch.float64)
    other, _, _ = small_group(kind, weighted=weighted, dtype=torch.float64, seed=10)
    curve = method.curve(site)
    unit = curve.unit
    for choice in curve.choices[:: max(1, len(curve.choices) // 4)]:
        factors = method.factorize(site, choice)
        for number, part in enumerate(site.parts):
            # New inputs and targets, as its compressed predecessors give them.
            new = dataclasses.replace(part.statistics, input=other.parts[number].statistics.input)
            part = dataclasses.replace(part, weight=part.weight + 0.1 * other.weights[number], statistics=new)
            fitted = method.refit(part, factors, number)
            assert torch.equal(fitted.shared_left, factors.shared_left)
            assert torch.equal(fitted.shared_right, factors.shared_right)
            for n in set(range(3)) - {number}:
                assert fitted.own_lefts[n] is factors.own_lefts[n]
                assert fitted.own_rights[n] is factors.own_rights[n]
            before, after = (measured_error(part, [f.dense()[number]], unit) for f in (factors, fitted))
            assert after <= before * (1 + 1e-6) + 1e-3, (choice, number)
            shift = fitted.shifts[number]
            assert shift is not None
            # The mean response stays: what the factors leave out of it goes to the bias.
            seen = statistics.Patches.of(part, factors.how)
            assert seen is not None
            missing = unfold(part.weight - fitted.dense()[number], factors.how)
            torch.testing.assert_close(shift, seen.shift(missing))


def test_a_refit_on_the_same_data_gains_nothing_where_the_fit_is_exact() -> None:
    site, _, _ = small_group("linear", dtype=torch.float64)
    for method in SHARES[:2]:
        choice = method.curve(site).choices[1]
        factors = method.factorize(site, choice)
        fitted = method.refit(site.parts[1], factors, 1)
        torch.testing.assert_close(fitted.dense()[1], factors.dense()[1], atol=1e-6, rtol=1e-6)
        assert method.refit(dataclasses.replace(site.parts[1], bias=None), factors, 1).shifts[1] is None


def test_the_curve_of_both_is_kept_at_every_rank_on_offer() -> None:
    site, _, _ = small_group("conv2d", calibrated=False, dtype=torch.float64)
    method = JointSVD("both", unfoldings=("height-first",), multiple_of=1, sweeps=4)
    curve = method.curve(site)
    assert 4 <= len(curve.choices) <= 8
    for choice, error in zip(curve.choices, curve.errors, strict=True):
        assert measured_error(site, method.factorize(site, choice).dense(), curve.unit) <= error + 1e-9
        assert choice["left_rank"] == round(0.5 * choice["rank"])


def test_both_with_one_part_is_that_part() -> None:
    site, _, _ = small_group("linear", calibrated=False, dtype=torch.float64)
    how = unfoldings(())[0]
    for proportion, share in ((0.0, "right"), (1.0, "left")):
        both, part = JointSVD("both", proportion=proportion), JointSVD(share)
        for rank in (1, 3):
            choices = [m.choice(site, how, rank, bias=True) for m in (both, part)]
            assert choices[0]["left_rank"] == choices[1]["left_rank"]
            made = [m.factorize(site, c).dense() for m, c in zip((both, part), choices, strict=True)]
            for a, b in zip(*made, strict=True):
                torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_layers_with_and_without_bias_are_built_as_announced() -> None:
    site, _, _ = small_group("linear", calibrated=False)
    site = with_part(altered(site, 1, bias=False), 1, bias=None)
    for method in SHARES:
        choice = method.curve(site).choices[-1]
        pairs = nn.ModuleList(build(method.factorize(site, choice), site.layers, site.biases))
        assert sum(p.numel() for p in pairs.parameters()) == costs.parameters(method.layers(site, choice))
        bare = nn.ModuleList(skeleton(choice, site.layers))
        bare.load_state_dict(pairs.state_dict())


def test_dead_layers_lose_nothing() -> None:
    for calibrated in (False, True):
        site, _, _ = small_group("linear", calibrated=calibrated)
        for weights in ((0 * site.weights[0], *site.weights[1:]), tuple(0 * w for w in site.weights)):
            dead = with_weights(site, weights)
            for method in SHARES:
                curve = method.curve(dead)
                assert all(0 <= e <= 1 for e in curve.errors)
                dense = method.factorize(dead, curve.choices[0]).dense()
                assert all(torch.isfinite(w).all() for w in dense)
                assert dense[0].abs().max() < 1e-6
    assert max(curve.errors) == 0


def test_layers_whose_outputs_do_not_matter() -> None:
    site, _, _ = small_group("linear", weighted=True)
    moments = Moments(1, 8)
    moments.count = 96
    idle = with_gradient(site, 1, moments)
    for method in SHARES:
        curve = method.curve(idle)
        assert all(0 <= e <= 1 for e in curve.errors)
        assert all(torch.isfinite(w).all() for w in method.factorize(idle, curve.choices[-1]).dense())


def test_moments_must_be_there_for_all_or_none() -> None:
    site, _, _ = small_group("linear")
    some = with_part(site, 1, statistics=Statistics())
    for method in SHARES:
        with pytest.raises(
            MissingMomentsError, match="group 'group': some of its layers are calibrated and some are not"
        ):
            method.curve(some)
    assert pose(some, unfoldings(())[0], left=True, right=False) is None
    choice = SHARES[0].curve(site).choices[0]
    with pytest.raises(MissingMomentsError):
        SHARES[0].factorize(some, choice)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"share": "top"}, "share is 'top'; expected one of 'left', 'right', 'both'"),
        ({"share": "both", "proportion": 1.5}, "proportion is 1.5; expected a share from 0 .right. to 1 .left."),
        ({"proportion": float("nan")}, "proportion is nan"),
        ({"first": "both"}, "first is 'both'; expected 'left' or 'right'"),
        ({"energy": "paper"}, "energy is 'paper'; expected 'equal' or 'plain'"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"sweeps": 0}, "sweeps must be at least 1, got 0"),
        ({"unfoldings": "channel"}, "unfoldings is 'channel'; expected a tuple of names"),
        ({"unfoldings": ("chanel",)}, "unfoldings is .'chanel',."),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        JointSVD(**options)


def test_names_tell_what_is_shared_and_records_make_it_again() -> None:
    assert [m.name for m in (*SHARES, BARE)] == [
        "JointSVD-right",
        "JointSVD-left",
        "JointSVD-both-0.5",
        "JointSVD-both-0.3",
    ]
    assert JointSVD("both", energy="plain").name == "JointSVD-both-0.5-plain"
    method = JointSVD("both", 0.7, ("height-first",), 4, True, 12, "right", "plain")
    assert from_record(method.record()) == method
    assert from_record({"type": "JointSVD", "options": {"share": "both", "proportion": 1}}) == JointSVD("both", 1.0)
