"""Low rank in the metric of the inputs, with and without decompositions, against the literal formula."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg import bilateral
from spectrim.linalg.metric import Full, Metric, Plain, Slices
from spectrim.linalg.unfold import unfolding


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(g: int, n: int, *, seed: int = 0) -> Tensor:
    patches = random(g, 3 * n + 10, n, seed=seed) @ random(g, n, n, seed=seed + 1)
    return patches.mT @ patches / patches.shape[1]


def power_law(g: int, o: int, n: int, *, exponent: float = 0.6, seed: int = 0) -> Tensor:
    """Weights whose singular values fall like a power."""
    left, _, right = torch.linalg.svd(random(g, o, n, seed=seed), full_matrices=False)
    values = torch.arange(1, min(o, n) + 1, dtype=torch.float64) ** -exponent
    return (left * values) @ right


def literal(target: Tensor, moment: Tensor, rank: int) -> Tensor:
    """``SVD_r(T C^1/2) C^-1/2`` (METHODS B.2)."""
    values, vectors = torch.linalg.eigh(moment)
    half = vectors @ (values.sqrt().unsqueeze(-1) * vectors.mT)
    inverse = vectors @ (values.rsqrt().unsqueeze(-1) * vectors.mT)
    left, singular, right = torch.linalg.svd(target @ half, full_matrices=False)
    return (left[..., :rank] * singular[..., None, :rank]) @ right[:, :rank] @ inverse


def lost(target: Tensor, metric: Metric, factors: tuple[Tensor, Tensor]) -> float:
    return float(metric.energy(target - factors[0] @ factors[1]))


@settings(max_examples=25)
@given(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7), st.integers(0, 20), st.data())
def test_the_exact_step_is_the_whitened_singular_value_decomposition(
    g: int, o: int, n: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(o, n)))
    target, moment = random(g, o, n, seed=seed), correlated(g, n, seed=seed)
    left, right = bilateral.exact(target, Full(moment), rank)
    assert (left.shape, right.shape) == ((g, o, rank), (g, rank, n))
    torch.testing.assert_close(left @ right, literal(target, moment, rank), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(left.mT @ left, torch.eye(rank, dtype=torch.float64).expand(g, -1, -1))


@settings(max_examples=25)
@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.data())
def test_the_greedy_step_gives_factors_of_the_rank_asked_for(
    g: int, o: int, n: int, turns: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(o, n)))
    target, metric = random(g, o, n), Full(correlated(g, n))
    left, right = bilateral.greedy(target, metric, rank, turns=turns)
    assert (left.shape, right.shape) == ((g, o, rank), (g, rank, n))
    torch.testing.assert_close(left.mT @ left, torch.eye(rank, dtype=torch.float64).expand(g, -1, -1))
    # The second factor is the best one for the first, in any metric.
    torch.testing.assert_close(right, left.mT @ target)
    best = lost(target, metric, bilateral.exact(target, metric, rank))
    assert lost(target, metric, (left, right)) >= best - 1e-9
    again = bilateral.greedy(target, metric, rank, turns=turns)
    assert torch.equal(left, again[0])
    assert torch.equal(right, again[1])


@pytest.mark.parametrize("exponent", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("share", [0.05, 0.15, 0.25])
def test_the_greedy_step_loses_hardly_more_than_the_exact_one(exponent: float, share: float) -> None:
    o, n = 120, 180
    target, moment = power_law(1, o, n, exponent=exponent), correlated(1, n)
    metric, rank = Full(moment), round(share * o)
    best = lost(target, metric, bilateral.exact(target, metric, rank))
    assert lost(target, metric, bilateral.greedy(target, metric, rank)) <= 1.03 * best
    assert lost(target, metric, bilateral.greedy(target, metric, rank, turns=12)) <= 1.01 * best


def test_over_relaxed_turns_come_closer_than_plain_ones() -> None:
    target, metric = power_law(1, 120, 180), Full(correlated(1, 180))
    best = lost(target, metric, bilateral.exact(target, metric, 20))
    for turns in (3, 4, 6):
        # From a start there is no over-relaxation, so this is the plain iteration from the same sketch.
        sketch = random(1, 20, 120) @ target
        left = torch.linalg.qr(target @ metric.times(sketch).mT).Q
        plain = bilateral.greedy(target, metric, 20, start=left.mT @ target, turns=turns - 1)
        excess = lost(target, metric, bilateral.greedy(target, metric, 20, turns=turns)) - best
        assert 0 <= excess < 0.8 * (lost(target, metric, plain) - best)


@pytest.mark.parametrize("known", [0, 3])
def test_neither_order_nor_sign_of_channels_decides(known: int) -> None:
    """Nor a rotation of the outputs, as another root of their weight is."""
    target, moment = power_law(2, 14, 18), correlated(2, 18)
    start = bilateral.exact(target, Full(moment), known)[1] if known else None
    inputs, signs = torch.randperm(18), torch.sign(random(18, seed=5))
    turned = torch.linalg.qr(random(2, 14, 14, seed=4)).Q
    one = torch.matmul(*bilateral.greedy(target, Full(moment), 6, start=start, turns=2))
    other = torch.matmul(
        *bilateral.greedy(
            turned @ (target * signs)[..., inputs],
            Full((moment * signs * signs.unsqueeze(1))[:, inputs][:, :, inputs]),
            6,
            start=None if start is None else (start * signs)[..., inputs],
            turns=2,
        )
    )
    torch.testing.assert_close(turned.mT @ other[..., inputs.argsort()] * signs, one)


@settings(max_examples=25)
@given(st.integers(0, 40), st.integers(1, 5), st.booleans())
def test_from_a_start_every_turn_lowers_the_error(seed: int, rank: int, scaled: bool) -> None:
    target, moment = random(2, 6, 8, seed=seed), correlated(2, 8, seed=seed)
    metric = Full(moment * (1e6 if scaled else 1.0))
    left = torch.linalg.qr(random(2, 6, rank, seed=seed + 3)).Q
    start = left.mT @ target
    errors = [lost(target, metric, (left, start))]
    for turns in (1, 2, 3, 6):
        errors.append(lost(target, metric, bilateral.greedy(target, metric, rank, start=start, turns=turns)))
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))


def test_a_start_of_a_lower_rank_is_kept_and_grown() -> None:
    target, metric = power_law(1, 40, 60), Full(correlated(1, 60))
    small = bilateral.greedy(target, metric, 4)
    grown = bilateral.greedy(target, metric, 8, start=small[1], turns=1)
    assert grown[1].shape == (1, 8, 60)
    assert lost(target, metric, grown) < lost(target, metric, small)
    with pytest.raises(ValueError, match="the start has rank 8, more than the 4 asked for"):
        bilateral.greedy(target, metric, 4, start=grown[1])


@pytest.mark.parametrize("rank", [3, 5])
def test_a_target_of_low_rank_is_found_whole(rank: int) -> None:
    target = random(2, 9, 3) @ random(2, 3, 12, seed=1)
    for metric in (Full(correlated(2, 12)), Plain(2, (12,), torch.device("cpu"))):
        for found in (bilateral.exact(target, metric, rank), bilateral.greedy(target, metric, rank)):
            torch.testing.assert_close(found[0] @ found[1], target, atol=1e-8, rtol=1e-8)


def test_without_correlations_it_is_the_singular_value_decomposition() -> None:
    target = random(2, 6, 8)
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    found = bilateral.exact(target, Plain(2, (8,), torch.device("cpu")), 3)
    torch.testing.assert_close(found[0] @ found[1], (left[..., :3] * values[:, None, :3]) @ right[:, :3])


def test_slices_are_a_metric_like_any_other() -> None:
    block = correlated(1, 6)
    metric = Slices(block, (2, 3, 4), unfolding((3, 4), "height-first"))
    dense = metric.times(torch.eye(24, dtype=torch.float64).unsqueeze(0))
    target = random(1, 8, 24)
    here, there = bilateral.exact(target, metric, 3), bilateral.exact(target, Full(dense), 3)
    torch.testing.assert_close(here[0] @ here[1], there[0] @ there[1])


def test_groups_are_independent() -> None:
    target, moment = random(3, 6, 8), correlated(3, 8)
    whole = bilateral.exact(target, Full(moment), 2)
    for number in range(3):
        one = slice(number, number + 1)
        part = bilateral.exact(target[one], Full(moment[one]), 2)
        torch.testing.assert_close(whole[0][one] @ whole[1][one], part[0] @ part[1])
    # So are greedy turns, once past the sketch.
    start = whole[1] + 0.1 * random(3, 2, 8, seed=4)
    together = bilateral.greedy(target, Full(moment), 2, start=start)
    for number in range(3):
        one = slice(number, number + 1)
        part = bilateral.greedy(target[one], Full(moment[one]), 2, start=start[one])
        torch.testing.assert_close(together[0][one] @ together[1][one], part[0] @ part[1])


@pytest.mark.parametrize("dead", ["inputs", "weight"])
def test_dead_inputs_and_weights_stay_finite(dead: str) -> None:
    target, moment = random(1, 6, 8), correlated(1, 8)
    target, moment = (target, torch.zeros_like(moment)) if dead == "inputs" else (torch.zeros_like(target), moment)
    for found in (bilateral.exact(target, Full(moment), 3), bilateral.greedy(target, Full(moment), 3)):
        assert torch.isfinite(found[0] @ found[1]).all()
        assert lost(target, Full(moment), found) == pytest.approx(0, abs=1e-12)


def test_large_targets_start_in_single_precision_and_end_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(2, 40, 60, generator=draw, dtype=torch.float64) * torch.linspace(2, 0.01, 60).double()
    metric = Plain(2, (60,), torch.device("cpu"))
    before = bilateral.greedy(target, metric, 12)
    monkeypatch.setattr("spectrim.linalg.bilateral._SINGLE", 1)
    after = bilateral.greedy(target, metric, 12)
    assert after[0].dtype == torch.float64
    eye = torch.eye(12, dtype=torch.float64).expand(2, 12, 12)
    torch.testing.assert_close(after[0].mT @ after[0], eye)
    least = metric.energy(target - torch.matmul(*bilateral.exact(target, metric, 12)))
    lost = [float(metric.energy(target - left @ right) / least) for left, right in (before, after)]
    assert max(lost) < 1.05
