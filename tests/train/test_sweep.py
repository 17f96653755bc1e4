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
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import spectrim as st
from spectrim.errors import CheckpointError, InfeasibleBudgetError
from spectrim.report.measures import Score
from spectrim.report.sweep_page import front_chart
from spectrim.selection.front import Sweep
from spectrim.selection.point import Judged, sealed
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
        assert point.judged.error == pytest.approx(alone.report.agreement.error, rel=1e-4)
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


def test_what_a_metric_knows_is_told_and_kept(model: nn.Module, batches: list[Tensor], tmp_path: Path) -> None:
    found = st.sweep(model, batches, ["macs=60%"], evaluate=lambda net: Score(90.0, 400), folder=tmp_path)
    assert found.unit == "%"
    assert found.dense_error == pytest.approx(1.5)
    assert found == Sweep.read(tmp_path)
    assert [line[-1] for line in found.table()[1]] == ["90.00 %", "90.00 %"]
    assert "metric has a standard error of up to 1.5 points" in str(found)
    chart = front_chart(found, "macs")
    assert chart.y_label == "metric, %"
    assert all(dot.barred for dot in chart.dots)
    axes = found.plot()
    assert len(axes.collections) == len(axes.patches) == 1  # a bar, and the band around the dense network


def test_notes_that_differ_in_figures_are_told_once(model: nn.Module, batches: list[Tensor]) -> None:
    found = st.sweep(model, batches, ("macs", [0.8, 0.6, 0.4]))
    notes = [("slow: 80 of 90",), ("slow: 60 of 80", "alike"), ("slow: 40 of 70", "alike")]
    points = tuple(dataclasses.replace(point, notes=each) for point, each in zip(found, notes, strict=True))
    said = dataclasses.replace(found, points=points).sentences
    assert "slow; with macs=40%: 40 of 70" in said
    assert "with macs=60%, macs=40%: alike" in said
    assert sum("slow" in sentence for sentence in said) == 1


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


def test_weights_that_were_kept_are_those_of_the_point_whatever_a_later_call_keeps(
    model: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    for options in ({"keep_models": True}, {"fine_tune": nudge}, {"fine_tune": nudge, "keep_models": True}):
        points = st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path, **options)
        small = points.result(0).model
        if points[0].tuned:
            nudge(small, None)
        loaded = st.load(perceptron(), tmp_path / "macs-50pct/model.safetensors")
        assert torch.equal(loaded(batches[0]), small(batches[0]))
    assert points[0].tuned is not None


def test_a_folder_holds_one_sweep(model: nn.Module, batches: list[Tensor], tmp_path: Path) -> None:
    st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path)
    other = perceptron()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="the digest of the weights was .*new weights each time must be"):
        st.sweep(other, batches, ("macs", [0.5]), folder=tmp_path)
    with pytest.raises(CheckpointError, match="layers was"):
        st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path, skip="0")
    with pytest.raises(CheckpointError, match=r"methods was None and is \[\{'type': 'ActivationCP'.* \.\.\.\. Give"):
        st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path, methods=st.ActivationCP())
    with pytest.raises(CheckpointError, match="the calibration data was '32 samples .* and is '32 samples"):
        st.sweep(model, [2 * batch for batch in batches], ("macs", [0.5]), folder=tmp_path)
    again = st.sweep(model, [*torch.cat(batches[::-1]).split(8)], ("macs", [0.5]), folder=tmp_path)  # the same samples
    assert again.notes == ()
    record = json.loads((tmp_path / "run.json").read_text())
    lacking = [json.dumps({name: record[name] for name in record if name != left_out}) for left_out in record]
    for text in ("{", "{}", *lacking, json.dumps(record | {"guard": True}), None):
        if text is None:  # whoever deletes the record does not make the points those of another sweep
            (tmp_path / "run.json").unlink()
        else:
            (tmp_path / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"run\.json.*ive another folder, or delete the folders of points"):
            st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path)


def test_times_of_a_folder_are_of_one_runtime(model: nn.Module, batches: list[Tensor], tmp_path: Path) -> None:
    def swept(**how: Any) -> st.Sweep:
        return st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path, **how)

    swept(latency=st.Latency(cache=None))
    with pytest.raises(CheckpointError, match="batch was 1 and is 4"):
        swept(latency=st.Latency(cache=None, batch=4))
    with pytest.raises(CheckpointError, match="runtime was 'eager' and is 'compile'"):
        swept(latency=st.Latency(cache=None, runtime="compile"))
    record = json.loads((tmp_path / "run.json").read_text())
    del record["runtime"], record["digest"]  # as folders from before are, which are of eager mode
    (tmp_path / "run.json").write_text(json.dumps(sealed(record)))
    with pytest.raises(CheckpointError, match="runtime was 'eager' and is 'compile'"):
        swept(latency=st.Latency(cache=None, runtime="compile"))


def test_samples_that_are_others_in_every_reading_are_not_compared(model: nn.Module, tmp_path: Path) -> None:
    class Noise(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.randn(16, 8)

    data = DataLoader(Noise(), batch_size=None)
    st.sweep(model, data, ("macs", [0.5]), folder=tmp_path)
    again = st.sweep(model, data, ("macs", [0.5]), folder=tmp_path)
    assert "other samples in every reading" in str(again)


def test_a_loader_that_shuffles_gives_what_a_list_gives(model: nn.Module, tmp_path: Path) -> None:
    """Samples that are held out are known by their place in a batch, and the folder's digest by what they hold."""
    x = torch.randn(200, 8)
    loader = DataLoader(TensorDataset(x), batch_size=25, shuffle=True, generator=torch.Generator().manual_seed(3))
    one, two = (st.sweep(model, each, ("macs", [0.6]), folder=tmp_path / str(n)) for n, each in
                enumerate((list(x.split(25)), loader)))  # fmt: skip
    assert one[0].judged.samples == two[0].judged.samples == 25
    assert two[0].judged.error == pytest.approx(one[0].judged.error, rel=1e-3)
    again = st.sweep(model, loader, ("macs", [0.6]), folder=tmp_path / "1")
    assert same(again, two)
    assert "reading" not in str(again)


def test_positions_reach_calibration_and_make_another_sweep(model: nn.Module, tmp_path: Path) -> None:
    batches = list(torch.randn(60, 20, 8).split(20))
    st.sweep(model, batches, ("macs", [0.6]), positions=2, folder=tmp_path)
    rows = st.sweep(model, batches, ("macs", [0.6]), positions=2).result(0)
    assert rows.report.samples == 60
    with pytest.raises(CheckpointError, match="positions"):
        st.sweep(model, batches, ("macs", [0.6]), folder=tmp_path)


def test_what_is_damaged_is_made_again(model: nn.Module, batches: list[Tensor], tmp_path: Path) -> None:
    def swept(**more: Any) -> st.Sweep:
        return st.sweep(model, batches, ("macs", [0.7, 0.5]), folder=tmp_path, **more)

    whole = swept(keep_models=True)
    weights, plan = (tmp_path / "macs-50pct" / name for name in ("model.safetensors", "plan.json"))
    right = st.load(perceptron(), weights)(batches[0])
    for file in (weights, plan):
        file.write_bytes(file.read_bytes()[:-40])
    mended = swept(keep_models=True)
    assert "plan.json: " in mended[1].notes[-2]
    assert "it was written again" in mended[1].notes[-2]
    assert "macs-50pct/model.safetensors: it should have" in mended[1].notes[-1]
    assert mended[0] == whole[0]
    assert swept(keep_models=True) == whole  # notes are of the run that mends
    (tmp_path / "sweep.json").write_text("{")
    assert "sweep.json: not a sweep" in swept(keep_models=True).notes[-1]
    assert swept(keep_models=True).notes == ()
    assert torch.equal(st.load(perceptron(), weights)(batches[0]), right)
    assert st.Plan.read(plan) == whole[1].plan
    point = tmp_path / "macs-70pct/point.json"
    record = json.loads(point.read_text())
    figures = record | {"carried_out": record["carried_out"] | {"top1": 0.999}}
    shorter = record | {"plan": record["plan"] | {"entries": record["plan"]["entries"][:-1]}}
    older = {name: record[name] for name in record if name != "digest"}
    for text in (
        "",
        json.dumps({"asked": "macs=70%"}),
        point.read_text()[:-40],
        *map(json.dumps, (figures, shorter, older)),
    ):
        point.write_text(text)
        again = swept()
        assert "the point was made again" in again[0].notes[-1]
        assert "macs-70pct" in str(again)
        assert dataclasses.replace(again[0], seconds=0, notes=whole[0].notes) == dataclasses.replace(
            whole[0], seconds=0
        )
    assert (tmp_path / "macs-70pct/former.safetensors").exists()


def test_weights_that_are_asked_for_after_a_training_are_told_to_be_without_it(
    model: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path, fine_tune=nudge)
    (point,) = st.sweep(model, batches, ("macs", [0.5]), folder=tmp_path, keep_models=True)
    assert "before fine-tuning" in point.notes[-1]


def test_what_cannot_be_meant_is_refused_before_any_work(batches: list[Tensor], tmp_path: Path) -> None:
    def idle(net: nn.Module) -> float:
        pytest.fail("the network was judged")

    (tmp_path / "file").touch()
    (tmp_path / "taken/macs-50pct/point.json").mkdir(parents=True)
    for wrong, said in (
        ({"fine_tune": lambda small: None}, "fine_tune is called with a network and a file .*too many positional"),
        ({"fine_tune": 3}, "fine_tune is 3: expected a function of both"),
        ({"evaluate": lambda: 1.0}, "evaluate is called with a model"),
        ({"folder": tmp_path / "file"}, "there is a file where a folder is to be: .*file'"),
        ({"folder": tmp_path / "file/in"}, "there is a file where a folder is to be: .*file'"),
        ({"folder": tmp_path / "taken"}, "there is a folder where a file is to be: .*taken/macs-50pct/point.json'"),
        ({"folder": ""}, "folder is '': it is empty"),
        ({"folder": "a\0b"}, "no path holds a NUL"),
        ({"folder": 3}, "folder is 3: expected a path"),
        ({"forward": lambda batch: batch}, "forward is called with the model and a batch"),
        ({"samples": lambda: 1}, "samples is called with a batch"),
        ({"mask": lambda: None}, "mask is called with a batch"),
        ({"mask": 3}, "mask is 3: expected"),
        ({"costs": {"joules": lambda: 1.0}}, "costs\\['joules'\\] is called with a layer"),
        ({"selector": lambda table: None}, "selector is called with a table and a budget"),
    ):
        with pytest.raises((TypeError, ValueError, OSError), match=said):
            st.sweep(perceptron(), batches, ["macs=50%"], **{"evaluate": idle, **wrong})


def test_a_point_that_is_not_there_is_named(model: nn.Module, batches: list[Tensor]) -> None:
    found = st.sweep(model, batches, ("macs", [0.5]))
    for wrong in (1, -2, 5):
        with pytest.raises(IndexError, match=f"no point {wrong} of a sweep with 1 point: there are 0 to 0"):
            found.result(wrong)


def test_what_a_metric_varies_by_is_told(model: nn.Module, batches: list[Tensor]) -> None:
    found = st.sweep(model, batches, ("macs", [0.5]), evaluate=lambda net: Score(90.0, 100))
    assert found[0].judged.standard_error == pytest.approx(3.0)
    assert "standard error of up to 3" in str(found)
    assert found.rows()[0]["standard_error"] == pytest.approx(3.0)
    assert "standard error" not in str(st.sweep(model, batches, ("macs", [0.5]), evaluate=first_weight))


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
        ("mac", r"there is no cost 'mac' to sweep over.*latency\. Did you mean 'macs'"),
        ("macs=50%", "there is no cost 'macs=50%' to sweep over.*list such as"),
        (("macs", [50]), "the share 50 of macs"),
        (("macs", [0]), "the share 0 of macs"),
        (("macs", "0.5"), "the shares of macs are '0.5'"),
        (("macs", 0.5), "the shares of macs are 0.5.*'macs=50%'"),
        ([], "there are no budgets"),
        ({"macs": 0.5}, "budgets is .*: expected a cost"),
        ([0.5], "the budget is 0.5"),
    ],
)
def test_budgets_that_cannot_be_meant_are_refused_before_any_work(budgets: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        st.sweep(perceptron(), None, budgets)  # pyright: ignore[reportArgumentType]


def test_weights_are_kept_in_a_folder_alone() -> None:
    with pytest.raises(ValueError, match="keep_models=True writes weights to a folder.*give folder="):
        st.sweep(perceptron(), None, keep_models=True)  # pyright: ignore[reportArgumentType]


def test_each_cost_that_a_budget_limits_has_a_column(model: nn.Module, batches: list[Tensor]) -> None:
    found = st.sweep(model, batches, ["macs=60%", "stored=80%"], costs={"stored": st.parameters})
    assert found.shown_costs == ["macs", "stored", "parameters"]


@pytest.mark.parametrize("value", ["good", float("nan")])
def test_a_metric_is_a_finite_number(model: nn.Module, batches: list[Tensor], value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="evaluate returned"):
        st.sweep(model, batches, evaluate=lambda net: value)


def test_networks_of_which_a_metric_is_no_number_are_told_of(model: nn.Module, batches: list[Tensor]) -> None:
    whole = sum(p.numel() for p in model.parameters())

    def metric(net: nn.Module) -> float:
        return 1.0 if sum(p.numel() for p in net.parameters()) > 0.6 * whole else float("nan")

    found = st.sweep(model, batches, ("parameters", [0.8, 0.5]), evaluate=metric)
    assert [point.asked for point in found.front()] == ["parameters=80%"]
    assert "metric is no finite number with parameters=50%: not on the front" in found.sentences
