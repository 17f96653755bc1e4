"""Shared factors against stacked SVDs, brute force and alternating least squares."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg import bi_joint, joint, lowrank, response
from spectrim.linalg.bi_joint import Bilateral
from spectrim.linalg.metric import Full
from spectrim.linalg.unfold import Unfolding

Matrices = list[Tensor]
Metrics = list[Full]


def drawn(*shapes: tuple[int, int], groups: int = 1, seed: int = 0) -> Matrices:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(groups, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def moments(*sizes: int, groups: int = 1, rank: int | None = None, seed: int = 1) -> Metrics:
    """Random second moments; of lower rank if asked."""
    return [Full(x @ x.mT) for x in drawn(*((n, rank or 2 * n) for n in sizes), groups=groups, seed=seed)]


def lost(matrices: Matrices, products: tuple[Tensor, ...] | Matrices, metrics: Metrics | None = None) -> float:
    """The objective, written out."""
    total = 0.0
    for n, (matrix, product) in enumerate(zip(matrices, products, strict=True)):
        rest = matrix - product
        moment = torch.eye(rest.shape[-2]).double().expand(len(rest), -1, -1) if metrics is None else metrics[n].moment
        total += float(torch.einsum("gpc,gpt,gtc->", rest, moment, rest))
    return total


def tails(values: Tensor) -> Tensor:
    """Squared singular values left out at every rank, over all groups."""
    energies = values.square().sum(0)
    return torch.cat([energies, energies.new_zeros(1)]).flip(0).cumsum(0).flip(0)


# Fewer and more rows than columns in the stack, unequal sizes, and one matrix alone.
RIGHT = [[(4, 9)], [(9, 4)], [(4, 9), (4, 9)], [(3, 5), (6, 5), (2, 5)], [(2, 11), (1, 11), (4, 11)]]
LEFT = [[(columns, rows) for rows, columns in shapes] for shapes in RIGHT]


@pytest.mark.parametrize("shapes", RIGHT, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_right_shared_is_the_svd_of_the_vertical_stack(shapes: list[tuple[int, int]], groups: int) -> None:
    matrices = drawn(*shapes, groups=groups)
    u, s, v = torch.linalg.svd(torch.cat(matrices, dim=-2), full_matrices=False)
    found = joint.right_shared(matrices)
    torch.testing.assert_close(found.energies, s.square(), atol=1e-10, rtol=1e-10)
    for rank in range(1, s.shape[-1] + 1):
        basis = joint.right_shared(matrices, most=rank).basis
        assert basis.shape[-1] == rank
        stacked = torch.cat([m @ basis @ basis.mT for m in matrices], dim=-2)
        torch.testing.assert_close(stacked, (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank], atol=1e-9, rtol=1e-9)
        assert lost(matrices, [m @ basis @ basis.mT for m in matrices]) == pytest.approx(float(tails(s)[rank]))


@pytest.mark.parametrize("shapes", LEFT, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_left_shared_is_the_svd_of_the_horizontal_stack(shapes: list[tuple[int, int]], groups: int) -> None:
    matrices = drawn(*shapes, groups=groups)
    u, s, v = torch.linalg.svd(torch.cat(matrices, dim=-1), full_matrices=False)
    left, rights, energies = joint.left_shared(matrices)
    torch.testing.assert_close(energies, s.square(), atol=1e-10, rtol=1e-10)
    for rank in range(1, s.shape[-1] + 1):
        products = [left[..., :rank] @ right[:, :rank] for right in rights]
        best = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
        torch.testing.assert_close(torch.cat(products, dim=-1), best, atol=1e-9, rtol=1e-9)
    rows = torch.cat(rights, dim=-1)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(rows.shape[-2]).double().expand(groups, -1, -1))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_matrix_is_the_plain_decomposition(shape: tuple[int, int], weighted: bool) -> None:
    (matrix,) = drawn(shape, groups=2)
    metric = moments(shape[0], groups=2)[0] if weighted else None
    plain = lowrank.spectrum(matrix, None if metric is None else metric.moment)
    shared = joint.right_shared([matrix], None if metric is None else [metric])
    left, (right,), energies = joint.left_shared([matrix], metric)
    full = plain.energies.shape[-1]
    torch.testing.assert_close(shared.energies[:, :full], plain.energies, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(energies, plain.energies, atol=1e-9, rtol=1e-9)
    for rank in range(1, full + 1):
        a, b = lowrank.factors(matrix, plain.basis, rank)
        basis = shared.basis[..., :rank]
        torch.testing.assert_close(matrix @ basis @ basis.mT, a @ b, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(left[..., :rank] @ right[:, :rank], a @ b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("shapes", RIGHT, ids=str)
def test_the_smaller_gram_side_gives_the_same_in_metrics(shapes: list[tuple[int, int]]) -> None:
    matrices, metrics = drawn(*shapes, groups=2), moments(*(rows for rows, _ in shapes), groups=2)
    found = joint.right_shared(matrices, metrics)
    whitened = torch.cat([lowrank.root(a.moment) @ m for a, m in zip(metrics, matrices, strict=True)], dim=-2)
    _, s, v = torch.linalg.svd(whitened, full_matrices=False)
    full = s.shape[-1]
    torch.testing.assert_close(found.energies[:, :full], s.square(), atol=1e-8, rtol=1e-8)
    for rank in range(1, full + 1):
        basis = found.basis[..., :rank]
        torch.testing.assert_close(basis @ basis.mT, v[:, :rank].mT @ v[:, :rank], atol=1e-7, rtol=1e-7)
        products = [m @ basis @ basis.mT for m in matrices]
        assert lost(matrices, products, metrics) == pytest.approx(float(tails(s)[rank]), abs=1e-7)


def alternating_least_squares(matrices: Matrices, metrics: Metrics, right: Tensor, rounds: int) -> float:
    """``U_n`` and ``V`` by turns, each by its normal equations: the reference for the closed form."""
    for _ in range(rounds):
        lefts = [m @ torch.linalg.pinv(right) for m in matrices]
        gram = sum(u.mT @ a.moment @ u for u, a in zip(lefts, metrics, strict=True))
        cross = sum(u.mT @ a.moment @ m for u, a, m in zip(lefts, metrics, matrices, strict=True))
        right = torch.linalg.solve(gram, cross)
    return lost(matrices, [u @ right for u in lefts], metrics)


@pytest.mark.parametrize("shapes", [[(4, 6), (5, 6), (3, 6)], [(2, 11), (3, 11)]], ids=str)
def test_the_weighted_right_shared_form_is_the_best_there_is(shapes: list[tuple[int, int]]) -> None:
    matrices, metrics = drawn(*shapes), moments(*(rows for rows, _ in shapes))
    rank, columns = 2, shapes[0][1]
    basis = joint.right_shared(matrices, metrics, rank).basis
    best = lost(matrices, [m @ basis @ basis.mT for m in matrices], metrics)
    for seed in range(20):
        (other,) = drawn((rank, columns), seed=100 + seed)
        # For any rows V the best U_n is the projection, whatever the metric.
        for right in (other, basis.mT + 0.1 * other):
            assert lost(matrices, [m @ torch.linalg.pinv(right) @ right for m in matrices], metrics) > best
    (start,) = drawn((rank, columns), seed=7)
    assert alternating_least_squares(matrices, metrics, start, 250) == pytest.approx(best, rel=1e-6)


def test_the_papers_averaged_update_stalls_above_the_stacked_svd() -> None:
    matrices = drawn(*[(24, 20)] * 4)
    rank = 4
    basis = joint.right_shared(matrices, most=rank).basis
    best = lost(matrices, [m @ basis @ basis.mT for m in matrices])

    def alternated(right: Tensor, averaged: bool) -> float:
        for _ in range(250):
            lefts = [m @ right.mT @ torch.linalg.inv(right @ right.mT) for m in matrices]
            if averaged:
                solved = [torch.linalg.solve(u.mT @ u, u.mT @ m) for u, m in zip(lefts, matrices, strict=True)]
                right = torch.stack(solved).mean(0)
            else:
                right = torch.linalg.solve(
                    sum(u.mT @ u for u in lefts), sum(u.mT @ m for u, m in zip(lefts, matrices, strict=True))
                )
        lefts = [m @ torch.linalg.pinv(right) for m in matrices]
        return lost(matrices, [u @ right for u in lefts])

    (start,) = drawn((rank, 20), seed=5)
    assert alternated(start, averaged=False) == pytest.approx(best, rel=1e-6)
    assert alternated(start, averaged=True) > best * (1 + 1e-3)
    # It even leaves the optimum.
    assert alternated(basis.mT, averaged=True) > best * (1 + 1e-3)


CASES = [(None, "left"), (None, "right"), ("one", "left"), ("one", "right"), ("own", "left"), ("own", "right")]


def metrics_for(kind: str | None, number: int, rows: int, rank: int | None = None) -> Metrics | None:
    if kind is None:
        return None
    return moments(rows, rank=rank) * number if kind == "one" else moments(*[rows] * number, rank=rank)


@pytest.mark.table
@pytest.mark.parametrize(("kind", "first"), CASES)
def test_the_objective_of_both_never_rises(kind: str | None, first: str) -> None:
    for shape, ranks in (((8, 6), (2, 2)), ((6, 8), (1, 3)), ((7, 7), (3, 1))):
        matrices, metrics = drawn(*[shape] * 3), metrics_for(kind, 3, shape[0])
        found = bi_joint.bilateral(matrices, *ranks, metrics, sweeps=8, tolerance=0.0, first=first)
        assert len(found.errors) == 16
        start = lost(matrices, [torch.zeros_like(m) for m in matrices], metrics)
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise([start, *found.errors])), found.errors
        assert found.errors[-1] < found.errors[1]
        assert found.errors[-1] == pytest.approx(lost(matrices, found.products(), metrics))
        # It goes on from where it was.
        on = bi_joint.bilateral(matrices, *ranks, metrics, sweeps=2, first=first, start=found)
        assert on.errors[0] <= found.errors[-1] * (1 + 1e-12)


def test_both_parts_beat_either_alone_and_the_orders_differ() -> None:
    matrices = drawn(*[(12, 10)] * 4)
    both = {
        first: bi_joint.bilateral(matrices, 3, 3, sweeps=60, tolerance=0.0, first=first) for first in bi_joint._FIRST
    }
    part = min(bi_joint.bilateral(matrices, 3, 0).errors[-1], bi_joint.bilateral(matrices, 0, 3).errors[-1])
    assert max(found.errors[-1] for found in both.values()) < part
    assert both["left"].errors[-1] != both["right"].errors[-1]
    # The first half round is the closed form for one part alone.
    assert both["left"].errors[0] == pytest.approx(bi_joint.bilateral(matrices, 3, 0).errors[-1])
    assert both["right"].errors[0] == pytest.approx(bi_joint.bilateral(matrices, 0, 3).errors[-1])


def test_it_stops_by_the_relative_change() -> None:
    matrices = drawn(*[(12, 10)] * 4)
    rounds = [len(bi_joint.bilateral(matrices, 3, 3, tolerance=t).errors) // 2 for t in (0.5, 1e-2, 2e-3, 0.0)]
    assert rounds == sorted(rounds)
    assert rounds[0] == 2
    assert rounds[2] < rounds[3] == 30


@pytest.mark.parametrize("kind", [None, "one"])
def test_one_part_alone_is_the_closed_form(kind: str | None) -> None:
    shape = (6, 8)
    matrices, metrics = drawn(*[shape] * 3), metrics_for(kind, 3, shape[0])
    for rank in (1, 3, 6):
        basis = joint.right_shared(matrices, metrics, rank).basis
        right = bi_joint.bilateral(matrices, 0, rank, metrics)
        assert len(right.errors) == 1
        for product, m in zip(right.products(), matrices, strict=True):
            torch.testing.assert_close(product, m @ basis @ basis.mT, atol=1e-9, rtol=1e-9)
        u, vs, energies = joint.left_shared(matrices, None if metrics is None else metrics[0], rank)
        left = bi_joint.bilateral(matrices, rank, 0, metrics)
        for product, v in zip(left.products(), vs, strict=True):
            torch.testing.assert_close(product, u @ v, atol=1e-9, rtol=1e-9)
        assert left.errors[-1] == pytest.approx(float(energies[:, rank:].sum()), rel=1e-9, abs=1e-7)


def test_one_part_alone_may_have_layers_of_other_sizes() -> None:
    tall = drawn((3, 5), (6, 5))
    assert [p.shape for p in bi_joint.bilateral(tall, 0, 2).products()] == [m.shape for m in tall]
    wide = drawn((5, 3), (5, 6))
    assert [p.shape for p in bi_joint.bilateral(wide, 2, 0).products()] == [m.shape for m in wide]


DEGENERATE = {
    "zero": lambda m: torch.zeros_like(m),
    "rank one": lambda m: m[..., :1] @ m[:, :1],
    "zero rows": lambda m: torch.cat([m[:, :-2], torch.zeros_like(m[:, :2])], dim=1),
}


@pytest.mark.table
@pytest.mark.parametrize("how", DEGENERATE)
@pytest.mark.parametrize("kind", [None, "one", "own"])
@pytest.mark.parametrize("metric_rank", [None, 1])
def test_deficient_matrices_and_metrics_do_not_fail(how: str, kind: str | None, metric_rank: int | None) -> None:
    for shape in ((5, 4), (4, 5)):
        matrices = [DEGENERATE[how](m) for m in drawn(*[shape] * 3)]
        matrices[-1] = torch.zeros_like(matrices[-1])
        metrics = metrics_for(kind, 3, shape[0], metric_rank)
        energy = lost(matrices, [torch.zeros_like(m) for m in matrices], metrics)
        for ranks in ((2, 2), (3, 0), (0, 3)):
            found = bi_joint.bilateral(matrices, *ranks, metrics, sweeps=3)
            assert all(torch.isfinite(p).all() for p in found.products())
            assert -1e-9 <= found.errors[-1] <= energy * (1 + 1e-9) + 1e-9
        if kind == "own":
            assert metrics is not None
            metrics[0] = Full(torch.zeros_like(metrics[0].moment))
            left, rights = joint.alternate_left(matrices, metrics, matrices[0][..., :2], sweeps=2)
            assert all(torch.isfinite(left @ v).all() for v in rights)
            start = [m[..., :2] for m in matrices]
            lefts, right = joint.alternate_right(matrices, metrics, start, sweeps=2)
            assert all(torch.isfinite(u @ right).all() for u in lefts)


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 8),
    st.integers(1, 2),
    st.integers(0, 99),
    st.booleans(),
)
def test_any_sizes_keep_the_bounds(sizes: list[int], shared: int, groups: int, seed: int, weighted: bool) -> None:
    tall = drawn(*((n, shared) for n in sizes), groups=groups, seed=seed)
    wide = [m.mT.contiguous() for m in tall]
    metrics = moments(*sizes, groups=groups, seed=seed + 1) if weighted else None
    found = joint.right_shared(tall, metrics)
    full = min(sum(sizes), shared)
    assert found.energies.shape[-1] >= full
    assert (found.energies.diff() <= 1e-9).all()
    total = lost(tall, [torch.zeros_like(m) for m in tall], metrics)
    assert float(found.energies.sum()) == pytest.approx(total, rel=1e-9)
    # Nothing that is shared is better than what every matrix may choose for itself, and full rank meets all.
    for rank in range(1, full + 1):
        basis = found.basis[..., :rank]
        shares = lost(tall, [m @ basis @ basis.mT for m in tall], metrics)
        assert shares == pytest.approx(float(found.energies[:, rank:].sum()), abs=1e-8 * (1 + total))
        alone = sum(
            float(lowrank.energies(m, None if metrics is None else metrics[n].moment)[:, rank:].sum())
            for n, m in enumerate(tall)
        )
        assert alone <= shares + 1e-8 * (1 + total)
    assert shares == pytest.approx(0, abs=1e-8 * (1 + total))
    left, rights, energies = joint.left_shared(wide)
    torch.testing.assert_close(energies, joint.right_shared(tall).energies[:, : energies.shape[-1]])
    for v, m in zip(rights, wide, strict=True):
        torch.testing.assert_close(left @ v, m, atol=1e-8, rtol=1e-8)


def layered(slices: int, *, shared: bool = False) -> tuple[Matrices, Metrics]:
    """Matrices ``[g, p, (o, q)]`` with metrics of their own."""
    p, outputs = 6, [4, 3, 5] if not shared else [4, 4, 4]
    matrices = drawn(*((p, o * slices) for o in outputs), groups=2)
    flat = moments(*[p * slices] * 3, groups=2)
    return matrices, [Full(a.moment, (p, slices), Unfolding("input", ())) for a in flat]


def seen(matrices: Matrices, products: list[Tensor], metrics: Metrics) -> float:
    rows = zip(matrices, products, metrics, strict=True)
    return sum(float(response.total_energy(m - p, a).sum()) for m, p, a in rows)


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("start", ["good", "random"])
def test_alternating_left_never_rises(slices: int, start: str) -> None:
    matrices, metrics = layered(slices)
    if start == "good":
        left, energies = joint.left_start(matrices, metrics, 3)
        assert energies.shape[-1] == 6
    else:
        (left,) = drawn((6, 3), groups=2, seed=9)
    errors = []
    for sweeps in (0, 1, 3, 6):
        made, rights = joint.alternate_left(matrices, metrics, left, sweeps=sweeps)
        errors.append(seen(matrices, [made @ v for v in rights], metrics))
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors)), errors
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("start", ["good", "random"])
def test_alternating_right_never_rises(slices: int, start: str) -> None:
    matrices, metrics = layered(slices, shared=True)
    basis = joint.right_shared(matrices, metrics, 3).basis
    lefts = [m @ basis for m in matrices] if start == "good" else drawn(*[(6, 3)] * 3, groups=2, seed=9)
    errors = []
    for sweeps in (0, 1, 3, 6):
        made, right = joint.alternate_right(matrices, metrics, lefts, sweeps=sweeps)
        errors.append(seen(matrices, [u @ right for u in made], metrics))
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors)), errors
    if slices == 1 and start == "good":
        assert errors[-1] == pytest.approx(errors[0])  # the closed form has nothing left to gain
    else:
        assert errors[-1] < errors[0]


def test_the_start_in_different_metrics_is_exact_where_they_are_one() -> None:
    matrices = drawn((6, 4), (6, 5))
    (metric,) = moments(6)
    one, energies = joint.left_start(matrices, [metric, metric])
    # Equal metrics that are two objects go the way of the mean, which is the same up to a factor.
    two, others = joint.left_start(matrices, [metric, Full(metric.moment.clone())])
    torch.testing.assert_close(others, energies)
    for rank in range(1, 6):
        spans = [torch.linalg.qr(left[..., :rank])[0] for left in (one, two)]
        torch.testing.assert_close(spans[0] @ spans[0].mT, spans[1] @ spans[1].mT, atol=1e-7, rtol=1e-7)


def test_the_size_of_a_metric_goes_over_to_its_matrix() -> None:
    matrices = drawn((6, 4), (6, 5))
    metrics = moments(6, 6)
    left, energies = joint.left_start(matrices, metrics)
    # A layer whose inputs are ten times as large and whose weights are a tenth answers the same.
    scaled, same = joint.left_start([matrices[0] / 10, matrices[1]], [Full(metrics[0].moment * 100), metrics[1]])
    torch.testing.assert_close(same, energies)
    torch.testing.assert_close(scaled, left)


def test_matrices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same groups and columns; these are \(1, 4, 5\), \(1, 4, 6\)"):
        joint.right_shared(drawn((4, 5), (4, 6)))
    with pytest.raises(ValueError, match=r"same groups and rows; these are \(1, 4, 5\), \(1, 3, 5\)"):
        joint.left_shared(drawn((4, 5), (3, 5)))
    with pytest.raises(ValueError, match="same groups and columns"):
        joint.right_shared([*drawn((4, 5)), *drawn((4, 5), groups=2)])
    with pytest.raises(ValueError, match="these are none"):
        joint.right_shared([])
    with pytest.raises(ValueError, match="rows"):
        bi_joint.bilateral(drawn((4, 5), (3, 5)), 1, 1)
    with pytest.raises(ValueError, match="first is 'both'; expected 'left' or 'right'"):
        bi_joint.bilateral(drawn((4, 5), (4, 5)), 1, 1, first="both")


def test_products_leave_out_a_part_without_rank() -> None:
    a, b = drawn((4, 2), (2, 5))
    none_left, none_right = a[..., :0], b[:, :0]
    only = Bilateral((a, a), b, none_left, (none_right, none_right))
    assert all(torch.equal(p, a @ b) for p in only.products())
    assert all(torch.equal(p, a @ b) for p in Bilateral((none_left,), none_right, a, (b,)).products())
    (whole,) = Bilateral((a,), b, 2 * a, (b,)).products()
    torch.testing.assert_close(whole, 3 * a @ b)
