"""Least squares from a known weight: not worse on samples that were held out, in any units."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from spectrim.linalg.moments import Paired
from spectrim.linalg.regression import MOST, SHARES, Covariances, Equations, Unseen, scarcity, towards
from spectrim.linalg.sketch import Sketch


def problem(n: int, d: int, o: int, *, noise: float, seed: int, moved: float = 1.0):
    """A weight to start from, inputs, and answers of another weight."""
    draw = torch.Generator().manual_seed(seed)
    weight, change = torch.randn(2, 1, o, d, generator=draw, dtype=torch.float64)
    x = torch.randn(1, n, d, generator=draw, dtype=torch.float64) + 2
    y = x @ (weight + moved * change).mT + noise * torch.randn(1, n, o, generator=draw, dtype=torch.float64) - 3
    return weight, x, y


def fitted(kind: str, weight: Tensor, x: Tensor, y: Tensor, *, cut: int, units: Tensor | None = None) -> Tensor:
    """The weight fitted to all rows but the first ``cut``, each of which is a sample that is held out."""
    units = y.new_ones(len(y), y.shape[2]) if units is None else units
    g, d = x.shape[0], x.shape[2]
    rows = torch.cat([x, y], dim=2)
    joint = Paired(g, rows.shape[2], d) if kind == "moments" else Sketch(g, rows.shape[2], size=512)
    joint.update(rows[:, cut:])
    regression = Covariances.of(joint) if isinstance(joint, Paired) else Equations.of(joint, d)
    away = rows - joint.mean.unsqueeze(1)
    inputs = away[:, cut:, :d]
    scarce = scarcity(joint.count, inputs.square().sum(1), inputs.pow(4).sum(1))
    held = Unseen(away[:, :cut, :d], away[:, :cut, d:], torch.arange(cut)) if cut else None
    return towards(weight, regression, scarce, held, units)


def lost(weight: Tensor, x: Tensor, y: Tensor, *, cut: int) -> float:
    """Squared error on the first rows, around the means of the others."""
    mx, my = (part[:, cut:].mean(1, keepdim=True) for part in (x, y))
    return float(((y - my) - (x - mx) @ weight.mT).square()[:, :cut].sum())


@pytest.mark.parametrize("kind", ["moments", "rows"])
def test_with_many_samples_and_no_noise_it_comes_close_to_the_weight(kind):
    weight, x, y = problem(4000, 6, 4, noise=0.0, seed=1, moved=0.5)
    best = torch.linalg.lstsq(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)).solution.mT
    found = (
        fitted(kind, weight, x, y, cut=500)
        if kind == "moments"
        else fitted(kind, weight, x[:, :450], y[:, :450], cut=50)
    )
    assert float((found - best).norm() / (weight - best).norm()) < (0.02 if kind == "moments" else 0.15)


@given(
    n=some.integers(8, 60), d=some.integers(1, 12), o=some.integers(1, 4), noise=some.floats(0.0, 4.0),
    moved=some.sampled_from([0.0, 0.1, 1.0]), seed=some.integers(0, 10_000),
)  # fmt: skip
def test_on_samples_that_were_held_out_it_is_never_worse_than_the_start(n, d, o, noise, moved, seed):
    weight, x, y = problem(n, d, o, noise=noise, moved=moved, seed=seed)
    found = fitted("moments", weight, x, y, cut=n // 4)
    assert lost(found, x, y, cut=n // 4) <= lost(weight, x, y, cut=n // 4) * (1 + 1e-9) + 1e-12


def test_noise_alone_is_hardly_fitted():
    away = []
    for seed in range(20):
        weight, x, y = problem(60, 40, 3, noise=1.0, moved=0.0, seed=seed)
        found, whole = (fitted("moments", weight, x, y, cut=cut) for cut in (15, 0))
        away.append(float((found - weight).norm() / (whole - weight).norm()))
    assert sum(away) / len(away) < 0.1


@pytest.mark.parametrize("kind", ["moments", "rows"])
def test_units_of_the_inputs_change_nothing(kind):
    weight, x, y = problem(200, 8, 3, noise=0.5, seed=3)
    units = 10.0 ** torch.linspace(-6, 6, 8, dtype=torch.float64)
    plain, scaled = fitted(kind, weight, x, y, cut=50), fitted(kind, weight / units, x * units, y, cut=50)
    tolerance = 1e-8 if kind == "moments" else 1e-3
    assert not torch.allclose(plain, weight, rtol=0.1)
    torch.testing.assert_close(scaled * units, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["moments", "rows"])
def test_units_of_the_outputs_change_nothing_where_they_are_told(kind):
    weight, x, y = problem(80, 20, 5, noise=2.0, seed=3, moved=0.3)
    units = 10.0 ** torch.linspace(-6, 6, 5, dtype=torch.float64)
    plain = fitted(kind, weight, x, y, cut=20)
    scaled = fitted(kind, weight * units.unsqueeze(1), x, y * units, cut=20, units=1 / units.unsqueeze(0))
    untold = fitted(kind, weight * units.unsqueeze(1), x, y * units, cut=20)
    tolerance = 1e-8 if kind == "moments" else 1e-3
    torch.testing.assert_close(scaled / units.unsqueeze(1), plain, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(untold / units.unsqueeze(1), plain, rtol=0.01)


@pytest.mark.parametrize("kind", ["moments", "rows"])
def test_inputs_that_never_vary_keep_their_weights(kind):
    weight, x, y = problem(100, 5, 2, noise=0.1, seed=4)
    x[..., 2] = 7.0
    found = fitted(kind, weight, x, y, cut=20)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[..., 2], weight[..., 2], rtol=1e-4, atol=1e-4)


def test_an_input_that_is_active_in_one_row_is_not_fitted_to_it():
    """What it does where it is active beyond what was seen has a bound."""
    ratios = []
    for seed in range(10):
        weight, x, y = problem(400, 6, 2, noise=1.0, moved=0.2, seed=seed)
        x[..., 3] = 0.0
        x[:, 200, 3] = 1e-3
        y = y - x[..., 3:4] @ weight[..., 3:4].mT
        found = fitted("moments", weight, x, y, cut=100)
        ratios.append(float((found - weight)[..., 3].norm() / weight[..., 3].norm()))
    assert max(ratios) <= MOST * (1 + 1e-9)


def test_how_many_rows_tell_of_an_input():
    x = torch.randn(1, 20_000, 2, dtype=torch.float64)
    x[..., 1] = 0
    x[:, 5, 1] = 3.0
    found = scarcity(20_000, x.square().sum(1), x.pow(4).sum(1))[0]
    assert float(found[0]) == pytest.approx(2 / (20_000 / 3), rel=0.05)
    assert float(found[1]) == pytest.approx(2.0)


def test_without_samples_to_hold_out_the_whole_step_is_taken():
    weight, x, y = problem(300, 5, 2, noise=0.1, seed=5)
    best = torch.linalg.lstsq(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)).solution.mT
    torch.testing.assert_close(fitted("moments", weight, x, y, cut=0), best, rtol=1e-2, atol=1e-2)


def test_what_a_share_of_a_step_gains_is_told_by_sample_one_standard_error_below_the_mean():
    draw = torch.Generator().manual_seed(0)
    inputs, missing, step = (torch.randn(2, *shape, generator=draw).double() for shape in ((9, 4), (9, 3), (3, 4)))
    sample = torch.tensor([7, 7, 2, 2, 2, 30, 7, 2, 30])
    gains = Unseen(inputs, missing, sample).gains(missing, step)
    for share, gain in zip(SHARES, gains, strict=True):
        less = missing.square() - (missing - share * inputs @ step.mT).square()
        each = torch.stack([less[:, sample == number].sum() for number in (2, 7, 30)])
        torch.testing.assert_close(gain, each.mean() - each.std() / 3**0.5)
    of_one = Unseen(inputs[:, :2], missing[:, :2], sample[:2]).gains(missing[:, :2], step)
    assert not of_one.any()
