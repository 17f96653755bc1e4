"""The proven gap against the whole integer program, and standard output without the solver's lines."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from spectrim.selection import integer, knapsack
from spectrim.selection.budget import Budget
from spectrim.selection.budgeted import PROVEN_GAP, Budgeted
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import exact, lagrangian, uniform
from tests.selection.test_selectors import make_row, make_table

COSTS: tuple[str, ...] = ("macs", "bytes", "latency")


def table(sites: int, options: int, costs: int, seed: int, *, same: bool = False) -> Candidates:
    """Curves that fall with the cost; measured costs are noisy. Sites are alike where ``same``."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(sites):
        mine = np.random.default_rng(seed) if same else draw
        steps = np.arange(1, options + 1) / (options + 1)
        errors = (1 - steps) ** mine.uniform(0.5, 4)
        size = mine.integers(50, 500, size=costs).astype(float)
        prices = np.round(steps[:, None] * size * mine.uniform(0.9, 1.05, size=(options, costs)), 2)
        names = COSTS[:costs]
        offered = [
            (float(e), dict(zip(names, map(float, p), strict=True))) for e, p in zip(errors, prices, strict=True)
        ]
        rows.append(make_row(f"site{number}", dict(zip(names, map(float, size), strict=True)), offered))
    return make_table(*rows, **dict.fromkeys(COSTS[:costs], 3.0))


def least(whole: Candidates, budget: Budget) -> float:
    """The least loss, from the integer program with every option of every site that is cheaper than dense."""
    limits = budget.limits(whole.dense)
    loss, cost, site = [], [], []
    for number, row in enumerate(whole):
        for option in row.options:
            if option is row.dense or all(option.costs[c] < row.dense.costs[c] for c in limits):
                loss.append(row.loss(option))
                cost.append([option.costs[c] for c in limits])
                site.append(number)
    one = (np.array(site)[None, :] == np.arange(len(whole))[:, None]).astype(float)
    room = [limit - whole.fixed[c] for c, limit in limits.items()]
    found = milp(
        np.array(loss), integrality=np.ones(len(loss)), bounds=Bounds(0, 1), options={"mip_rel_gap": 0},
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(np.array(cost).T, -np.inf, np.array(room))]  # pyright: ignore[reportArgumentType],
    )  # fmt: skip
    assert found.status == 0
    return float(found.fun)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 99), st.booleans(), st.booleans())
def test_bound_optimum_and_value_are_in_order(
    sites: int, options: int, costs: int, seed: int, same: bool, wide: bool
) -> None:
    whole, budget = table(sites, options, costs, seed, same=same), Budget(**dict.fromkeys(COSTS[:costs], 0.6))
    if options == 1 and not wide:
        budget = Budget(**dict.fromkeys(COSTS[:costs], 0.8))
    with pytest.MonkeyPatch.context() as patch:
        if wide:
            patch.setattr(knapsack, "FEW_SITES", 0)
            patch.setattr(knapsack, "WIDE_GAP", 0.02)
        plan = exact(whole, budget)
    best = least(whole, budget)
    assert plan.bound is not None
    slack = 1e-6 * best + 1e-9
    assert plan.bound - slack <= best <= plan.loss + slack
    gap = plan.facts[PROVEN_GAP]
    assert gap == pytest.approx(1 - plan.bound / plan.loss if plan.loss else 0.0)
    assert 0 <= gap <= (0.02 if wide else 2e-6)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.table(every=2)
@pytest.mark.parametrize("costs", [1, 2])
def test_many_sites_have_a_small_proven_gap(costs: int) -> None:
    whole = table(110, 15, costs, 5)
    plan = exact(whole, Budget(**dict.fromkeys(COSTS[:costs], 0.5)))
    assert plan.selector == "exact"
    assert plan.facts[PROVEN_GAP] <= 1e-3


def test_plans_without_a_bound_say_nothing_of_a_gap() -> None:
    whole = table(5, 5, 1, 0)
    assert PROVEN_GAP not in uniform(whole, Budget(macs=0.5)).facts
    assert lagrangian(whole, Budget(macs=0.5)).facts[PROVEN_GAP] >= 0


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(2, 15), st.integers(2, 3), st.integers(0, 99))
def test_multipliers_are_those_of_the_linear_relaxation(sites: int, options: int, costs: int, seed: int) -> None:
    whole = table(sites, options, costs, seed)
    items = Budgeted.of(whole, Budget(**dict.fromkeys(COSTS[:costs], 0.6))).items
    assert items is not None
    one = (items.site[None, :] == np.arange(sites)[:, None]).astype(float)
    relaxed = linprog(items.loss, A_ub=items.cost.T, b_ub=items.room, A_eq=one, b_eq=np.ones(sites))
    assert relaxed.status == 0
    found = knapsack.relaxed_multipliers(items)
    assert (found >= 0).all()
    assert items.lower_bound(found) == pytest.approx(relaxed.fun, rel=1e-7, abs=1e-9)


def test_the_solvers_own_lines_stay_off_standard_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from scipy import optimize

    def noisy(*_arguments: object, **_options: object) -> str:
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\nof another thread\n")
        return "solved"

    monkeypatch.setattr(optimize, "milp", noisy)
    print("before")
    assert integer.milp() == "solved"
    print("after")
    assert capfd.readouterr().out == "before\nof another thread\nafter\n"
    monkeypatch.undo()
    plan = exact(table(60, 30, 2, 3), Budget(macs=0.5, bytes=0.55))
    assert plan.selector == "exact"
    assert capfd.readouterr().out == ""
