"""Claims N2 and N5 at a size that takes seconds, and the file that all of N1 to N6 go into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import architectures, door, proof_cost, run, strangers

EXPERIMENTS = Path(run.__file__).parent / "experiments"


def smoke(name: str) -> dict[str, Any]:
    config = json.loads((EXPERIMENTS / f"{name}.json").read_text())
    return {**config, **config["smoke"]}


def test_every_claim_has_a_module_and_is_left_to_make_bench_strangers(capsys: pytest.CaptureFixture[str]) -> None:
    for module in strangers.CLAIMS.values():
        assert (Path(run.__file__).parent / f"{module}.py").exists()
        assert run.main([module]) == 0
        assert f"{module}: measured by python -m benchmarks.strangers" in capsys.readouterr().err


def test_architectures_are_compressed_and_proven_or_refused(tmp_path: Path) -> None:
    found = architectures.run(smoke("architectures"), {"work": tmp_path})
    assert found["claims"]["N2"]["value"] == 0, found["rows"]
    assert all(row["loaded"] and row["merged"] for row in found["rows"] if row["outcome"] == "proven")
    assert len(architectures.NETWORKS) >= 90


def test_the_proof_takes_two_passes_of_a_batch(tmp_path: Path) -> None:
    (row,) = proof_cost.run(smoke("proof_cost"), {})["rows"]
    assert row["whole_batches"] == 2
    assert 1 < row["passes_by_macs"] <= 2
    assert row["passes_by_time"] > 1


def test_a_file_of_claims_names_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        proof_cost, "run", lambda config, paths: {"claims": {"N5": {}}, "rows": [{"a": config["share"]}]}
    )
    found = door.measured("N5", "proof_cost", tmp_path, "strangers")
    assert found["claims"]["N5"]["command"] == "python -m benchmarks.strangers N5"
    assert found["proof_cost"] == [{"a": smoke("proof_cost")["share"]}]


def test_rows_that_are_right_need_not_be_measured_again() -> None:
    rows = [{"action": "a", "wrong": [], "commit": "c1"}, {"action": "b", "wrong": ["x"]}, {"action": "d", "wrong": []}]
    whole = {"measured": {"N4": {"code": {"commit": "c2"}}}, "killed_writes": rows}
    kept = list(strangers.standing("N4", whole))
    assert [(line["key"], line["commit"]) for line in kept] == [({"action": "a"}, "c1"), ({"action": "d"}, "c2")]
