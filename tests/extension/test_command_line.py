"""A method and a cost of a user's own on the command line, as their package names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import spectrim as st
from spectrim.cli.app import app
from tests.extension import kit
from tests.extension.kit import Tucker2, Tucker2Choice

KIT = "tests.extension.kit"
CALL = (f"{KIT}:network", "--input", "3x12x12", "--cost", f"joules={KIT}:joules")


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_compress_meets_a_budget_in_joules_with_tucker2_and_evaluate_reads_the_network() -> None:
    method = ("--method", f"{KIT}:Tucker2:shares=0.25+0.5")
    document = json.loads(run("compress", *CALL, *method, "--budget", "joules=50%", "--out", "small", "--json"))
    assert document["costs"]["joules"] <= 0.5 * document["dense_costs"]["joules"]
    plan = st.Plan.read("small/plan.json")
    assert any(isinstance(entry.choice, Tucker2Choice) for entry in plan)
    assert plan.methods["Tucker2"] == Tucker2((0.25, 0.5)).record()
    small = st.load(kit.network(), "small/model.safetensors")
    assert st.merge(small)[2].weight.shape == kit.network()[2].weight.shape
    page = Path("small/report.html").read_text(encoding="utf-8")
    assert "Tucker-2, ranks" in page
    assert "joules" in page
    rows = json.loads(
        run("evaluate", *CALL[:3], "--checkpoint", "small/model.safetensors", "--repeats", "0", "--json")
    )["rows"]
    assert {row["metric"]: row["value"] for row in rows}["MACs"] == plan.costs["macs"]


def test_methods_stand_beside_each_other_and_profile_lists_the_cost() -> None:
    document = json.loads(run("profile", *CALL, "--method", f"{KIT}:Tucker2", "--method", "weight-svd", "--json"))
    assert document["costs"]["joules"] == pytest.approx(
        sum(layer["costs"]["joules"] for layer in document["layers"]) + document["fixed"]["joules"]
    )


def test_what_does_not_fit_is_said_with_the_options_there_are() -> None:
    error = run("compress", *CALL, "--method", f"{KIT}:Tucker2:ranks=3", "--budget", "joules=50%", code=2)
    assert "there is no option 'ranks'; the options of tests.extension.kit:Tucker2 are shares: a number," in error
    assert "= 0.25+0.5+0.75" in error
