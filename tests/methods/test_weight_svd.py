"""WeightSVD against torch.linalg.svd, and its error in output energy against what the layer answers."""

from __future__ import annotations

import pytest
import torch

from spectrim.linalg.unfold import unfold, unfolding, unfoldings
from spectrim.methods import ActivationSVD, WeightSVD, from_record, statistics
from spectrim.methods.base import LowRankMethod, break_even, full_rank
from spectrim.testing import measured_error
from tests.cases import LAYERS, small_site


@pytest.mark.table(every=2)
@pytest.mark.parametrize("kind", LAYERS)
def test_without_data_it_is_the_truncated_svd(kind: str) -> None:
    site, _, _ = small_site(kind, calibrated=False, dtype=torch.float64)
    curve = WeightSVD().curve(site)
    assert curve.unit == "weight energy"
    assert curve.scale == 1
    for choice, error in zip(curve.choices, curve.errors, strict=True):
        matrix = unfold(site.weight, unfolding(site.spec.kernel, choice["unfolding"]))
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        rank = choice["rank"]
        assert error == pytest.approx(float(s[:, rank:].square().sum() / s.square().sum()), abs=1e-12)
        factors = WeightSVD().factorize(site, choice)
        best = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
        torch.testing.assert_close(factors.left @ factors.right, best, atol=1e-9, rtol=1e-9)


@pytest.mark.table(every=3)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weighted", [False, True])
def test_with_data_its_error_is_measured_in_output_energy(
    kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "shrunk", lambda covariance, count: covariance)
    site, _, _ = small_site(kind, dtype=torch.float64, samples=32, weighted=weighted)
    curve = WeightSVD().curve(site)
    assert curve.unit == ("weighted output energy" if weighted else "output energy")
    for choice, error in list(zip(curve.choices, curve.errors, strict=True))[::4]:
        lost = measured_error(site, WeightSVD().factorize(site, choice).dense(), curve.unit)
        assert lost == pytest.approx(error, abs=1e-9)


def test_calibration_does_not_change_the_weights() -> None:
    bare, _, _ = small_site("conv2d", calibrated=False)
    site, _, _ = small_site("conv2d")
    for choice in WeightSVD().curve(bare).choices[::3]:
        one, two = WeightSVD().factorize(bare, choice), WeightSVD().factorize(site, choice)
        assert torch.equal(one.left, two.left)
        assert torch.equal(one.right, two.right)


@pytest.mark.table
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", [WeightSVD(), ActivationSVD(sweeps=0)])
def test_factors_carry_a_mean_if_their_choice_has_a_bias(kind: str, method: LowRankMethod) -> None:
    site, _, _ = small_site(kind, samples=32)
    for how in unfoldings(site.spec.kernel):
        with_bias, without = (method.factorize(site, method.choice(site, how, 2, bias=bias)) for bias in (True, False))
        assert without.shift is None
        assert with_bias.shift is not None
        assert with_bias.shift.shape == (site.spec.out_channels,)
        assert with_bias.shift.any()
        if isinstance(method, WeightSVD):
            assert torch.equal(with_bias.left, without.left)
            assert torch.equal(with_bias.right, without.right)
    bare, _, _ = small_site(kind, calibrated=False)
    how = unfoldings(bare.spec.kernel)[0]
    assert WeightSVD().factorize(bare, WeightSVD().choice(bare, how, 2, bias=bare.spec.bias)).shift is None


@pytest.mark.table
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_to_full_rank_also_ranks_that_do_not_pay_are_on_offer(kind: str, calibrated: bool) -> None:
    site, _, _ = small_site(kind, calibrated=calibrated, dtype=torch.float64, samples=32)
    short, long = WeightSVD(multiple_of=1), WeightSVD(multiple_of=1, to_full_rank=True)
    errors = {}
    for how in unfoldings(site.spec.kernel):
        full, even = full_rank(site.spec, how), break_even(site.spec, how)
        assert list(long.ranks(site.spec, how)) == list(range(1, full + 1))
        assert list(short.ranks(site.spec, how)) == list(range(1, even + 1))
        assert list(WeightSVD(multiple_of=3, to_full_rank=True).ranks(site.spec, how)) == list(range(3, full + 1, 3))
        errors[how.name] = full
    curve, part = long.curve(site), short.curve(site)
    found = dict(zip(curve.choices, curve.errors, strict=True))
    assert len(found) == sum(errors.values())
    for choice, error in zip(part.choices, part.errors, strict=True):
        assert found[choice] == pytest.approx(error, abs=1e-12)
    for choice, error in found.items():
        if choice["rank"] == errors[choice["unfolding"]]:
            assert error == pytest.approx(0, abs=1e-12)


def test_to_full_rank_is_recorded_and_older_records_go_without() -> None:
    method = WeightSVD(unfoldings=("channel",), multiple_of=1, to_full_rank=True)
    assert from_record(method.record()) == method
    assert from_record({"type": "WeightSVD", "options": {"unfoldings": None, "multiple_of": 4}}) == WeightSVD(None, 4)
