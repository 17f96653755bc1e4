"""Ranks that a C step chooses: the values of the released code, brute force, and all unfoldings at once."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spectrim
from spectrim.methods import WeightSVD
from spectrim.network.sites import Sites
from spectrim.train import LearnedRanks, Schedule
from spectrim.train.c_step import ZERO

MUS = (0.5, 1.0, 2.0, 10.0)
# RankSelection.compress of UCMerced-ML/LC-model-compression (bf12c3c) on diag(4, 3, 2, 1), criterion "storage".
DIAGONAL = {
    (False, 0.01): (4, 4, 4, 4),
    (False, 0.05): (3, 4, 4, 4),
    (False, 0.25): (2, 2, 3, 4),
    (False, 1.0): (0, 0, 2, 3),
    (True, 0.01): (1, 2, 3, 4),
    (True, 0.05): (0, 0, 1, 3),
    (True, 0.25): (0, 0, 0, 1),
    (True, 1.0): (0, 0, 0, 0),
}
# The same on RandomState(seed).randn(*shape): seed, shape, alpha, mu, normalize, rank, ||A - Delta||^2.
RANDOM = [
    (0, (20, 30), 1e-3, 1.0, False, 20, 0.0),
    (0, (20, 30), 1e-3, 1.0, True, 3, 397.39628651),
    (1, (64, 576), 1e-6, 0.1, True, 42, 8131.44970318),
    (1, (64, 576), 1e-6, 1.0, True, 64, 0.0),
    (1, (64, 576), 1e-5, 1.0, True, 42, 8131.44970318),
    (2, (10, 10), 0.1, 5.0, False, 8, 0.49907039),
]
POSITIONS = (4, 8)  # 32 output positions, so that a multiplier over their number is exact


def linear(matrix: np.ndarray) -> nn.Sequential:
    return filled(nn.Linear(matrix.shape[1], matrix.shape[0], bias=False), matrix)


def scheme_1(matrix: np.ndarray) -> nn.Sequential:
    """A convolution whose weight ``(n, m d1 d2)`` is the matrix."""
    rows, columns = matrix.shape
    kernel = (2, 2) if columns % 4 == 0 else (1, 2)
    inputs = columns // (kernel[0] * kernel[1])
    layer = nn.Conv2d(inputs, rows, kernel, padding="same", bias=False)
    return filled(layer, matrix.reshape(rows, inputs, *kernel))


def scheme_2(matrix: np.ndarray) -> nn.Sequential:
    """A convolution whose weight ``(n d1, m d2)`` is the matrix."""
    rows, columns = matrix.shape
    layer = nn.Conv2d(columns // 2, rows // 2, (2, 2), padding="same", bias=False)
    return filled(layer, matrix.reshape(rows // 2, 2, columns // 2, 2).swapaxes(1, 2))


LAYOUTS = {"linear": (linear, "channel"), "scheme 1": (scheme_1, "channel"), "scheme 2": (scheme_2, "width-first")}


def filled(layer: nn.Linear | nn.Conv2d, weight: np.ndarray) -> nn.Sequential:
    layer.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
    return nn.Sequential(layer)


def seen(model: nn.Module, *shapes: tuple[int, ...]) -> Sites:
    """The sites of a model with the input shapes of their layers, without running it."""
    sites = spectrim.find(model)
    layers = [(site.spec.at((shape,)),) for site, shape in zip(sites, shapes, strict=True)]
    changed = (site.with_layers(specs) for site, specs in zip(sites, layers, strict=True))
    return dataclasses.replace(sites, sites=tuple(changed))


def direct(model: nn.Module, multiplier: float, mu: float, sites: Sites | None = None, **options) -> LearnedRanks:
    """One C step on the weights as they are."""
    options = {"cost": "parameters", "dense": False} | options
    schedule = Schedule(start=mu, factor=1, steps=1)
    sites = spectrim.find(model) if sites is None else sites
    return LearnedRanks(model, sites, multiplier=multiplier, schedule=schedule, **options)


def first_rank(ranks: LearnedRanks) -> int:
    (rank,) = ranks.trajectory.records[0].ranks
    return rank


@pytest.mark.table
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_ranks_of_the_released_code(layout: str, cost: str) -> None:
    make, unfolding = LAYOUTS[layout]
    model = make(np.diag([4.0, 3.0, 2.0, 1.0]))
    shape = (32,) if layout == "linear" else POSITIONS
    options = {"sites": seen(model, shape), "cost": cost, "methods": [WeightSVD((unfolding,), 1, to_full_rank=True)]}
    for (normalize, alpha), expected in DIAGONAL.items():
        alpha = alpha / (32 if cost == "macs" else 1)
        found = [first_rank(direct(model, alpha, mu, normalize=normalize, **options)) for mu in MUS]
        assert tuple(found) == expected, f"normalize={normalize}, alpha={alpha}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("seed", "shape", "alpha", "mu", "normalize", "rank", "missed"), RANDOM)
def test_random_matrices_of_the_released_code(layout, seed, shape, alpha, mu, normalize, rank, missed) -> None:
    make, unfolding = LAYOUTS[layout]
    model = make(np.random.RandomState(seed).randn(*shape))
    methods = [WeightSVD((unfolding,), 1, to_full_rank=True)]
    ranks = direct(model, alpha, mu, normalize=normalize, methods=methods)
    assert first_rank(ranks) == rank
    lost = model[0].weight - ranks.nested()[0].weight
    assert float(lost.detach().square().sum()) == pytest.approx(missed, abs=1e-8)


def test_by_default_the_paper_has_every_rank_of_one_shape() -> None:
    model = scheme_1(np.random.RandomState(0).randn(12, 16))
    ranks = direct(model, 1e-9, 1.0)
    assert first_rank(ranks) == 12
    assert [o.choice["rank"] for o in ranks.table.rows[0].options[1:]] == [*range(1, 13), 0]
    assert {o.choice["unfolding"] for o in ranks.table.rows[0].options[1:-1]} == {"channel"}
    # The bias of a layer is paid at any rank, so it changes nothing.
    biased = nn.Sequential(nn.Conv2d(4, 12, (2, 2)).double())
    biased[0].weight = model[0].weight
    for alpha in (1e-4, 1e-3, 1e-2):
        assert first_rank(direct(biased, alpha, 1.0)) == first_rank(direct(model, alpha, 1.0))


def totals(energies: np.ndarray, alpha: float, mu: float, cost: int, normalize: bool) -> np.ndarray:
    """What every rank from 0 costs and loses together."""
    lost = np.append(energies[::-1].cumsum()[::-1], 0) / (energies.sum() if normalize else 1)
    return alpha * cost * np.arange(len(energies) + 1) + mu / 2 * lost


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=6, max_size=6),
    st.integers(0, 10**6),
    st.floats(-4, 1),
    st.floats(-2, 2),
    st.booleans(),
)
def test_the_rank_is_the_minimum_over_all_ranks(shapes, seed, alpha, mu, normalize) -> None:
    random, alpha, mu = np.random.RandomState(seed), 10**alpha, 10**mu
    matrices = [random.randn(*shape) * 2.0 ** random.randint(-3, 3) for shape in shapes]
    ranks = direct(nn.Sequential(*map(linear, matrices)), alpha, mu, normalize=normalize)
    best = 0.0
    for matrix, found in zip(matrices, ranks.trajectory.records[0].ranks, strict=True):
        energies = np.linalg.svd(matrix, compute_uv=False) ** 2
        sums = totals(energies, alpha, mu, sum(matrix.shape), normalize)
        best += sums.min()
        assert sums[found] <= sums.min() * (1 + 1e-9)
        if np.sort(sums)[1] > sums.min() * (1 + 1e-9):
            scale = energies.sum() if normalize else 1
            assert found == sums.argmin() == (mu / 2 * energies / scale > alpha * sum(matrix.shape)).sum()
    assert ranks.plan.loss + alpha * ranks.plan.costs["parameters"] == pytest.approx(best, rel=1e-9)


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    st.integers(0, 5),
    st.integers(-3, 3),
    st.booleans(),
)
def test_of_equal_sums_the_smaller_rank_is_taken(values, at, power, normalize) -> None:
    # The multiplier makes a rank with one of the singular values exactly as good as one without.
    size, energies = len(values), sorted((value**2 for value in values), reverse=True)
    whole = Fraction(sum(energies)) if normalize else Fraction(1)
    losses = [Fraction(2) ** power / 2 * energy / whole for energy in energies]
    alpha = losses[at % size] / (2 * size)
    sums = [alpha * 2 * size * rank + sum(losses[rank:]) for rank in range(size + 1)]
    ranks = direct(linear(np.diag(np.array(values, float))), float(alpha), 2.0**power, normalize=normalize)
    assert first_rank(ranks) == sums.index(min(sums)) == sum(loss > alpha * 2 * size for loss in losses)


# All shapes of the matrix, and leaving dense.


def splits(weight: np.ndarray, sizes: tuple[int, ...]) -> dict[str, tuple[np.ndarray, int, int]]:
    """Matrices ``[g, rows, columns]`` of a weight ``[g, o, i, h, w]``, and what a rank costs in parameters and MACs."""
    g, o, i, h, w = weight.shape
    above, left, below, right = sizes  # input height and width, output height and width
    return {
        "channel": (weight.reshape(g, o, -1), i * h * w + o, below * right * (i * h * w + o)),
        "input": (
            weight.transpose(0, 2, 1, 3, 4).reshape(g, i, -1),
            i + o * h * w,
            above * left * i + below * right * o * h * w,
        ),
        "height-first": (
            weight.transpose(0, 2, 3, 1, 4).reshape(g, i * h, o * w),
            i * h + o * w,
            below * left * i * h + below * right * o * w,
        ),
        "width-first": (
            weight.transpose(0, 2, 4, 1, 3).reshape(g, i * w, o * h),
            i * w + o * h,
            above * right * i * w + below * right * o * h,
        ),
    }


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    groups=st.sampled_from([1, 2]),
    stride=st.sampled_from([1, 2]),
    bias=st.booleans(),
    cost=st.sampled_from(["parameters", "macs"]),
    alpha=st.floats(-3.5, 0.5),
)
def test_the_best_shape_or_dense_is_chosen_at_every_site(seed, groups, stride, bias, cost, alpha) -> None:
    random, mu = np.random.RandomState(seed), 2.0
    layer = nn.Conv2d(4 * groups, 3 * groups, (3, 2), stride, padding=(1, 1), groups=groups, bias=bias).double()
    weight = random.randn(groups, 3, 4, 3, 2) * 2.0 ** -random.randint(0, 4, (groups, 1, 4, 1, 2))
    layer.weight.data = torch.tensor(weight.reshape(3 * groups, 4, 3, 2))
    below, right = (6 + 2 - 3) // stride + 1, (5 + 2 - 2) // stride + 1
    macs = cost == "macs"
    paid = 0 if macs or not bias else 3 * groups
    whole = weight.size * (below * right if macs else 1) + paid
    alpha = 10**alpha / whole
    options = [(alpha * whole, "dense"), (alpha * paid + mu / 2, "zero")]
    for name, (matrix, *price) in splits(weight, (6, 5, below, right)).items():
        energies = (np.linalg.svd(matrix, compute_uv=False) ** 2).sum(0)
        for rank in range(1, len(energies) + 1):
            pair = groups * rank * price[macs] + paid
            if pair < whole:
                loss = mu / 2 * energies[rank:].sum() / energies.sum()
                options.append((alpha * pair + loss, f"{name}, rank {rank}"))
    best, word = min(options)
    model = nn.Sequential(layer)
    methods = [WeightSVD(multiple_of=1)]
    ranks = direct(model, alpha, mu, seen(model, (6, 5)), cost=cost, dense=True, methods=methods)
    [chosen] = ranks.trajectory.records[0].choices
    assert ranks.plan.loss + alpha * ranks.plan.costs[cost] == pytest.approx(best, rel=1e-9)
    if sorted(options)[1][0] > best * (1 + 1e-9):
        assert chosen == word


def test_sites_are_chosen_each_on_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, (1, 3)), nn.Linear(9, 7), nn.Linear(2, 2)).double()
    drawn = [torch.randn(*shape, dtype=torch.float64) for shape in ((6, 1), (1, 36), (6, 1), (1, 18), (7, 2), (2, 9))]
    model[0].weight.data = (drawn[0] @ drawn[1]).reshape(6, 4, 3, 3)
    model[1].weight.data = (drawn[2] @ drawn[3]).reshape(6, 6, 1, 3).transpose(0, 1).contiguous()
    model[2].weight.data = drawn[4] @ drawn[5]
    model[3].weight.data = torch.eye(2, dtype=torch.float64)
    together = direct(model, 1e-4, 1.0, dense=True).trajectory
    assert together.records[0].choices == ("channel, rank 1", "input, rank 1", "channel, rank 2", "dense")
    assert together.records[0].ranks == (1, 1, 2, 2)
    assert together.full == (12, 6, 7, 2)
    alone = [direct(nn.Sequential(layer), 1e-4, 1.0, dense=True).trajectory.records[0].choices for layer in model]
    assert tuple(word for (word,) in alone) == together.records[0].choices


def test_a_large_multiplier_drops_every_layer_and_keeps_its_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(5, 4, bias=False))
    for dense in (True, False):
        ranks = direct(model, 1e6, 1.0, dense=dense)
        assert [entry.choice for entry in ranks.plan] == [ZERO, ZERO]
        assert ranks.plan.costs["parameters"] == 6
        record = ranks.trajectory.records[0]
        assert (record.ranks, record.choices, record.distance) == ((0, 0), ("zero", "zero"), 1.0)
        nested = ranks.nested()
        assert not nested[0].weight.any()
        assert torch.equal(nested[0].bias, model[0].bias)
