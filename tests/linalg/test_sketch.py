"""Sketches of second moments: exact while there is room, bounded beyond."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrim.linalg.metric import Rows
from spectrim.linalg.moments import Moments, shrunk
from spectrim.linalg.sketch import Sketch


def rows(groups: int, n: int, d: int, *, seed: int = 0, mean: float = 3.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=draw) * torch.linspace(1, 0.01, d) ** 2
    return torch.randn(groups, n, d, generator=draw) @ mixing.mT + mean


def both(data: torch.Tensor, size: int, cuts: list[int]) -> tuple[Moments, Sketch]:
    held, sketch = Moments(data.shape[0], data.shape[2]), Sketch(data.shape[0], data.shape[2], size)
    for part in data.tensor_split(cuts, dim=1):
        held.update(part)
        sketch.update(part)
    return held, sketch


@given(n=st.integers(1, 40), d=st.integers(1, 12), cut=st.integers(0, 40), seed=st.integers(0, 5))
def test_it_is_exact_while_there_is_room(n, d, cut, seed):
    held, sketch = both(rows(2, n, d, seed=seed), 64, [min(cut, n)])
    assert sketch.count == held.count == n
    torch.testing.assert_close(sketch.mean, held.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sketch.scatter, held.scatter, rtol=1e-4, atol=1e-4)
    # Beyond as many rows as features they are turned, and nothing but rounding is lost.
    assert float(sketch.lost.sum()) <= 1e-5 * float(held.scatter.diagonal(dim1=1, dim2=2).sum()) + 1e-9


@pytest.mark.parametrize("size", [4, 10, 20])
def test_beyond_that_no_direction_is_further_off_than_the_energy_it_has_no_room_for(size):
    data = rows(1, 700, 30)
    held, sketch = both(data, size, list(range(50, 700, 50)))
    assert sketch.rows.shape[1] <= 2 * size
    # Without what is given back, every direction is underestimated, by at most the lost energy over the directions.
    kept = (sketch.rows.double().mT @ sketch.rows.double())[0]
    gap = torch.linalg.eigvalsh(held.scatter[0] - kept)
    energy = float(held.scatter[0].trace())
    assert float(gap.min()) > -1e-4 * energy
    # In units of the features' own deviations, as directions are chosen in them.
    unit = sketch.squares[0].sqrt()
    standard = torch.linalg.eigvalsh((held.scatter[0] - kept) / unit / unit.unsqueeze(1))
    assert float(standard.max()) <= float((sketch.lost[0] / sketch.squares[0]).sum()) / size * (1 + 1e-1)
    assert float(gap.max()) <= float(sketch.lost.sum()) + 1e-4 * energy
    # With it, the variance of every feature is right.
    variances = held.scatter.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(sketch.scatter.diagonal(dim1=1, dim2=2), variances, rtol=1e-4, atol=0)


def test_more_room_is_closer():
    data = rows(1, 700, 30)
    apart = []
    for size in (4, 8, 16):
        held, sketch = both(data, size, list(range(50, 700, 50)))
        apart.append(float((held.scatter - sketch.scatter).norm()))
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 0.5 * apart[0]


def test_merging_adds_up():
    data = rows(2, 60, 7)
    (_, one), (_, two), (held, _) = both(data[:, :20], 64, []), both(data[:, 20:], 64, []), both(data, 64, [])
    one.merge(two)
    assert one.count == 60
    torch.testing.assert_close(one.scatter, held.scatter, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot merge Moments"):
        one.merge(held)


@pytest.mark.parametrize("count", [4, 20])
def test_the_metric_of_the_rows_is_the_shrunk_covariance(count):
    held, sketch = both(rows(2, count, 9), 64, [])
    metric = Rows(*sketch.shrunk())
    wanted = shrunk(held.covariance, held.count)
    eye = torch.eye(9, dtype=torch.float64).expand(2, 9, 9)
    torch.testing.assert_close(metric.times(eye), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metric.diagonal(), wanted.diagonal(dim1=1, dim2=2), rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_shows():
    sketch = Sketch(1, 3)
    sketch.update(torch.tensor([[[1.0, math.nan, 2.0]]]))
    assert not sketch.is_finite()
    assert "count=1" in repr(sketch)
    assert sketch.nbytes == (3 + 3) * 8 + 3 * 4


def test_there_are_no_more_directions_than_features():
    held, sketch = both(rows(1, 500, 6), 64, list(range(20, 500, 20)))
    assert sketch.rows.shape[1] <= 2 * 6 + 20
    assert float(sketch.lost.sum()) < 1e-4 * float(held.scatter.diagonal(dim1=1, dim2=2).sum())
    torch.testing.assert_close(sketch.scatter, held.scatter, rtol=1e-3, atol=1e-2)


def test_units_of_features_do_not_matter():
    data, units = rows(1, 700, 30, mean=0.0), 10 ** torch.linspace(-6, 6, 30)
    _, plain = both(data, 10, list(range(50, 700, 50)))
    _, other = both(data * units, 10, list(range(50, 700, 50)))
    outer = (units.unsqueeze(0) * units.unsqueeze(1)).double()
    size = plain.squares[0].sqrt()
    apart = (other.scatter[0] / outer - plain.scatter[0]) / size / size.unsqueeze(1)
    assert float(apart.abs().max()) < 1e-3
    torch.testing.assert_close(other.level() / units.double().square(), plain.level(), rtol=1e-3, atol=0)


def test_its_weight_is_least_squares_in_its_metric():
    _, sketch = both(rows(1, 20, 9), 64, [])
    missing = torch.randn(1, sketch.rows.shape[1], 4).double()
    held = sketch.rows.double()
    moment = held.mT @ held + torch.diag_embed(sketch.level() * sketch.count)
    wanted = torch.linalg.solve(moment, held.mT @ missing).mT
    torch.testing.assert_close(sketch.solve(missing), wanted)
