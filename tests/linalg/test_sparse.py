"""Sparse weights fitted to responses, against exact least squares, searches through all masks, and simpler methods."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg import sparse
from spectrim.linalg.low_rank_steps import Greedy
from spectrim.linalg.metric import Full, Plain
from spectrim.linalg.patterns import Pattern, Taps, pattern
from spectrim.linalg.sparse import Quadratic, Sparse

UNSTRUCTURED = pattern("unstructured")
# name, (g, o, i, *k), density
PATTERNS = [
    ("unstructured", (1, 6, 8), 0.2),
    ("unstructured", (2, 4, 3, 2), 0.3),
    ("rows", (1, 6, 8), 0.25),
    ("2:4", (1, 6, 8), 0.5),
    ("4:8", (2, 3, 4, 2, 2), 0.5),
    ("2x2", (1, 4, 6, 3), 0.3),
    ("1x4", (2, 3, 8), 0.25),
    ("channels", (2, 4, 5, 3), 0.4),
    ("taps-1x2@1x0", (1, 4, 3, 3, 3), 2 / 9),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(g: int, n: int, *, seed: int = 0, shared: float = 0.7) -> Tensor:
    """Second moment of inputs of unequal strength that have a part in common."""
    patches = random(g, 4 * n + 20, n, seed=seed) + shared * random(g, 4 * n + 20, 1, seed=seed + 1)
    patches = patches * torch.linspace(0.3, 2, n, dtype=torch.float64)
    return patches.mT @ patches / patches.shape[1]


def problem(
    shape: tuple[int, ...], *, seed: int = 0, outer: bool = False, shared: float = 0.7
) -> tuple[Tensor, Quadratic, tuple[int, ...]]:
    g, o, *kernel = shape
    n = torch.Size(kernel).numel()
    weight = correlated(g, o, seed=seed + 5) if outer else None
    return random(g, o, n, seed=seed), Quadratic(Full(correlated(g, n, seed=seed + 9, shared=shared)), weight), (
        *kernel,
    )  # fmt: skip


def measured(target: Tensor, error: Quadratic, found: Tensor) -> float:
    """``tr(G R C R^T)`` from dense matrices, group by group."""
    total = 0.0
    for number, rest in enumerate(target - found):
        metric = error.metric
        dense = metric.moment[number] if isinstance(metric, Full) else torch.eye(rest.shape[1], dtype=rest.dtype)
        outer = torch.eye(rest.shape[0], dtype=rest.dtype) if error.outer is None else error.outer[number]
        total += float(torch.trace(outer @ rest @ dense @ rest.T))
    return total


def least_squares(target: Tensor, error: Quadratic, mask: Tensor) -> Tensor:
    """The best values inside a mask, one dense linear system a group."""
    assert isinstance(error.metric, Full)
    best = torch.zeros_like(target)
    for number, dense in enumerate(error.metric.moment):
        o = target.shape[1]
        outer = torch.eye(o, dtype=target.dtype) if error.outer is None else error.outer[number]
        whole = torch.kron(outer, dense)
        held = mask[number].reshape(-1).nonzero().squeeze(1)
        right = (whole @ target[number].reshape(-1))[held]
        best[number].view(-1)[held] = torch.linalg.solve(whole[held][:, held], right)
    return best


def plain_thresholding(
    target: Tensor, error: Quadratic, kind: Pattern, density: float, kernel: tuple[int, ...], *, steps: int = 200
) -> Tensor:
    """``S <- H_k(S + (T - S) C / lambda_max)`` (METHODS B.2)."""
    assert isinstance(error.metric, Full)
    eta = 1 / float(torch.linalg.eigvalsh(error.metric.moment).max())
    weight = torch.zeros_like(target)
    for _ in range(steps):
        moved = weight + eta * error.apply(target - weight)
        weight = moved * sparse.threshold(moved.square(), kind, density, kernel)
    return weight


def has_pattern(mask: Tensor, kind: Pattern, shape: tuple[int, ...], density: float) -> None:
    opened = kind.open(mask.reshape(shape))
    # Units are kept or dropped as a whole, equally many in each pool.
    assert torch.equal(opened.any(-1), opened.all(-1))
    assert set(opened.any(-1).sum(1).tolist()) == {kind.kept(shape, density)}
    assert int(mask.sum()) == kind.stored(shape, density)


@settings(max_examples=20)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 5), st.floats(0, 1), st.integers(0, 20), st.booleans())
def test_values_inside_a_mask_are_the_least_squares_solution(
    g: int, o: int, n: int, density: float, seed: int, outer: bool
) -> None:
    target, error, _ = problem((g, o, n), seed=seed, outer=outer)
    mask = torch.rand(g, o, n, generator=torch.Generator().manual_seed(seed)) < density
    best = least_squares(target, error, mask)
    found = sparse.solve(target, error, mask, steps=60, tolerance=0.0)
    torch.testing.assert_close(found.weight, best, atol=1e-8, rtol=1e-6)
    assert found.error == pytest.approx(measured(target, error, best), rel=1e-7, abs=1e-10)
    assert not found.weight[~mask].any()


def test_rows_are_solved_one_by_one() -> None:
    target, error, _ = problem((1, 5, 8))
    mask = random(1, 5, 8, seed=3) > 0.3
    found = sparse.solve(target, error, mask, steps=100, tolerance=0.0).weight[0]
    assert isinstance(error.metric, Full)
    (dense,) = error.metric.moment
    for row, wanted, held in zip(found, target[0], mask[0], strict=True):
        expected = torch.linalg.solve(dense[held][:, held], (dense @ wanted)[held])
        torch.testing.assert_close(row[held], expected)


@settings(max_examples=20)
@given(st.integers(0, 50), st.integers(0, 12), st.booleans(), st.booleans())
def test_every_conjugate_gradient_step_lowers_the_error_it_reports(
    seed: int, steps: int, outer: bool, warm: bool
) -> None:
    target, error, _ = problem((2, 4, 6), seed=seed, outer=outer)
    mask = random(2, 4, 6, seed=seed + 1) > 0
    start = random(2, 4, 6, seed=seed + 2) if warm else None
    fewer = sparse.solve(target, error, mask, start=start, steps=steps)
    more = sparse.solve(target, error, mask, start=start, steps=steps + 1)
    assert fewer.error == pytest.approx(measured(target, error, fewer.weight), rel=1e-8)
    assert more.error <= fewer.error * (1 + 1e-9)


@settings(max_examples=25)
@given(st.sampled_from(PATTERNS), st.integers(0, 30), st.booleans())
def test_a_fit_has_its_pattern_and_is_no_worse_than_simpler_methods(
    case: tuple[str, tuple[int, ...], float], seed: int, outer: bool
) -> None:
    name, shape, density = case
    kind = pattern(name)
    target, error, kernel = problem(shape, seed=seed, outer=outer)
    found = sparse.fit(target, error, kind, density, kernel)
    has_pattern(found.mask, kind, shape, density)
    assert not found.weight[~found.mask].any()
    assert found.error == pytest.approx(measured(target, error, found.weight), rel=1e-7)
    once = sparse.one_shot(target, error, kind, density, kernel)
    has_pattern(once.mask, kind, shape, density)
    assert torch.equal(once.weight, target * once.mask)
    assert once.error == pytest.approx(measured(target, error, once.weight), rel=1e-9)
    assert found.error <= once.error * (1 + 1e-9)
    largest = sparse.threshold(target.square(), kind, density, kernel)
    assert found.error <= measured(target, error, target * largest) * (1 + 1e-9)
    again = sparse.fit(target, error, kind, density, kernel)
    assert torch.equal(again.weight, found.weight)
    assert torch.equal(again.mask, found.mask)


def test_fits_beat_plain_thresholding_and_refitted_magnitudes_where_inputs_correlate() -> None:
    wins = {"plain": 0.0, "magnitudes": 0.0}
    for seed in range(10):
        target, error, kernel = problem((1, 12, 16), seed=seed, shared=1.5)
        found = sparse.fit(target, error, UNSTRUCTURED, 0.25, kernel).error
        plain = measured(target, error, plain_thresholding(target, error, UNSTRUCTURED, 0.25, kernel))
        largest = sparse.threshold(target.square(), UNSTRUCTURED, 0.25, kernel)
        refitted = measured(target, error, least_squares(target, error, largest))
        assert found <= plain * 1.005
        assert found <= refitted
        wins["plain"] += plain / found / 10
        wins["magnitudes"] += refitted / found / 10
    assert wins["plain"] > 1.01
    assert wins["magnitudes"] > 1.05


@pytest.mark.table
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("kept", [1, 3])
def test_fits_come_close_to_the_best_of_all_masks(kept: int, outer: bool) -> None:
    shape = (1, 2, 4)
    masks = torch.stack([torch.isin(torch.arange(8), torch.tensor(c)) for c in itertools.combinations(range(8), kept)])
    ratios = []
    for seed in range(15):
        target, error, kernel = problem(shape, seed=seed, outer=outer)
        best = min(measured(target, error, least_squares(target, error, mask.reshape(shape))) for mask in masks)
        found = sparse.fit(target, error, UNSTRUCTURED, kept / 8, kernel, steps=20).error
        assert found >= best * (1 - 1e-9)
        ratios.append(found / best)
    assert sum(ratio < 1 + 1e-6 for ratio in ratios) >= 10
    assert sum(ratios) / len(ratios) < 1.1


def test_a_single_wrong_entry_is_exchanged() -> None:
    target, error, kernel = problem((1, 24, 36), shared=3.0)
    assert isinstance(error.metric, Full)
    mask = sparse.threshold(random(1, 24, 36, seed=4), UNSTRUCTURED, 0.1, kernel)
    target = random(1, 24, 36, seed=5).sign() * (1 + random(1, 24, 36, seed=6).abs()) * mask
    wrong = mask.clone().view(-1)
    first, other = mask.view(-1).nonzero()[0], (~mask).view(-1).nonzero()[-1]
    wrong[first], wrong[other] = False, True
    poor = sparse.solve(target, error, wrong.view_as(mask), steps=100)
    assert poor.error > 1e-3
    found = sparse.fit(target, error, UNSTRUCTURED, 0.1, kernel, start=poor, steps=100)
    assert torch.equal(found.mask, mask)
    assert found.error < 1e-6


@settings(max_examples=15)
@given(st.integers(0, 30), st.integers(0, 6))
def test_a_start_is_never_made_worse(seed: int, rounds: int) -> None:
    target, error, kernel = problem((2, 4, 6), seed=seed)
    mask = sparse.threshold(random(2, 4, 6, seed=seed + 1), UNSTRUCTURED, 0.3, kernel)
    weight = random(2, 4, 6, seed=seed + 2) * mask
    start = Sparse(weight, mask, error.value(target - weight))
    found = sparse.fit(target, error, UNSTRUCTURED, 0.3, kernel, start=start, rounds=rounds)
    assert found.error <= start.error * (1 + 1e-9)
    if not rounds:
        assert torch.equal(found.mask, mask)


def test_an_output_weight_is_the_same_as_weighting_the_outputs_by_its_root() -> None:
    target, error, _ = problem((2, 4, 6), outer=True)
    assert error.outer is not None
    values, vectors = torch.linalg.eigh(error.outer)
    root = vectors @ (values.sqrt().unsqueeze(-1) * vectors.mT)
    plain = Quadratic(error.metric)
    rest = random(2, 4, 6, seed=8)
    assert error.value(rest) == pytest.approx(plain.value(root @ rest))
    # A diagonal one commutes with masks: the fits are each other's images.
    strengths = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    weighted = Quadratic(error.metric, torch.diag(strengths.square()).expand(2, 4, 4).contiguous())
    here = sparse.fit(target, weighted, UNSTRUCTURED, 0.3, (6,))
    there = sparse.fit(strengths.unsqueeze(1) * target, plain, UNSTRUCTURED, 0.3, (6,))
    assert torch.equal(here.mask, there.mask)
    torch.testing.assert_close(strengths.unsqueeze(1) * here.weight, there.weight)
    assert here.error == pytest.approx(there.error)


def test_the_strength_of_the_inputs_does_not_matter() -> None:
    target, error, kernel = problem((1, 4, 6))
    assert isinstance(error.metric, Full)
    units = torch.logspace(-1, 1, 6, dtype=torch.float64)
    scaled = Quadratic(Full(units.unsqueeze(1) * error.metric.moment * units))
    here = sparse.fit(target, error, UNSTRUCTURED, 0.3, kernel)
    there = sparse.fit(target / units, scaled, UNSTRUCTURED, 0.3, kernel)
    assert torch.equal(here.mask, there.mask)
    assert here.error == pytest.approx(there.error, rel=1e-6)


def test_groups_are_independent_where_the_pattern_is() -> None:
    target, error, kernel = problem((3, 4, 8))
    assert isinstance(error.metric, Full)
    whole = sparse.fit(target, error, pattern("2:4"), 0.5, kernel, steps=60)
    for number in range(3):
        one = slice(number, number + 1)
        part = sparse.fit(target[one], Quadratic(Full(error.metric.moment[one])), pattern("2:4"), 0.5, kernel, steps=60)
        least = least_squares(target[one], Quadratic(Full(error.metric.moment[one])), whole.mask[one])
        torch.testing.assert_close(whole.weight[one], least, atol=1e-4, rtol=1e-3)
        has_pattern(part.mask, pattern("2:4"), (1, 4, 8), 0.5)


def test_two_of_every_four_neighbours_stay() -> None:
    target, error, kernel = problem((1, 6, 4, 2))
    mask = sparse.fit(target, error, pattern("2:4"), 0.5, kernel).mask
    assert mask.reshape(-1, 4).sum(1).tolist() == [2] * 12


def test_uncorrelated_inputs_of_equal_strength_keep_the_largest_entries() -> None:
    target = random(2, 4, 6)
    found = sparse.fit(target, Quadratic(Plain(2, (6,), torch.device("cpu"))), UNSTRUCTURED, 0.25, (6,))
    largest = sparse.threshold(target.square(), UNSTRUCTURED, 0.25, (6,))
    assert torch.equal(found.mask, largest)
    torch.testing.assert_close(found.weight, target * largest)


def test_the_ends_are_exact() -> None:
    target, error, kernel = problem((1, 4, 6))
    nothing = sparse.fit(target, error, UNSTRUCTURED, 0.0, kernel)
    assert not nothing.mask.any()
    assert nothing.error == pytest.approx(error.value(target))
    everything = sparse.fit(target, error, UNSTRUCTURED, 1.0, kernel)
    assert everything.mask.all()
    assert everything.error <= 1e-20
    box = Taps((1, 2), (1, 0))
    target, error, kernel = problem((1, 2, 2, 3, 3))
    mask = sparse.fit(target, error, box, 2 / 9, kernel).mask.reshape(1, 2, 2, 3, 3)
    assert mask[..., 1, :2].all()
    assert int(mask.sum()) == 8


@pytest.mark.parametrize("dead", ["inputs", "weight"])
def test_dead_inputs_and_weights_stay_finite(dead: str) -> None:
    target, error, kernel = problem((1, 4, 6))
    assert isinstance(error.metric, Full)
    if dead == "inputs":
        moment = error.metric.moment.clone()
        moment[:, 2:], moment[:, :, 2:] = 0, 0
        error = Quadratic(Full(moment))
    else:
        target = torch.zeros_like(target)
    found = sparse.fit(target, error, UNSTRUCTURED, 0.4, kernel)
    assert torch.isfinite(found.weight).all()
    assert found.error == pytest.approx(measured(target, error, found.weight), abs=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_an_error_beside_a_product_is_that_of_its_weight_of_the_outputs(rank: int) -> None:
    target, step = random(1, 8, 12, seed=3), Greedy(Plain(1, (12,), torch.device("cpu")))
    beside = step.eliminated(step(target, rank, None))
    assert beside.outer is not None
    assert (beside.less is None) == (2 * rank >= 8)
    rows = random(1, 8, 12, seed=4)
    torch.testing.assert_close(beside.apply(rows), beside.outer @ rows)
