"""Joint, separate and mixed tables in miniature: the arms are what they say, and rows that are there are kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import joint_training

CONFIG: dict[str, Any] = {
    "network": "resnet18",
    "width": 4,
    "images": 50,
    "seeds": [0],
    "dense": {"batch_size": 50, "epochs": 1, "lr": 0.01, "weight_decay": 0.0, "precision": "float32"},
    "recipe": {
        "batch_size": 50, "epochs": 1, "lr": 0.01, "weight_decay": 0.0, "schedule": "one_cycle", "precision": "float32",
        "temperature": 4.0, "teacher_weight": 0.9,
    },
    "arms": [{"name": name, "parameters": [0.5]} for name in ("separate", "joint", "mixed")],
    "claims": {
        "J3": {"kind": "never worse", "parameters": [0.5]},
        "J4": {"kind": "lost", "arm": "mixed", "width": 4, "points": [{"ratio": 2, "at_most": 100}]},
    },
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("single_thread")


def test_three_tables_at_one_budget(paths: dict[str, Any]) -> None:
    found = joint_training.run(CONFIG, paths)
    rows = {row["arm"]: row for row in found["rows"]}
    assert all(row["ratio"] == pytest.approx(2, rel=0.02) for row in rows.values())
    assert rows["separate"]["layers_sharing"] == 0 < rows["joint"]["layers_sharing"]
    # The mixed table holds the options of the separate one.
    assert rows["mixed"]["loss_planned"] <= rows["separate"]["loss_planned"] * (1 + 1e-6)
    accuracies = {arm: row["accuracy"] for arm, row in rows.items()}
    value = accuracies["mixed"] - max(accuracies["separate"], accuracies["joint"])
    assert found["claims"]["J3"]["value"] == pytest.approx(value, abs=1e-3)
    assert found["claims"]["J4"]["met"] is True
    # Another run trains nothing that is done.
    kept = paths["work"] / "mixed-0.5000-0.json"
    kept.write_text(json.dumps({**rows["mixed"], "accuracy": 100.0}))
    again = joint_training.run(CONFIG, paths)
    assert [row["accuracy"] for row in again["rows"]] == [accuracies["separate"], accuracies["joint"], 100.0]
