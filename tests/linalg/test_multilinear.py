"""Tucker-2 and CP against dense references, finite differences and their own invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg import descent
from spectrim.linalg.descent import descend
from spectrim.linalg.metric import Full, Plain
from spectrim.linalg.multilinear import (
    Target,
    columns_of,
    normalised,
    polyadic,
    polyadic_error,
    polyadic_start,
    tucker,
    tucker_errors,
    tucker_start,
)
from spectrim.linalg.unfold import unfolding

PARTS = {
    (3, 3): [[(0, 1)], [(0,), (1,)]],
    (1, 3): [[(0, 1)]],
    (5,): [[(0,)]],
    (2, 3, 2): [[(0, 1, 2)], [(0,), (1,), (2,)]],
}
KERNELS = sorted(PARTS, key=str)


def target(kernel: tuple[int, ...], *, outputs: int = 4, inputs: int = 3, data: bool = True, seed: int = 0) -> Target:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, *kernel, generator=generator, dtype=torch.float64)
    how, size = unfolding(kernel, "input"), weight[0].numel()
    if not data:
        return Target(weight, Plain(1, (inputs, *kernel), weight.device, how))
    rows = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    return Target(weight, Full((rows.mT @ rows / len(rows)).unsqueeze(0), (inputs, *kernel), how))


def answered(goal: Target, columns: Tensor) -> float:
    """Share of the energy lost with the best last factor, from its definition."""
    return goal.lost((goal.outer(columns) @ columns.mT).reshape(goal.weight.shape))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("data", [False, True])
def test_all_components_are_the_weight_whatever_the_parts(kernel: tuple[int, ...], data: bool) -> None:
    goal = target(kernel, data=data)
    for parts in PARTS[kernel]:
        modes = polyadic_start(goal, parts, min(goal.weight.shape[:2]) * goal.weight[0, 0].numel())
        columns = columns_of(modes)
        product = (goal.outer(columns) @ columns.mT).reshape(goal.weight.shape)
        torch.testing.assert_close(product, goal.weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_error_is_that_of_the_product_and_falls_with_more_components(kernel: tuple[int, ...]) -> None:
    goal = target(kernel)
    for parts in PARTS[kernel]:
        errors = []
        for rank in (1, 2, 4, 6):
            modes = polyadic_start(goal, parts, rank)
            errors.append(polyadic_error(goal, modes)[0])
            assert errors[-1] == pytest.approx(answered(goal, columns_of(modes)), abs=1e-9)
        # The starts are nested and the last factor is exact.
        assert errors == sorted(errors, reverse=True)
        assert 0 < errors[-1] < errors[0] < 1


@pytest.mark.parametrize("data", [False, True])
@given(seed=st.integers(0, 1000), rank=st.integers(1, 5))
@settings(max_examples=8, deadline=None)
def test_gradients_are_those_of_finite_differences(data: bool, seed: int, rank: int) -> None:
    goal = target((3, 2), data=data, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    modes = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (3, 3, 2)]
    ways = [torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in modes]
    _, gradients, _ = polyadic_error(goal, modes)
    ahead, behind = (
        polyadic_error(goal, [m + h * w for m, w in zip(modes, ways, strict=True)])[0] for h in (1e-5, -1e-5)
    )
    slope = sum(float((g * w).sum()) for g, w in zip(gradients, ways, strict=True))
    assert (ahead - behind) / 2e-5 == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("data", [False, True])
def test_more_evaluations_lose_less_and_never_more_than_the_start(data: bool) -> None:
    goal = target((3, 3), data=data)
    start = polyadic_start(goal, [(0, 1)], 4)
    errors = [polyadic(goal, start, evaluations)[1] for evaluations in (0, 2, 8, 40)]
    assert errors[0] == pytest.approx(polyadic_error(goal, start)[0])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_a_descent_to_a_cp_knows_its_last_eight_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[int] = []
    direction = descent._direction

    def noted(gradient: torch.Tensor, pairs: Any) -> torch.Tensor:
        known.append(len(pairs))
        return direction(gradient, pairs)

    monkeypatch.setattr(descent, "_direction", noted)
    goal = target((3, 3), data=True)
    polyadic(goal, polyadic_start(goal, [(0, 1)], 4), 60)
    assert max(known) == 8


def test_a_sum_of_few_components_is_found_again() -> None:
    generator = torch.Generator().manual_seed(1)
    modes = [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (6, 9)]
    outer = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    weight = torch.einsum("or,ir,kr->oik", outer, *modes).reshape(5, 6, 3, 3)
    goal = Target(weight, Plain(1, (6, 3, 3), weight.device, unfolding((3, 3), "input")))
    _, error = polyadic(goal, polyadic_start(goal, [(0, 1)], 2), 200)
    assert error < 1e-8


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("data", [False, True])
def test_tucker_errors_are_those_of_the_factors_and_fall_with_either_rank(kernel: tuple[int, ...], data: bool) -> None:
    goal = target(kernel, data=data)
    inner = tucker_start(goal, 3)
    errors = tucker_errors(goal, inner, [1, 2, 3])
    for number, lost in zip((1, 2, 3), errors, strict=True):
        assert len(lost) == goal.weight.shape[0] + 1
        assert bool((lost.diff() <= 1e-12).all())
        kept, core = tucker(goal, inner[:, :number], 2, 0)
        columns = torch.einsum("ip,qp...->i...q", kept, core).flatten(0, -2)
        assert answered(goal, columns) == pytest.approx(float(lost[2]), abs=1e-9)
    assert bool((errors[0] >= errors[1] - 1e-12).all() and (errors[1] >= errors[2] - 1e-12).all())
    assert float(errors[2][-1]) == pytest.approx(0, abs=1e-9)


def test_tucker_without_data_is_no_worse_than_the_truncated_svds() -> None:
    goal = target((3, 3), outputs=6, inputs=5, data=False)
    cube = goal.weight
    left = torch.linalg.svd(cube.transpose(0, 1).flatten(1), full_matrices=False).U[:, :2]
    right = torch.linalg.svd(cube.flatten(1), full_matrices=False).U[:, :3]
    core = torch.einsum("oikl,oq,ip->qpkl", cube, right, left)
    truncated = 1 - float(core.square().sum() / cube.square().sum())
    inner = tucker_start(goal, 2)
    start = float(tucker_errors(goal, inner, [2])[0][3])
    kept, core = tucker(goal, inner, 3, 40)
    descended = answered(goal, torch.einsum("ip,qp...->i...q", kept, core).flatten(0, -2))
    # The start has the same combinations of inputs, and the best outputs for them.
    assert descended < start <= truncated + 1e-12


def test_nothing_is_lost_of_nothing() -> None:
    goal = Target(torch.zeros(3, 2, 3, 3, dtype=torch.float64), target((3, 3), inputs=2).metric)
    modes, error = polyadic(goal, polyadic_start(goal, [(0, 1)], 2), 5)
    assert error == 0
    assert all(bool(mode.isfinite().all()) for mode in modes)
    assert float(tucker_errors(goal, tucker_start(goal, 2), [1])[0].max()) == 0


def test_channels_that_never_change_do_no_harm() -> None:
    goal = target((3, 3))
    moment = goal.metric.moment.clone().reshape(1, 3, 9, 3, 9)  # type: ignore[attr-defined]
    moment[:, 1], moment[:, :, :, 1] = 0, 0
    still = Target(goal.weight, Full(moment.reshape(1, 27, 27), (3, 3, 3), goal.metric.how))
    modes, error = polyadic(still, polyadic_start(still, [(0, 1)], 3), 10)
    assert all(bool(mode.isfinite().all()) for mode in modes)
    assert 0 < error < 1


def test_descent_keeps_the_best_point_it_has_seen() -> None:
    found = descend(lambda p: (float((p[0] - 3).square().sum()), [2 * (p[0] - 3)]), [torch.zeros(2)], 10)
    torch.testing.assert_close(found[0], torch.full((2,), 3.0))
    assert torch.equal(descend(lambda p: (0.0, p), [torch.ones(2)], 0)[0], torch.ones(2))


def test_columns_without_length_are_left() -> None:
    scaled = normalised([torch.tensor([[3.0, 0.0], [4.0, 0.0]])])[0]
    assert torch.equal(scaled, torch.tensor([[0.6, 0.0], [0.8, 0.0]]))


def test_rounding_does_not_decide_where_a_descent_ends() -> None:
    for seed in range(2):
        goal = target((3, 3), outputs=12, inputs=10, seed=seed)
        draw = torch.randn(goal.weight.shape, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)
        other = Target(goal.weight * (1 + 1e-7 * draw), goal.metric)
        answers = []
        for each in (goal, other):
            modes, _ = polyadic(each, polyadic_start(each, [(0, 1)], 5), 600)
            columns = columns_of(modes)
            answers.append(each.outer(columns) @ columns.mT)
        assert float((answers[0] - answers[1]).norm()) <= 5e-3 * float(answers[0].norm())
