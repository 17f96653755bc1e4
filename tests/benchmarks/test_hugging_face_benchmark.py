"""The claim on models of transformers, in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import run


def test_one_model_within_one_budget(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config = json.loads((Path(run.__file__).parent / "experiments" / "hugging_face.json").read_text())
    found = run.run("hugging_face", {**config, **config["smoke"]}, {"work": tmp_path}, tmp_path / "found.json")
    assert found["claims"]["N6"]["met"], found["rows"]
    (row,) = found["rows"]
    assert "shared_basis" in row["kinds"]
    assert row["errors"]["folded"] < row["errors"]["dropped"]
