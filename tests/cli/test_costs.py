"""Costs of a user's own, and budgets over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectrim import macs, parameters
from spectrim.selection.plan import Plan

DATA = ("--data", "nets:batches")
JOULES = ("--cost", "joules=own:joules")
LEARN = ("--train", "nets:batches", "--test", "nets:batches", "--epochs", "0")


def test_a_budget_limits_a_cost_of_ones_own(run):
    found = run.json("compress", "nets:tiny", *DATA, *JOULES, "-b", "joules=50%", "--out", "small")
    dense = found["dense_costs"]
    assert dense["joules"] == pytest.approx(2 * dense["macs"] + dense["parameters"])
    assert found["costs"]["joules"] <= found["budget"]["joules"] == 0.5 * dense["joules"]
    assert Plan.read("small/plan.json").costs["joules"] == found["costs"]["joules"]
    assert "joules" in Path("small/report.html").read_text(encoding="utf-8")
    bare = run.json("compress", "nets:tiny", "--input", "1x8x8", *JOULES, "-b", "joules=60%", "--no-report")
    assert bare["costs"]["joules"] <= 0.6 * dense["joules"]


def test_profile_lists_it(run):
    found = run.json("profile", "nets:tiny", *DATA, *JOULES)
    assert {"macs", "parameters", "joules"} <= found["costs"].keys()
    for layer in found["layers"]:
        assert layer["costs"]["joules"] == 2 * layer["costs"]["macs"] + layer["costs"]["parameters"]
    assert "joules" in run("profile", "nets:tiny", *DATA, *JOULES).stdout
    assert macs([]) == parameters([]) == 0


@pytest.mark.slow
def test_ranks_are_learned_within_it_and_another_one_is_another_run(run):
    learned = ("--method", "learned-ranks:rank_epochs=0,c_steps=2", *LEARN, "--checkpoint", "state", "--no-report")
    found = run.json("compress", "nets:tiny", *learned, *JOULES, "-b", "joules=60%")
    assert found["costs"]["joules"] <= 0.6 * found["dense_costs"]["joules"]
    # A run of before there were such costs has no word of them.
    record = json.loads(Path("state/run.json").read_text())
    assert record["costs"] == ["joules=own:joules"]
    text = run("path", "nets:tiny", *LEARN, "--rank-epochs", "0", *JOULES, "-b", "joules=60%").stdout
    assert "joules" in text


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ("joules", "--cost 'joules': write NAME=package.module:function"),
        ("joules=bare.py:joules", "cost 'bare.py:joules': joules() is called with 1 argument, and takes 0"),
        ("joules=", "--cost 'joules=': write NAME=package.module:function"),
        ("joules=own", "write NAME=package.module:function, as joules=energy:joules"),
        ("macs=own:joules", "there is a cost 'macs' already"),
        ("joules=own:gone", "'own' has no attribute 'gone'"),
        ("joules=own:NUMBER", "'NUMBER' is a int, not callable"),
        ("joules=nowhere:joules", "cannot import 'nowhere'"),
    ],
)
def test_what_cannot_be_a_cost_is_quoted(run, cost: str, message: str):
    Path("bare.py").write_text("def joules(): return 1.0")
    assert message in run("compress", "nets:tiny", *DATA, "-b", "macs=50%", "--cost", cost, code=2).stderr


def test_a_budget_over_an_unknown_cost_says_how_to_count_it(run):
    error = run("compress", "nets:tiny", *DATA, "-b", "joules=50%", code=2).stderr
    assert "--budget limits 'joules', which is not counted" in error
    assert "give --cost joules=package.module:function" in error
