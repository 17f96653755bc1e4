"""Spectra and factors against torch.linalg.svd, with and without a metric."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.lowrank import balance, energies, factors, principal, profile, spectrum, tail_errors
from spectrim.testing import planted

SHAPES = [(1, 6, 6, 6), (2, 9, 4, 4), (3, 4, 9, 4), (2, 7, 5, 2), (2, 5, 7, 2), (1, 1, 6, 1), (1, 6, 1, 1)]
"""Groups, rows, columns, rank."""
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda s: st.tuples(*map(st.just, s), st.integers(0, min(s[1:])))
)


def matrix_of(g: int, rows: int, columns: int, rank: int, seed: int = 0) -> Tensor:
    return planted(rows, columns, [2.0 ** (3 - k) for k in range(rank)], groups=g, seed=seed)


def metric_of(g: int, rows: int, rank: int | None = None, seed: int = 1) -> Tensor:
    drawn = torch.randn(g, rows, rows if rank is None else rank, generator=torch.Generator().manual_seed(seed)).double()
    return drawn @ drawn.mT / rows


def root(metric: Tensor) -> Tensor:
    """A square root made another way than the library does: ``F`` with ``F^T F = A``."""
    values, vectors = torch.linalg.eigh(metric)
    return values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.mT


@given(shapes, st.integers(0, 5))
def test_energies_are_squared_singular_values(shape: tuple[int, int, int, int], seed: int) -> None:
    matrix = matrix_of(*shape, seed=seed)
    found = spectrum(matrix)
    expected = torch.linalg.svdvals(matrix).square()
    torch.testing.assert_close(found.energies, expected, atol=1e-12, rtol=1e-10)
    assert (found.energies.diff(dim=-1) <= 0).all()
    assert (found.energies >= 0).all()


@given(shapes, st.integers(0, 5))
def test_energies_in_a_metric_are_those_of_the_whitened_matrix(shape: tuple[int, int, int, int], seed: int) -> None:
    matrix, metric = matrix_of(*shape, seed=seed), metric_of(shape[0], shape[1], seed=seed)
    expected = torch.linalg.svdvals(root(metric) @ matrix).square()
    torch.testing.assert_close(spectrum(matrix, metric).energies, expected, atol=1e-11, rtol=1e-9)


@given(shapes, st.integers(0, 5))
def test_energies_alone_are_those_of_the_spectrum(shape: tuple[int, int, int, int], seed: int) -> None:
    matrix, metric = matrix_of(*shape, seed=seed), metric_of(shape[0], shape[1], seed=seed)
    # Both orientations, so that the smaller side is once the rows and once the columns.
    for found in (energies(matrix), energies(matrix.mT.contiguous())):
        torch.testing.assert_close(found, torch.linalg.svdvals(matrix).square(), atol=1e-11, rtol=1e-10)
        assert (found >= 0).all()
        assert (found.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(energies(matrix, metric), spectrum(matrix, metric).energies, atol=1e-11, rtol=1e-9)
    assert energies(matrix.float()).dtype == torch.float64


@given(shapes, st.integers(0, 5))
def test_the_basis_is_orthonormal_also_where_the_spectrum_has_died_out(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    matrix = matrix_of(*shape, seed=seed)
    for metric in (None, metric_of(shape[0], shape[1], rank=1, seed=seed)):
        basis = spectrum(matrix, metric).basis
        assert basis.shape == (shape[0], shape[2], min(shape[1:3]))
        eye = torch.eye(basis.shape[-1], dtype=torch.float64).expand(shape[0], -1, -1)
        torch.testing.assert_close(basis.mT @ basis, eye, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_leading_columns_span_the_leading_singular_vectors(shape: tuple[int, int, int, int], weighted: bool) -> None:
    matrix = matrix_of(*shape)
    metric = metric_of(shape[0], shape[1]) if weighted else None
    basis = spectrum(matrix, metric).basis
    right = torch.linalg.svd(matrix if metric is None else root(metric) @ matrix).Vh.mT
    for rank in range(1, shape[3] + 1):
        torch.testing.assert_close(projector(basis[..., :rank]), projector(right[..., :rank]), atol=1e-9, rtol=0)


@given(shapes, st.integers(0, 5))
def test_factors_reach_the_error_of_eckart_and_young(shape: tuple[int, int, int, int], seed: int) -> None:
    matrix = matrix_of(*shape, seed=seed)
    found = spectrum(matrix)
    values = torch.linalg.svdvals(matrix).square()
    for rank in range(min(shape[1:3]) + 1):
        left, right = factors(matrix, found.basis, rank)
        lost = (matrix - left @ right).square().sum(dim=(1, 2))
        torch.testing.assert_close(lost, values[:, rank:].sum(-1), atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_in_a_metric_are_optimal(shape: tuple[int, int, int, int]) -> None:
    g, rows, _, rank = shape
    matrix, metric = matrix_of(*shape), metric_of(g, rows)
    found = spectrum(matrix, metric)
    kept = max(1, rank - 1)
    left, right = factors(matrix, found.basis, kept)

    def lost(left: Tensor, right: Tensor) -> Tensor:
        missing = matrix - left @ right
        return (missing.mT @ metric @ missing).diagonal(dim1=1, dim2=2).sum()

    best = lost(left, right)
    torch.testing.assert_close(best, found.energies[:, kept:].sum(), atol=1e-10, rtol=1e-9)
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(10):
            assert lost(left + scale * torch.randn_like(left), right) >= best - 1e-10
            assert lost(left, right + scale * torch.randn_like(right)) >= best - 1e-10
            both = lost(left + scale * torch.randn_like(left), right + scale * torch.randn_like(right))
            assert both >= best - 1e-10


def test_a_singular_metric_needs_no_special_case() -> None:
    matrix, metric = matrix_of(1, 8, 5, 5), metric_of(1, 8, rank=2)
    found = spectrum(matrix, metric)
    left, right = factors(matrix, found.basis, 2)
    missing = matrix - left @ right
    assert float((missing.mT @ metric @ missing).diagonal(dim1=1, dim2=2).sum()) < 1e-12
    assert float(missing.square().sum()) > 1e-3


def test_signs_do_not_depend_on_the_sign_of_the_input() -> None:
    covariance = metric_of(3, 6)
    found = principal(covariance)
    largest = found.basis.gather(-2, found.basis.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    for shape in ((2, 7, 5, 5), (2, 5, 7, 5)):
        matrix = matrix_of(*shape)
        left, _ = factors(matrix, spectrum(matrix).basis, 3)
        other, _ = factors(-matrix, spectrum(-matrix).basis, 3)
        torch.testing.assert_close(left.abs(), other.abs(), atol=1e-10, rtol=1e-8)


def test_principal_components_reconstruct_the_covariance() -> None:
    covariance = metric_of(2, 6)
    found = principal(covariance)
    torch.testing.assert_close((found.basis * found.energies.unsqueeze(1)) @ found.basis.mT, covariance)
    assert (found.energies.diff(dim=-1) <= 0).all()


@given(shapes, st.integers(0, 5), st.floats(-6, 6))
def test_balance_keeps_the_product_and_evens_out_the_lengths(
    shape: tuple[int, int, int, int], seed: int, exponent: float
) -> None:
    matrix = matrix_of(*shape, seed=seed)
    left, right = factors(matrix, spectrum(matrix).basis, min(shape[1:3]))
    left, right = left * 10**exponent, right
    a, b = balance(left, right)
    torch.testing.assert_close(a @ b, left @ right, rtol=1e-10, atol=1e-12 * 10**exponent)
    alive = (left.norm(dim=1) > 0) & (right.norm(dim=2) > 0)
    torch.testing.assert_close(a.norm(dim=1)[alive], b.norm(dim=2)[alive], rtol=1e-10, atol=0)


def test_balance_leaves_components_of_length_zero() -> None:
    left, right = torch.ones(1, 3, 2).double(), torch.ones(1, 2, 4).double()
    left[..., 1] = 0
    a, b = balance(left, right)
    assert torch.equal(a[..., 1], left[..., 1])
    assert torch.equal(b[:, 1], right[:, 1])
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()


def test_tail_errors_sum_over_groups() -> None:
    held = torch.tensor([[4.0, 2.0], [3.0, 1.0]]).double()
    assert tail_errors(held).tolist() == pytest.approx([1.0, 0.3, 0.0])


def test_a_matrix_without_energy_loses_nothing() -> None:
    found = spectrum(torch.zeros(2, 4, 3))
    assert found.energies.sum() == 0
    assert tail_errors(found.energies).tolist() == [0.0] * 4
    assert sum(profile(found.energies)) == 0
    assert torch.isfinite(found.basis).all()


@given(st.lists(st.just(0.0) | st.floats(1e-50, 100), min_size=1, max_size=8), st.integers(1, 3))
def test_tail_errors_fall_from_one_to_zero(values: list[float], g: int) -> None:
    held = torch.tensor(sorted(values, reverse=True), dtype=torch.float64).expand(g, -1)
    errors = tail_errors(held)
    assert len(errors) == len(values) + 1
    assert (errors.diff() <= 1e-12).all()
    assert float(errors[-1]) == pytest.approx(0, abs=1e-12)
    assert float(errors[0]) == (1.0 if sum(values) > 0 else 0.0)


def test_profile_is_the_share_of_each_component() -> None:
    held = torch.tensor([[4.0, 2.0, 0.0], [3.0, 1.0, 0.0]]).double()
    assert profile(held) == pytest.approx((0.7, 0.3, 0.0))
    assert profile(held, most=2) == pytest.approx((0.7, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_decomposed_in_double_precision(dtype: torch.dtype) -> None:
    matrix = matrix_of(1, 6, 9, 6).to(dtype)
    found = spectrum(matrix)
    assert found.energies.dtype == found.basis.dtype == torch.float64
    torch.testing.assert_close(found.energies, torch.linalg.svdvals(matrix.double()).square())


def test_planted_energies_are_found_in_any_order() -> None:
    found = spectrum(planted(7, 5, [1.0, 9.0, 4.0], groups=2))
    torch.testing.assert_close(found.energies, torch.tensor([9.0, 4.0, 1.0, 0.0, 0.0]).double().expand(2, -1))
    with pytest.raises(ValueError, match="a 2 x 3 matrix takes at most 2 energies"):
        planted(2, 3, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="at least 0"):
        planted(2, 3, [-1.0])
