"""Eigenvalues are numbers on every machine, also where its solver gives none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.linalg import symmetric
from spectrim.linalg.metric import Full
from spectrim.linalg.sparse import Quadratic


def _gram(dtype: torch.dtype) -> Tensor:
    """Of four rows of 32 numbers: all but four of its eigenvalues are equal."""
    rows = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return rows.mT @ rows + torch.eye(32, dtype=dtype)


def _spoils(result: Any, _: Tensor) -> Any:
    return type(result)(part * float("nan") for part in result) if isinstance(result, tuple) else result * float("nan")


def _raises(_: Any, matrix: Tensor) -> Any:
    raise RuntimeError(f"of {tuple(matrix.shape)} it did not converge")


@pytest.fixture(params=[_spoils, _raises])
def fails_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which solvers of torch failed: each does the first time it is asked, as one in single precision may."""
    failed: list[str] = []

    def failing(name: str, solve: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def call(matrix: Tensor) -> Any:
            if name in failed:
                return solve(matrix)
            failed.append(name)
            return request.param(tuple(solve(matrix)) if name == "eigh" else solve(matrix), matrix)

        return call

    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, failing(name, getattr(torch.linalg, name)))
    return failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_a_solver_fails_another_one_is_asked(fails_once: list[str], dtype: torch.dtype) -> None:
    gram = _gram(dtype)
    values, vectors = symmetric.eigh(gram)
    alone = symmetric.eigvalsh(gram)
    assert fails_once == ["eigh", "eigvalsh"]
    close = {"atol": 1e-4 if dtype == torch.float32 else 1e-6, "rtol": 0}
    assert values.dtype == vectors.dtype == alone.dtype == dtype
    assert torch.allclose(vectors @ torch.diag_embed(values) @ vectors.mT, gram, **close)
    assert torch.allclose(vectors.mT @ vectors, torch.eye(32, dtype=dtype).expand(2, -1, -1), **close)
    assert torch.allclose(alone, values, **close)


@pytest.mark.usefixtures("fails_once")
def test_penalised_weights_are_numbers_where_a_solver_fails() -> None:
    rows = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    size = (moment := _gram(torch.float64)).diagonal(dim1=-2, dim2=-1).sqrt()
    moment = moment / size.unsqueeze(1) / size.unsqueeze(2)
    shrunk = Quadratic(Full(moment)).ridge.solve(rows, 2.0)
    assert torch.allclose((rows - shrunk) @ moment, 2.0 * shrunk, atol=1e-5)
