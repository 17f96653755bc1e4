"""Metrics as operators against the dense matrices they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.metric import Full, Metric, Plain, Rows, Slices
from spectrim.linalg.unfold import unfold, unfoldings

KERNELS = [(), (3,), (2, 3), (2, 1, 2)]
SLICED = [(kernel, how) for kernel in KERNELS for how in unfoldings(kernel)]


def moment(g: int, n: int, *, seed: int = 0) -> Tensor:
    mixing = torch.randn(g, n, 2 * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mixing @ mixing.mT / (2 * n)


def check(metric: Metric, dense: Tensor) -> None:
    """Products, diagonal and energy of a metric are those of a dense ``C [g, n, n]``."""
    g, n, _ = dense.shape
    rows = torch.randn(g, 3, n, dtype=torch.float64)
    torch.testing.assert_close(metric.times(rows), rows @ dense)
    torch.testing.assert_close(metric.diagonal(), dense.diagonal(dim1=1, dim2=2).contiguous())
    expected = sum(torch.trace(r @ c @ r.T) for r, c in zip(rows, dense, strict=True))
    torch.testing.assert_close(metric.energy(rows), expected)


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 7))
def test_a_full_metric_is_its_matrix(g: int, n: int) -> None:
    dense = moment(g, n)
    check(Full(dense), dense)


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 7))
def test_the_plain_metric_is_the_identity(g: int, n: int) -> None:
    check(Plain(g, n, torch.device("cpu")), torch.eye(n, dtype=torch.float64).expand(g, n, n))


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7))
def test_rows_are_their_moment_and_a_level(g: int, m: int, n: int) -> None:
    rows, level = torch.randn(g, m, n, dtype=torch.float64), torch.rand(g, dtype=torch.float64)
    dense = rows.mT @ rows + level.reshape(g, 1, 1) * torch.eye(n, dtype=torch.float64)
    check(Rows(rows, level), dense)


@pytest.mark.parametrize(("kernel", "how"), SLICED, ids=[f"{k}-{h.name}" for k, h in SLICED])
@pytest.mark.parametrize("g", [1, 2])
def test_slices_are_the_block_diagonal_matrix(kernel: tuple[int, ...], how, g: int) -> None:
    patch = (3, *kernel)
    n, length = math.prod(patch), 3 * how.sizes(kernel)[0]
    block = moment(g, length)
    # Unfolding puts the coordinates of a slice in the rows, a column for each slice.
    numbers = unfold(torch.arange(n, dtype=torch.float64).reshape(1, 1, *patch), how)[0].long()
    assert numbers.shape == (length, n // length)
    dense = torch.zeros(g, n, n, dtype=torch.float64)
    for slice_ in numbers.T:
        dense[:, slice_.unsqueeze(1), slice_] = block
    check(Slices(block, patch, how.axes), dense)
