"""Several budgets from one calibration: points, the front, a folder that a killed sweep goes on in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.errors import CheckpointError, InfeasibleBudgetError, PlanError
from spectrim.selection.front import Sweep
from spectrim.selection.point import Judged
from spectrim.train import sweeping
from tests.cases import one_thread


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6)).eval()


@pytest.fixture
def model() -> nn.Module:
    return perceptron()


@pytest.fixture
def batches() -> list[Tensor]:
    return list(torch.randn(32, 8, generator=torch.Generator().manual_seed(1)).split(16))


def first_weight(model: nn.Module) -> float:
    """A number that tells networks apart, and needs no data."""
    return float(sum(p.abs().sum() for p in model.parameters()))


def nudge(small: nn.Module, file: Path | None) -> None:
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(0.5)


def same(one: Sweep, other: Sweep) -> bool:
    """Whether two sweeps tell the same, times left out."""
    return [dataclasses.replace(p, seconds=0) for p in one] == [dataclasses.replace(p, seconds=0) for p in other]


def test_points_are_what_compress_gives_and_calibration_runs_once(
    model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    original = sweeping.prepare
    monkeypatch.setattr(sweeping, "prepare", lambda *a, **k: runs.append(a) or original(*a, **k))
    found = st.sweep(model, batches, ("macs", [0.4, 0.7]))
    assert len(runs) == 1
    assert [point.asked for point in found] == ["macs=70%", "macs=40%"]
    for point, budget in zip(found, ("macs=70%", "macs=40%"), strict=True):
        alone = st.compress(model, batches, budget, groups=False)
        assert point.plan == alone.plan
        assert alone.report.agreement is not None
        assert point.judged.error == pytest.approx(alone.report.agreement.error)
        assert point.costs["macs"] <= float(budget[5:7]) / 100 * point.dense_costs["macs"]
    again = found.result(-1)
    assert again.plan == found[-1].plan
    assert torch.equal(again.model(batches[0]), alone.model(batches[0]))


def test_the_front_leaves_out_what_another_network_beats() -> None:
    plan = st.select(st.tabulate(st.find(perceptron())), "parameters=60%")

    def at(cost: float, metric: float | None) -> Any:
        costs = {**plan.costs, "parameters": cost}
        return sweeping.Point(f"parameters={cost:g}", dataclasses.replace(plan, costs=costs), Judged(metric))

    points = (at(50, 90.0), at(40, 91.0), at(30, 80.0), at(20, 80.0), at(10, None))
    high = Sweep(points, "parameters", dense=92.0)
    assert [p.costs["parameters"] for p in high.front()] == [40, 20]
    assert [row["on_front"] for row in high.rows()] == [False, True, False, True, False]
    low = Sweep(points, "parameters", dense=92.0, better="lower")
    assert [p.costs["parameters"] for p in low.front()] == [20]
    with pytest.raises(ValueError, match="no cost 'joules' at every point"):
        high.front("joules")


def test_a_sweep_prints_and_draws(model: nn.Module, batches: list[Tensor]) -> None:
    found = st.sweep(model, batches, ["macs=60%", st.Budget(parameters=0.4)], evaluate=first_weight, better="lower")
    text = str(found)
    assert "macs=60%" in text
    assert f"{found.dense:.4g}" in text
    assert "lower is better" in text
    assert set(found.rows()[0]) >= {"asked", "macs", "macs_dense", "metric", "tuned_metric", "on_front"}
    axes = found.plot()
    assert axes.get_ylabel() == "first weight"
    assert {line.get_label() for line in axes.get_lines()} >= {"without training", "front", "dense"}


def test_a_killed_sweep_goes_on_and_gives_the_same(model: nn.Module, batches: list[Tensor], tmp_path: Path) -> None:
    whole = st.sweep(model, batches, ("macs", [0.7, 0.5]), evaluate=first_weight)
    evaluated: list[int] = []

    def dies(net: nn.Module) -> float:
        evaluated.append(1)
        if len(evaluated) == 3:  # the dense network, the first point, and in the second
            raise KeyboardInterrupt
        return first_weight(net)

    with pytest.raises(KeyboardInterrupt):
        st.sweep(model, batches, ("macs", [0.7, 0.5]), evaluate=dies, folder=tmp_path)
    assert [path.parent.name for path in tmp_path.glob("*/point.json")] == ["macs-70pct"]
    before = (tmp_path / "macs-70pct/point.json").stat().st_mtime_ns
    gone_on = st.sweep(model, batches, ("macs", [0.7, 0.5]), evaluate=first_weight, folder=tmp_path)
    assert (tmp_path / "macs-70pct/point.json").stat().st_mtime_ns == before
    assert same(gone_on, whole)
    assert Sweep.read(tmp_path) == gone_on
    with pytest.raises(ValueError, match="read from files"):
        Sweep.read(tmp_path).result(0)


def test_training_and_weights_are_added_to_points_that_are_there(
    model: nn.Module, batches: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path)
    monkeypatch.setattr(sweeping, "shrink", None)  # nothing is chosen again
    after = st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path, fine_tune=nudge, keep_models=True)
    assert after[0].carried_out == before[0].carried_out
    assert after[0].tuned is not None
    assert after[0].judged == after[0].tuned != before[0].judged
    loaded = st.load(perceptron(), tmp_path / "macs-50pct/model.safetensors")
    nudge(small := before.result(0).model, None)
    assert torch.equal(loaded(batches[0]), small(batches[0]))
    monkeypatch.setattr(sweeping, "prepare", None)  # and nothing calibrated where all is there
    assert st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path, fine_tune=nudge, keep_models=True) == after


def test_a_folder_holds_one_sweep(model: nn.Module, batches: list[Tensor], tmp_path: Path) -> None:
    st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path)
    other = perceptron()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="the digest of the weights was"):
        st.sweep(other, batches, ("macs", [0.5]), folder=tmp_path)
    with pytest.raises(CheckpointError, match="layers was"):
        st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path, skip="0")
    (tmp_path / "macs-50pct/point.json").write_text(json.dumps({"asked": "macs=50%"}))
    with pytest.raises(PlanError, match="macs-50pct"):
        st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path)


def test_budgets_that_cannot_be_met_are_told_and_left_out(model: nn.Module, batches: list[Tensor]) -> None:
    found = st.sweep(model, batches, ("macs", [0.6, 0.001]))
    assert [point.asked for point in found] == ["macs=60%"]
    assert "cannot be met" in found.unmet["macs=0.1%"]
    assert "macs=0.1% is left out" in str(found)
    with pytest.raises(InfeasibleBudgetError):
        st.sweep(model, batches, ("macs", [0.001]))


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ("mac", "there is no cost 'mac' to sweep over.*'macs'"),
        ("macs=50%", "there is no cost 'macs=50%' to sweep over.*list such as"),
        (("macs", [50]), "the share 50 of macs"),
        (("macs", [0]), "the share 0 of macs"),
        ([], "there are no budgets"),
        ({"macs": 0.5}, "budgets is .*: expected a cost"),
        ([0.5], "the budget is 0.5"),
    ],
)
def test_budgets_that_cannot_be_meant_are_refused_before_any_work(budgets: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        st.sweep(perceptron(), None, budgets)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", ["good", float("nan")])
def test_a_metric_is_a_finite_number(model: nn.Module, batches: list[Tensor], value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="evaluate returned"):
        st.sweep(model, batches, evaluate=lambda net: value)
