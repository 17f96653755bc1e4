"""The benchmark of situations (N1): it holds at a small size, and it finds what is wrong and what is unclear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as st
from benchmarks import resumed, run, situations
from benchmarks.situation_table import SITUATIONS, Situation, Two, vectors

EXPERIMENTS = Path(run.__file__).parent / "experiments"


def test_situations_of_all_kinds_are_compressed_and_right_or_refused_clearly(tmp_path: Path) -> None:
    config = json.loads((EXPERIMENTS / "situations.json").read_text())
    found = situations.run({**config, **config["smoke"]}, {"work": tmp_path})
    assert found["claims"]["N1"]["value"] == 0, found["rows"]
    assert {row["outcome"] for row in found["rows"]} == {"right", "refused"}
    assert all(row["checks"] >= 8 for row in found["rows"] if row["outcome"] == "right")
    assert not found["claims"]["N1"]["met"]  # fewer than sixty
    assert len(SITUATIONS) >= 60
    # Kinds 10, 15 and 16 (files, the command line, models of transformers) are those of other claims.
    assert {case.kind for case in SITUATIONS.values()} >= {*range(1, 10), 11, 12, 13}


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda model: model.a.register_forward_hook(lambda *args: args[-1] + 1), "reference: outputs differ"),
        (lambda model: model.register_parameter("more", nn.Parameter(torch.zeros(3))), "3,299 parameters"),
        (lambda model: setattr(model, "forward", lambda x: x), "calls: {}"),
    ],
)
def test_a_network_that_is_not_right_is_found(
    spoil: Any, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = situations.shrunk

    def shrunk(case: Situation, dense: nn.Module, arm: str, share: float) -> st.Result:
        result = whole(case, dense, arm, share)
        spoil(result.model)
        return result

    monkeypatch.setattr(situations, "shrunk", shrunk)
    row = situations.row(Situation("two", 0, "compressed", Two, vectors), "default", tmp_path)
    assert row["outcome"] == "wrong"
    assert fault in row["faults"]


def test_what_a_refusal_lacks_is_told() -> None:
    def missing(error: Exception) -> list[str]:
        try:
            raise error
        except Exception as raised:
            return situations.unclear(raised, Two())

    assert missing(KeyError(0)) == ["the library's own error", "a place", "a reason", "a cure"]
    with pytest.raises(st.CalibrationError) as caught:
        st.compress(Two(), [], st.Budget(macs=0.5))
    assert situations.unclear(caught.value, Two()) == []


def test_rows_that_stand_are_not_measured_again(tmp_path: Path) -> None:
    path, seen = tmp_path / "rows.jsonl", []

    def row(name: str) -> dict[str, Any]:
        seen.append(name)
        if seen == ["a", "b"]:
            raise KeyboardInterrupt
        return {"length": len(name)}

    keys = [{"name": "a"}, {"name": "b"}]
    with pytest.raises(KeyboardInterrupt):
        resumed.rows(path, keys, row)
    rows, notes = resumed.rows(path, keys, row)
    assert seen == ["a", "b", "b"]
    assert rows == [{"name": "a", "length": 1}, {"name": "b", "length": 1}]
    assert notes == []  # of one commit
    assert not path.exists()
