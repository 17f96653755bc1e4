"""The headline's peers keep their limits, its file its rows, and its claims say what the rows do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import schema
from benchmarks.headline import claims, network, store, tables, timing
from benchmarks.headline.__main__ import keys
from benchmarks.headline.arms import ARMS
from benchmarks.headline.peers import layers
from benchmarks.headline.peers.decompositions import CP, Responses, SpatialSVD, Tucker2

CONFIG = {"samples": 1, "seed": 0, "threads": 1}
EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    strided = nn.Conv2d(16, 24, 3, stride=2, padding=1)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), strided, nn.Flatten(), nn.Linear(384, 16)).eval()


@pytest.mark.parametrize("cost", ["macs", "bytes"])
@pytest.mark.parametrize("ranks", [layers.uniform, layers.lagrangian])
@pytest.mark.parametrize("how", [SpatialSVD, Responses])
def test_a_peer_is_within_its_limit_and_near_it(how: Any, ranks: Any, cost: layers.Cost):
    dense, one = small_network(), EXAMPLE[:1]
    limit = 0.6 * layers.measured(dense, one, cost)
    small = layers.decomposed(dense, [EXAMPLE], one, cost, limit, how=how(), ranks=ranks)
    assert 0.75 * limit < layers.measured(small, one, cost) <= limit
    assert small(EXAMPLE).shape == dense(EXAMPLE).shape


@pytest.mark.parametrize("how", [SpatialSVD, Responses, Tucker2, CP])
def test_at_full_rank_thin_layers_give_what_the_layer_gave(how: Any):
    dense = nn.Sequential(nn.Conv2d(4, 16, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))).eval()
    batch = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    (layer,) = layers.layers_of(dense, batch[:1])
    made = how()
    made.watch(dense, [layer], [batch])
    rank = 16 if how is Responses else made.options(layer)[-1].rank
    assert torch.allclose(made.made(layer, rank)(batch), dense(batch), atol=1e-3)
    option = made.options(layer)[0]
    assert option.cost("macs") == layers.measured(made.made(layer, option.rank), batch[:1], "macs")


def test_a_limit_that_no_rank_reaches_is_told():
    with pytest.raises(ValueError, match="were asked for"):
        layers.decomposed(
            small_network(), [EXAMPLE], EXAMPLE[:1], "macs", 10, how=SpatialSVD(), ranks=layers.uniform
        )  # fmt: skip


@pytest.mark.parametrize("name", network.names())
def test_every_network_is_a_short_file_and_names_arms_and_budgets_that_exist(name: str):
    kind = network.plugin(name)
    assert kind.name == name
    assert len((network.HERE / f"{name}.py").read_text().splitlines()) <= 80
    rows = list(keys(kind, kind.budgets, list(ARMS)))
    assert len(rows) == len(set(rows)) >= len(kind.budgets)
    assert set(kind.arms or ()) <= set(ARMS)


def row(arm: str, kind: str, value: float, budget: str = "macs=50%") -> dict[str, Any]:
    return {"network": "resnet20", "budget": budget, "arm": arm, "kind": kind, "value": value, "error": 0.3}


def test_rows_are_kept_once_and_in_order_and_the_file_has_the_form_of_all(tmp_path: Path):
    target = tmp_path / "headline.json"
    for each in (row("CP, uniform", "peer", 80.0), row("auto", "auto", 89.0), row("dense", "dense", 91.0, "")):
        store.keep(target, CONFIG, store.with_row(each))
    store.keep(target, CONFIG, store.with_row(row("auto", "auto", 90.0)))
    assert [each["arm"] for each in json.loads(target.read_text())["rows"]] == ["dense", "auto", "CP, uniform"]
    held = schema.checked(target)
    assert held["rows"][1]["value"] == 90.0
    assert held["claims"]["A2"]["value"] == 1


def test_claims_that_a_row_does_not_change_stand_with_their_own_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "headline.json"
    first = (row("dense", "dense", 91.0, ""), row("auto", "auto", 89.0), row("CP, uniform", "peer", 80.0))
    for day, rows in (("2026-01-01", first), ("2026-01-02", [row("low rank", "ours", 88.0)])):
        monkeypatch.setattr(store, "today", lambda day=day: day)
        for each in rows:
            store.keep(target, CONFIG, store.with_row(each))
    measured = json.loads(target.read_text())["measured"]
    assert {name: one["date"] for name, one in measured.items()} == {"A1": "2026-01-02", "A2": "2026-01-01"}


def test_claims_count_what_is_ahead_and_what_is_worse_than_noise():
    rows = [row("dense", "dense", 91.0, "")]
    for budget, auto, single in (("macs=50%", 90.0, 89.0), ("macs=25%", 80.0, 82.0)):
        rows += [row("auto", "auto", auto, budget), row("filters", "ours", single, budget)]
        rows += [row("low rank", "ours", single - 5, budget), row("CP, uniform", "peer", 81.0, budget)]
    made = claims.claims(rows, planned=2)
    assert not made["A1"]["met"]
    assert (
        "2 of 2 networks and budgets run: 1 better than the best single arm, 1 worse than noise" in made["A1"]["note"]
    )
    assert made["A2"]["value"] == 1
    assert not made["A2"]["met"]
    rows = [each for each in rows if each["budget"] != "macs=25%"]
    assert claims.claims(rows, planned=1)["A1"]["met"]
    assert not claims.claims(rows)["A1"]["met"]  # of the other networks nothing is known
    assert not claims.claims(rows, planned=1)["A2"]["met"]  # the levels of ResNet-20 were not run


def test_the_table_has_a_line_a_budget_and_the_best_of_each_kind():
    sizes = {"macs": 2e7, "file_bytes": 5e5}
    rows = [row("dense", "dense", 91.0, ""), row("auto", "auto", 90.0)]
    rows += [row("CP, uniform", "peer", 80.0), row("Tucker-2, uniform", "peer", 85.0), row("filters", "ours", 88.0)]
    rows.append({"network": "resnet20", "budget": "macs=50%", "arm": "low rank", "failed": "no memory"})
    dense, line = tables.beside_others([each | sizes for each in rows])
    assert "test accuracy, %, higher is better" in dense[0]
    assert dense[1:] == ("", "", "91.0 ± 0.3", "20.0 M", "0.50")
    assert line[:4] == ("`macs=50%`", "85.0 ± 0.3 (Tucker-2, uniform)", "88.0 ± 0.3 (filters)", "90.0 ± 0.3")
    (_, alone) = tables.beside_others([each | sizes for each in rows if each["arm"] in ("dense", "filters")])
    assert alone[1:] == ("not run", "88.0 ± 0.3 (filters)", "not run", "", "")
    late = {"network": "resnet20", "budget": "macs=50%", "arm": "auto", "failed": "not ready after 9 s"}
    (_, stopped) = tables.beside_others([each | sizes for each in (rows[0], rows[4], late)])
    assert stopped[3:] == ("not ready after 9 s", "", "")


def test_the_table_has_a_budget_once_however_it_was_written():
    sizes = {"macs": 2e7, "file_bytes": 5e5}
    rows = [row("low rank", "ours", 80.0, "macs=9M"), row("CP chains", "ours", 88.0, "macs=9.0M")]
    ((budget, *_),) = tables.beside_others([each | sizes for each in rows])
    assert budget == "`macs=9M`"


@pytest.mark.parametrize("runtime", timing.RUNTIMES)
def test_a_kept_network_is_timed_beside_the_dense_one_in_every_runtime(runtime: str):
    dense, threads = small_network(), torch.get_num_threads()
    small = layers.decomposed(dense, [EXAMPLE], EXAMPLE, "macs", 3e5, how=SpatialSVD(), ranks=layers.uniform)
    line = timing.timed(
        row("auto", "auto", 90.0), dense, small, EXAMPLE, runtime=runtime, batch=2, threads=1, repeats=3
    )
    torch.set_num_threads(threads)
    assert line["low"] <= line["faster"] <= line["high"]
    assert line["dense_ms"] > 0 < line["ms"]
    assert (line["arm"], line["runtime"]) == ("auto", runtime)


def test_what_cannot_be_timed_is_a_line_with_the_reason():
    broken = nn.Linear(2, 2)
    line = timing.timed(
        row("auto", "auto", 9.0), broken, broken, EXAMPLE, runtime="eager", batch=2, threads=1, repeats=3
    )
    assert "shapes cannot be multiplied" in line["failed"]
