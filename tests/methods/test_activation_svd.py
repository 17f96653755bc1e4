"""ActivationSVD against what the layer and the pair in its place really answer on the calibration data."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from spectrim.cost.counted import parameters
from spectrim.errors import MissingMomentsError
from spectrim.linalg.unfold import unfold, unfolding, unfoldings
from spectrim.methods import ActivationSVD, WeightSVD, statistics
from spectrim.methods.base import full_rank
from spectrim.network.choices import Choice
from spectrim.network.sites import Site
from spectrim.nn.build import build
from spectrim.nn.find import find
from spectrim.nn.watch import watchers
from spectrim.nn.watch.calibrate import calibrate
from spectrim.nn.watch.sensitivity import sensitivity
from spectrim.testing import measured_error
from tests.cases import LAYERS, small_site


@pytest.fixture
def unshrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain covariance of the samples, so that errors are comparable to many digits."""
    monkeypatch.setattr(statistics, "shrunk", lambda covariance, count: covariance)


@torch.no_grad()
def rows_of(site: Site, outputs: Tensor) -> Tensor:
    """Outputs as ``[g, n, o]``."""
    last = outputs.double() if site.spec.is_linear else outputs.double().movedim(1, -1)
    return last.reshape(-1, site.spec.groups, last.shape[-1] // site.spec.groups).transpose(0, 1)


@torch.no_grad()
def answers(site: Site, layer: nn.Module, inputs: Tensor, method: ActivationSVD | WeightSVD, choice: Choice):
    """What the layer answers, and what the modules built in its place do."""
    (pair,) = build(method.factorize(site, choice), site.layers, site.biases)
    return rows_of(site, layer(inputs)), rows_of(site, pair(inputs))


def some(site: Site, method: ActivationSVD | WeightSVD) -> list[tuple[Choice, float]]:
    """The middle choice of every unfolding."""
    curve = method.curve(site)
    held = list(zip(curve.choices, curve.errors, strict=True))
    found = []
    for how in unfoldings(site.spec.kernel):
        run = [pair for pair in held if pair[0]["unfolding"] == how.name]
        found.append(run[len(run) // 2])
    return found


@pytest.mark.table(every=2)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.usefixtures("unshrunk")
def test_the_reported_error_is_what_the_pair_loses_on_the_calibration_data(kind: str) -> None:
    site, layer, inputs = small_site(kind, dtype=torch.float64, samples=32)
    method = ActivationSVD(sweeps=0)
    for choice, error in some(site, method):
        wanted, found = answers(site, layer, inputs, method, choice)
        centred = wanted - wanted.mean(1, keepdim=True)
        lost = float((found - wanted).square().sum() / centred.square().sum())
        assert lost == pytest.approx(error, abs=1e-8), choice
        torch.testing.assert_close(found.mean(1), wanted.mean(1), atol=1e-9, rtol=1e-9)


@pytest.mark.table(every=2)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.usefixtures("unshrunk")
def test_with_a_sensitivity_the_error_is_weighted_by_the_gradients(kind: str) -> None:
    site, layer, inputs = small_site(kind, dtype=torch.float64, samples=32, weighted=True)
    outer = site.statistics.gradient.second_moment
    method = ActivationSVD(sweeps=0)
    assert method.curve(site).unit == "weighted output energy"
    for choice, error in some(site, method):
        wanted, found = answers(site, layer, inputs, method, choice)
        centred, missing = wanted - wanted.mean(1, keepdim=True), found - wanted
        lost, whole = (torch.einsum("gna,gab,gnb->", rows, outer, rows) for rows in (missing, centred))
        assert float(lost / whole) == pytest.approx(error, abs=1e-7), choice
        torch.testing.assert_close(found.mean(1), wanted.mean(1), atol=1e-9, rtol=1e-9)


@pytest.mark.table(every=3)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_worse_than_the_weight_svd_at_equal_rank(kind: str, weighted: bool) -> None:
    site, _, _ = small_site(kind, dtype=torch.float64, samples=32, weighted=weighted)
    unit = ActivationSVD().curve(site).unit
    assert WeightSVD().curve(site).unit == unit
    for choice, _ in some(site, ActivationSVD()):
        mine = measured_error(site, ActivationSVD().factorize(site, choice).dense(), unit)
        other = measured_error(site, WeightSVD().factorize(site, choice).dense(), unit)
        assert mine <= other + 1e-4, choice
    exact = site.spec.shape[0] == 1 and unfolding(site.spec.kernel, "channel")
    if exact:
        # In the same metric and the unfolding that has an exact solution, no rank is worse.
        mine, other = (m(unfoldings=("channel",)).curve(site).errors for m in (ActivationSVD, WeightSVD))
        assert all(a <= b + 1e-9 for a, b in zip(mine, other, strict=True))


def test_alternation_lowers_the_error() -> None:
    site, _, _ = small_site("conv2d", dtype=torch.float64)
    for choice, error in some(site, ActivationSVD())[1:]:
        once, often = (
            measured_error(site, ActivationSVD(sweeps=s).factorize(site, choice).dense(), "output energy")
            for s in (0, 6)
        )
        assert often < once <= error + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_goes_into_the_bias_in_narrow_precision(dtype: torch.dtype) -> None:
    site, layer, inputs = small_site("conv2d-strided-no-bias", dtype=dtype)
    for choice, _ in some(site, ActivationSVD()):
        assert choice["bias"] is True
        wanted, found = answers(site, layer, inputs, ActivationSVD(), choice)
        spread = wanted.std()
        assert (found.mean(1) - wanted.mean(1)).abs().max() < 4 * torch.finfo(dtype).eps * spread * 4


@pytest.mark.table
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv2d-grouped", "transposed2d"])
@pytest.mark.parametrize("weighted", [False, True])
def test_fewer_samples_than_channels_stay_finite_and_keep_the_rest_of_the_weight(kind: str, weighted: bool) -> None:
    model = nn.Sequential(LAYERS[kind].make(), nn.Softplus())
    inputs = torch.randn(2, *LAYERS[kind].shape)
    sites = calibrate(model, find(model), [inputs], rows=3)
    if weighted:
        sites = sensitivity(model, sites, [inputs], rows=3)
    site = sites["0"]
    assert site.statistics.input.count < site.spec.features
    for method in (ActivationSVD(), WeightSVD()):
        curve = method.curve(site)
        assert curve.choices
        assert all(0 <= e < float("inf") for e in curve.errors)
        for choice, _ in some(site, method):
            factors = method.factorize(site, choice)
            (dense,) = factors.dense()
            assert torch.isfinite(dense).all()
            assert factors.shift is None or torch.isfinite(factors.shift).all()
            # Directions that no sample took are kept small by the shrinkage, not left to take any value.
            assert dense.norm() < 3 * site.weight.norm()
    # Leaving energy out costs something in every direction, also in those the samples never took.
    curve = ActivationSVD(unfoldings=("channel",)).curve(site)
    assert curve.errors[0] > curve.errors[-1] > 0


def test_missing_statistics_are_named_with_the_site() -> None:
    site, _, _ = small_site("conv2d", calibrated=False)
    site = dataclasses.replace(site, spec=dataclasses.replace(site.spec, names=("layer1.conv2",)))
    with pytest.raises(MissingMomentsError, match="site 'layer1.conv2' .Conv2d 3x3. holds none.*Run calibrate"):
        ActivationSVD().curve(site)
    for name, statistic in (("channel", "output"), ("height-first", "input")):
        choice = Choice("low_rank", "ActivationSVD", {"unfolding": name, "rank": 2, "bias": True})
        with pytest.raises(
            MissingMomentsError, match=f"'layer1.conv2'.*no '{statistic}' moments.*ActivationSVD .{name}"
        ):
            ActivationSVD().factorize(site, choice)


@pytest.mark.table
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv2d-grouped", "conv3d", "transposed2d"])
@pytest.mark.parametrize("weighted", [False, True])
def test_long_patches_use_slices_and_outputs(kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    full, _, _ = small_site(kind, dtype=torch.float64, weighted=weighted)
    monkeypatch.setattr(watchers, "FULL_PATCH", 4)
    monkeypatch.setattr(watchers, "FULL_LINEAR", 4)
    site, layer, inputs = small_site(kind, dtype=torch.float64, weighted=weighted)
    hows = unfoldings(site.spec.kernel)
    sketch = {"sketch"} if kind == "linear" else set()
    slices = {"slices"} if len(hows) > 1 else set()
    assert set(site.statistics.names) - {"gradient"} == {"output", *sketch, *slices}
    assert set(site.statistics.slices) == {how.name for how in hows[1:]}
    for method in (ActivationSVD(), WeightSVD()):
        curve = method.curve(site)
        assert {c["unfolding"] for c in curve.choices} == {u.name for u in hows}
        assert all(0 <= e <= 1 for e in curve.errors)
        assert curve.unit == method.curve(full).unit
        for choice, _ in some(site, method):
            wanted, found = answers(site, layer, inputs, method, choice)
            lost = measured_error(full, method.factorize(site, choice).dense(), curve.unit)
            assert 0 < lost < 1
            assert (found - wanted).square().sum() < (wanted - wanted.mean(1, keepdim=True)).square().sum() * 1.5
        for how in hows:
            choice = Choice(
                "low_rank", method.name, {"unfolding": how.name, "rank": full_rank(site.spec, how), "bias": True}
            )
            wanted, found = answers(site, layer, inputs, method, choice)
            torch.testing.assert_close(found, wanted, atol=1e-8, rtol=1e-8)
    # The outputs alone tell the channel unfolding's error and mean exactly, as the full patches do.
    channel = ActivationSVD(unfoldings=("channel",))
    for (choice, error), (_, other) in zip(some_channel(site, channel), some_channel(full, channel), strict=True):
        wanted, found = answers(site, layer, inputs, channel, choice)
        torch.testing.assert_close(found.mean(1), wanted.mean(1), atol=1e-9, rtol=1e-9)
        lost = measured_error(full, channel.factorize(site, choice).dense(), channel.curve(site).unit)
        assert lost == pytest.approx(error, abs=1e-3)
        assert error == pytest.approx(other, abs=2e-2)


def some_channel(site: Site, method: ActivationSVD) -> list[tuple[Choice, float]]:
    curve = method.curve(site)
    held = list(zip(curve.choices, curve.errors, strict=True))
    return [held[0], held[len(held) // 2]]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_site_without_slices_offers_the_channel_unfolding_only(weighted: bool) -> None:
    site, _, _ = small_site("conv2d", weighted=weighted)
    other = dataclasses.replace(site.statistics, input=None, channels=site.statistics.input)
    assert ActivationSVD().curve(dataclasses.replace(site, statistics=other)).choices == ()


def test_the_shift_of_a_site_that_is_known_by_its_outputs_counts_the_old_bias_once() -> None:
    layer = nn.Linear(12, 8).double()
    nn.init.constant_(layer.bias, 7.0)
    model = nn.Sequential(layer, nn.ReLU())
    inputs = torch.randn(200, 12).double() + 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchers, "FULL_LINEAR", 4)
        site = calibrate(model, find(model), [inputs], rows=None)["0"]
    choice = Choice("low_rank", "ActivationSVD", {"unfolding": "channel", "rank": 3, "bias": True})
    wanted, found = answers(site, layer, inputs, ActivationSVD(), choice)
    torch.testing.assert_close(found.mean(1), wanted.mean(1))


@pytest.mark.table
@pytest.mark.parametrize("case", ["dead inputs", "zero weight", "constant input"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_dead_layers_stay_finite(case: str, kind: str) -> None:
    layer = LAYERS[kind].make()
    inputs = torch.rand(20, *LAYERS[kind].shape)
    if case == "dead inputs":
        inputs[:, 1:] = 0
    elif case == "constant input":
        inputs[:] = 2.5
    else:
        nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer, nn.Softplus())
    sites = calibrate(model, find(model), [inputs], rows=None)
    for site in (sites["0"], sensitivity(model, sites, [inputs])["0"]):
        for method in (ActivationSVD(), WeightSVD()):
            curve = method.curve(site)
            assert all(0 <= e < float("inf") for e in curve.errors)
            for choice, error in some(site, method):
                wanted, found = answers(site, layer, inputs, method, choice)
                assert torch.isfinite(found).all()
                if case == "zero weight":
                    assert error == 0
                    torch.testing.assert_close(found, wanted)
                if case == "constant input" and kind == "linear" and isinstance(method, ActivationSVD):
                    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_scale_predicts_how_far_the_output_moves() -> None:
    """With a linear rest of the network the loss is half the squared movement of the output, whatever the layer."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6 * 3 * 3, 20)).double()
    inputs = torch.randn(3000, 4, 5, 5).double() + 0.5
    sites = calibrate(model, find(model), [inputs], rows=None)
    site = sensitivity(model, sites, [inputs], samples=3000, rows=10**6)["0"]
    method = ActivationSVD(unfoldings=("channel",), sweeps=0)
    curve = method.curve(site)
    choice, error = curve.choices[2], curve.errors[2]
    (pair,) = build(method.factorize(site, choice), site.layers, site.biases)
    with torch.no_grad():
        missing = pair(inputs) - model[0](inputs)
        head = model[2].weight.reshape(20, 6, 9)
        moved = sum((missing.flatten(2)[:, :, p] @ head[:, :, p].T).square().sum(1).mean() for p in range(9))
    # The errors of different positions are taken as independent: the gradients' second moment is an average over them.
    assert curve.scale * error == pytest.approx(0.5 * float(moved), rel=0.15)


def test_the_bias_that_takes_the_mean_is_counted() -> None:
    site, _, _ = small_site("conv2d-strided-no-bias")
    for choice, _ in some(site, ActivationSVD()):
        first, second = ActivationSVD().layers(site, choice)
        assert not first.bias
        assert second.bias
        plain = WeightSVD().layers(site, Choice("low_rank", "WeightSVD", {**choice.settings, "bias": False}))
        assert parameters((first, second)) == parameters(plain) + site.spec.out_channels


def test_factors_are_balanced() -> None:
    site, _, _ = small_site("conv2d", dtype=torch.float64)
    for choice, _ in some(site, ActivationSVD()):
        factors = ActivationSVD().factorize(site, choice)
        torch.testing.assert_close(factors.left.norm(dim=1), factors.right.norm(dim=2))
        assert factors.left.shape[-1] == choice["rank"]
        matrix = unfold(site.weight, factors.how)
        assert (factors.left.shape[1], factors.right.shape[2]) == tuple(matrix.shape[1:])
