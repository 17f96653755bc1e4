"""The tasks of learned ranks run in miniature, and their parts do what they say."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import spectrim as st
from benchmarks import c_step, cifar, rank_paths, report, run, vgg
from spectrim.selection.trajectory import Record, Trajectory

EXPERIMENTS = Path(run.__file__).parent / "experiments"
CLAIMS = {
    "c_step": "L1", "c_step_time": "L1", "rank_paths_lenet300": "L2",
    "rank_paths_lenet300_from0": "L2", "rank_paths_resnet20": "L2", "vgg": "L5",
    "vgg16_full": "L5", "budgets": "L7",
}  # fmt: skip

TASKS = ("c_step", "c_step_time", "rank_paths", "vgg", "budgets")


def config(name: str) -> dict[str, Any]:
    """An experiment at the size of its smoke test."""
    held = json.loads((EXPERIMENTS / f"{name}.json").read_text())
    return {**held, **held["smoke"]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks are no faster with more, and far slower beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Random images in the layout of the data sets, and random weights."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for name, count in (*((f"data_batch_{i}", 1050) for i in range(1, 6)), ("test_batch", 60)):
        records = draw.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / f"{name}.bin")
    for part, count in (("train", 600), ("t10k", 100)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            values = draw.integers(0, 10 if kind.startswith("labels") else 256, shape, dtype=np.uint8)
            head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + values.tobytes())
    torch.manual_seed(0)
    weights = {name: folder / f"{name}.safetensors" for name in ("resnet20",)}
    save_file(cifar.ResNet(3).state_dict(), weights["resnet20"])
    return {"cifar10": folder, "fashion-mnist": folder, "weights": weights}


@pytest.fixture(scope="session")
def result(paths: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The result of an experiment in miniature, by name; each is run once."""

    @functools.cache
    def found(name: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(name)
        run.run(name, config(name), {**paths, "work": folder}, folder / f"{name}.json")
        return json.loads((folder / f"{name}.json").read_text())

    return found


@pytest.mark.parametrize("name", CLAIMS)
def test_an_experiment_runs_and_leaves_a_whole_result(name: str, result: Callable[[str], dict[str, Any]]):
    threads = torch.get_num_threads()
    held = result(name)
    claim = held["claims"][CLAIMS[name]]
    assert {"value", "unit", "target", "met", "command", "note"} <= claim.keys()
    assert claim["value"] is not None
    assert held["rows"]
    assert held["seeds"] == [0]
    assert torch.get_num_threads() == threads
    for need in held["config"].get("needs", []):
        assert f"--{need}" in claim["command"]
    # Rows of these tasks are no points of the accuracy figure.
    assert not report.networks([held])


def test_every_experiment_of_these_tasks_is_run_here():
    tasks = {path.stem: json.loads(path.read_text()).get("task") for path in EXPERIMENTS.glob("*.json")}
    assert {name for name, task in tasks.items() if task in TASKS} == CLAIMS.keys()


# L1


def test_every_case_of_a_tied_group_is_a_tie_and_keeps_the_smaller_rank():
    draw = np.random.default_rng(1)
    for _ in range(6):
        group = c_step._tied_group(draw, 3)
        found = group.expected()
        assert all(tie for _, tie in found)
        assert group.chosen() == [rank for rank, _ in found]


def test_brute_force_says_what_the_official_code_says():
    oracle = config("c_step")["oracle"]["diagonal"]
    model = c_step._Layers([nn.Linear(4, 4)], [(4,)])
    model.layers[0].weight.data = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))  # type: ignore[union-attr]
    for normalize, table in ((False, oracle["plain"]), (True, oracle["normalised"])):
        for alpha, ranks in zip(oracle["alpha"], table, strict=True):
            found = [
                c_step._Group(model, alpha, mu, normalize, "parameters", "integer diagonal").expected()[0][0]
                for mu in oracle["mu"]
            ]
            assert found == ranks


def test_a_rank_that_differs_is_counted(monkeypatch: pytest.MonkeyPatch):
    small = {**config("c_step"), "cases": 10}
    monkeypatch.setattr(c_step._Group, "chosen", lambda self: [99] * len(self.model.layers))
    claim = c_step.run(small, {})["claims"]["L1"]
    assert claim["value"] == 10
    assert not claim["met"]


def test_the_mac_price_of_a_rank_is_that_of_the_cost():
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    model = c_step._Layers([layer], [(3, 9, 9)])
    group = c_step._Group(model, 1.0, 1.0, False, "macs", "random")
    price = group.price(layer.weight, layer(torch.zeros(1, 3, 9, 9)))
    (site,) = st.calibrate(model, st.find(model), [torch.zeros(1, 1)], statistics=False)
    method = st.WeightSVD(unfoldings=("channel",), multiple_of=1, to_full_rank=True)
    assert {st.macs(method.layers(site, c)) / c["rank"] for c in method.curve(site).choices} == {price}


# L2


def trajectory(ranks: list[tuple[int, ...]]) -> Trajectory:
    records = (Record(1.0, {"macs": 1e-9}, r, ("low",) * len(r), {"macs": 1.0}, 0.1, 50.0) for r in ranks)
    return Trajectory(("a", "b"), (10, 10), {"macs": 2.0}, records=tuple(records))


@pytest.mark.parametrize(
    ("ranks", "met"),
    [
        ([(0, 0), (2, 1), (5, 5), (5, 5), (5, 5)], True),
        ([(0, 0), (2, 1), (4, 4), (5, 5), (6, 6)], False),  # still growing
        ([(4, 4), (4, 5), (5, 5), (5, 5), (5, 5)], False),  # begins high
        ([(0, 0), (0, 0), (0, 0), (0, 0), (0, 0)], False),  # nothing is learned
    ],
)
def test_a_path_must_begin_low_grow_and_settle(ranks: list[tuple[int, ...]], met: bool):
    asked = {"network": "x", "low": 0.1, "settled": {"c_steps": 2, "within": 0.02}}
    assert rank_paths._claim(asked, trajectory(ranks))["met"] is met


def test_part_gives_the_epochs_from_the_first_on_and_so_many_batches():
    images = cifar.Images(torch.arange(8 * 3 * 32 * 32).reshape(8, 3, 32, 32).to(torch.uint8), torch.arange(8))
    whole = cifar.Batches(images, batch_size=2, seed=0)
    part = rank_paths.Part(whole, 5, 3)
    part.set_epoch(1)
    mine = [labels.tolist() for _, labels in part]
    whole.set_epoch(6)
    assert mine == [labels.tolist() for _, labels in whole][:3]
    assert len(part) == 3


def test_trajectories_of_results_become_figures():
    held = {
        "experiment": "rank_paths_lenet300",
        "rows": [],
        "trajectory": json.loads(trajectory([(0, 0), (3, 1)]).to_json()),
    }
    found = report.figures([held])
    assert [name for name in found if name.startswith("rank-paths")] == ["rank-paths-lenet300.svg"]
    assert b"<svg" in found["rank-paths-lenet300.svg"]
    assert report.figures([held]) == found


# L5


def test_vgg16_counts_what_the_published_one_does():
    counts = vgg._counts(vgg.folded(vgg.VGG16()))
    assert counts["macs"] / 1e6 == pytest.approx(313.46, abs=0.01)
    assert counts["parameters"] == 14_977_728


def test_the_published_ranks_give_the_published_ratios():
    model = vgg.VGG16()
    sites = st.calibrate(model, st.find(model), [torch.zeros(1, 3, 32, 32)], statistics=False)
    ranks = json.loads((EXPERIMENTS / "vgg.json").read_text())["ranks"]
    method = st.WeightSVD(unfoldings=("channel",))
    macs = numbers = 0.0
    for site, rank in zip(sites, ranks, strict=True):
        pair = site.spec.factor(method.offered(site.spec)[0], rank)
        macs += min(st.macs(pair), st.macs(site.layers))
        numbers += min(*(sum(np.prod(s.shape) for s in layers) for layers in (pair, site.layers)))
    # The ranks were read off a figure, to within 1; it says 3.39 and 5.44.
    assert 313.46e6 / macs == pytest.approx(3.36, abs=0.01)
    assert 14_977_728 / numbers == pytest.approx(5.43, abs=0.01)


def test_folding_and_full_ranks_keep_the_function_of_vgg16():
    torch.manual_seed(0)
    model = vgg.VGG16(4)
    model.train()(torch.randn(16, 3, 32, 32))
    images = torch.randn(4, 3, 32, 32)
    expected = model.eval()(images)
    folded = vgg.folded(model)
    torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-5)
    small, plan = vgg.at_ranks(folded, [2, 2] + [99] * 13)
    assert [entry.choice.is_dense for entry in plan] == [False, False] + [True] * 13
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in folded.parameters())


def test_the_dense_training_goes_on_where_it_was_stopped(tmp_path: Path):
    images = cifar.Images(torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8), torch.arange(32) % 10)
    given = {"epochs": 2, "lr": 0.05, "lr_decay": 0.5, "weight_decay": 1e-3, "precision": "float32"}

    def trained(epochs: int, path: Path) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        batches = cifar.Batches(images, batch_size=16, seed=0)
        return vgg._reference(vgg.VGG16(2), batches, {**given, "epochs": epochs}, path).state_dict()

    whole = trained(2, tmp_path / "whole.safetensors")
    first = trained(1, tmp_path / "parts.safetensors")
    both = trained(2, tmp_path / "parts.safetensors")
    assert all(torch.equal(both[name], whole[name]) for name in whole)
    assert not all(torch.equal(first[name], whole[name]) for name in whole)


# L7


def test_counted_budgets_hold_on_the_module_itself(result: Callable[[str], dict[str, Any]]):
    parameters, macs, size, latency = result("budgets")["rows"]
    for row in (parameters, macs, size):
        assert row["has"] <= row["planned"] <= row["limit"]
        assert row["of_budget"] > 0.9
    assert all(row["has"] == row["planned"] for row in (parameters, macs))
    assert macs["limit"] == 3e5
    assert latency["of_budget_least"] <= latency["of_budget"] <= latency["of_budget_most"]
