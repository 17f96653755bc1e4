"""Claims of the learned-ranks task, from rows made by hand: what is missing is never counted as met."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import learned_ranks, run


def row(arm: str, macs: float, accuracy: float, seed: int = 0) -> dict[str, Any]:
    return {"arm": arm, "macs": macs, "accuracy": accuracy, "seed": seed}


def asked(**more: Any) -> dict[str, Any]:
    return {"arms": ["learned"], "points": [{"macs": 20e6, "at_least": 90.0}, {"macs": 10e6, "at_least": 80.0}], **more}


def test_a_level_is_met_if_every_budget_is():
    rows = [row("learned", 19.9e6, 91.0), row("learned", 19.8e6, 90.0, 1), row("learned", 9.9e6, 80.0)]
    found = learned_ranks._claim(asked(), rows)
    assert (found["value"], found["met"]) == (0.0, True)
    assert found["note"] == "20 MMAC: 90.50 %; 10 MMAC: 80.00 %"


@pytest.mark.parametrize("missing", [20.1e6, 15e6])
def test_a_budget_that_was_not_run_or_not_met_leaves_the_claim_open(missing: float):
    found = learned_ranks._claim(asked(), [row("learned", missing, 99.0), row("learned", 9.9e6, 99.0)])
    assert found["met"] is False
    assert "20 MMAC: not run" in found["note"]


def test_a_gain_is_the_difference_of_means_and_takes_seeds():
    rows = [row("learned", 20e6, 90.0), row("learned", 10e6, 81.0), row("plan", 20e6, 90.5), row("plan", 10e6, 80.0)]
    found = learned_ranks._claim(asked(against="plan"), rows)
    assert (found["value"], found["met"]) == (-0.5, False)
    assert learned_ranks._claim(asked(against="plan"), rows + rows)["met"] is True
    assert "20 MMAC: 90.00 against 90.50 % (-0.50, n = 1)" in found["note"]


def test_rows_of_another_result_keep_its_figures():
    arm = {"name": "plan", "result": "resnet20_finetune", "where": {"method": "spectrim"}}
    held = json.loads((run.HERE / "results" / "resnet20_finetune.json").read_text())["rows"]
    found = learned_ranks._rows_of(arm)
    assert [r["accuracy"] for r in found] == [r["accuracy"] for r in held if r["method"] == "spectrim"]
    assert {r["arm"] for r in found} == {"plan"}
