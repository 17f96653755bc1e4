"""Filter removal, and low rank + sparse, in miniature: the arms are what they say, and rows that are there are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import filter_oracles, filters, low_rank_sparse

RECIPE = {
    "batch_size": 50, "epochs": 1, "lr": 0.01, "weight_decay": 0.0, "schedule": "one_cycle", "precision": "float32",
    "temperature": 4.0, "teacher_weight": 0.9,
}  # fmt: skip
NETWORK: dict[str, Any] = {
    "network": "vgg16",
    "width": 2,
    "images": 50,
    "dense": {"epochs": 1, "lr": 0.01, "weight_decay": 0.0},
    "recipe": RECIPE,
}


pytestmark = pytest.mark.usefixtures("single_thread")


def test_filters_of_every_arm_meet_the_budget(paths: dict[str, Any]) -> None:
    pytest.importorskip("torch_pruning")
    arms = ["reconstruction", "L1 magnitude", "L1 magnitude + BatchNorm", "random"]
    config = {
        **NETWORK,
        "points": [
            {"budget": {"macs": 0.7}, "epochs": 0, "seeds": [0], "arms": arms},
            {"budget": {"macs": 0.7}, "epochs": 1, "seeds": [0], "arms": ["reconstruction"]},
        ],
        "claims": {"P2": {"kind": "lead", "at_least": 10}},
    }
    found = filters.run(config, paths)
    for row in found["rows"]:
        assert row["macs"] <= 0.7 * row["macs_dense"] * (1 + 1e-9)
        assert row["parameters"] < row["parameters_dense"]
    before = {row["arm"]: row["accuracy_before"] for row in found["rows"]}
    lead = before["reconstruction"] - max(before["L1 magnitude"], before["random"])
    assert found["claims"]["P2"]["value"] == pytest.approx(lead, abs=1e-2)
    # Trained or not, it is the same network; another run trains nothing that is done.
    first, *_, last = found["rows"]
    assert first["widths"] == last["widths"]
    assert "accuracy" in last
    kept = paths["work"] / "reconstruction-macs-0.7-0-1.json"
    kept.write_text(json.dumps({**last, "accuracy": 100.0}))
    assert filters.run(config, paths)["rows"][-1]["accuracy"] == 100.0


def test_the_arms_of_low_rank_and_sparse_meet_the_budget(paths: dict[str, Any]) -> None:
    arms = ["low rank + sparse", "low rank", "sparse"]
    config = {
        **NETWORK,
        "points": [{"bytes": 0.5, "epochs": 0, "seeds": [0], "arms": arms}],
        "claims": {"S4": {"kind": "lead"}},
    }
    rows = {row["arm"]: row for row in low_rank_sparse.run(config, paths)["rows"]}
    assert all(row["ratio"] >= 2 * (1 - 1e-9) for row in rows.values())
    assert rows["low rank"]["layers_sparse"] == rows["low rank"]["layers_both"] == 0
    assert rows["sparse"]["layers_low_rank"] == rows["sparse"]["layers_both"] == 0


def test_the_oracles_are_compared_with_and_not_copied() -> None:
    experiment = Path(filter_oracles.__file__).parent / "experiments" / "filter_oracles.json"
    config = json.loads(experiment.read_text())
    assert filter_oracles.run(config, {})["claims"]["P1"]["met"] is True
    config["layers"][1]["KL"] += 1e-6
    assert filter_oracles.run(config, {})["claims"]["P1"]["met"] is False
