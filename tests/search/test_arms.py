"""Sets of methods compete: the best finished network is taken, and it is never worse than any single one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.errors import PlanError
from spectrim.methods import ActivationSVD, LowRankPlusSparse, PrincipalFilters, WeightSVD
from spectrim.search.arms import Arm, best, usual

ARMS = [Arm("a"), Arm("b"), Arm("c")]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)).eval()


BATCHES = list(torch.randn(128, 12, generator=torch.Generator().manual_seed(0)).split(64))


def test_the_least_loss_wins_and_all_are_told() -> None:
    losses = {"a": 0.3, "b": 0.1, "c": 0.2}
    winner, tried = best(ARMS, lambda arm: arm.name, losses.__getitem__)
    assert winner == "b"
    assert {each.name: each.loss for each in tried} == losses


def test_a_refused_arm_is_a_note() -> None:
    def made(arm: Arm) -> str:
        if arm.name == "a":
            raise PlanError("it has no layer")
        return arm.name

    winner, tried = best(ARMS, made, {"b": 0.3, "c": 0.2}.__getitem__)
    assert winner == "c"
    assert tried[0].loss == math.inf
    assert str(tried[0]) == "a: refused, it has no layer"
    with pytest.raises(PlanError, match="no layer"):
        best(ARMS[:1], made, lambda name: 0.0)


def test_after_the_seconds_no_arm_is_begun() -> None:
    winner, tried = best(ARMS, lambda arm: arm.name, lambda name: 1.0 if name == "a" else 0.0, seconds=0)
    assert winner == "a"
    assert [each.note for each in tried] == ["", "not tried, as 0 s were over", "not tried, as 0 s were over"]


def test_auto_shares_factors_where_parameters_are_limited() -> None:
    result = st.compress(network(), BATCHES, "parameters=50%", methods="auto", sensitivity=False, seconds=0)
    first, *others = result.report.arms
    assert first.name == "low rank, shared factors"
    assert first.loss < math.inf
    assert all("not tried" in arm.note for arm in others)


def test_auto_is_the_best_of_its_arms() -> None:
    model, budget = network(), "macs=50%"
    result = st.compress(model, BATCHES, budget, methods="auto", sensitivity=False)
    arms, agreement = result.report.arms, result.report.agreement
    assert [arm.name for arm in arms] == [arm.name for arm in usual(["macs"])]
    assert agreement is not None
    assert agreement.divergence == min(arm.loss for arm in arms) < math.inf
    assert "methods that competed" in str(result.report)
    assert result.plan.costs["macs"] <= 0.5 * result.plan.dense_costs["macs"]
    # An arm does what it does alone.
    alone = [PrincipalFilters(), ActivationSVD(), WeightSVD()]
    single = st.compress(model, BATCHES, budget, methods=alone, sensitivity=False).report.agreement
    assert single is not None
    filters = next(arm for arm in arms if arm.name == "filters, then low rank")
    assert single.divergence == pytest.approx(filters.loss, rel=1e-6)


def test_the_arms_are_judged_by_the_metric_where_there_is_one() -> None:
    model = network()

    def few_layers(small: nn.Module) -> float:
        return -float(len(list(small.modules())))

    result = st.compress(model, BATCHES, "macs=50%", methods="auto", evaluate=few_layers, sensitivity=False)
    verdict = result.report.verdict
    assert verdict is not None
    assert verdict.drop == min(arm.loss for arm in result.report.arms)


def test_what_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match=r"methods='auto' lets sets of methods compete"):
        st.compress(network(), BATCHES, methods="auto", min_agreement=0.9)
    with pytest.raises(ValueError, match="seconds is -1"):
        st.compress(network(), BATCHES, "macs=50%", methods="auto", seconds=-1)
    assert any(isinstance(method, LowRankPlusSparse) for method in usual(["bytes"])[1].methods or ())


def test_chains_compete_where_layers_have_kernels_and_time_that_was_not_measured_is_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
    ).eval()
    x = torch.randn(32, 3, 6, 6)
    assert "low rank, chains" not in [arm.name for arm in usual(["macs"], [layer.spec for layer in st.find(network())])]
    arms = usual(["macs"], [layer.spec for layer in st.find(model)])
    assert [arm.name for arm in arms][:2] == ["low rank", "low rank, chains"]
    result = st.compress(model, [x], "macs=40%", methods=st.ActivationCP(evaluations=5))
    assert any("became chains of three or more thin layers" in note for note in result.report.notes)
