"""Every experiment of this machine runs, at a size that takes seconds, and its parts do what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import spectrim as st
from benchmarks import nets, run, speed
from spectrim.network.choices import DENSE
from spectrim.selection.candidates import Candidates, Option, Row

EXPERIMENTS = Path(run.__file__).parent / "experiments"
CLAIMS = {
    "demo": "F1",
    "speed_32": "F6",
    "speed_224": "F6",
    "latency_budget": "F7",
    "analysis": "F8",
    "memory": "F9",
    "tolerances": "A6",
}
SMOKE = {name: json.loads((EXPERIMENTS / f"{name}.json").read_text()) for name in CLAIMS}


def test_the_experiments_of_every_claim_have_a_size_that_takes_seconds():
    assert all("smoke" in config for config in SMOKE.values())


@pytest.mark.parametrize("name", CLAIMS)
def test_an_experiment_runs_and_leaves_a_whole_result(name: str, tmp_path: Path):
    config = {**SMOKE[name], **SMOKE[name]["smoke"]}
    paths = {"cifar10": None, "weights": {}, "work": tmp_path}
    threads = torch.get_num_threads()
    target = tmp_path / f"{name}.json"
    run.run(name, config, paths, target)
    held = json.loads(target.read_text())
    claim = held["claims"][CLAIMS[name]]
    assert {"value", "unit", "target", "met", "command"} <= claim.keys()
    assert claim["value"] is not None
    assert held["rows"]
    assert held["seeds"] == config.get("seeds", [config.get("seed")])
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("name", "size", "gmacs", "layers"),
    [
        ("vgg16", 32, 0.3132, 14),
        ("resnet18", 32, 0.5554, 21),
        ("resnet18", 224, 1.8141, 21),
        ("resnet50", 224, 4.0892, 54),
    ],
)
def test_networks_have_the_macs_of_the_published_ones(name: str, size: int, gmacs: float, layers: int):
    model = nets.network(name, size)
    sites = st.calibrate(model, st.find(model), [torch.zeros(1, 3, size, size)], statistics=False)
    assert len(sites) == layers
    assert sum(st.macs(site.layers) for site in sites) / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_responses_of_random_networks_neither_vanish_nor_explode():
    for name in ("vgg16", "resnet18"):
        assert 0.05 < float(nets.network(name, 32)(nets.images(2, 32)).std()) < 50


def test_an_unknown_network_is_named():
    with pytest.raises(ValueError, match="lenet"):
        nets.network("lenet", 32)


def work_table() -> Candidates:
    """Two layers of 100 MACs each; only the second becomes faster when it does less work."""

    def row(site: str, milliseconds: float) -> Row:
        options = [Option(DENSE, 0.0, {"macs": 100.0, "latency": 10.0})]
        for share in range(90, 0, -10):
            choice = st.Choice("low_rank", "WorkKept", {"unfolding": "channel", "rank": share})
            time = 10 - milliseconds * (100 - share) / 100
            options.append(Option(choice, 1 - share / 100, {"macs": float(share), "latency": time}))
        return Row(site, "conv", tuple(options), scale=100.0)

    return Candidates((row("slow", 1.0), row("quick", 9.0)), {"macs": 0.0, "latency": 5.0}, "share of MACs")


def test_the_fastest_plan_takes_work_away_where_it_saves_time():
    plan = speed.fastest(work_table(), 0.6, 1.0)
    assert plan["slow"].choice.is_dense
    assert plan.costs["macs"] == pytest.approx(120.0)


@pytest.mark.parametrize("exponent", [1.0, 1.3])
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_the_fastest_plan_keeps_to_its_macs_and_uses_them(share: float, exponent: float):
    plan = speed.fastest(work_table(), share, exponent)
    assert share * 200 - 10 < plan.costs["macs"] <= share * 200


def test_work_kept_offers_no_rank_below_a_sixteenth_and_counts_saved_work():
    model = nets.network("resnet18", 32, width=32)
    sites = st.calibrate(model, st.find(model), [torch.zeros(1, 3, 32, 32)], statistics=False)
    method = speed.WorkKept()
    site = sites["blocks.7.convs.1"]
    curve = method.curve(site)
    for choice, error in zip(curve.choices, curve.errors, strict=True):
        full = 256 * (3 if choice["unfolding"] in ("height-first", "width-first") else 1)
        assert choice["rank"] >= full / 16
        assert error == pytest.approx(max(0.0, 1 - st.macs(method.layers(site, choice)) / st.macs(site.layers)))


def test_heads_and_widths_that_go_leave_what_zeroed_ones_do():
    pytest.importorskip("transformers")
    pytest.importorskip("torch_pruning")
    from benchmarks import heads

    config = json.loads((EXPERIMENTS / "heads.json").read_text())
    found = heads.run({**config, **config["smoke"]}, {})
    (row,) = found["rows"]
    assert found["claims"]["A7"]["met"]
    assert row["heads_left"] == [2]
    assert row["macs"] < row["macs_dense"]
