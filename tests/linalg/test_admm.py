"""Ridge solutions by eigenvectors against dense ones, and the search for entries that they serve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectrim.linalg import additive, admm, sparse
from spectrim.linalg.low_rank_steps import Greedy
from spectrim.linalg.metric import Full, Metric, Plain, Rows, Slices
from spectrim.linalg.patterns import largest, pattern
from spectrim.linalg.sparse import Quadratic
from spectrim.linalg.unfold import unfolding

KERNEL = (3, 2, 2)
N = 12
UNSTRUCTURED = pattern("unstructured")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(g: int, n: int, seed: int = 0) -> Tensor:
    rows = random(g, 3 * n, n, seed=seed) * torch.linspace(0.2, 2, n, dtype=torch.float64)
    return rows.mT @ rows / rows.shape[1]


def metric(kind: str) -> Metric:
    if kind == "full":
        return Full(moment(2, N), KERNEL)
    if kind == "slices":
        how = unfolding((2, 2), "height-first")
        return Slices(moment(2, 6), KERNEL, how)
    if kind == "rows":
        rows = random(2, 5, N, seed=3)
        return Rows(rows, 0.5 * rows.square().sum(1), KERNEL)
    return Plain(2, KERNEL, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["full", "slices", "rows", "plain"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("penalty", [0.01, 3.0])
def test_ridge_solutions_are_those_of_dense_equations(kind: str, weighted: bool, penalty: float) -> None:
    seen = metric(kind)
    outer = moment(2, 4, seed=5) if weighted else None
    error = Quadratic(seen, outer)
    rows, ridge = random(2, 4, N, seed=1), error.ridge
    found = ridge.solve(rows, penalty)
    # The gradient of tr[G (rows - Y) C (rows - Y)^T] + penalty ||Y||^2, with entries in the units of the ridge.
    gradient = penalty * found - error.apply((rows - found) / ridge.units) / ridge.units
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)
    weighted_units = ridge.units.expand(2, 4, N)
    torch.testing.assert_close(weighted_units, error.scale(4), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("rank", [0, 2])
def test_more_turns_find_better_entries_than_thresholding_of_gradients(rank: int) -> None:
    gains = []
    for seed in range(4):
        target, seen = random(1, 24, 40, seed=seed), Full(moment(1, 40, seed=seed + 9) + 0.3)
        error, step = Quadratic(seen), Greedy(seen)
        lost = {}
        for turns in (4, 40):
            found = admm.search(target, error, step, rank, UNSTRUCTURED, 0.2, (40,), turns=turns)
            product, weight, mask = found.product, found.weight, found.mask
            assert int(mask.sum()) == 192
            assert not weight[~mask].any()
            rest = target if product is None else target - product.weight
            lost[turns] = sparse.solve(rest, error, mask, start=weight, steps=100).error
        plain = sparse.fit(target if product is None else target - product.weight, error, UNSTRUCTURED, 0.2, (40,))
        assert lost[40] < lost[4]
        gains.append(plain.error / lost[40])
    assert sum(gains) / len(gains) > 1.0


def test_what_cannot_change_ends_the_search() -> None:
    # A box of kernel positions is the same whatever the scores.
    calls = []

    class Counted(Greedy):
        def __call__(self, target, rank, start):  # type: ignore[no-untyped-def]
            calls.append(rank)
            return super().__call__(target, rank, start)

    seen = Full(moment(1, N), KERNEL)
    found = admm.search(
        random(1, 4, N), Quadratic(seen), Counted(seen), 1, pattern("taps-1x2@0x0"), 0.5, KERNEL, turns=40
    )
    assert int(found.mask.sum()) == 24
    assert len(calls) <= 4


def test_a_path_goes_on_from_its_last_point_and_loses_about_what_fits_from_nothing_do() -> None:
    target, seen = random(1, 24, 40), Full(moment(1, 40, seed=9) + 0.3)
    error, step = Quadratic(seen), Greedy(seen)
    points = [(0, 0.1), (1, 0.2), (2, 0.3), (0, 0.2)]
    fits = list(additive.path(target, error, step, points, UNSTRUCTURED, (40,), turns=16, between=6))
    for (rank, density), fit in zip(points, fits, strict=True):
        alone = additive.decompose(
            target, error, step, rank, UNSTRUCTURED, density, (40,), alternation=additive.Alternation(16, polish=0)
        )
        assert int(fit.sparse.mask.sum()) == round(density * 960)
        assert fit.error < 1.2 * alone.error


@pytest.mark.parametrize(("between", "goes_on"), [(3, [False, True, False, False]), (0, [False] * 4)])
def test_a_path_goes_on_where_neither_rank_nor_density_falls_and_density_is_low(
    between: int, goes_on: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, search = [], admm.search

    def watched(*args: object, **options: object) -> admm.Iterate:
        asked.append((options["turns"], options["first"], options["relax"], options["start"] is not None))
        return search(*args, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(admm, "search", watched)
    points = [(1, 0.1), (2, 0.1), (1, 0.2), (1, 0.5)]
    error, step = Quadratic(Full(moment(1, N))), Greedy(Full(moment(1, N)))
    list(additive.path(random(1, 4, N), error, step, points, UNSTRUCTURED, KERNEL, turns=5, between=between))
    relax = admm.RELAX if between else 1.0
    anew, further = (5, admm.FIRST, relax, False), (between, admm.NEXT, relax, True)
    assert asked == [further if on else anew for on in goes_on]


def test_of_equal_scores_the_first_are_the_largest() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    wanted = torch.tensor([[False, True, True, True, False], [True, True, True, False, False]])
    assert torch.equal(largest(scores, 3), wanted)
    assert torch.equal(largest(scores.bfloat16(), 3), wanted)


@pytest.mark.parametrize("rank", [0, 3])
def test_rounding_exchanges_hardly_any_entries(rank: int) -> None:
    # Masks in every turn sent one in three of these searches another way, with hundreds of other entries.
    for seed in range(2):
        target, seen = random(1, 48, 64, seed=seed), moment(1, 64, seed=seed + 9) + 0.3
        masks = []
        for noise in (0.0, 1e-5):
            metric = Full(seen)
            asked = target * (1 + noise * random(1, 48, 64, seed=seed + 50))
            found = admm.search(asked, Quadratic(metric), Greedy(metric), rank, UNSTRUCTURED, 0.3, (64,), turns=60)
            masks.append(found.mask)
        assert int((masks[0] != masks[1]).sum()) <= 8
