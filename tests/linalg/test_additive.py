"""Low rank plus sparse: special cases, planted sums, reference loops, and what every turn must keep."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg import bilateral, lowrank, response, sparse
from spectrim.linalg.additive import Additive, Alternation, better, decompose
from spectrim.linalg.low_rank_steps import Alternating, Exact, Greedy, LowRankStep
from spectrim.linalg.metric import Full, Metric, Plain, Slices
from spectrim.linalg.patterns import pattern
from spectrim.linalg.sparse import Quadratic
from spectrim.linalg.unfold import fold, unfold, unfoldings

UNSTRUCTURED = pattern("unstructured")
CPU = torch.device("cpu")
STEPS = ("greedy", "exact", "input", "height-first", "width-first")
PATTERNS = [
    ("unstructured", 0.1),
    ("rows", 0.2),
    ("2:4", 0.5),
    ("2x2", 0.25),
    ("channels", 0.25),
    ("taps-1x2@1x0", 2 / 9),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(g: int, n: int, *, seed: int = 0) -> Tensor:
    patches = random(g, 4 * n + 20, n, seed=seed) @ (torch.eye(n) + 0.4 * random(g, n, n, seed=seed + 1) / n**0.5)
    return patches.mT @ patches / patches.shape[1]


def root_of(matrix: Tensor) -> Tensor:
    return torch.linalg.cholesky(matrix, upper=True)


def mixture(o: int, n: int, rank: int, density: float, *, g: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A low-rank and a sparse weight, and the mask: entries stand out from the low-rank part by some times."""
    low = random(g, o, rank, seed=seed) @ random(g, rank, n, seed=seed + 1) / math.sqrt(rank)
    mask = sparse.threshold(random(g, o, n, seed=seed + 2), UNSTRUCTURED, density, (n,))
    return low, mask * random(g, o, n, seed=seed + 3).sign() * (2 + random(g, o, n, seed=seed + 4).abs()), mask


class Case:
    """A convolution of 4 channels and a kernel of 3 x 3 in all the ways a low-rank part can be found."""

    def __init__(self, step: str, *, metric: str = "full", outer: bool = False, g: int = 1, o: int = 8) -> None:
        self.kernel, n = (4, 3, 3), 36
        self.target = random(g, o, n, seed=7)
        how = next((u for u in unfoldings((3, 3)) if u.name == step), unfoldings((3, 3))[0])
        self.how = how
        found: dict[str, Metric] = {
            "full": Full(correlated(g, n), self.kernel, how),
            "slices": Slices(correlated(g, 4 * how.sizes((3, 3))[0]), self.kernel, how),
            "plain": Plain(g, self.kernel, CPU, how),
        }
        self.metric = found[metric]
        self.root = root_of(correlated(g, o, seed=3)) if outer else None
        self.error = Quadratic(self.metric, None if self.root is None else self.root.mT @ self.root)
        if step in ("greedy", "exact"):
            self.step: LowRankStep = (Greedy if step == "greedy" else Exact)(self.metric, self.root)
        else:
            self.step = Alternating(self.metric.sliced(how), self.root)

    def solve(
        self,
        rank: int,
        name: str = "unstructured",
        density: float = 0.1,
        **turns: object,
    ) -> Additive:
        return decompose(
            self.target, self.error, self.step, rank, pattern(name), density, self.kernel,
            alternation=Alternation(**turns),  # type: ignore[arg-type]
        )  # fmt: skip

    def left(self, found: Additive) -> float:
        """Error of a result from its weights."""
        rest = self.target - found.sparse.weight
        return self.error.value(rest if found.product is None else rest - found.product.weight)


@pytest.mark.table
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("metric", ["full", "slices", "plain"])
@pytest.mark.parametrize("outer", [False, True])
def test_errors_fall_and_are_those_of_the_weights(step: str, metric: str, outer: bool) -> None:
    case = Case(step, metric=metric, outer=outer)
    found = case.solve(2, turns=6)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(found.errors))
    assert found.error == pytest.approx(case.left(found), rel=1e-9)
    assert int(found.sparse.mask.sum()) == UNSTRUCTURED.stored((1, 8, 4, 3, 3), 0.1)
    assert not found.sparse.weight[~found.sparse.mask].any()
    assert found.product is not None
    matrix = found.product.weight[0] if step in ("greedy", "exact") else unfold(
        found.product.weight.reshape(1, 8, *case.kernel), case.how
    )[0]  # fmt: skip
    assert int(torch.linalg.matrix_rank(matrix)) == 2
    # Each part is worth having.
    assert found.error < case.solve(2, density=0.0).error
    assert found.error < case.solve(0, turns=6).error
    again = case.solve(2, turns=6)
    assert torch.equal(found.sparse.weight, again.sparse.weight)
    assert again.product is not None
    assert torch.equal(found.product.weight, again.product.weight)


@pytest.mark.table
@pytest.mark.parametrize("step", ["greedy", "exact", "height-first"])
@pytest.mark.parametrize(("name", "density"), PATTERNS)
def test_every_pattern_is_kept(step: str, name: str, density: float) -> None:
    case = Case(step, g=2)
    kind, shape = pattern(name), (2, 8, 4, 3, 3)
    found = case.solve(2, name, density, turns=5)
    opened = kind.open(found.sparse.mask.reshape(shape))
    assert torch.equal(opened.any(-1), opened.all(-1))
    assert set(opened.any(-1).sum(1).tolist()) == {kind.kept(shape, density)}
    assert int(found.sparse.mask.sum()) == kind.stored(shape, density)
    assert found.error == pytest.approx(case.left(found), rel=1e-9)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(found.errors))
    if name == "2:4":
        assert found.sparse.mask.reshape(-1, 4).sum(1).unique().tolist() == [2]


@settings(max_examples=12)
@given(st.integers(1, 2), st.integers(2, 7), st.integers(2, 7), st.integers(0, 9), st.booleans(), st.data())
def test_any_shape_rank_and_density(g: int, o: int, n: int, seed: int, exact: bool, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, min(o, n)))
    density = data.draw(st.floats(0, 1))
    target, metric = random(g, o, n, seed=seed), Full(correlated(g, n, seed=seed))
    error = Quadratic(metric)
    found = decompose(
        target,
        error,
        (Exact if exact else Greedy)(metric),
        rank,
        UNSTRUCTURED,
        density,
        (n,),
        alternation=Alternation(6),
    )
    rest = target - found.sparse.weight - (0 if found.product is None else found.product.weight)
    assert found.error == pytest.approx(error.value(rest), rel=1e-6, abs=1e-10 * error.value(target))
    assert found.error <= error.value(target) * (1 + 1e-9)
    assert int(found.sparse.mask.sum()) == UNSTRUCTURED.stored((g, o, n), density)
    assert (found.product is None) == (not rank)


def test_without_a_sparse_part_it_is_low_rank_in_the_responses() -> None:
    for outer in (False, True):
        case = Case("exact", outer=outer)
        found = case.solve(3, density=0.0)
        mixed = case.target if case.root is None else case.root @ case.target
        left, right = bilateral.exact(mixed, case.metric, 3)
        assert found.error == pytest.approx(float(case.metric.energy(mixed - left @ right)), rel=1e-9)
        assert not found.sparse.mask.any()
        greedy = Case("greedy", outer=outer).solve(3, density=0.0)
        assert found.error * (1 - 1e-9) <= greedy.error <= 1.01 * found.error
        assert greedy.converged


def test_without_a_low_rank_part_it_is_pruning_with_reconstruction() -> None:
    case = Case("greedy")
    found = case.solve(0)
    assert found.product is None
    alone = sparse.fit(case.target, case.error, UNSTRUCTURED, 0.1, case.kernel, rounds=60)
    # Another search for the entries ends in another minimum, no worse on the whole.
    assert found.error <= 1.02 * alone.error
    best = sparse.solve(case.target, case.error, found.sparse.mask, steps=300)
    assert found.error == pytest.approx(best.error, rel=1e-5)


def godec(target: Tensor, rank: int, kept: int, *, turns: int = 100) -> tuple[Tensor, Tensor]:
    """GoDec (Zhou and Tao 2011) with exact projections, in a loop."""
    spread = torch.zeros_like(target)
    low = torch.zeros_like(target)
    for _ in range(turns):
        left, values, right = torch.linalg.svd(target - spread, full_matrices=False)
        low = (left[:, :rank] * values[:rank]) @ right[:rank]
        rest = target - low
        spread = torch.zeros_like(rest)
        held = rest.abs().flatten().topk(kept).indices
        spread.view(-1)[held] = rest.flatten()[held]
    return low, spread


@pytest.mark.parametrize("step", [Greedy, Exact])
def test_without_data_it_is_godec(step: type[Greedy] | type[Exact]) -> None:
    low, spread, mask = mixture(30, 40, 3, 0.05)
    target = low + spread + 0.01 * random(1, 30, 40, seed=9)
    metric = Plain(1, (40,), CPU)
    found = decompose(
        target, Quadratic(metric), step(metric), 3, UNSTRUCTURED, 0.05, (40,), alternation=Alternation(tolerance=1e-9)
    )
    wanted_low, wanted_sparse = godec(target[0], 3, int(mask.sum()))
    assert found.product is not None
    torch.testing.assert_close(found.product.weight[0], wanted_low, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.sparse.weight[0], wanted_sparse, atol=1e-3, rtol=1e-3)
    # On noise, where there is nothing to find, either ends in a minimum of its own.
    target = random(1, 30, 40, seed=4)
    found = decompose(target, Quadratic(metric), step(metric), 5, UNSTRUCTURED, 0.1, (40,))
    wanted_low, wanted_sparse = godec(target[0], 5, 120)
    assert found.error <= 1.1 * float((target[0] - wanted_low - wanted_sparse).square().sum())


@pytest.mark.table
@pytest.mark.parametrize("step", [Greedy, Exact])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rank", "density"), [(2, 0.02), (6, 0.02), (4, 0.15)])
def test_planted_parts_are_found_with_correlated_inputs(
    step: type[Greedy] | type[Exact], seed: int, rank: int, density: float
) -> None:
    low, spread, mask = mixture(48, 64, rank, density, seed=10 * seed)
    metric = Full(correlated(1, 64, seed=seed))
    noise = 1e-3 * random(1, 48, 64, seed=seed + 50)
    found = decompose(low + spread + noise, Quadratic(metric), step(metric), rank, UNSTRUCTURED, density, (64,))
    assert found.product is not None
    assert torch.equal(found.sparse.mask, mask)
    floor = metric.energy(noise)
    assert metric.energy(found.product.weight - low) < floor
    assert metric.energy(found.sparse.weight - spread) < floor


@pytest.mark.parametrize("name", ["input", "height-first", "width-first"])
def test_without_a_sparse_part_a_split_alternates(name: str) -> None:
    case = Case(name)
    found = case.solve(3, density=0.0, relax=False, turns=5, tolerance=0.0)
    matrix = unfold(case.target.reshape(1, 8, *case.kernel), case.how)
    assert isinstance(case.metric, Full)
    start = lowrank.factors(matrix, lowrank.spectrum(matrix, case.metric.average, 3).basis, 3)[0]
    left = response.alternate(matrix, case.metric, start, sweeps=5, steps=4)
    right = response.refit(matrix, case.metric, left)
    weight = fold(left @ right, case.how, (8, *case.kernel)).reshape(1, 8, -1)
    assert found.error == pytest.approx(float(case.metric.energy(case.target - weight)), rel=1e-6)
    assert found.product is not None
    left, right = found.product.factors
    folded = fold(left @ right, case.how, (8, *case.kernel)).reshape(1, 8, -1)
    torch.testing.assert_close(found.product.weight, folded)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("metric", ["full", "slices", "plain"])
@pytest.mark.parametrize("outer", [False, True])
def test_a_difference_costs_what_the_second_factor_cannot_make_up_for(step: str, metric: str, outer: bool) -> None:
    case = Case(step, metric=metric, outer=outer)
    product = case.step(case.target, 2, None)
    change = random(1, 8, 36, seed=2)
    refitted = case.step.refit(change, product)
    assert case.step.eliminated(product).value(change) == pytest.approx(
        case.error.value(change - refitted.weight), rel=1e-6
    )
    # The refit is the best one: no change of the second factor along itself improves it.
    for share in (-0.1, 0.1):
        assert case.error.value(change - (1 + share) * refitted.weight) > case.error.value(change - refitted.weight)


@pytest.mark.parametrize("step", ["greedy", "exact"])
def test_an_output_weight_is_the_same_as_weighting_the_outputs_by_its_root(step: str) -> None:
    case = Case(step, outer=True)
    assert case.root is not None
    found = case.solve(3, density=0.0)
    there = decompose(
        case.root @ case.target,
        Quadratic(case.metric),
        dataclasses.replace(case.step, root=None),  # type: ignore[type-var]
        3,
        UNSTRUCTURED,
        0.0,
        case.kernel,
    )
    assert found.product is not None
    assert there.product is not None
    torch.testing.assert_close(case.root @ found.product.weight, there.product.weight, atol=1e-7, rtol=1e-6)
    assert found.error == pytest.approx(there.error)


def test_groups_are_independent_where_the_pattern_is() -> None:
    whole = Case("exact", g=3)
    assert isinstance(whole.metric, Full)
    found = whole.solve(2, "2:4", 0.5, tolerance=1e-7)
    for number in range(3):
        one = slice(number, number + 1)
        metric = Full(whole.metric.moment[one])
        part = decompose(
            whole.target[one],
            Quadratic(metric),
            Exact(metric),
            2,
            pattern("2:4"),
            0.5,
            whole.kernel,
            alternation=Alternation(tolerance=1e-7),
        )
        assert found.product is not None
        rest = whole.target[one] - found.sparse.weight[one] - found.product.weight[one]
        # The entries are searched for in each group alone; conjugate-gradient steps on the values are common ones.
        assert torch.equal(part.sparse.mask[0], found.sparse.mask[number])
        assert Quadratic(metric).value(rest) == pytest.approx(part.error, rel=0.01)


@pytest.mark.parametrize("step", ["greedy", "exact", "height-first"])
def test_turns_and_tolerance_end_the_loop(step: str) -> None:
    case = Case(step)
    short = case.solve(3, turns=6, tolerance=0.0, polish=0)
    assert not short.converged
    assert len(short.errors) <= 6
    long = case.solve(3, turns=100, tolerance=1e-5)
    assert long.converged
    assert long.error <= short.error * (1 + 1e-9)
    coarse = case.solve(3, turns=100, tolerance=1e-1)
    assert coarse.converged
    assert len(coarse.errors) < len(long.errors)
    assert long.error <= coarse.error * (1 + 1e-6)


def test_over_relaxation_does_no_harm() -> None:
    ratios = []
    for seed in range(4):
        target, metric = random(1, 24, 32, seed=seed), Full(correlated(1, 32, seed=seed))
        plain, relaxed = (
            decompose(
                target,
                Quadratic(metric),
                Greedy(metric),
                4,
                UNSTRUCTURED,
                0.0,
                (32,),
                alternation=Alternation(15, relax=relax),
            )
            for relax in (False, True)
        )
        ratios.append(relaxed.error / plain.error)
    assert sum(ratios) / len(ratios) < 1.01


@pytest.mark.parametrize("dead", ["inputs", "weight"])
@pytest.mark.parametrize("step", STEPS)
def test_dead_inputs_and_weights_stay_finite(step: str, dead: str) -> None:
    case = Case(step)
    if dead == "weight":
        case.target = torch.zeros_like(case.target)
    else:
        assert isinstance(case.metric, Full)
        case.metric.moment[:, 9:] = 0
        case.metric.moment[:, :, 9:] = 0
    found = case.solve(2, turns=5)
    assert torch.isfinite(found.sparse.weight).all()
    assert found.product is not None
    assert torch.isfinite(found.product.weight).all()
    assert found.error <= case.error.value(case.target) * (1 + 1e-9)


def test_the_targets_and_parts_rank_as_in_the_formulation() -> None:
    # METHODS B.2: a made-up weight, inputs with 5 % noise from compressed predecessors.
    o, n, rank = 64, 144, 8
    low, spread, _ = mixture(o, n, rank, 0.02)
    weight = low[0] + spread[0]
    inputs = random(6000, n, seed=5) @ (torch.eye(n) + 0.6 * random(n, n, seed=6) / n**0.5)
    seen = inputs + 0.05 * inputs.std() * random(6000, n, seed=7)
    moment = (seen.T @ seen / 6000).unsqueeze(0)
    cross = ((inputs @ weight.T).T @ seen / 6000).unsqueeze(0)
    metric, plain = Full(moment), Plain(1, (n,), CPU)
    asymmetric = torch.linalg.solve(moment, cross.mT).mT

    def feature_error(target: Tensor, using: Metric, rank: int, density: float, exact: bool = False) -> float:
        found = better(
            target,
            Quadratic(using),
            (Exact if exact else Greedy)(using),
            rank,
            UNSTRUCTURED,
            density,
            (n,),
            alternation=Alternation(20),
        )
        made = found.sparse.weight[0] + (0 if found.product is None else found.product.weight[0])
        return float((inputs @ weight.T - seen @ made.T).norm() / (inputs @ weight.T).norm())

    numbers = rank * (o + n) + round(0.05 * o * n)
    dense = weight.unsqueeze(0)
    greedy = feature_error(asymmetric, metric, rank, 0.05)
    exact = feature_error(asymmetric, metric, rank, 0.05, exact=True)
    symmetric = feature_error(dense, metric, rank, 0.05)
    free = feature_error(dense, plain, rank, 0.05)
    alone = feature_error(asymmetric, metric, numbers // (o + n), 0.0)
    pruned = feature_error(asymmetric, metric, 0, numbers / (o * n))
    assert greedy == pytest.approx(exact, rel=0.02)
    assert max(greedy, exact) < symmetric <= free * 1.001
    assert 3 * free < min(alone, pruned)
