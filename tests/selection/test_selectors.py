"""Selectors against brute force on small tables, and what each promises."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import InfeasibleBudgetError
from spectrim.network.choices import DENSE, LowRankChoice
from spectrim.selection import knapsack
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates, Option, Row
from spectrim.selection.knapsack import ROUNDING
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import at_multiplier, energy, exact, greedy, lagrangian, select, uniform

SELECTORS = (uniform, energy, greedy, lagrangian, exact)
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def make_row(name: str, dense: dict[str, float], options: list[tuple[float, dict[str, float]]], **kwargs: Any) -> Row:
    made = (LowRankChoice("channel", rank, method="svd") for rank in range(1, len(options) + 1))
    rest = (Option(choice, error, costs) for choice, (error, costs) in zip(made, options, strict=True))
    return Row(name, "Linear", (Option(DENSE, 0.0, dense), *rest), **kwargs)


def make_table(*rows: Row, **fixed: float) -> Candidates:
    return Candidates(rows, fixed, "weight energy")


def line(name: str, *points: tuple[float, float], dense: float = 10.0, **kwargs: float) -> Row:
    """A row with one cost from ``(macs, error)`` pairs."""
    return make_row(name, {"macs": dense}, [(error, {"macs": macs}) for macs, error in points], **kwargs)


@st.composite
def tables(draw: st.DrawFn, costs: tuple[str, ...] = ("macs",)) -> Candidates:
    """Few sites and options; small integers, so that ties, non-monotone rows and dear options are common."""
    error = st.one_of(st.integers(0, 8).map(lambda n: n / 8), st.floats(0, 1, allow_subnormal=False))
    price = st.one_of(st.integers(0, 12).map(float), st.floats(0.1, 12))
    rows = []
    for i in range(draw(st.integers(1, 4))):
        dense = {c: float(draw(st.integers(1, 10))) for c in costs}
        options = draw(st.lists(st.tuples(error, st.fixed_dictionaries(dict.fromkeys(costs, price))), max_size=5))
        scale, exponent = draw(st.sampled_from([(1.0, 1.0), (0.0, 1.0), (3.0, 1.0), (1.0, 0.5), (2.0, 2.0)]))
        rows.append(make_row(f"site{i}", dense, options, scale=scale, exponent=exponent))
    return make_table(*rows, **{c: float(draw(st.integers(0, 5))) for c in costs})


def allowed(row: Row, costs: tuple[str, ...]) -> list[Option]:
    return [row.dense, *(o for o in row.options[1:] if all(o.costs[c] < row.dense.costs[c] for c in costs))]


def brute_force(table: Candidates, budget: Budget) -> float | None:
    """Least loss within the budget, or None."""
    limits = budget.limits(table.dense)
    best = None
    for picks in itertools.product(*(allowed(row, budget.costs) for row in table)):
        totals = {c: table.fixed[c] + sum(o.costs[c] for o in picks) for c in limits}
        if all(totals[c] <= limits[c] * (1 + knapsack.ROUNDING) for c in limits):
            loss = sum(row.loss(o) for row, o in zip(table, picks, strict=True))
            best = loss if best is None else min(best, loss)
    return best


def check(plan: Plan, table: Candidates, budget: Budget) -> None:
    limits = budget.limits(table.dense)
    assert plan.budget == limits
    assert [e.site for e in plan] == [row.site for row in table]
    for c, limit in limits.items():
        assert plan.costs[c] <= limit * (1 + 1e-9)
        assert plan.costs[c] == pytest.approx(table.fixed[c] + sum(e.costs[c] for e in plan))
    for row, entry in zip(table, plan, strict=True):
        assert any((o.choice, o.error, o.costs) == (entry.choice, entry.error, entry.costs) for o in row.options)
        if not entry.choice.is_dense:
            assert all(entry.costs[c] < row.dense.costs[c] for c in limits), "an option that is not cheaper"


fractions = st.one_of(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.floats(0.02, 1.0))


@FEW
@given(tables(), fractions)
def test_exact_equals_brute_force(table: Candidates, fraction: float) -> None:
    budget = Budget(macs=fraction)
    best = brute_force(table, budget)
    if best is None:
        with pytest.raises(InfeasibleBudgetError):
            exact(table, budget)
        return
    plan = exact(table, budget)
    assert plan.selector == "exact"
    assert plan.loss == pytest.approx(best, rel=2e-6, abs=1e-9)
    assert plan.bound is not None
    assert plan.bound <= best * (1 + 1e-9) + 1e-12
    assert plan.bound >= best * (1 - 1e-5) - 1e-9


@FEW
@given(tables(("macs", "latency")), fractions, fractions)
def test_exact_equals_brute_force_under_two_limits(table: Candidates, macs: float, latency: float) -> None:
    budget = Budget(macs=macs, latency=f"{100 * latency}%")
    best = brute_force(table, budget)
    if best is None:
        with pytest.raises(InfeasibleBudgetError):
            exact(table, budget)
        return
    plan = exact(table, budget)
    assert plan.selector == "exact"
    assert plan.loss == pytest.approx(best, rel=2e-6, abs=1e-9)
    assert plan.bound is not None
    assert plan.bound <= best * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("selector", SELECTORS)
@settings(FEW, max_examples=12)
@given(table=tables(("macs", "latency")), macs=fractions, latency=st.none() | fractions)
def test_every_selector_meets_all_limits_or_raises(selector, table: Candidates, macs: float, latency: float | None):
    budget = Budget(macs=macs, latency=None if latency is None else f"{100 * latency}%")
    best = brute_force(table, budget)
    if best is None:
        with pytest.raises(InfeasibleBudgetError):
            selector(table, budget)
        return
    plan = selector(table, budget)
    check(plan, table, budget)
    assert plan.loss >= best * (1 - 1e-9) - 1e-12
    if selector is lagrangian:
        assert plan.bound is not None
        assert plan.bound <= best * (1 + 1e-9) + 1e-12


@settings(FEW, max_examples=20)
@given(tables(), fractions)
def test_the_order_of_selectors(table: Candidates, fraction: float) -> None:
    budget = Budget(macs=fraction)
    if brute_force(table, budget) is None:
        return
    least, close, walked = (selector(table, budget) for selector in (exact, lagrangian, greedy))
    assert close.bound is not None
    assert close.bound <= least.loss * (1 + 1e-9) + 1e-12
    assert least.loss <= close.loss * (1 + 1e-9) + 1e-12
    assert close.loss <= walked.loss * (1 + 1e-9) + 1e-12
    # The relaxation splits one site at most, so that rounding it up costs at most that site's whole loss.
    largest = max(row.loss(o) for row in table for o in allowed(row, ("macs",)))
    assert close.loss <= close.bound + largest + 1e-9


@FEW
@given(tables(), st.one_of(st.just(0.0), st.floats(0, 2), st.just(1e9)))
def test_at_multiplier_is_the_argmin(table: Candidates, multiplier: float) -> None:
    plan = at_multiplier(table, "macs", multiplier)
    assert plan.budget == {}
    for row, entry in zip(table, plan, strict=True):
        options = [(row.loss(o) + multiplier * o.costs["macs"], o.costs["macs"]) for o in allowed(row, ("macs",))]
        [taken] = {o.costs["macs"] for o in row.options if o.choice == entry.choice}
        assert taken == min(options)[1]


def test_at_multiplier_takes_the_cheaper_of_ties_and_never_a_dear_option() -> None:
    table = make_table(line("a", (6.0, 0.5), (2.0, 1.0), (10.0, 0.0), (11.0, 0.0)), macs=0.0)
    assert at_multiplier(table, "macs", 0.125)["a"].costs["macs"] == 2.0
    assert at_multiplier(table, "macs", 0.12)["a"].choice.is_dense
    for multiplier in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="multiplier"):
            at_multiplier(table, "macs", multiplier)
    with pytest.raises(ValueError, match="multiplier is for bytes, which the table does not hold"):
        at_multiplier(table, "bytes", 1.0)


@FEW
@given(tables(), st.one_of(st.just(0.0), st.floats(0, 2), st.just(1e9)))
def test_at_multiplier_without_dense_is_the_argmin_over_all_other_options(table: Candidates, multiplier: float) -> None:
    bare = [row.site for row in table if len(row.options) == 1]
    if bare:
        with pytest.raises(ValueError, match=f"site '{bare[0]}' has no option but dense, which is not allowed"):
            at_multiplier(table, "macs", multiplier, dense=False)
        return
    plan = at_multiplier(table, "macs", multiplier, dense=False)
    assert plan.multipliers == {"macs": multiplier}
    for row, entry in zip(table, plan, strict=True):
        assert not entry.choice.is_dense
        sums = {o.choice: row.loss(o) + multiplier * o.costs["macs"] for o in row.options[1:]}
        assert sums[entry.choice] <= min(sums.values()) * (1 + 1e-12)
        ties = [o for o in row.options[1:] if sums[o.choice] <= min(sums.values()) * (1 + 1e-12)]
        assert entry.costs["macs"] == min(o.costs["macs"] for o in ties)


def test_at_multiplier_takes_the_cheaper_of_sums_that_are_equal_but_for_rounding() -> None:
    assert 0.2 + 0.1 * 4.0 > 0.1 + 0.1 * 5.0
    for points in ([(4.0, 0.2), (5.0, 0.1)], [(5.0, 0.1), (4.0, 0.2)]):
        table = make_table(line("a", *points), macs=0.0)
        for dense in (True, False):
            assert at_multiplier(table, "macs", 0.1, dense=dense)["a"].costs["macs"] == 4.0
    # Of equal costs, what loses less.
    table = make_table(line("a", (4.0, 0.2), (4.0, 0.2 - 1e-14), (4.0, 0.2)), macs=0.0)
    assert at_multiplier(table, "macs", 1.0)["a"].error == 0.2 - 1e-14
    # What differs by more than rounding is no tie.
    table = make_table(line("a", (4.0, 0.2), (5.0, 0.1 - 1e-9)), macs=0.0)
    assert at_multiplier(table, "macs", 0.1)["a"].costs["macs"] == 5.0


def test_at_multiplier_without_dense_takes_options_that_cost_more_than_dense() -> None:
    table = make_table(line("a", (14.0, 0.0), (4.0, 0.5)), macs=0.0)
    assert at_multiplier(table, "macs", 0.0, dense=False)["a"].costs["macs"] == 14.0
    assert at_multiplier(table, "macs", 0.0)["a"].choice.is_dense
    assert at_multiplier(table, "macs", 0.06, dense=False)["a"].costs["macs"] == 4.0


def test_a_cost_that_the_table_does_not_hold_is_refused_with_what_it_needs() -> None:
    table = make_table(make_row("a", {"parameters": 9.0}, [(0.1, {"parameters": 4.0})]), parameters=0.0)
    message = r"multiplier is for macs, which the table does not hold \(it has parameters\). MACs need .* function}\.$"
    with pytest.raises(ValueError, match=message):
        at_multiplier(table, "macs", 0.1)


@FEW
@given(tables(("macs", "latency")), fractions, st.none() | fractions)
def test_the_lagrangian_is_least_at_its_multipliers(table: Candidates, macs: float, latency: float | None) -> None:
    budget = Budget(macs=macs, latency=None if latency is None else f"{100 * latency}%")
    if brute_force(table, budget) is None:
        return
    plan, limits = lagrangian(table, budget), budget.limits(table.dense)
    prices = plan.multipliers
    assert set(prices) == {c for c in limits if table.dense[c] > limits[c] * (1 + ROUNDING)}
    assert all(price >= 0 for price in prices.values())
    assert plan.bound is not None
    gap = 0.0
    for row, entry in zip(table, plan, strict=True):
        sums = {o.choice: row.loss(o) + sum(p * o.costs[c] for c, p in prices.items()) for o in row.options}
        gap += sums[entry.choice] - min(sums[o.choice] for o in allowed(row, budget.costs))
    # The plan loses more than the bound by what its sites are off their least, and by what it leaves of the budget.
    unused = sum(price * (limits[c] - plan.costs[c]) for c, price in prices.items())
    scale = 1 + plan.loss + sum(price * limits[c] for c, price in prices.items())
    assert gap >= -1e-9 * scale
    assert unused >= -1e-9 * scale
    assert gap + unused == pytest.approx(plan.loss - plan.bound, abs=1e-7 * scale)


@FEW
@given(tables(), fractions)
def test_the_multiplier_is_the_smallest_that_meets_the_budget(table: Candidates, fraction: float) -> None:
    budget = Budget(macs=fraction)
    if brute_force(table, budget) is None:
        return
    plan, limit = lagrangian(table, budget), budget.limits(table.dense)["macs"]
    price = plan.multipliers.get("macs", 0.0)
    if price > 1e-6:
        at, below = (at_multiplier(table, "macs", p) for p in (price, price * (1 - 1e-6)))
        assert at.costs["macs"] <= limit * (1 + 1e-9)
        assert plan.loss <= at.loss * (1 + 1e-9)
        assert below.costs["macs"] > limit


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("budget", [Budget(macs=1.0), Budget(macs="100%"), Budget(macs="1k"), Budget(macs=23.0)])
def test_the_whole_budget_leaves_all_dense(selector, budget: Budget) -> None:
    table = make_table(line("a", (5.0, 0.0)), line("b", (5.0, 0.1)), macs=3.0)
    plan = selector(table, budget)
    assert all(e.choice.is_dense for e in plan)
    assert plan.costs == plan.dense_costs == {"macs": 23.0}
    assert plan.loss == 0.0


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_budget_out_of_reach_raises_with_the_lowest_cost(selector) -> None:
    # Site b's only cheap option is not cheaper in latency, so that under both limits it stays dense.
    rows = [
        make_row("a", {"macs": 10.0, "latency": 1.0}, [(0.5, {"macs": 4.0, "latency": 0.5})]),
        make_row("b", {"macs": 10.0, "latency": 1.0}, [(0.5, {"macs": 1.0, "latency": 1.0})]),
    ]
    table = make_table(*rows, macs=2.0, latency=0.5)
    with pytest.raises(InfeasibleBudgetError, match="lowest reachable is 7") as caught:
        selector(table, Budget(macs=6.0))
    error = caught.value
    assert (error.cost, error.budget, error.lowest, error.dense) == ("macs", 6.0, 7.0, 22.0)
    assert selector(table, Budget(macs=7.0)).costs["macs"] == 7.0
    with pytest.raises(InfeasibleBudgetError) as caught:
        selector(table, Budget(macs=10.0, latency=0.99))
    assert (caught.value.cost, caught.value.lowest) == ("macs", 16.0)


@pytest.mark.parametrize("selector", SELECTORS)
def test_limits_that_cannot_be_met_together_raise(selector) -> None:
    costs = [(0.1, {"macs": 2.0, "latency": 8.0}), (0.1, {"macs": 8.0, "latency": 3.0})]
    table = make_table(make_row("a", {"macs": 10.0, "latency": 10.0}, costs), macs=0.0, latency=0.0)
    with pytest.raises(InfeasibleBudgetError, match="not macs and latency together") as caught:
        selector(table, Budget(macs=5.0, latency=5.0))
    assert (caught.value.cost, caught.value.lowest) in {("macs", 8.0), ("latency", 8.0)}


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_plan_is_found_where_a_walk_ends_above_a_limit(selector) -> None:
    # Each site alone prefers its first option; two limits are met only by one of each.
    costs = [(0.1, {"macs": 1.0, "latency": 6.0}), (0.2, {"macs": 7.0, "latency": 1.0})]
    rows = [make_row(name, {"macs": 10.0, "latency": 10.0}, costs) for name in "ab"]
    table = make_table(*rows, macs=0.0, latency=0.0)
    plan = selector(table, Budget(macs=8.0, latency=7.0))
    check(plan, table, Budget(macs=8.0, latency=7.0))
    assert plan.loss == pytest.approx(0.3)


def test_uniform_uses_one_fraction_of_each_sites_own_cost() -> None:
    table = make_table(
        line("large", *((c, 1 - c / 100) for c in range(10, 100, 10)), dense=100.0),
        line("small", *((c / 10, 1 - c / 100) for c in range(10, 100, 10)), dense=10.0),
        line("floored", (8.0, 0.2), (9.0, 0.1)),
        line("hopeless", (10.0, 0.0)),
        macs=0.0,
    )
    plan = uniform(table, Budget(macs=65 + 8.0 + 10))
    shares = {e.site: e.costs["macs"] / e.dense_costs["macs"] for e in plan}
    assert shares == {"large": 0.5, "small": 0.5, "floored": 0.8, "hopeless": 1.0}
    # With one step of the fraction less to save, all sites go up together.
    plan = uniform(table, Budget(macs=66 + 8.0 + 10))
    assert {e.costs["macs"] / e.dense_costs["macs"] for e in plan.entries[:2]} == {0.6}


def test_energy_uses_one_error_threshold() -> None:
    table = make_table(
        line("a", (8.0, 0.1), (5.0, 0.3), (2.0, 0.6), scale=100.0),
        line("b", (7.0, 0.2), (6.0, 0.35), (1.0, 0.3)),
        macs=1.0,
    )
    assert [e.error for e in energy(table, Budget(macs=16.0))] == [0.1, 0.2]
    assert [e.error for e in energy(table, Budget(macs=15.0))] == [0.3, 0.3]
    assert [e.error for e in energy(table, Budget(macs=6.0))] == [0.6, 0.3]


def test_greedy_takes_the_least_loss_for_the_cost_and_lagrangian_spends_the_rest() -> None:
    table = make_table(line("a", (5.0, 0.1), (1.0, 0.9)), line("b", (9.0, 0.05), (2.0, 0.32)), macs=0.0)
    plan = greedy(table, Budget(macs=14.0))
    assert [e.costs["macs"] for e in plan] == [5.0, 2.0]
    assert [e.costs["macs"] for e in lagrangian(table, Budget(macs=14.0))] == [5.0, 9.0]


def test_sensitivity_moves_the_choice() -> None:
    table = make_table(line("a", (5.0, 0.2)), line("b", (5.0, 0.3)), macs=0.0)
    assert exact(table, Budget(macs=15.0))["b"].choice.is_dense
    weighted = table.weighted({"a": (2.0, 1.0)})
    plan = exact(weighted, Budget(macs=15.0))
    assert plan["a"].choice.is_dense
    assert not plan["b"].choice.is_dense


@pytest.mark.parametrize("selector", SELECTORS)
def test_tables_that_make_no_sense_are_refused(selector) -> None:
    for error in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="site 'layer1.conv'.*errors must be finite"):
            selector(make_table(line("layer1.conv", (5.0, error)), macs=0.0), Budget(macs=0.9))
    with pytest.raises(ValueError, match="site 'a'.*negative or not finite"):
        selector(make_table(line("a", (float("nan"), 0.1)), macs=0.0), Budget(macs=0.9))
    with pytest.raises(ValueError, match="site 'a'.*scale and exponent"):
        selector(make_table(line("a", (5.0, 0.1), scale=-1.0), macs=0.0), Budget(macs=0.9))
    with pytest.raises(ValueError, match="site 'a'.*scale and exponent"):
        selector(make_table(line("a", (5.0, 1e-9), exponent=-100.0), macs=0.0), Budget(macs=0.9))
    with pytest.raises(ValueError, match="site 'a'.*'macs'"):
        selector(make_table(make_row("a", {"macs": 9.0}, [(0.1, {})]), macs=0.0), Budget(macs=0.9))
    with pytest.raises(ValueError, match="latency"):
        selector(make_table(line("a", (5.0, 0.1)), macs=0.0), Budget(latency=0.9))
    row = line("a", (5.0, 0.1))
    with pytest.raises(ValueError, match="first option must be the dense one"):
        selector(make_table(dataclasses.replace(row, options=row.options[::-1]), macs=0.0), Budget(macs=0.9))


def test_a_network_without_sites() -> None:
    assert exact(make_table(macs=5.0), Budget(macs=1.0)).entries == ()
    with pytest.raises(InfeasibleBudgetError) as caught:
        exact(make_table(macs=5.0), Budget(macs=0.5))
    assert caught.value.lowest == 5.0


def long_table() -> Candidates:
    """30 sites with decaying spectra, all different, costs in the millions."""
    rows = []
    for i in range(30):
        size, decay = 10**6 * (3 + 7 * i % 11), 0.02 + 0.01 * (i % 7)
        points = [(size * k / 40 + 13 * i, math.exp(-decay * k) - math.exp(-decay * 44)) for k in range(1, 40)]
        rows.append(line(f"site{i}", *points, dense=float(size)))
    return make_table(*rows, macs=1e6)


@pytest.mark.table(every=3)
@pytest.mark.parametrize("fraction", [0.15, 0.3, 0.5, 0.8])
def test_lagrangian_is_close_to_exact_on_longer_tables(fraction: float) -> None:
    table, budget = long_table(), Budget(macs=fraction)
    best, close = exact(table, budget), lagrangian(table, budget)
    assert best.selector == "exact"
    assert best.bound is not None
    assert close.bound is not None
    assert close.bound <= best.bound <= best.loss <= close.loss
    assert best.loss - best.bound <= 2e-6 * best.loss
    assert close.loss <= 1.006 * best.loss
    for selector in (uniform, energy, greedy):
        assert selector(table, budget).loss >= best.loss


def test_more_budget_never_loses_more() -> None:
    table = long_table()
    losses = [exact(table, Budget(macs=fraction)).loss for fraction in (0.2, 0.4, 0.9)]
    assert losses == sorted(losses, reverse=True)


def test_a_solver_that_gives_up_leaves_the_lagrangian_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    table, budget = long_table(), Budget(macs=0.5)
    monkeypatch.setattr(knapsack, "SECONDS", 0.0)
    plan, close = exact(table, budget), lagrangian(table, budget)
    assert plan.selector.startswith("lagrangian (exact: ")
    assert plan.entries == close.entries
    assert plan.bound == close.bound


def test_of_few_sites_the_plan_is_the_best_and_of_many_one_that_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [((6.0, 0.3), (2.0, 0.6)), ((8.0, 0.3), (1.0, 0.8)), ((5.0, 0.2), (3.0, 0.8))]
    table = make_table(*(line(f"site{number}", *each) for number, each in enumerate(points)), macs=0.0)
    budget = Budget.absolute({"macs": 15.0})
    monkeypatch.setattr(knapsack, "WIDE_GAP", 1.0)
    best, close = brute_force(table, budget), lagrangian(table, budget).loss
    assert best is not None
    assert best < 0.95 * close
    assert exact(table, budget).loss == pytest.approx(best)
    monkeypatch.setattr(knapsack, "FEW_SITES", 2)
    assert exact(table, budget).loss == close


def test_select_is_exact_unless_told() -> None:
    table, budget = make_table(line("a", (5.0, 0.1), (1.0, 0.9)), line("b", (9.0, 0.05)), macs=0.0), Budget(macs=0.75)
    assert exact(table, budget) != uniform(table, budget)
    assert select(table, budget) == exact(table, budget)
    assert select(table, budget, selector=uniform) == uniform(table, budget)


def test_importing_the_selectors_does_not_load_scipy() -> None:
    import subprocess
    import sys

    code = "import sys, spectrim.selection.selectors; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_selector_that_gives_no_plan_is_named() -> None:
    def mine(table: Candidates, budget: Budget) -> None: ...

    with pytest.raises(TypeError, match="selector mine gave None: expected a Plan"):
        select(make_table(line("a", (5.0, 0.1)), macs=0.0), Budget(macs=0.5), mine)  # type: ignore[arg-type]
