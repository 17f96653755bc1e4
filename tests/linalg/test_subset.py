"""Elimination of channels against brute force: what each removal adds, who goes first, and the weights left over."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.subset import Reader, elimination, restored

seeds = st.integers(0, 10_000)


def positive(d: int, generator: torch.Generator) -> Tensor:
    a = torch.randn(d, d + 3, generator=generator, dtype=torch.float64)
    return a @ a.T / d + 0.05 * torch.eye(d, dtype=torch.float64)


def reader(n: int, f: int, seed: int, channels: list[int] | None = None, outputs: int = 3) -> Reader:
    """Reads the channels named, in shuffled order; the entries of a channel lie apart."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.tensor(channels if channels is not None else range(n))
    d = len(seen) * f
    weight = torch.randn(outputs, d, generator=generator, dtype=torch.float64)
    entries = torch.randperm(d, generator=generator).reshape(len(seen), f)
    return Reader(positive(d, generator), weight.T @ weight, seen, entries)


def loss(readers: list[Reader], gone: list[int]) -> float:
    """tr(B (C - C_S C_SS^-1 C_S^T)), from its definition."""
    total = 0.0
    for held in readers:
        taken = torch.tensor([bool(c in gone) for c in held.channels.tolist()])
        left = held.entries[~taken].flatten()
        c = held.covariance
        explained = c[:, left] @ torch.linalg.solve(c[left][:, left], c[left]) if len(left) else torch.zeros_like(c)
        total += float((held.gram * (c - explained)).sum())
    return total


def close(given: float, wanted: float, scale: float) -> bool:
    return abs(given - wanted) <= 1e-9 * scale


@given(st.integers(2, 9), st.integers(1, 3), st.integers(1, 3), seeds)
def test_every_prefix_loses_what_the_closed_formula_says(n: int, f: int, many: int, seed: int) -> None:
    readers = [reader(n, f, seed + k) for k in range(many)]
    order, lost = elimination(readers, n)
    scale = sum(r.energy for r in readers)
    assert len(order) == n - 1 == len(set(order))
    assert len(lost) == n
    assert lost[0] == 0
    for k in range(n):
        assert close(float(lost[k]), loss(readers, order[:k]), scale)


@given(st.integers(2, 7), st.integers(1, 2), seeds)
def test_each_step_takes_the_channel_that_adds_least(n: int, f: int, seed: int) -> None:
    readers = [reader(n, f, seed), reader(n, 1, seed + 1)]
    order, lost = elimination(readers, n)
    scale = sum(r.energy for r in readers)
    for k in range(n - 1):
        others = [loss(readers, [*order[:k], c]) for c in range(n) if c not in order[:k]]
        assert close(float(lost[k + 1]), min(others), scale)


@given(st.integers(4, 8), seeds)
def test_readers_of_different_channels_add_up(n: int, seed: int) -> None:
    """A grouped convolution: each reader sees a part of the channels, and a channel that nobody reads is free."""
    readers = [reader(n, 2, seed, list(range(n // 2))), reader(n, 1, seed + 1, list(range(n // 2, n - 1)))]
    order, lost = elimination(readers, n)
    scale = sum(r.energy for r in readers)
    assert order[0] == n - 1
    assert lost[1] == 0
    for k in range(n):
        assert close(float(lost[k]), loss(readers, order[:k]), scale)


@given(st.integers(1, 4), st.integers(2, 4), seeds, st.integers(1, 7))
def test_pools_lose_one_each_in_turn(pools: int, size: int, seed: int, at_a_time: int) -> None:
    n = pools * size
    held = reader(n, 1, seed)
    order, lost = elimination([held], n, pools=pools, at_a_time=at_a_time)
    assert len(order) == n - pools
    for k in range(0, len(order), pools):
        assert sorted(c // size for c in order[k : k + pools]) == list(range(pools))
    assert close(float(lost[-1]), loss([held], order), held.energy)


@given(st.integers(2, 8), seeds, st.randoms(use_true_random=False))
def test_a_given_order_is_followed(n: int, seed: int, random) -> None:
    order = list(range(n))
    random.shuffle(order)
    readers = [reader(n, 2, seed)]
    found, lost = elimination(readers, n, order=order)
    assert found == order[: n - 1]
    for k in range(n):
        assert close(float(lost[k]), loss(readers, order[:k]), readers[0].energy)


@given(st.integers(3, 12), st.integers(2, 5), seeds)
def test_several_at_a_time_lose_at_the_ends_what_they_lose_and_in_between_a_line(n: int, step: int, seed: int) -> None:
    held = reader(n, 1, seed)
    order, lost = elimination([held], n, at_a_time=step)
    ends = [*range(0, n - 1, step), n - 1]
    for start, end in itertools.pairwise(ends):
        assert close(float(lost[end]), loss([held], order[:end]), held.energy)
        line = torch.linspace(float(lost[start]), float(lost[end]), end - start + 1, dtype=torch.float64)
        assert torch.allclose(lost[start : end + 1], line, atol=1e-9 * held.energy)
    _, one_by_one = elimination([held], n, order=order)
    assert close(float(lost[-1]), float(one_by_one[-1]), held.energy)


@given(st.integers(2, 10), st.integers(1, 12), st.integers(1, 3), seeds)
def test_it_stops_where_it_is_told(n: int, until: int, pools: int, seed: int) -> None:
    n *= pools
    order, lost = elimination([reader(n, 1, seed)], n, pools=pools, until=until)
    left = n - len(order)
    assert len(lost) == len(order) + 1
    assert left % pools == 0
    assert min(until, n) <= left < max(until, pools) + pools or left == n


def test_duplicates_go_first_at_no_loss_and_dead_channels_before_all() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    rows[:, 4] = -2 * rows[:, 1]
    rows[:, 2] = 0
    covariance = rows.T @ rows / 500 + 1e-9 * torch.eye(6, dtype=torch.float64)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    held = Reader(covariance, weight.T @ weight, torch.arange(6), torch.arange(6).unsqueeze(1))
    order, lost = elimination([held], 6)
    assert order[0] == 2
    assert order[1] in (1, 4)
    assert float(lost[2]) < 1e-6 * held.energy
    assert float(lost[3]) > 1e-3 * held.energy


@pytest.mark.parametrize("n", [40, 130])
def test_matrices_that_are_closed_up_on_the_way_lose_nothing(n: int) -> None:
    held = reader(n, 1, 5, outputs=8)
    order, lost = elimination([held], n)
    for k in (1, n // 8, n // 3, n // 2, n - 2, n - 1):
        assert close(float(lost[k]), loss([held], order[:k]), held.energy)
    assert bool((lost.diff() >= 0).all())
    assert float(lost[-1]) <= held.energy


def test_the_readers_are_left_as_they_are() -> None:
    held = reader(6, 2, 0)
    before = [getattr(held, name).clone() for name in ("covariance", "gram", "channels", "entries")]
    elimination([held], 6)
    assert all(
        torch.equal(a, getattr(held, n))
        for a, n in zip(before, ("covariance", "gram", "channels", "entries"), strict=True)
    )


def test_a_covariance_that_is_not_positive_definite_is_refused() -> None:
    singular = Reader(torch.ones(3, 3).double(), torch.eye(3).double(), torch.arange(3), torch.arange(3).unsqueeze(1))
    with pytest.raises(ValueError, match="not positive definite"):
        elimination([singular], 3)


def test_one_channel_stays_one() -> None:
    order, lost = elimination([reader(1, 2, 0)], 1)
    assert (order, lost.tolist()) == ([], [0.0])


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), seeds)
def test_restored_weights_are_least_squares(g: int, o: int, d: int, s: int, seed: int) -> None:
    s = min(s, d)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(g, 4 * d + 5, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(g, o, d, generator=generator, dtype=torch.float64)
    kept = torch.stack([torch.randperm(d, generator=generator)[:s].sort().values for _ in range(g)])
    found = restored(rows.mT @ rows, weight, kept)
    assert found.shape == (g, o, s)
    for n in range(g):
        wanted = torch.linalg.lstsq(rows[n][:, kept[n]], rows[n] @ weight[n].T).solution.T
        assert torch.allclose(found[n], wanted, atol=1e-8)


def test_restored_without_a_group_axis_and_with_all_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    c, w = positive(5, generator), torch.randn(2, 5, generator=generator)
    assert torch.allclose(restored(c, w, torch.arange(5)), w.double(), atol=1e-10)
    assert restored(c, w, torch.tensor([0, 3])).shape == (2, 2)
