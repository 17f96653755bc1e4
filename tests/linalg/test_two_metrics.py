"""A matrix with two readers: each factor has an exact solution for the other, and one metric alone is the SVD."""

from __future__ import annotations

import pytest
import torch

from spectrim.linalg import lowrank
from spectrim.linalg.two_metrics import TwiceRead, View


def drawn(seed=0, entries=14, width=6, *, like=False):
    torch.manual_seed(seed)
    kind = {"dtype": torch.float64}
    metrics = [part.mT @ part for part in (torch.randn(9, width, **kind), torch.randn(9, width, **kind))]
    weights = [torch.rand(entries, **kind).square(), torch.rand(entries, **kind)]
    if like:
        metrics[1], weights[1] = 3 * metrics[0], weights[0]
    one, two = (View(rows, metric) for rows, metric in zip(weights, metrics, strict=True))
    return TwiceRead(torch.randn(entries, width, **kind), (one, two))


def loss(problem, rows, columns):
    missing = problem.matrix - rows @ columns
    return sum((d.rows[:, None] * (missing @ d.metric) * missing).sum() for d in problem.readings)


def solved(matrix, weights):
    """Least squares in which every row of unknowns has its own weight matrix, by one system of equations."""
    return torch.linalg.lstsq(weights, matrix).solution


def test_rows_are_the_least_squares_of_each_row():
    problem = drawn()
    columns = torch.randn(3, 6, dtype=torch.float64)
    found = problem.rows(columns)
    one, two = problem.readings
    for row, target, p, q in zip(found, problem.matrix, one.rows, two.rows, strict=True):
        root = lowrank.root((p * one.metric + q * two.metric)[None])[0]
        assert torch.allclose(row, solved((root @ target)[:, None], root @ columns.mT)[:, 0])


def test_columns_are_the_least_squares_of_all_at_once():
    problem = drawn(1)
    rows = torch.randn(14, 3, dtype=torch.float64)
    unknowns, targets = [], []
    for each in problem.readings:
        root, size = lowrank.root(each.metric[None])[0], each.rows.sqrt()[:, None]
        unknowns.append(torch.kron(size * rows, root))
        targets.append((size * (problem.matrix @ root.mT)).reshape(-1))
    wanted = solved(torch.cat(targets)[:, None], torch.cat(unknowns)).reshape(3, 6)
    assert torch.allclose(problem.columns(rows), wanted)


def test_what_is_lost_is_what_both_lose():
    problem = drawn(2)
    rows, columns = problem.alternated(problem.start()[:3], 0)
    assert problem.lost(rows, columns) == pytest.approx(float(loss(problem, rows, columns)))
    assert problem.lost(0 * rows, columns) == pytest.approx(problem.energy())


def test_turns_only_improve():
    problem = drawn(3)
    outwards = problem.start()
    before = problem.energy()
    for sweeps in range(4):
        now = loss(problem, *problem.alternated(outwards[:2], sweeps))
        assert now <= before * (1 + 1e-9)
        before = now


def test_one_metric_is_the_closed_solution():
    problem = drawn(4, like=True)
    reading = problem.readings[0]
    scaled = reading.rows.sqrt()[:, None] * problem.matrix @ lowrank.root(reading.metric[None])[0].mT
    outwards = problem.start()
    for rank in (1, 3):
        best = 4 * torch.linalg.svdvals(scaled)[rank:].square().sum()
        assert torch.allclose(loss(problem, *problem.alternated(outwards[:rank], 30)), best, rtol=1e-4)


@pytest.mark.parametrize("dead", ["columns", "rows"])
def test_what_nobody_reads_breaks_nothing(dead):
    problem = drawn(5)
    one, two = problem.readings
    if dead == "columns":
        one.metric[2], one.metric[:, 2], two.metric[2], two.metric[:, 2] = 0, 0, 0, 0
    else:
        one.rows[4] = two.rows[4] = 0
    outwards = problem.start()
    rows, columns = problem.alternated(outwards[:5], 3)
    assert rows.isfinite().all()
    assert columns.isfinite().all()
    assert loss(problem, rows, columns) < 0.2 * loss(problem, 0 * rows, columns)
