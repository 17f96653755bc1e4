"""A tolerance in place of a budget: the smallest network that loses no more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.errors import CalibrationError, InfeasibleBudgetError, ToleranceError
from spectrim.search.judge import Judge, Verdict
from spectrim.search.tolerance import Tolerance, smaller, smallest
from spectrim.selection.budget import Budget

DENSE = {"macs": 1000.0}
generator = torch.Generator().manual_seed(0)
INPUTS = torch.randn(192, 12, generator=generator)


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)).eval()


MODEL = classifier()
BATCHES = [INPUTS[:64], INPUTS[64:128]]
LABELS = MODEL(INPUTS[128:]).argmax(-1)


def accuracy(model: nn.Module) -> float:
    return 100 * float((model(INPUTS[128:]).argmax(-1) == LABELS).double().mean())


def compress(**options: Any) -> st.Result:
    return st.compress(MODEL, BATCHES, methods=st.ActivationSVD(), sensitivity=False, reconstruct=False, **options)


@pytest.mark.parametrize("needed", [0.03, 0.2, 0.5, 0.93])
def test_the_search_is_within_ten_percent_of_the_smallest(needed: float) -> None:
    made: list[float] = []

    def limit(budget: Budget) -> float:
        made.append(budget.limits(DENSE)["macs"])
        if made[-1] < 20:
            raise InfeasibleBudgetError("macs", made[-1], 20, 1000)
        return made[-1]

    found = smallest({"macs": 10.0}, DENSE, limit, lambda macs: macs >= 1000 * needed)
    assert found is not None
    assert 1000 * needed <= found <= 1100 * needed
    assert len(made) <= 10


def test_the_smallest_that_held_is_returned_where_losses_are_not_monotone() -> None:
    tried: list[float] = []

    def limit(budget: Budget) -> float:
        tried.append(budget.limits(DENSE)["macs"])
        return tried[-1]

    def holds(macs: float) -> bool:
        return macs > 300 or 100 < macs < 120

    found = smallest({"macs": 10.0}, DENSE, limit, holds)
    assert found == min(filter(holds, tried))


@pytest.mark.parametrize("holds", [lambda macs: macs > 370 or 264 < macs < 312, lambda macs: macs > 50 or macs < 46])
def test_what_holds_a_little_below_what_does_not_is_found(holds: Callable[[float], bool]) -> None:
    best = min(macs for macs in (1.01**n for n in range(231, 700)) if holds(macs))
    found = smallest({"macs": 10.0}, DENSE, lambda budget: budget.limits(DENSE)["macs"], holds)
    assert found is not None
    assert holds(found)
    assert found <= 1.1 * best


@pytest.mark.parametrize("needed", [0.05, 0.3, 0.57, 0.7])
def test_another_set_is_asked_for_less_than_was_reached_only(needed: float) -> None:
    tried: list[float] = []

    def limit(budget: Budget) -> float:
        tried.append(budget.limits(DENSE)["macs"])
        return tried[-1]

    found = smaller({"macs": 10.0}, {"macs": 600.0}, limit, lambda macs: macs >= 1000 * needed)
    assert max(tried) < 600
    if needed == 0.7:
        assert (found, len(tried)) == (None, 1)
    else:
        assert found is not None
        assert 1000 * needed <= found <= 1100 * needed


def test_nothing_that_holds_is_none() -> None:
    told: list[tuple[int, int | None]] = []
    found = smallest(
        {"macs": 10.0}, DENSE, lambda budget: budget, lambda budget: False, progress=lambda _, *at: told.append(at)
    )
    assert found is None
    assert told[0] == (0, 10)
    assert told[-1] == (8, 8)


def test_a_drop_is_met_and_told() -> None:
    result = compress(max_drop=10.0, evaluate=accuracy)
    verdict = result.report.verdict
    assert verdict is not None
    assert verdict.dense == 100
    assert accuracy(result.model) == verdict.metric
    assert accuracy(result.model) >= 90
    assert result.plan.costs["macs"] < result.plan.dense_costs["macs"]
    assert "the tolerance is met" in str(result.report)


def test_a_metric_that_falls_as_it_gets_better() -> None:
    result = compress(max_drop=10.0, evaluate=lambda model: 100 - accuracy(model), better="lower")
    assert accuracy(result.model) >= 90
    assert result.plan.changed


def test_a_drop_of_all_that_the_dense_network_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a drop of 1 is allowed .* evaluate gives 1 for the dense network"):
        compress(max_drop=1, evaluate=lambda model: accuracy(model) / 100)
    compress(max_drop=1, evaluate=lambda model: -1 + accuracy(model) / 100, budget="macs=90%")


def test_agreement_needs_no_labels() -> None:
    result = compress(min_agreement=0.9)
    agreement = result.report.agreement
    assert agreement is not None
    assert agreement.top1 is not None
    assert agreement.top1 >= 0.9
    assert "where 90.00% is asked for" in str(result.report)


def test_the_dense_network_where_nothing_holds() -> None:
    dense = MODEL(INPUTS)
    result = compress(max_drop=0, evaluate=lambda model: -float((model(INPUTS) - dense).square().sum()))
    assert not result.plan.changed
    assert any("this is the dense network" in note for note in result.report.notes)
    torch.testing.assert_close(result.model(INPUTS), dense)


def test_where_nothing_holds_no_layer_pays_for_the_text_in_a_file() -> None:
    def unlike(model: nn.Module) -> float:
        return float((model(INPUTS) - MODEL(INPUTS)).square().sum())

    result = compress(max_drop=0, evaluate=unlike, better="lower", cost="bytes")
    assert not result.plan.changed
    assert result.report.verdict is not None
    assert result.report.verdict.drop == 0
    assert result.plan.budget == {"bytes": result.plan.dense_costs["bytes"]} == result.report.plan.budget
    assert st.Plan.from_json(result.plan.to_json()) == result.plan


@pytest.mark.slow
def test_a_budget_beyond_the_tolerance_says_which_budget_holds() -> None:
    with pytest.raises(ToleranceError, match=r"NOT met.*macs=\d+.*% holds it") as caught:
        compress(budget="macs=25%", max_drop=10.0, evaluate=accuracy)
    assert accuracy(caught.value.result.model) >= 90
    verdict = compress(budget="macs=95%", max_drop=50.0, evaluate=accuracy).report.verdict
    assert verdict is not None
    assert verdict.drop is not None
    assert verdict.drop <= 50


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, TypeError, "how small is not said"),
        ({"max_drop": 0.5}, ValueError, r"max_drop=0\.5 is a drop of a metric.*evaluate="),
        ({"max_drop": 0.5, "min_agreement": 0.9, "evaluate": accuracy}, ValueError, "are both given"),
        ({"max_drop": -1, "evaluate": accuracy}, ValueError, "max_drop is -1"),
        ({"max_drop": "1%", "evaluate": accuracy}, TypeError, "max_drop is '1%'"),
        ({"min_agreement": 99}, ValueError, "min_agreement is 99"),
        ({"max_drop": 1, "evaluate": 3}, TypeError, "evaluate is 3"),
        ({"max_drop": 1, "evaluate": accuracy, "better": "more"}, ValueError, "better is 'more'"),
        ({"max_drop": 1, "evaluate": lambda model: math.nan}, CalibrationError, "returned nan for the dense network"),
        ({"max_drop": 1, "evaluate": lambda model: "good"}, TypeError, "returned 'good' for the dense network"),
        ({"max_drop": 1, "evaluate": accuracy, "cost": "joules"}, ValueError, "joules"),
    ],
)
def test_what_cannot_be_meant(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        compress(**options)


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_metric_that_is_infinite_on_its_bad_side_holds_nothing_and_ends_nothing(better: Any) -> None:
    bad = math.inf if better == "lower" else -math.inf
    dense = MODEL(INPUTS)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        lost = float((model(INPUTS) - dense).square().mean())
        return (lost if better == "lower" else -lost) if lost < 0.002 else bad

    result = compress(max_drop=0.05, evaluate=evaluate, better=better)
    assert result.plan.changed
    assert evaluate(result.model) != bad
    with pytest.raises(ToleranceError, match="a drop of inf where 0.05 is allowed"):
        compress(budget="macs=15%", max_drop=0.05, evaluate=evaluate, better=better)
    with pytest.raises(CalibrationError, match=f"returned {-bad} for a compressed network"):
        compress(max_drop=0.05, evaluate=lambda model: 0.0 if model is MODEL else -bad, better=better)


def test_outputs_that_cannot_be_compared_are_told() -> None:
    with pytest.raises(CalibrationError, match="cannot be measured"):
        Tolerance(min_agreement=0.9).holds(Verdict())
    assert Verdict().loss == math.inf


def test_a_judge_without_a_metric_takes_the_divergence_of_classes() -> None:
    assert compress(budget="macs=60%").report.verdict is None
    agreed = compress(budget="macs=60%").report.agreement
    assert agreed is not None
    assert agreed.divergence is not None
    assert Judge().verdict(MODEL, agreed).loss == agreed.divergence > 0


@pytest.mark.slow
def test_a_metric_that_is_turned_round_is_told_of() -> None:
    def mistakes(model: nn.Module) -> float:
        return 100 - accuracy(model)

    turned = compress(max_drop=10.0, evaluate=mistakes)
    assert turned.report.verdict is not None
    assert turned.report.verdict.agreed is not None
    assert turned.report.verdict.agreed < 0.75
    assert any("give better='lower'" in note for note in turned.report.notes)
    assert not any(
        "better=" in note for note in compress(max_drop=10.0, evaluate=mistakes, better="lower").report.notes
    )


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        (lambda model: accuracy(MODEL), "does evaluate run the model it is given"),
        (lambda model: 1 - accuracy(model) / 100, "within 1 of the dense network's 0, though outputs agree in"),
    ],
)
def test_a_metric_that_tells_nothing_is_told_of(evaluate: Callable[[nn.Module], float], said: str) -> None:
    assert any(said in note for note in compress(max_drop=1.0, evaluate=evaluate, better="lower").report.notes)
    same = compress(budget="macs=95%", max_drop=1.0, evaluate=evaluate, better="lower")
    assert not any("outputs agree in" in note for note in same.report.notes)
