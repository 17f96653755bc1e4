"""Budgets: limits on any cost, as numbers and as text."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import InfeasibleBudgetError
from spectrim.network.choices import DENSE, LowRankChoice
from spectrim.selection.budget import Budget, Limit
from spectrim.selection.candidates import Candidates, Option, Row
from spectrim.selection.selectors import select


@pytest.mark.parametrize(
    ("cost", "value", "dense", "limit"),
    [
        ("macs", 0.5, 1e9, 5e8),
        ("macs", 1, 1e9, 1e9),
        ("macs", 1.0, 1e9, 1e9),
        ("macs", 2, 1e9, 2.0),
        ("macs", "0.5", 1e9, 5e8),
        ("macs", "50%", 1e9, 5e8),
        ("macs", " 12.5 % ", 1e9, 1.25e8),
        ("macs", "100%", 1e9, 1e9),
        ("macs", "2.5M", 1e9, 2.5e6),
        ("macs", "2.5 GMAC", 1e12, 2.5e9),
        ("macs", "1e6", 1e9, 1e6),
        ("macs", ".25", 1e9, 2.5e8),
        ("parameters", "1.5k", 1e6, 1500.0),
        ("parameters", "7B", 1e12, 7e9),
        ("bytes", "10MiB", 1e9, 10 * 2**20),
        ("bytes", "10mb", 1e9, 1e7),
        ("bytes", "100B", 1e9, 100.0),
        ("bytes", "0.5B", 1e9, 0.5),
        ("latency", "3ms", 10.0, 3.0),
        ("latency", "500us", 10.0, 0.5),
        ("latency", "2s", 1e4, 2000.0),
        ("latency", 0.4, 10.0, 4.0),
        ("latency", 4.0, 10.0, 4.0),
    ],
)
def test_budgets(cost: str, value: float | str, dense: float, limit: float) -> None:
    budget = Budget(**{cost: value})  # type: ignore[arg-type]
    assert budget.costs == (cost,)
    assert budget.limits({cost: dense, "other": 1.0}) == {cost: pytest.approx(limit)}
    assert Budget.parse(f"{cost}={value}").limits({cost: dense}) == budget.limits({cost: dense})


@pytest.mark.parametrize(
    "value", [0, 0.0, -1, -0.5, float("nan"), float("inf"), "0", "0%", "-1", "-5%", "half", "", "%", "150%"]
)
@pytest.mark.parametrize("cost", ["parameters", "macs", "bytes", "latency"])
def test_budgets_that_make_no_sense(cost: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=cost):
        Budget(**{cost: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cost", "value"),
    [
        ("macs", "3ms"),
        ("latency", "3M"),
        ("bytes", "3k"),
        ("macs", "1,5M"),
        ("macs", "1e999"),
        ("macs", "٣M"),
        ("macs", "1 2"),
    ],
)
def test_budgets_in_the_wrong_unit(cost: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{cost} budget"):
        Budget(**{cost: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_a_share_above_one_is_no_count(cost: str) -> None:
    with pytest.raises(ValueError, match="only numbers up to 1 are shares"):
        Budget(**{cost: 1.5})  # type: ignore[arg-type]
    assert Budget(latency=1.5).limits({"latency": 3.0}) == {"latency": 1.5}


@pytest.mark.parametrize("text", ["macs", "macs=", "=3", "macs:50%", "macs==50%", ""])
def test_budget_texts_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        Budget.parse(text)


def test_several_limits_and_none() -> None:
    budget = Budget.parse("latency=3ms", "macs=50%")
    assert budget == Budget(macs="50%", latency="3ms")
    assert budget.limits({"macs": 100.0, "latency": 9.0}) == {"macs": 50.0, "latency": 3.0}
    with pytest.raises(ValueError, match="at least one"):
        Budget()
    with pytest.raises(ValueError, match="at least one"):
        Budget.parse()
    with pytest.raises(ValueError, match="macs twice"):
        Budget.parse("macs=50%", "macs=60%")
    with pytest.raises(ValueError, match="latency, which the table does not hold"):
        budget.limits({"macs": 100.0})


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.text(max_size=12) | st.from_regex(r"[0-9.eE+-]{0,8} ?[a-zA-Z%]{0,4}", fullmatch=True))
def test_any_text_is_a_budget_or_a_value_error(text: str) -> None:
    try:
        limit = Budget(macs=text).limits({"macs": 1e9})["macs"]
    except ValueError:
        return
    assert 0 < limit < float("inf")


@pytest.mark.parametrize(
    ("value", "limit"), [(0.5, 5e8), (3, 3.0), ("50%", 5e8), ("3k", 3e3), ("2 M", 2e6), ("1G", 1e9), ("0.5T", 5e11)]
)
def test_a_cost_of_the_users_own_takes_numbers_suffixes_and_shares(value: float | str, limit: float) -> None:
    assert Budget(joules=value).limits({"macs": 1.0, "joules": 1e9}) == {"joules": pytest.approx(limit)}
    assert Budget.parse(f"joules={value}") == Budget(joules=value)


@pytest.mark.parametrize("value", ["3ms", "3kB", "3 MAC", "", "half", 0, -1.0, math.nan])
def test_a_cost_of_the_users_own_has_no_unit(value: float | str) -> None:
    with pytest.raises(ValueError, match="joules budget"):
        Budget(joules=value)


def test_limits_are_attributes_of_the_costs_that_everybody_has() -> None:
    budget = Budget(macs="50%", joules="3k")
    assert (budget.macs, budget.parameters, budget.bytes, budget.latency) == ("50%", None, None, None)
    assert budget.costs == ("macs", "joules")
    assert Budget(joules=0.5).macs is None


def test_budgets_are_equal_if_their_limits_are() -> None:
    budget = Budget(macs=0.5, joules="3k", grams=2)
    same = Budget(grams="2e-3k", joules=3000, macs="50%")
    assert budget == same
    assert hash(budget) == hash(same)
    assert budget.costs == same.costs
    assert budget != Budget(macs=0.5, joules="3k")
    assert budget != Budget(macs=0.5, joules=0.3, grams=2)
    assert Budget(macs=1) != Budget.absolute({"macs": 1})
    assert budget != "macs=50%"
    assert pickle.loads(pickle.dumps(budget)) == copy.deepcopy(budget) == budget


@pytest.mark.parametrize(
    "budget",
    [Budget(macs="50%", joules=3), Budget(**{"J per image": 0.5, "macs": 2}), Budget.absolute({"latency": 0.1})],
)
def test_a_budget_reads_as_what_makes_it(budget: Budget) -> None:
    assert eval(repr(budget), {"Budget": Budget, "Limit": Limit}) == budget


def test_a_budget_does_not_change_and_others_are_made_of_it() -> None:
    budget = Budget(macs=0.5, joules=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.macs = 0.4  # type: ignore[misc]
    with pytest.raises((TypeError, ValueError), match="macs"):  # it would lose the other limit
        dataclasses.replace(budget, macs=0.4)
    assert budget.replace(joules=0.4) == Budget(macs=0.5, joules=0.4)
    assert budget.replace(joules=None, latency=2) == Budget(macs=0.5, latency=2)
    with pytest.raises(ValueError, match="at least one"):
        Budget(macs=0.5).replace(macs=None)


def test_a_budget_is_kept_as_it_was_stated() -> None:
    kept = Budget(macs="50%", joules=Limit(0.5)).record()
    assert kept == {
        "parameters": None,
        "macs": "50%",
        "bytes": None,
        "latency": None,
        "joules": {"number": 0.5, "relative": False},
    }


@pytest.mark.parametrize("number", [1e-9, 0.1 + 0.2, 1.0, 123456.789, 1e15 / 3])
def test_absolute_limits_stay_the_numbers_they_are(number: float) -> None:
    costs = {"parameters": number, "latency": number, "joules": number}
    assert Budget.absolute(costs).limits(dict.fromkeys(costs, 7.0)) == costs
    assert Budget(macs=0.5).replace(latency=Limit(number)).limits({"macs": 4.0, "latency": 9.0})["latency"] == number


@pytest.mark.parametrize("number", [0, -1.0, math.inf, math.nan])
def test_absolute_limits_that_make_no_sense(number: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        Budget.absolute({"macs": number})


@pytest.mark.parametrize(
    "value",
    [
        Budget(macs="50%", latency="3ms"),
        "macs=50%,latency=3ms",
        "macs=50% latency=3 ms",
        " latency = 3ms, macs = 50% ",
        {"macs": 0.5, "latency": 3},
    ],
)
def test_what_is_taken_for_a_budget(value: Budget | str | dict) -> None:
    assert Budget.of(value) == Budget(macs=0.5, latency=3)


@pytest.mark.parametrize("value", [0.5, 3, None, ["macs=50%"], (Budget(macs=0.5),), True])
def test_what_is_not_taken_for_a_budget(value: object) -> None:
    with pytest.raises(TypeError, match="the budget is .*: expected Budget"):
        Budget.of(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("amount", [[0.5], True, object(), {"macs": 1}])
def test_limits_that_are_no_numbers(amount: object) -> None:
    with pytest.raises(TypeError, match="macs budget is"):
        Budget(macs=amount)  # type: ignore[arg-type]


def in_joules() -> Candidates:
    """Two sites; what saves MACs at one of them costs energy."""

    def row(name: str, *options: tuple[float, float, float]) -> Row:
        choices = [DENSE, *(LowRankChoice("channel", n, method="svd") for n in range(1, len(options)))]
        costs = [{"macs": macs, "joules": joules} for _, macs, joules in options]
        return Row(name, "linear", tuple(map(Option, choices, [error for error, _, _ in options], costs)))

    a = row("a", (0.0, 10.0, 4.0), (0.1, 5.0, 3.0), (0.5, 2.0, 1.0))
    b = row("b", (0.0, 10.0, 4.0), (0.01, 4.0, 3.9), (0.4, 3.0, 0.5))
    return Candidates((a, b), {"macs": 0.0, "joules": 1.0}, "weight energy")


def test_a_cost_of_the_users_own_is_limited_alone_and_together() -> None:
    table = in_joules()
    assert select(table, "macs=75%").costs == {"macs": 14.0, "joules": 8.9}
    alone = select(table, {"joules": 8.0})
    assert alone.costs["joules"] <= 8 == alone.budget["joules"]
    assert [entry.error for entry in alone] == [0.1, 0.0]
    together = select(table, Budget(joules="60%", macs="75%"))
    assert together.costs["joules"] <= 0.6 * 9
    assert together.costs["macs"] <= 0.75 * 20
    assert [entry.error for entry in together] == [0.1, 0.4]


def test_what_cannot_be_met_or_is_not_there_is_named() -> None:
    with pytest.raises(InfeasibleBudgetError, match="budget joules <= 2 cannot be met") as caught:
        select(in_joules(), Budget(joules=2))
    assert (caught.value.cost, caught.value.lowest) == ("joules", 2.5)
    with pytest.raises(ValueError, match=r"limits grams, which the table does not hold \(it has macs, joules\)"):
        select(in_joules(), Budget(grams=0.5, macs=0.5))
    with pytest.raises(ValueError, match=r"limits grams, .* \(it has macs\)"):
        Budget(grams=0.5).check(["macs"])


def test_a_number_without_its_cost_limits_nothing():
    with pytest.raises(TypeError, match=r"Say what is limited, as Budget\(macs=0\.5\)"):
        Budget(0.5)  # type: ignore[misc]


def test_a_few_bytes_are_asked_about():
    with pytest.raises(ValueError, match="bytes=5%, for millions bytes=5MB, and for so few indeed bytes=0.005kB"):
        Budget.of("bytes=5")
    assert Budget.of("bytes=5MB") == Budget(bytes=5_000_000)
    assert Budget(bytes=5).limits({"bytes": 9.0}) == {"bytes": 5}


@pytest.mark.parametrize("text", ["macs=70%,50%,30%", "bytes=1,200,000"])
def test_several_numbers_in_one_budget_are_told_of_sweeps(text: str) -> None:
    cost = text.split("=")[0]
    with pytest.raises(ValueError, match=rf"sweep, with \('{cost}', \[0.7, 0.5\]\) or --points 0.7,0.5"):
        Budget.parse(text)


@pytest.mark.parametrize(("cost", "one"), [("macs", "1M"), ("parameters", "1M"), ("bytes", "1MB"), ("latency", "1ms")])
def test_one_without_a_sign_is_asked_about_and_the_cures_are_taken(cost: str, one: str) -> None:
    with pytest.raises(ValueError, match=rf"'1' may mean all or a hundredth .*: write {cost}=100%, .*{cost}={one}"):
        Budget.of(f"{cost}=1")
    assert Budget.of(f"{cost}=100%") == Budget(**{cost: 1})
    assert Budget.of(f"{cost}={one}").limits({cost: 9e9})[cost] == (1 if cost == "latency" else 1e6)


def test_few_multiply_accumulates_can_be_written_as_the_sentence_says() -> None:
    with pytest.raises(ValueError, match=r"so few indeed macs=0.05k$"):
        Budget.of("macs=50")
    assert Budget.of("macs=0.05k").limits({"macs": 1e6}) == {"macs": 50}
