"""compress: one call from a model to a smaller one within its budget, and what the report says."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import spectrim as st
from spectrim import preparation
from spectrim.cost.counted import macs
from spectrim.errors import InfeasibleBudgetError, PlanError, SlowerError, ToleranceError
from spectrim.network.layer import LayerSpec
from spectrim.nn.checkpoint import header_bytes
from spectrim.nn.modules import Factored
from spectrim.nn.standing import StandIn
from spectrim.nn.surgery import parameter_count, size_in_bytes
from spectrim.nn.timing import Timing
from spectrim.pipeline import sets
from spectrim.search import measured
from spectrim.search.arms import Arm
from spectrim.selection.budget import Budget
from spectrim.selection.plan import Plan
from tests.cases import MODELS, batches_for, one_thread, sample_inputs, settled


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def counted_macs(model: nn.Module, name: str) -> float:
    inputs = sample_inputs(MODELS[name][1], 2)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(inputs)
    return counter.get_total_flops() / 2 / 2


def share_of(budget: Budget, cost: str) -> float:
    share = getattr(budget, cost)
    return float(share.rstrip("%")) / 100 if isinstance(share, str) else share


@pytest.mark.table
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [Budget(macs=0.6), Budget(parameters="70%"), Budget(parameters=0.8, macs=0.7)])
def test_the_built_model_meets_the_budget(name: str, budget: Budget) -> None:
    model, batches = settled(name), batches_for(name)
    before = copy.deepcopy(model.state_dict())
    result = st.compress(model, batches, budget)
    # Counted on the built model by other means than the plan's.
    built = {
        "parameters": (parameter_count(result.model), parameter_count(model)),
        "macs": (counted_macs(result.model, name), counted_macs(model, name)),
        "bytes": (size_in_bytes(result.model), size_in_bytes(model)),
    }
    for cost, (small, dense) in built.items():
        assert result.plan.costs[cost] == small
        assert result.plan.dense_costs[cost] == dense
        if cost in budget.costs:
            assert small <= share_of(budget, cost) * dense
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    inputs = batches[0]
    with torch.no_grad():
        assert result.model(inputs).shape == model(inputs).shape
        assert torch.isfinite(result.model(inputs)).all()
    assert result.plan.unit == result.candidates.unit == "weighted output energy"


FILES = {
    "low rank": (lambda: None, {}),
    "groups": (lambda: None, {"groups": True}),
    "sparse": (lambda: st.LowRankPlusSparse(share=0.3, densities=(0.0, 0.1, 0.3), turns=4), {}),
    "filters": (lambda: st.PrincipalFilters(multiple_of=1), {}),
    "filters and pairs": (lambda: [st.PrincipalFilters(), st.ActivationSVD()], {}),
}


@pytest.mark.table
@pytest.mark.parametrize("limit", ["80%", "30kB"])
@pytest.mark.parametrize(("methods", "options"), FILES.values(), ids=FILES)
def test_a_limit_on_bytes_is_met_by_the_file(methods, options, limit, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    sizes = [(8, 48), (48, 48), (48, 48), (48, 8)]
    model = nn.Sequential(*(part for a, b in sizes for part in (nn.Linear(a, b), nn.ReLU())))
    x = torch.randn(64, 8)
    result = st.compress(model, x.split(32), Budget(bytes=limit), methods=methods(), reconstruct=False, **options)
    st.save(result.model, result.plan, tmp_path / "small.safetensors")
    file, numbers = (tmp_path / "small.safetensors").stat().st_size, size_in_bytes(result.model)
    assert numbers < file <= result.plan.costs["bytes"] <= result.plan.budget["bytes"]
    assert result.plan.costs["bytes"] <= file + 2048
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    dense = (tmp_path / "dense.safetensors").stat().st_size
    assert dense <= size_in_bytes(model) + header_bytes(model) <= dense + 256
    wanted = 30_000 if limit == "30kB" else 0.8 * (size_in_bytes(model) + header_bytes(model))
    assert result.plan.budget["bytes"] == pytest.approx(wanted)


@pytest.mark.table
@pytest.mark.parametrize("budget", ["macs=70%", "parameters=70%", "bytes=90%"])
@pytest.mark.parametrize("methods", [st.ActivationSVD(), st.LowRankPlusSparse(share=0.3)], ids=["pairs", "sparse"])
def test_a_report_tells_the_bytes_of_the_files(methods, budget: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48)).eval()
    batches = torch.randn(64, 48).split(32)

    def told(model: nn.Module) -> dict[str, float]:
        result = st.compress(model, batches, budget, methods=methods, reconstruct=False)
        st.save(result, tmp_path / "small.safetensors")
        assert result.plan.changed
        (row,) = [row for row in result.report.rows() if row["cost"] == "bytes"]
        assert row["compressed"] == (tmp_path / "small.safetensors").stat().st_size
        if budget == "bytes=90%":  # a share of the same file
            assert result.plan.budget["bytes"] == pytest.approx(0.9 * row["dense"], abs=256)
        return row | {"model": result.model}

    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    first = told(model)
    assert first["dense"] == (tmp_path / "dense.safetensors").stat().st_size
    if isinstance(methods, st.ActivationSVD):
        # Of a network that was compressed before, the file that it has.
        assert told(first["model"])["dense"] == first["compressed"]


@pytest.mark.table(every=2)
@pytest.mark.parametrize("methods", ["auto", [st.PrincipalFilters(), st.ActivationSVD()]], ids=["competing", "set"])
def test_the_lowest_file_that_is_told_can_be_reached(methods, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    arms = [Arm("pairs", (st.ActivationSVD(),)), Arm("filters", (st.PrincipalFilters(),))]
    monkeypatch.setattr(sets, "usual", lambda *_: arms)
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4)).eval()
    batches = torch.randn(64, 16).split(32)

    def refused(limit: int) -> tuple[float, float]:
        with pytest.raises(InfeasibleBudgetError, match="lowest reachable") as raised:
            st.compress(model, batches, Budget(bytes=limit), methods=methods, reconstruct=False)
        return raised.value.lowest, raised.value.dense

    # Below all numbers, and below numbers and header.
    lowest, dense = refused(100)
    assert refused(2000) == (lowest, dense)
    assert dense == size_in_bytes(model) + header_bytes(model)
    limit = Budget(bytes=round(lowest))
    result = st.compress(model, batches, limit, methods=methods, reconstruct=False)
    st.save(result, tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size <= lowest == result.plan.budget["bytes"]


@pytest.mark.parametrize(
    "methods",
    [
        [st.ActivationSVD()],
        [st.ActivationSVD(), st.LowRankPlusSparse()],
        pytest.param([st.PrincipalFilters(), st.ActivationSVD()], marks=pytest.mark.slow),
    ],
    ids=["pairs", "sparse", "filters and pairs"],
)
@pytest.mark.parametrize("share", [0.001, 0.02])  # below all numbers, and below numbers with a header
def test_a_file_that_cannot_be_is_refused_before_anything_is_fitted(methods, share: float, monkeypatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 16)).eval()
    batches = torch.randn(256, 128).split(64)

    def fitted(*_: Any) -> None:
        raise AssertionError("a curve was asked for")

    with monkeypatch.context() as patched:
        for method in (st.ActivationSVD, st.LowRankPlusSparse):
            patched.setattr(method, "curve", fitted)
        with pytest.raises(InfeasibleBudgetError, match="lowest reachable") as raised:
            st.compress(model, batches, Budget(bytes=share), methods=methods, reconstruct=False)
    lowest = raised.value.lowest
    assert share * raised.value.dense < lowest < 0.2 * raised.value.dense
    result = st.compress(model, batches, Budget(bytes=round(lowest)), methods=methods, reconstruct=False)
    assert result.plan.costs["bytes"] <= lowest


@pytest.mark.parametrize(
    ("lowest", "told"), [(1_234_501.0, "1.235 M"), (4_681.2, "4,682"), (0.12341, "0.1235"), (50, "50")]
)
def test_the_lowest_cost_is_told_rounded_up(lowest, told) -> None:
    assert f"reachable is {told} (" in str(InfeasibleBudgetError("macs", 0.01, lowest, 2e6))


def test_a_limit_that_the_header_alone_takes_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(InfeasibleBudgetError, match=r"header \(text, \d+\.\d% of bytes\): names, shapes") as raised:
        st.compress(model, torch.randn(64, 8).split(32), Budget(bytes=0.9), methods=[st.ActivationSVD()])
    # Layers can change: that their outputs stay explains nothing.
    assert "channels" not in str(raised.value)
    # Of the dense network's own file, whose header is another.
    assert raised.value.dense == size_in_bytes(model) + header_bytes(model)
    assert raised.value.budget == pytest.approx(0.9 * raised.value.dense)
    assert raised.value.lowest > raised.value.budget


def watts(specs: Sequence[LayerSpec]) -> float:
    return sum(2e-3 * spec.stored + 3e-3 * spec.in_channels for spec in specs)


@pytest.mark.table
@pytest.mark.parametrize("budget", ["watts=70%", {"watts": 0.8, "macs": 0.8}])
@pytest.mark.parametrize("methods", [None, [st.PrincipalFilters(multiple_of=2), st.WeightSVD(multiple_of=1)]])
def test_a_cost_of_the_users_own_is_limited_in_one_call(budget: str | dict, methods: list | None) -> None:
    if methods is not None:
        pytest.importorskip("torch_pruning")
    model, batches = settled("cnn"), batches_for("cnn")
    result = st.compress(model, batches, budget, methods=methods, costs={"watts": watts})
    spent = {}
    for name, network in (("dense", model), ("small", result.model)):
        plain = (m for m in network.modules() if not isinstance(m, StandIn))
        layers = [module for module in plain if isinstance(module, (nn.Conv2d, nn.Linear))]
        inputs = [layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features for layer in layers]
        spent[name] = sum(2e-3 * layer.weight.numel() + 3e-3 * n for layer, n in zip(layers, inputs, strict=True))
    assert result.plan.costs["watts"] == pytest.approx(spent["small"])
    assert result.plan.dense_costs["watts"] == pytest.approx(spent["dense"])
    for cost, limit in Budget.of(budget).limits(result.plan.dense_costs).items():
        assert result.plan.costs[cost] <= limit * (1 + 1e-9)
    assert "watts" in str(result.report)


@pytest.mark.slow
def test_a_generous_budget_loses_little_and_a_tight_one_more() -> None:
    model, batches = settled("residual"), batches_for("residual")
    inputs = torch.cat(batches)
    lost = []
    for share in (0.95, 0.6, 0.35):
        small = st.compress(model, batches, Budget(macs=share), methods=st.ActivationSVD()).model
        with torch.no_grad():
            lost.append(float((small(inputs) - model(inputs)).square().mean()))
    assert lost == sorted(lost)
    assert lost[0] < 0.3 * lost[-1]


def test_where_outputs_agree_poorly_the_report_says_what_else_there_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).eval()
    batches = list(torch.randn(4, 64, 16))

    def told(share: float, **options: Any) -> tuple[bool, bool]:
        report = st.compress(model, batches, Budget(macs=share), **options).report
        assert report.agreement is not None
        return report.agreement.agreed < 0.9, any("without training the budget" in note for note in report.notes)

    assert told(0.2) == (True, True)
    assert told(1.0) == (False, False)
    # Who names methods knows of others.
    assert told(0.2, methods=[st.ActivationSVD()]) == (True, False)


def depthwise() -> nn.Module:
    """Layers of few channels between depthwise convolutions: of their costs low rank takes 85 % at most."""
    torch.manual_seed(0)
    kernels = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 5, padding=2, groups=12), nn.Conv2d(12, 12, 1)
    return nn.Sequential(*kernels, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [None, pytest.param(1e-9, marks=pytest.mark.slow)])
def test_where_low_rank_is_not_enough_all_methods_compete(tolerance: float | None) -> None:
    pytest.importorskip("torch_pruning")
    model, batches = depthwise(), list(torch.randn(128, 3, 8, 8).split(32))
    with pytest.raises(InfeasibleBudgetError):
        st.compress(model, batches, "macs=25%", methods=[st.ActivationSVD()])
    result = st.compress(model, batches, "macs=25%", min_agreement=tolerance)
    assert result.plan.costs["macs"] <= 0.25 * result.plan.dense_costs["macs"]
    assert next(arm.name for arm in result.report.arms if arm.chosen).startswith("filters")
    assert "cannot be met" in next(arm.note for arm in result.report.arms if arm.name.startswith("low rank"))
    assert "cannot be met" in result.report.notes[0]
    assert ": so other sets of methods competed" in result.report.notes[0]


def test_within_a_tolerance_too_other_sets_compete_below_what_low_rank_can_reach() -> None:
    pytest.importorskip("torch_pruning")
    model, batches = depthwise(), list(torch.randn(64, 3, 8, 8).split(32))
    result = st.compress(model, batches, min_agreement=1e-9)
    named = st.compress(model, batches, min_agreement=1e-9, methods=[st.ActivationSVD()])
    assert result.plan.costs["macs"] < 0.5 * named.plan.costs["macs"]
    assert ": so other sets of methods competed" in result.report.notes[0]
    (chosen,) = [arm for arm in result.report.arms if arm.chosen]
    assert chosen.costs == result.plan.costs
    assert not any("methods='auto'" in note for note in result.report.notes)
    (said,) = [note for note in named.report.notes if "methods='auto'" in note]
    assert "cannot be met" in said
    assert not any("methods='auto'" in note for note in st.compress(model, batches, "macs=95%").report.notes)


def test_a_budget_that_low_rank_meets_and_that_does_not_hold_has_other_sets_compete() -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        model[0].bias[::2] = -100.0  # half of the channels say nothing, and all ranks are full
    batches = list(torch.randn(256, 32).split(64))
    with pytest.raises(ToleranceError, match="No smaller network holds it"):
        st.compress(model, batches, "macs=50%", min_agreement=0.99, methods=st.ActivationSVD())
    result = st.compress(model, batches, "macs=50%", min_agreement=0.99)
    assert result.plan.costs["macs"] <= 0.5 * result.plan.dense_costs["macs"]
    torch.testing.assert_close(result.model(batches[0]), model(batches[0]), atol=1e-4, rtol=1e-4)
    (said,) = [note for note in result.report.notes if "so other sets of methods competed" in note]
    assert said.startswith("with low rank alone the tolerance is NOT met")
    with pytest.raises(ToleranceError, match="No smaller network holds it"):
        st.compress(model, batches, "macs=30%", max_drop=0.0, evaluate=lambda net: -_apart(net, model, batches))


def _apart(small: nn.Module, model: nn.Module, batches: Sequence[Tensor]) -> float:
    return float((small(batches[0]) - model(batches[0])).abs().max())


def test_seconds_limit_what_competes_after_the_default_and_nothing_that_was_named() -> None:
    model, batches = depthwise(), list(torch.randn(64, 3, 8, 8).split(32))
    result = st.compress(model, batches, min_agreement=1e-9, seconds=0)
    first, *others = result.report.arms
    assert (first.name, first.chosen, first.costs) == ("low rank", True, result.plan.costs)
    assert all(arm.note == "not tried, as 0 s were over" for arm in others)
    assert any("the search ended after 0 s" in note for note in result.report.notes)
    for said in ({"methods": st.ActivationSVD()}, {"groups": False}):
        with pytest.raises(ValueError, match=r"seconds=3 limits how long.*methods='auto'"):
            st.compress(model, batches, "macs=90%", seconds=3, **said)


def test_where_a_smaller_network_of_the_default_does_not_hold_nothing_else_competes() -> None:
    model, batches = depthwise(), list(torch.randn(64, 3, 8, 8).split(32))
    whole = sum(p.numel() for p in model.parameters())
    most = {"max_drop": 0, "evaluate": lambda net: float(sum(p.numel() for p in net.parameters()) > 0.8 * whole)}
    result = st.compress(model, batches, **most)
    assert result.plan.costs["macs"] < result.plan.dense_costs["macs"]
    assert not result.report.arms
    (said,) = [note for note in result.report.notes if "methods='auto'" in note]
    assert "cannot be met" in said


def test_where_low_rank_reaches_further_than_the_tolerance_nothing_else_competes() -> None:
    model = settled("cnn")
    result = st.compress(model, batches_for("cnn"), min_agreement=0.99)
    assert not result.report.arms
    assert not any("competed" in note for note in result.report.notes)


def test_what_was_said_of_methods_or_groups_holds_where_it_is_not_enough() -> None:
    model, batches = depthwise(), list(torch.randn(64, 3, 8, 8).split(32))
    for said in ({"methods": st.ActivationSVD()}, {"groups": False}):
        with pytest.raises(InfeasibleBudgetError):
            st.compress(model, batches, "macs=25%", **said)


def test_a_budget_out_of_reach_names_the_lowest() -> None:
    model, batches = settled("cnn"), batches_for("cnn")
    with pytest.raises(InfeasibleBudgetError) as caught:
        st.compress(model, batches, Budget(macs=0.01))
    error = caught.value
    assert error.cost == "macs"
    assert 0.01 * error.dense < error.lowest < error.dense
    # The lowest is reachable.
    result = st.compress(model, batches, Budget(macs=error.lowest))
    assert result.plan.costs["macs"] == error.lowest


def test_the_same_call_gives_the_same_bits_and_batches_may_come_from_an_iterator() -> None:
    model, batches = settled("residual"), batches_for("residual")
    one = st.compress(model, batches, Budget(macs=0.5))
    torch.manual_seed(5)
    two = st.compress(model, iter(batches), Budget(macs=0.5))
    assert one.plan.to_json() == two.plan.to_json()
    pairs = zip(one.model.state_dict().items(), two.model.state_dict().items(), strict=True)
    assert all(k == m and torch.equal(v, w) for (k, v), (m, w) in pairs)


def test_a_plan_read_from_a_file_replays(tmp_path) -> None:
    model, batches = settled("residual"), batches_for("residual")
    result = st.compress(model, batches, Budget(parameters=0.6))
    result.plan.write(tmp_path / "plan.json")
    again = st.apply(model, result.sites, Plan.read(tmp_path / "plan.json"), batches)
    for key, value in result.model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_options_reach_their_steps() -> None:
    model, batches = settled("residual"), batches_for("residual")
    told = []
    result = st.compress(
        model,
        batches,
        Budget(parameters=0.7),
        methods=[st.WeightSVD(unfoldings=("channel",))],
        skip="head",
        sensitivity=False,
        reconstruct=False,
        progress=lambda what, done, total: told.append((what, done, total)),
    )
    assert result.plan.unit == "output energy"
    assert {entry.choice.method for entry in result.plan} <= {"", "WeightSVD"}
    assert isinstance(result.model.head, nn.Linear)
    assert ("calibrate", 2, 2) in told
    assert {what for what, _, _ in told} == {"calibrate", "tabulate", "apply"}
    only = st.compress(model, batches, Budget(parameters=0.9), only="conv*")
    assert {entry.site for entry in only.plan} == {"conv1", "conv2"}


def test_nothing_to_compress_is_an_error_with_the_reasons() -> None:
    with pytest.raises(PlanError, match="Sequential has no layer to compress .it has no linear or conv layers."):
        st.compress(nn.Sequential(nn.ReLU()), [torch.ones(2, 3)], Budget(macs=0.5))
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(PlanError, match="0: depthwise: each group has one channel"):
        st.compress(model, [torch.ones(2, 4, 5, 5)], Budget(macs=0.5))


def test_the_report_lists_costs_and_skipped_layers() -> None:
    model, batches = settled("depthwise"), batches_for("depthwise")
    result = st.compress(model, batches, Budget(macs=0.7), skip="0")
    text = str(result.report)
    assert result.report.samples == 96
    assert "96 calibration samples" in text
    assert "left alone: 2 (Conv2d 3x3 g16): depthwise: each group has one channel" in text
    assert "left alone: 0 (Conv2d 1x1): skipped on request" in text
    assert f"1 of {len(result.plan.entries)} layers changed" in text
    for cost, name in {"parameters": "parameters", "macs": "MACs"}.items():
        (line,) = [line for line in text.splitlines() if line.startswith(name)]
        assert line.endswith(f"{result.plan.ratio(cost):.2f}x")
    assert "measured" not in text


# Latency, with a clock that can be set.


class Clock:
    """Stands in for the stopwatch: layers take time in step with their MACs, whole models something else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, overhead: float, factor: float) -> None:
        self.name, self.overhead, self.factor = name, overhead, factor
        self.seen: list[float] = []
        monkeypatch.setattr(preparation, "measure_latency", self.models)
        monkeypatch.setattr(measured, "measure_latency", self.models)

    def latency(self) -> st.Latency:
        def timer(chains, **_: object) -> list[float]:
            return [sum(macs([spec]) * 1e-3 for spec in chain) for chain in chains]

        return st.Latency(cache=None, timer=timer)

    def models(self, models: Mapping[str, nn.Module], example: Any, **_: object) -> dict[str, Timing]:
        found = {}
        for key, model in models.items():
            with torch.no_grad():
                model(*example)
            # What was factored runs slower than the sum of its layers says.
            slow = self.factor if any(isinstance(m, Factored) for m in model.modules()) else 1.0
            found[key] = Timing((self.overhead + slow * counted_macs(model, self.name) * 1e-3,) * 3)
        if "compressed" in found:
            self.seen.append(found["compressed"].p50 / found["dense"].p50)
        return found


@pytest.mark.parametrize(
    ("overhead", "factor"),
    [*(pytest.param(*each, marks=pytest.mark.slow) for each in ((0.0, 1.0), (5.0, 1.0), (0.0, 0.8))), (5.0, 1.25)],
)
def test_a_latency_budget_is_met_as_measured(monkeypatch: pytest.MonkeyPatch, overhead: float, factor: float) -> None:
    model, batches = settled("residual"), batches_for("residual")
    clock = Clock(monkeypatch, "residual", overhead, factor)
    result = st.compress(model, batches, Budget(latency=0.6), latency=clock.latency(), sensitivity=False)
    measured = result.report.measured
    ratio = measured["compressed"].p50 / measured["dense"].p50
    assert ratio <= 0.6
    # A table with few ranks cannot hit a budget exactly, but leaves little of it unused.
    assert ratio > 0.5
    assert 1 <= len(clock.seen) <= 4
    assert ratio in [pytest.approx(seen) for seen in clock.seen]
    if factor > 1:
        assert clock.seen[0] > 0.6, "the first plan must miss for the correction to be tested"
    assert not result.report.notes
    assert "measured ms" in str(result.report)
    said = " ".join(result.report.sentences)
    assert "the latency budget is met" in said
    assert f"with {result.plan.facts['batch']} sample" in said
    assert result.plan.facts["batch"] == 1


@pytest.mark.slow
def test_a_latency_budget_that_is_not_met_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = settled("residual"), batches_for("residual")
    clock = Clock(monkeypatch, "residual", 0.0, 100.0)
    one: dict[str, Any] = {"methods": [st.ActivationSVD()], "sensitivity": False, "latency": clock.latency()}
    with pytest.raises(SlowerError, match="latency <= .*slower than dense"):
        st.compress(model, batches, Budget(latency=0.9), **one)
    result = st.compress(model, batches, Budget(macs=0.6), **one)
    measured = result.report.measured
    assert measured["compressed"].p50 > measured["dense"].p50
    assert "the compressed model is SLOWER than dense" in str(result.report)
    assert "such as latency=60%" in str(result.report)
    limit = {"latency": 0.9 * result.plan.dense_costs["latency"]}
    result = result.reporting(plan=dataclasses.replace(result.plan, budget=limit))
    text = str(result.report)
    assert "the latency budget is NOT met" in text
    assert "the machine was busy" not in text
    times = [measured["compressed"].p50] * 5 + [measured["compressed"].p50 * 3] * 5
    busy = dataclasses.replace(
        result.report, measured={**measured, "compressed": Timing(tuple(times), (0,) * 5 + (1,) * 5)}
    )
    assert "the machine was busy" in " ".join(busy.sentences)
    # The table and the sentence rest on one statistic, that of an idle machine.
    row = busy.rows()[-1]
    assert row["measured"]
    assert f"{row['compressed']:.3f} ms measured" in " ".join(busy.sentences)


def test_guard_measures_and_offers_nothing_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = settled("residual"), batches_for("residual")
    clock = Clock(monkeypatch, "residual", 1.0, 1.0)
    result = st.compress(model, batches, Budget(macs=0.6), latency=clock.latency(), guard=True, sensitivity=False)
    assert len(clock.seen) == 1
    for row in result.candidates:
        assert all(o.costs["latency"] < row.dense.costs["latency"] for o in row.options[1:])
    for entry in result.plan:
        assert entry.choice.is_dense or entry.costs["latency"] < entry.dense_costs["latency"]
    assert set(result.report.measured) == {"dense", "compressed"}
