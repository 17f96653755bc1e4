"""``spectrim compress`` with a tolerance in place of a budget."""

from __future__ import annotations

import pytest
from torch import nn

from spectrim.cli.common import exit_code
from spectrim.cli.results import _warnings
from spectrim.errors import InfeasibleBudgetError, ToleranceError
from spectrim.network.choices import LowRankChoice
from spectrim.nn.standing import StandIn
from spectrim.report import Comparison, Measure
from spectrim.selection.plan import Entry, Plan

COMPRESS = ("compress", "nets:tiny", "--only", "wide")
DATA = ("--data", "nets:batches")
TEST = ("--test", "nets:batches")
ALONE = ("--method", "activation-svd", "--no-report")


def test_a_drop_in_place_of_a_budget(run) -> None:
    found = run.json(*COMPRESS, *DATA, *TEST, *ALONE, "--max-drop", "9", "--out", "small")
    assert found["costs"]["macs"] < found["dense_costs"]["macs"]
    said = " ".join(found["notes"])
    assert "the tolerance is met: accuracy on --test is" in said
    assert "the smallest was taken that held on these samples" in said
    assert "the tolerance is met" in run(*COMPRESS, *DATA, *ALONE, "--min-agreement", "0.6", "--out", "other").output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((*DATA, "--max-drop", "1"), "measured on --test"),
        ((*DATA, *TEST, "--max-drop", "-1"), "--max-drop -1"),
        ((*DATA, *TEST, "--max-drop", "20"), "a drop of 20 is allowed"),
        ((*DATA, "--min-agreement", "99"), "--min-agreement 99"),
        ((*DATA, *TEST, "--max-drop", "1", "--min-agreement", "0.9"), "give one of them"),
        (("--input", "1x8x8", "--min-agreement", "0.9"), "give --data"),
        ((*DATA, "--min-agreement", "0.9", "--plan", "plan.json"), "or --plan"),
        (DATA, "give one of --budget (as macs=50%), --max-drop, --min-agreement or --plan FILE"),
    ],
)
def test_what_does_not_go_together(run, options: tuple[str, ...], said: str) -> None:
    assert said in " ".join(run(*COMPRESS, *options, code=2).output.split())


@pytest.mark.parametrize("timed", [True, False])
def test_a_limit_of_time_that_is_missed_is_told_once(timed: bool) -> None:
    changed = Entry(
        "wide",
        "",
        LowRankChoice(method="weight-svd", unfolding="channel", rank=1),
        0.1,
        {"latency": 3.0},
        {"latency": 4.0},
    )
    plan = Plan((changed,), {"latency": 3.0}, {"latency": 4.0}, budget={"latency": 1.0})
    found = Comparison((Measure("latency p50", "ms", 4.0, 5.0),))
    assert len(_warnings(found, plan, timed=timed)) == (0 if timed else 2)


def test_a_budget_beyond_the_tolerance_ends_as_one_that_cannot_be_met() -> None:
    assert exit_code(ToleranceError("macs=60% holds it")) == exit_code(InfeasibleBudgetError("macs", 1, 2, 3)) == 3


@pytest.mark.slow
def test_a_tolerance_that_only_the_dense_network_holds_tells_of_no_budget(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def accuracy(model: nn.Module, batches: object) -> float:
        return 0.0 if any(isinstance(module, StandIn) for module in model.modules()) else 100.0

    monkeypatch.setattr("spectrim.cli.subject.accuracy", accuracy)
    found = run.json(*COMPRESS, *DATA, *TEST, "--max-drop", "1", "--out", "small")
    assert found["costs"] == found["dense_costs"]
    said = " ".join(found["notes"])
    assert "no smaller network that was tried holds the tolerance: this is the dense network" in said
    assert "limits nothing" not in said
    assert "not faster" not in said
