"""Groups in the table: selectors against brute force over all covers, and the trees themselves."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from spectrim.errors import InfeasibleBudgetError
from spectrim.network.choices import DENSE, LowRankChoice, SharedChoice
from spectrim.selection import selectors
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates, Option, Row
from spectrim.selection.forest import Forest, flattened
from spectrim.selection.plan import Plan

SELECTORS = (selectors.exact, selectors.lagrangian, selectors.greedy, selectors.uniform, selectors.energy)
BUDGETS = (Budget(parameters=0.5), Budget(parameters=0.3), Budget(parameters=0.5, macs=0.7))
MEMBERS = {"g012": ("s0", "s1", "s2"), "g01": ("s0", "s1"), "g34": ("s3", "s4")}
# Every way to cover the five sites by rows.
COVERS = [
    [*first, *second] for first in (["g012"], ["g01", "s2"], ["s0", "s1", "s2"]) for second in (["g34"], ["s3", "s4"])
]


def options(rng: random.Random, name: str, dense: float, lowest: float, number: int = 5) -> tuple[Option, ...]:
    """Random options that lose more where they cost less."""
    found = [Option(DENSE, 0.0, {"parameters": dense, "macs": 2 * dense})]
    for rank in range(number):
        share = rng.uniform(lowest, 0.95)
        costs = {"parameters": dense * share, "macs": 2 * dense * rng.uniform(0.2, 1.1)}
        choice = LowRankChoice("channel", rank + 1, method=name)
        found.append(Option(choice, rng.random() * (1 - share) + 0.001, costs))
    return tuple(found)


def table(seed: int) -> Candidates:
    """Five sites, a group inside a group, and a group apart."""
    rng = random.Random(seed)
    singles = [Row(f"s{i}", "x", options(rng, f"s{i}", 100, 0.1)) for i in range(5)]
    groups = [
        Row(
            name, "x", options(rng, name, 100 * len(sites), 0.03 if len(sites) > 2 else 0.05),
            scale=float(len(sites)), members=sites,
        )
        for name, sites in MEMBERS.items()
    ]  # fmt: skip
    return Candidates((*singles, *groups), {"parameters": 50.0, "macs": 10.0}, "weight energy", methods={"m": {}})


def allowed(row: Row, costs: tuple[str, ...]) -> list[Option]:
    """Dense is said by the sites; what is not strictly cheaper is not considered."""
    found = [o for o in row.options[1:] if all(o.costs[c] < row.dense.costs[c] for c in costs)]
    return found if row.members else [row.dense, *found]


def brute_force(candidates: Candidates, budget: Budget) -> float | None:
    """Least loss within the budget over all covers, or None."""
    limits = budget.limits(candidates.dense)
    best = math.inf
    for cover in COVERS:
        rows = [candidates[name] for name in cover]
        for picks in itertools.product(*(allowed(row, tuple(limits)) for row in rows)):
            totals = {c: candidates.fixed[c] + sum(o.costs[c] for o in picks) for c in limits}
            if all(totals[c] <= limits[c] * (1 + 1e-12) for c in limits):
                best = min(best, sum(row.loss(o) for row, o in zip(rows, picks, strict=True)))
    return None if best == math.inf else best


def check(plan: Plan, candidates: Candidates, limits: dict[str, float]) -> None:
    """Every site once, in order, within the limits, with the sums that the entries give."""
    covered = [site for entry in plan for site in entry.sites]
    assert sorted(covered) == [f"s{i}" for i in range(5)]
    assert [min(entry.sites) for entry in plan] == sorted(min(entry.sites) for entry in plan)
    for cost, limit in limits.items():
        assert plan.costs[cost] <= limit * (1 + 1e-9)
        assert plan.costs[cost] == pytest.approx(candidates.fixed[cost] + sum(e.costs[cost] for e in plan))
    loss = 0.0
    for entry in plan:
        row = candidates[entry.site]
        assert entry.members == row.members
        [option] = [o for o in row.options if o.choice == entry.choice]
        assert (entry.error, entry.costs) == (option.error, option.costs)
        loss += row.loss(option)
    assert plan.loss == pytest.approx(loss)


@pytest.mark.table
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", BUDGETS, ids=["half", "third", "two limits"])
def test_selectors_against_brute_force(seed: int, budget: Budget) -> None:
    candidates = table(seed)
    limits = budget.limits(candidates.dense)
    best = brute_force(candidates, budget)
    if best is None:
        for selector in SELECTORS:
            with pytest.raises(InfeasibleBudgetError):
                selector(candidates, budget)
        return
    for selector in SELECTORS:
        plan = selector(candidates, budget)
        check(plan, candidates, limits)
        assert plan.loss >= best * (1 - 1e-9)
        if plan.bound is not None:
            assert plan.bound <= best * (1 + 1e-9)
        if selector is selectors.exact:
            assert plan.selector == "exact"
            assert plan.loss == pytest.approx(best, rel=1e-5)


def test_groups_are_chosen_and_left() -> None:
    chosen = {entry.site for seed in range(12) for entry in selectors.exact(table(seed), BUDGETS[1])}
    assert {"g012", "g34", "s0", "s2"} <= chosen


@pytest.mark.table
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("price", [0.0, 1e-4, 1e-3, 3e-3, 1e-2, 1.0])
@pytest.mark.parametrize("dense", [True, False])
def test_at_multiplier_is_the_least_sum_over_all_covers(seed: int, price: float, dense: bool) -> None:
    candidates = table(seed)
    plan = selectors.at_multiplier(candidates, "parameters", price, dense=dense)
    best = math.inf
    for cover in COVERS:
        total = 0.0
        for name in cover:
            row = candidates[name]
            offered = allowed(row, ("parameters",)) if dense else row.options[1:]
            total += min((row.loss(o) + price * o.costs["parameters"] for o in offered), default=math.inf)
        best = min(best, total)
    check(plan, candidates, {})
    found = plan.loss + price * sum(entry.costs["parameters"] for entry in plan)
    assert found == pytest.approx(best, rel=1e-9)
    assert dense or not any(entry.choice.is_dense for entry in plan)


def test_without_a_need_nothing_is_shared() -> None:
    plan = selectors.exact(table(0), Budget(parameters=1.0))
    assert [entry.site for entry in plan] == ["s0", "s1", "s2", "s3", "s4"]
    assert all(entry.choice.is_dense for entry in plan)
    # A group that loses and costs as much as its sites apart is left too.
    half = Option(LowRankChoice("channel", 1, method="m"), 0.5, {"macs": 4.0})
    halves = tuple(Row(name, "x", (Option(DENSE, 0.0, {"macs": 10.0}), half)) for name in "ab")
    joined = Option(SharedChoice("channel", 1, 0, method="m"), 0.5, {"macs": 8.0})
    both = Row("ab", "x", (Option(DENSE, 0.0, {"macs": 20.0}), joined), scale=2.0, members=("a", "b"))
    tie = Candidates((*halves, both), {"macs": 0.0}, "weight energy")
    assert [entry.site for entry in selectors.at_multiplier(tie, "macs", 1.0)] == ["a", "b"]


def test_trees() -> None:
    forest = Forest(table(0))
    names = [row.site for row in forest.rows]
    assert [names[n] for n in forest.roots] == ["g012", "g34"]
    children = {names[n]: [names[c] for c in some] for n, some in enumerate(forest.children) if some}
    assert children == {"g01": ["s0", "s1"], "g012": ["g01", "s2"], "g34": ["s3", "s4"]}
    assert [names[n] for n in forest.leaves[names.index("g012")]] == ["s0", "s1", "s2"]


def test_the_flat_table_stands_for_the_one_with_groups() -> None:
    candidates = table(3)
    flat = flattened(candidates, ("parameters", "macs"))
    assert [row.site for row in flat.candidates] == ["g012", "g34"]
    assert flat.candidates.dense == candidates.dense
    for row, picks in zip(flat.candidates, flat.picks, strict=True):
        assert row.dense.choice.is_dense
        for option, pairs in zip(row.options, picks, strict=True):
            rows = [candidates.rows[n] for n, _ in pairs]
            taken = [candidates.rows[n].options[k] for n, k in pairs]
            sites = [site for r in rows for site in r.members or (r.site,)]
            assert sorted(sites) == sorted(candidates[row.site].members)
            assert row.loss(option) == pytest.approx(sum(r.loss(o) for r, o in zip(rows, taken, strict=True)))
            for cost in ("parameters", "macs"):
                assert option.costs[cost] == pytest.approx(sum(o.costs[cost] for o in taken))
    plain = Candidates(candidates.singles, candidates.fixed, candidates.unit)
    assert flattened(plain, ("macs",)).candidates is plain


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"ab": ("s0", "s1"), "bc": ("s1", "s2")}, "groups 'bc' and 'ab' overlap"),
        ({"abc": ("s0", "s1", "s2"), "cd": ("s2", "s3")}, "overlap; of two groups one contains"),
        ({"ax": ("s0", "x")}, "group 'ax' names site 'x', which the table does not have"),
    ],
)
def test_groups_that_make_no_trees_are_refused(members: dict[str, tuple[str, ...]], complaint: str) -> None:
    candidates = table(0)
    rows = [Row(name, "x", candidates["g01"].options, members=sites) for name, sites in members.items()]
    broken = Candidates((*candidates.singles, *rows), candidates.fixed, candidates.unit, methods={"m": {}})
    for selector in SELECTORS:
        with pytest.raises(ValueError, match=complaint):
            selector(broken, BUDGETS[0])
    with pytest.raises(ValueError, match=complaint):
        selectors.at_multiplier(broken, "macs", 0.1)
