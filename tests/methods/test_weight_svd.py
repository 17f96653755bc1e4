"""WeightSVD against torch.linalg.svd, and its error in output energy against what the layer answers."""

from __future__ import annotations

import pytest
import torch

from spectrim.methods import WeightSVD, metrics
from spectrim.testing import measured_error
from spectrim.unfold import unfold, unfolding
from tests.cases import LAYERS, small_site


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


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weighted", [False, True])
def test_with_data_its_error_is_measured_in_output_energy(
    kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "shrunk", lambda covariance, count: covariance)
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
