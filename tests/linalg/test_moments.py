"""Streamed moments against a batch reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.moments import Moments, Paired, shrunk


def reference(rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.double()
    mean = rows.mean(1)
    centred = rows - mean.unsqueeze(1)
    return mean, centred.mT @ centred / rows.shape[1]


def streamed(rows: Tensor, sizes: list[int]) -> Moments:
    held = Moments(rows.shape[0], rows.shape[2])
    for part in rows.split(sizes, dim=1):
        held.update(part)
    return held


splits = st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)


@given(splits, st.integers(1, 3), st.integers(1, 5), st.integers(0, 9))
def test_streaming_equals_one_batch(sizes: list[int], g: int, d: int, seed: int) -> None:
    rows = torch.randn(g, sum(sizes), d, generator=torch.Generator().manual_seed(seed)).double() + 3
    held = streamed(rows, sizes)
    mean, covariance = reference(rows)
    assert held.count == sum(sizes)
    torch.testing.assert_close(held.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(held.covariance, covariance, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(held.second_moment, rows.mT @ rows / rows.shape[1], rtol=1e-10, atol=1e-12)


@given(splits, splits, st.integers(1, 2), st.integers(0, 9))
def test_merging_equals_one_stream(one: list[int], two: list[int], g: int, seed: int) -> None:
    rows = torch.randn(g, sum(one) + sum(two), 3, generator=torch.Generator().manual_seed(seed)).double()
    rows[:, sum(one) :] += 10
    left, right = streamed(rows[:, : sum(one)], one), streamed(rows[:, sum(one) :], two)
    before = right.scatter.clone()
    left.merge(right)
    whole = streamed(rows, [rows.shape[1]])
    assert left.count == whole.count
    torch.testing.assert_close(left.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.scatter, whole.scatter, rtol=1e-10, atol=1e-10)
    assert torch.equal(right.scatter, before)


def test_merging_into_and_from_nothing() -> None:
    rows = torch.randn(2, 9, 3).double()
    full, empty = streamed(rows, [9]), Moments(2, 3)
    expected = full.scatter.clone()
    full.merge(empty)
    assert torch.equal(full.scatter, expected)
    empty.merge(full)
    assert empty.count == 9
    torch.testing.assert_close(empty.scatter, expected)
    empty.scatter += 1
    torch.testing.assert_close(full.scatter, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_tiny_spread_about_a_huge_mean(dtype: torch.dtype, offset: float) -> None:
    spread = 1e-4 if dtype == torch.float64 else 1.0
    rows = (torch.randn(2, 400, 3).double() * spread + offset).to(dtype)
    held = streamed(rows, [100] * 4)
    mean, covariance = reference(rows)
    torch.testing.assert_close(held.mean, mean, rtol=1e-12, atol=0)
    # float32 rows near 1e6 are multiples of 1/16; the reference sees the same rounded numbers.
    torch.testing.assert_close(held.covariance, covariance, rtol=1e-5, atol=1e-6 * spread**2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_summed_in_double(dtype: torch.dtype) -> None:
    rows = (torch.randn(1, 3000, 4) + 20).to(dtype)
    held = streamed(rows, [1000] * 3)
    mean, covariance = reference(rows)
    assert held.mean.dtype == held.scatter.dtype == torch.float64
    torch.testing.assert_close(held.mean, mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(held.covariance, covariance, rtol=1e-5, atol=1e-5)


def test_half_precision_does_not_overflow() -> None:
    rows = torch.full((1, 50, 2), 6e4).half()
    rows[:, ::2] = -6e4
    held = streamed(rows, [50])
    assert held.is_finite()
    torch.testing.assert_close(held.covariance, rows[0, 1, 0].double().square().expand(1, 2, 2), rtol=1e-6, atol=0)


def test_an_empty_batch_changes_nothing() -> None:
    held = Moments(2, 3)
    held.update(torch.empty(2, 0, 3))
    assert held.count == 0
    assert held.is_finite()
    assert held.covariance.abs().sum() == 0
    assert held.second_moment.abs().sum() == 0


def test_groups_are_kept_apart() -> None:
    rows = torch.randn(3, 50, 4).double()
    held = streamed(rows, [50])
    for group in range(3):
        torch.testing.assert_close(held.covariance[group], torch.cov(rows[group].mT, correction=0))


@pytest.mark.parametrize("outer", [1, 2, 3, 6])
def test_matrices_are_swapped_for_their_transposes(outer: int) -> None:
    rows = torch.randn(2, 50, 6).double()
    turned = rows.unflatten(2, (outer, -1)).mT.flatten(2)
    held, other = streamed(rows, [20, 30]).swapped(outer), streamed(turned, [20, 30])
    assert held.count == other.count
    torch.testing.assert_close(held.mean, other.mean)
    torch.testing.assert_close(held.scatter, other.scatter)
    held.update(rows)
    assert held.count == 100


def test_not_finite_numbers_are_noticed() -> None:
    for bad in (float("nan"), float("inf")):
        rows = torch.randn(1, 5, 2)
        rows[0, 2, 1] = bad
        assert not streamed(rows, [5]).is_finite()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"moments of shape \(1, 3\) into \(2, 3\)"):
        Moments(2, 3).merge(Moments(1, 3))


def test_memory_does_not_depend_on_the_samples() -> None:
    held = Moments(2, 5)
    before = held.nbytes
    held.update(torch.randn(2, 1000, 5))
    assert held.nbytes == before == (2 * 5 + 2 * 5 * 5) * 8
    assert repr(held) == "Moments(count=1000, groups=2, features=5)"


def test_gradients_are_not_kept() -> None:
    held = Moments(1, 2)
    held.update(torch.randn(1, 6, 2, requires_grad=True))
    assert not held.scatter.requires_grad
    assert not held.mean.requires_grad


@pytest.mark.parametrize(
    ("count", "share", "little"),
    [(0, 1, 1e-2), (1, 1, 1e-2), (3, 0.7208, 1e-2), (8, 0.3089, 1e-2), (16, 0.1614 / 4, 5e-3), (800_000_000, 0, 1e-10)],
)
def test_few_samples_are_shrunk_by_how_few_they_are(count: int, share: float, little: float) -> None:
    """By the closed form of Chen et al. (2010); less where there are more vectors than entries."""
    correlation = torch.full((1, 8, 8), 0.8).double()
    correlation.diagonal(dim1=1, dim2=2).fill_(1)
    size = torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4]).double()
    found = shrunk(correlation * size * size.unsqueeze(1), count) / size / size.unsqueeze(1)
    off = ~torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(found[0][off], (1 - share) * correlation[0][off], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), torch.full((1, 8), 1 + little + 1e-6).double())


def test_what_few_samples_do_not_tell_is_said_to_be_lost() -> None:
    """Of a half of the directions of normal vectors, fewer than these have entries, half of the energy."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 24, 48, generator=generator, dtype=torch.float64)
    held = streamed(rows, [24])
    lost = torch.linalg.eigvalsh(shrunk(held.covariance / held.variance.mean(), 24))[0, :24].sum() / 48
    assert float(torch.linalg.eigvalsh(held.covariance)[0, :24].sum()) < 1e-9
    assert 0.3 < float(lost) < 0.6


@pytest.mark.parametrize("count", [3, 40, 4000])
def test_shrinkage_knows_no_units(count: int) -> None:
    rows = torch.randn(2, 40, 8).double() @ torch.randn(8, 8).double()
    rows[:, :, 3] = 5.0
    plain, other = streamed(rows, [40]), Moments(2, 8)
    units = 10 ** torch.linspace(-6, 6, 8).double()
    other.update(rows * units)
    outer = units.unsqueeze(0) * units.unsqueeze(1)
    wanted = shrunk(plain.covariance, count)
    torch.testing.assert_close(shrunk(other.covariance, count) / outer, wanted, rtol=1e-9, atol=1e-12)
    assert float(wanted[:, 3].abs().max()) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_products_beyond_the_range_of_float32(scale: float) -> None:
    rows = torch.randn(2, 50, 6)
    mixed = rows.clone()
    mixed[..., :3] *= scale
    held = streamed(mixed, [20, 30])
    _, wanted = reference(mixed)
    size = wanted.diagonal(dim1=1, dim2=2).sqrt()
    outer = size.unsqueeze(1) * size.unsqueeze(2)
    torch.testing.assert_close(held.covariance / outer, wanted / outer, rtol=0, atol=1e-5)


def test_shrinkage_bounds_what_unseen_directions_may_become() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, 6, 40, generator=generator, dtype=torch.float64)
    held = Moments(1, 40)
    held.update(rows)
    target = torch.randn(1, 3, 40, generator=generator, dtype=torch.float64)
    moment = shrunk(held.covariance, held.count)
    cross = target @ moment + 1e-3 * torch.randn(1, 3, 40, generator=generator, dtype=torch.float64)
    fitted = torch.linalg.solve(moment, cross.mT).mT
    # A disturbance of the cross moment that no sample explains is multiplied by at most a hundred over the variance.
    assert float((fitted - target).norm()) < 0.1 * float(target.norm())


def test_what_changes_by_rounding_alone_has_no_variance() -> None:
    torch.manual_seed(0)
    rows = torch.randn(1, 300, 4)
    rows[..., 1] = 0.3 + 1e-8 * torch.randn(300)
    rows[..., 2] = 0.7
    held = streamed(rows, [100, 200])
    assert torch.equal(held.variance == 0, torch.tensor([[False, True, True, False]]))
    kept = held.covariance[0][[0, 3]][:, [0, 3]]
    torch.testing.assert_close(kept, reference(rows)[1][0][[0, 3]][:, [0, 3]])
    assert not held.covariance[0, [1, 2]].any()
    assert not held.take(torch.tensor([[1, 2]])).covariance.any()


@pytest.mark.parametrize(("inner", "outer"), [(3, 5), (300, 7), (300, 160)])
@pytest.mark.parametrize("scale", [1.0, 1e-16])
def test_pairs_hold_the_blocks_of_the_whole_moments(inner: int, outer: int, scale: float) -> None:
    rows = torch.randn(2, 90, inner + outer, generator=torch.Generator().manual_seed(1)) + 3
    rows[..., -1] = rows[..., 0] * 2
    rows = rows * scale
    whole, cut, paired = Moments(2, inner + outer), Paired(2, inner + outer, inner), Paired(2, inner + outer, inner)
    whole.update(rows)
    for part in rows.split(40, dim=1):
        paired.update(part)
    cut.update(rows[:, :50])
    other = Paired(2, inner + outer, inner)
    other.update(rows[:, 50:])
    cut.merge(other)
    for one in (paired, cut):
        size = scale**2
        torch.testing.assert_close(one.covariance / size, whole.covariance[..., :inner] / size, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.variance / size, whole.variance / size, rtol=1e-4, atol=1e-4)
        inputs = one.inputs
        assert (inputs.count, one.is_finite()) == (90, True)
        torch.testing.assert_close(inputs.mean, whole.mean[:, :inner])
        torch.testing.assert_close(inputs.covariance, one.covariance[:, :inner])


@pytest.mark.parametrize("centred", [True, False])
def test_rows_of_weights_are_as_many_rows_of_weight_one(centred: bool) -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    weights = torch.tensor([2.0, 0.0, 1.0, 3.0])
    made = Moments.of_rows(rows, weights, 50, centred=centred)
    many = rows.repeat_interleave(weights.long(), dim=0)
    mean = many.mean(0) if centred else torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(made.mean, mean[None])
    torch.testing.assert_close(made.covariance, ((many - mean).mT @ (many - mean) / len(many))[None])
    assert made.count == 50
    torch.testing.assert_close(Moments.of_rows(rows, 7 * weights, 50, centred=centred).covariance, made.covariance)
    none = Moments.of_rows(rows, 0 * weights, 50, centred=centred)
    assert none.mean.shape == made.mean.shape
    assert not none.covariance.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_that_are_there_several_times_are_multiplied_once(dtype: torch.dtype) -> None:
    rows = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0)).to(dtype) + 5
    often = torch.tensor([[1, 4, 2, 0, 1, 3]])
    counted, whole = Moments(1, 3), Moments(1, 3)
    for moments in (counted, whole):
        moments.update(rows[:, :2])
    counted.update(rows, often)
    whole.update(rows.repeat_interleave(often[0], dim=1))
    assert counted.count == whole.count == 13
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(counted.mean, whole.mean, **close)
    torch.testing.assert_close(counted.covariance, whole.covariance, **close)
