"""The experiments on planted weights and on the time of the low-rank step, at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bilateral_speed, planted, run

EXPERIMENTS = Path(run.__file__).parent / "experiments"


def config(name: str) -> dict[str, Any]:
    held = json.loads((EXPERIMENTS / f"{name}.json").read_text())
    return {**held, **held["smoke"]}


def result(name: str, tmp_path: Path) -> dict[str, Any]:
    threads = torch.get_num_threads()
    target = tmp_path / f"{name}.json"
    run.run(name, config(name), {"cifar10": None, "weights": {}, "work": tmp_path / "work"}, target)
    assert torch.get_num_threads() == threads
    return json.loads(target.read_text())


def test_planted_weights_are_found_and_failures_are_told(tmp_path: Path) -> None:
    held = result("planted", tmp_path)
    assert held["claims"]["S2"]["met"]
    found, lost = held["rows"]
    assert (found["lost"], found["found_doubted"]) == (0, 0)
    assert (lost["lost"], lost["lost_unsaid"]) == (1, 0)


def test_a_failure_that_is_not_told_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "GAP", 0.0)
    monkeypatch.setattr(planted, "OVERLAP", 1.0)
    claim = planted.run(config("planted"), {})["claims"]["S2"]
    assert not claim["met"]
    assert "1 of them without a warning" in claim["note"]


def test_steps_are_timed_and_their_objectives_compared(tmp_path: Path) -> None:
    held = result("bilateral_speed", tmp_path)
    (row,) = held["rows"]
    assert held["claims"]["S1"]["value"] == row["svd_over_greedy"] > 0
    assert 1 <= row["objective_ratio"] < 1.05
    # The literal formula and the eigendecomposition are both the optimum.
    assert row["eigh_objective_ratio"] == pytest.approx(1, abs=1e-4)
    assert row["svd_objective_ratio"] == pytest.approx(1, abs=1e-4)
    (solve,) = held["solves"]
    assert 0.8 < solve["objective_ratio"] < 1.2
    assert bilateral_speed.run({**config("bilateral_speed"), "claimed": False}, {})["claims"] == {}
