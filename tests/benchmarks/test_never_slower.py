from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as st
from benchmarks import never_slower
from spectrim.cost.rounds import Timing

CONFIG = json.loads(Path(never_slower.__file__).with_name("experiments").joinpath("never_slower.json").read_text())
SMALL = {**CONFIG, "networks": ["net"], "runtimes": ["eager"]}


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Compression that is refused down to a share, and a clock that gives these times in turn."""
    given: dict[str, Any] = {"least": 0.75, "times": [], "asked": []}

    def compress(model: nn.Module, data: Any, budget: st.Budget, **options: Any) -> Any:
        given["asked"].append((options["latency"].batch, options["guard"], str(budget)))
        if given["least"] is None:
            raise RuntimeError("broken")
        if budget.macs < given["least"]:
            raise st.SlowerError("macs", 0.5, 1.0, "9 ms for 8 ms, run by eager at batch 1")
        return SimpleNamespace(model=nn.Identity(), report=SimpleNamespace(notes=("time is lost", "few rows")))

    def clock(models: Any, example: torch.Tensor, **_: Any) -> dict[str, Timing]:
        ms = given["times"].pop(0)
        return {"dense": Timing((10.0,) * 15), "compressed": Timing((ms,) * 15)}

    monkeypatch.setattr(never_slower.zoo, "build", lambda name, seed: (nn.Identity(), torch.ones(2, 3, 4, 4)))
    monkeypatch.setattr(st, "compress", compress)
    monkeypatch.setattr(never_slower, "measure_latency", clock)
    return given


def test_a_network_counts_as_slower_if_it_is_so_twice(faked: dict[str, Any], tmp_path: Path) -> None:
    faked["times"] = [12.0, 8.0, 12.0, 12.0]
    found = never_slower.run(SMALL, {"work": tmp_path})
    assert [(row["batch"], row["slower"], row["share"]) for row in found["rows"]] == [
        (1, False, 0.75),
        (16, True, 0.75),
    ]
    assert {row["said"] for row in found["rows"]} == {"time is lost"}
    assert found["rows"][0]["faster"] == pytest.approx(10 / 8)
    claim = found["claims"]["A4"]
    assert (claim["value"], claim["met"]) == (1, False)
    assert faked["asked"][:2] == [(1, True, "macs=50%"), (1, True, "macs=75%")]


def test_what_is_refused_is_not_slower_and_what_fails_is_no_pass(faked: dict[str, Any], tmp_path: Path) -> None:
    faked["least"] = 2.0
    found = never_slower.run(SMALL, {"work": tmp_path})
    assert {(row["outcome"], row["slower"]) for row in found["rows"]} == {("refused", False)}
    assert "SlowerError" in found["rows"][0]["reason"]
    assert found["claims"]["A4"]["met"]
    faked["least"] = None
    found = never_slower.run(SMALL, {"work": tmp_path})
    assert found["rows"][0]["outcome"] == "failed"
    assert not found["claims"]["A4"]["met"]


def test_the_experiment_is_twelve_networks_that_there_are() -> None:
    assert len(CONFIG["networks"]) == len(set(CONFIG["networks"])) == 12
    assert set(CONFIG["networks"]) <= set(never_slower.zoo.NETWORKS)
    assert len(CONFIG["batches"]) * len(CONFIG["runtimes"]) == 6
