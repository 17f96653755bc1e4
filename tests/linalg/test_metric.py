"""Metrics as operators against the dense matrices they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg import response
from spectrim.linalg.metric import Full, Metric, Plain, Rows, SlicedMetric, Slices, cholesky, mean
from spectrim.linalg.unfold import Unfolding, unfold, unfolding, unfoldings

KERNELS = [(), (3,), (2, 3), (2, 1, 2)]
SLICED = [(kernel, how) for kernel in KERNELS for how in unfoldings(kernel)]


def moment(g: int, n: int, *, seed: int = 0) -> Tensor:
    mixing = torch.randn(g, n, 2 * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mixing @ mixing.mT / (2 * n)


def agrees(metric: Metric, dense: Tensor) -> bool:
    """Whether products, diagonal and energy of a metric are those of a dense ``C [g, n, n]``."""
    g, n, _ = dense.shape
    rows = torch.randn(g, 3, n, dtype=torch.float64)
    energy = torch.stack([torch.trace(r @ c @ r.T) for r, c in zip(rows, dense, strict=True)]).sum()
    pairs = (
        (metric.times(rows), rows @ dense),
        (metric.diagonal(), dense.diagonal(dim1=1, dim2=2)),
        (metric.energy(rows), energy),
    )
    return all(torch.allclose(found, expected, rtol=1e-7, atol=1e-10) for found, expected in pairs)


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 7))
def test_a_full_metric_is_its_matrix(g: int, n: int) -> None:
    dense = moment(g, n)
    assert agrees(Full(dense), dense)


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 7))
def test_the_plain_metric_is_the_identity(g: int, n: int) -> None:
    assert agrees(Plain(g, (n,), torch.device("cpu")), torch.eye(n, dtype=torch.float64).expand(g, n, n))


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7))
def test_rows_are_their_moment_and_a_level(g: int, m: int, n: int) -> None:
    rows, level = torch.randn(g, m, n, dtype=torch.float64), torch.rand(g, n, dtype=torch.float64)
    dense = rows.mT @ rows + torch.diag_embed(level)
    assert agrees(Rows(rows, level), dense)


def blocks(kernel: tuple[int, ...], how: Unfolding, block: Tensor) -> Tensor:
    """``C [g, n, n]`` with the same moment for every slice and nothing between slices."""
    n = 3 * math.prod(kernel)
    # Unfolding puts the coordinates of a slice in the rows, a column for each slice.
    numbers = unfold(torch.arange(n, dtype=torch.float64).reshape(1, 1, 3, *kernel), how)[0].long()
    assert numbers.shape == (block.shape[1], n // block.shape[1])
    dense = torch.zeros(len(block), n, n, dtype=torch.float64)
    for slice_ in numbers.T:
        dense[:, slice_.unsqueeze(1), slice_] = block
    return dense


def cases(g: int, kernel: tuple[int, ...], how: Unfolding) -> dict[str, tuple[SlicedMetric, Tensor]]:
    """Every metric that knows its slices, and the dense matrix it stands for."""
    patch = (3, *kernel)
    n = math.prod(patch)
    dense, block = moment(g, n), moment(g, 3 * how.sizes(kernel)[0])
    plain = Plain(g, patch, torch.device("cpu"), how)
    return {
        "full": (Full(dense, patch, how), dense),
        "slices": (Slices(block, patch, how), blocks(kernel, how, block)),
        "plain": (plain, torch.eye(n, dtype=torch.float64).expand(g, n, n)),
    }


@pytest.mark.table
@pytest.mark.parametrize("kind", ["full", "slices", "plain"])
@pytest.mark.parametrize(("kernel", "how"), SLICED, ids=[f"{k}-{h.name}" for k, h in SLICED])
@pytest.mark.parametrize("g", [1, 2])
def test_sliced_metrics_are_their_dense_matrices(kind: str, kernel: tuple[int, ...], how: Unfolding, g: int) -> None:
    metric, dense = cases(g, kernel, how)[kind]
    assert agrees(metric, dense)
    assert metric.dtype == torch.float64
    p, q, outputs, rank = 3 * how.sizes(kernel)[0], metric.slices, 4, 2
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(g, outputs, p * q, generator=generator, dtype=torch.float64)
    left = torch.randn(g, p, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(g, rank, outputs * q, generator=generator, dtype=torch.float64)
    matrix = metric.unfold(weight)
    torch.testing.assert_close(metric.fold(matrix), weight)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return metric.fold(left @ right)

    # What a first factor lets through: a map from whole patches, a column for each component and slice.
    eye = torch.eye(q, dtype=torch.float64)
    through = torch.stack([product(left[..., [r]], eye[[s]].expand(g, 1, q)) for r in range(rank) for s in range(q)], 3)
    through = through[:, 0]
    gram, cross = metric.normal(matrix, left)
    # Where all slices are alike it is told once.
    alike = torch.eye(rank * q // gram.moment.shape[1], dtype=torch.float64)
    torch.testing.assert_close(
        torch.stack([torch.kron(each, alike) for each in gram.moment]), through.mT @ dense @ through
    )
    torch.testing.assert_close(cross, through.mT @ dense @ weight.mT)
    torch.testing.assert_close(metric.normal(matrix, left, metric.seen(matrix))[1], cross)
    torch.testing.assert_close(metric.first_seen(metric.seen(matrix))(right), metric.first_target(matrix)(right))
    solution = response.Normal(gram, cross, cross.new_zeros(()), q).solve()
    right_of = solution.reshape(g, rank, outputs, q).transpose(2, 3).flatten(1, 2)
    torch.testing.assert_close(through.mT @ dense @ through @ right_of, cross, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(metric.fold(metric.seen(matrix).transpose(2, 3).flatten(2)), weight @ dense)
    parts = [product(left[..., [r]], right[:, [r]]) for r in range(rank)]
    pairs = torch.stack([torch.stack([(a @ dense * b).sum() for b in parts]) for a in parts])
    torch.testing.assert_close(metric.pairs(left, right), pairs)
    # The slope of half the error in the first factor is what the operator gives less what is asked for.
    moving = left.clone().requires_grad_()
    rest = weight - product(moving, right)
    (slope,) = torch.autograd.grad((rest @ dense * rest).sum() / 2, moving)
    torch.testing.assert_close(metric.first_operator(right)(left) - metric.first_target(matrix)(right), slope)
    # Nothing of what was let through is left beside it.
    beside = metric.beside(left)
    unseen = dense - dense @ through @ torch.linalg.solve(through.mT @ dense @ through, through.mT @ dense)
    everything = torch.eye(p * q, dtype=torch.float64).expand(g, -1, -1)
    torch.testing.assert_close(beside.times(everything), unseen, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("kind", ["full", "slices", "plain", "rows"])
@pytest.mark.parametrize(("kernel", "how"), SLICED, ids=[f"{k}-{h.name}" for k, h in SLICED])
def test_the_average_is_that_of_the_slices(kind: str, kernel: tuple[int, ...], how: Unfolding) -> None:
    rows, level = torch.randn(2, 5, 3 * math.prod(kernel)).double(), torch.rand(2, 3 * math.prod(kernel)).double()
    of_rows = Rows(rows, level, (3, *kernel))
    metric = of_rows.sliced(how) if kind == "rows" else cases(2, kernel, how)[kind][0]
    everything = torch.eye(rows.shape[2]).double().expand(2, -1, -1)
    dense = (of_rows if kind == "rows" else metric).times(everything)
    numbers = unfold(torch.arange(rows.shape[2]).double().reshape(1, 1, 3, *kernel), how)[0].long()
    expected = torch.stack([dense[:, s.unsqueeze(1), s] for s in numbers.T]).mean(0)
    torch.testing.assert_close(metric.average, expected)
    some = torch.randn(2, expected.shape[1], 3).double()
    torch.testing.assert_close(metric.weigh(some), expected @ some)
    assert metric.separates == (kind != "full" or metric.slices == 1)
    alone = metric.averaged
    assert (alone.slices, alone.separates) == (1, True)
    torch.testing.assert_close(alone.moment, expected)


def test_a_metric_can_be_sliced_another_way() -> None:
    one, two = unfoldings((2, 3))[2:]
    dense = moment(1, 18)
    assert Full(dense, (3, 2, 3), one).sliced(two).average.shape == (1, 9, 9)
    assert Plain(1, (3, 2, 3), torch.device("cpu"), one).sliced(two).slices == 2
    slices = Slices(moment(1, 6), (3, 2, 3), one)
    assert slices.sliced(one) is slices
    with pytest.raises(ValueError, match="slices of 'height-first' says nothing of those of 'width-first'"):
        slices.sliced(two)


def test_metrics_of_one_kind_have_a_mean() -> None:
    one, two = moment(2, 6, seed=1), moment(2, 6, seed=2)
    how = unfolding((3,), "input")
    average = mean([Full(one, (2, 3), how), Full(two, (2, 3), how)])
    torch.testing.assert_close(average.moment, (one + two) / 2)
    assert (average.patch, average.how) == ((2, 3), how)
    single = Full(one).single()
    assert isinstance(single, Full)
    torch.testing.assert_close(single.moment, one.float())


def test_entries_that_are_rounding_alone_do_not_stop_a_factorisation() -> None:
    """A direction that is dead has a variance of rounding, 1e-47, and products of rounding with others, 1e-33."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=draw, dtype=torch.float64)
    good = rows.mT @ rows
    matrix = torch.zeros(1, 8, 8, dtype=torch.float64)
    matrix[0, :6, :6] = good
    matrix[0, 6:, :] = matrix[0, :, 6:] = 0
    matrix[0, 6, 7] = matrix[0, 7, 6] = 1e-33
    matrix[0, 6, 6], matrix[0, 7, 7] = 1e-47, 2e-47
    factor = cholesky(matrix)
    torch.testing.assert_close((factor @ factor.mT)[0, :6, :6], good)
    with pytest.raises(ValueError, match="NaN or Inf"):
        cholesky(torch.full((1, 3, 3), torch.nan, dtype=torch.float64))
