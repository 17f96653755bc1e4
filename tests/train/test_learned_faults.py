"""Faults of learned ranks that were found once, one test each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.errors import CheckpointError, InfeasibleBudgetError, TrainingError
from spectrim.methods import ActivationSVD, WeightSVD
from spectrim.network.choices import DENSE, LowRankChoice
from spectrim.nn.surgery import parameter_count
from spectrim.nn.timing import Timing
from spectrim.nn.watch.state import evaluating
from spectrim.selection.candidates import Option, Row
from spectrim.selection.plan import Plan
from spectrim.selection.trajectory import Trajectory
from spectrim.train import LearnedRanks, Recipe, Schedule, budget_path, fine_tune, learn_ranks
from spectrim.train.c_step import ZERO, buildable
from tests.cases import batches_for, settled
from tests.train.learned import perturb, with_weights_of
from tests.train.learning_script import LEARNING, TUNING, Residual, Stop, Stopping, learn, options
from tests.train.small import equal, loader, weights

BUDGET = st.Budget(parameters=0.5)


def reseed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - the global one


@pytest.mark.parametrize("data", [pytest.param(None, marks=pytest.mark.slow), loader])
def test_a_run_does_not_depend_on_what_ran_before_and_leaves_the_generators(data) -> None:
    found, left = [], []
    for seed in (0, 1):
        settings = options(
            calibration=data and data(), learning=Recipe(epochs=1), tuning=Recipe(epochs=0),
            schedule=Schedule(0.1, 1.6, 2),
        )  # fmt: skip
        net, batches = Residual(), loader()
        reseed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        found.append(learn_ranks(net, batches, BUDGET, **settings))
        left += [
            torch.equal(torch.get_rng_state(), before[0]),
            random.getstate() == before[1],
            np.random.get_state()[1].tolist() == before[2],  # noqa: NPY002
        ]
    assert equal(weights(found[0].model), weights(found[1].model))
    assert all(left)


class Clock:
    """Stopwatch whose second reading of anything is one per cent off the first."""

    def __init__(self, monkeypatch, overhead: float, drift: float = 0.0) -> None:
        self.overhead, self.drift, self.reading = overhead, drift, 0
        for where in ("spectrim.search.measured", "spectrim.preparation"):
            monkeypatch.setattr(f"{where}.measure_latency", self.models)

    def off(self) -> float:
        self.reading += 1
        return 1 + self.drift * (self.reading % 7)

    def latency(self) -> st.Latency:
        def timer(chains, **_: object) -> list[float]:
            return [self.off() * sum(st.macs([spec]) * 1e-4 for spec in chain) for chain in chains]

        return st.Latency(cache=None, timer=timer)

    def models(self, models, example, **_: object) -> dict[str, Timing]:
        found = {}
        for key, model in models.items():
            counter = torch.utils.flop_counter.FlopCounterMode(display=False)
            with evaluating(model), counter, torch.no_grad():
                model(*example)
            found[key] = Timing((self.off() * (self.overhead + counter.get_total_flops() / 2e4 / len(example[0])),) * 3)
        return found


@pytest.mark.slow
def test_milliseconds_are_of_the_whole_network(monkeypatch) -> None:
    clock = Clock(monkeypatch, overhead=2.0)
    net = Residual().eval()
    example = (torch.zeros(1, 1, 6, 6),)
    dense = clock.models({"dense": net}, example)["dense"].p50
    asked = 2.0 + 0.6 * (dense - 2.0)
    result = learn_ranks(
        net,
        loader(),
        st.Budget(latency=f"{asked}ms"),
        latency=clock.latency(),
        **options(learning=Recipe(epochs=1), tuning=Recipe(epochs=0), methods=[WeightSVD(multiple_of=1)]),
    )
    found = clock.models({"small": result.model.eval()}, example)["small"].p50
    assert result.plan.dense_costs["latency"] == pytest.approx(dense)
    assert 0.9 * asked < found <= asked


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, pytest.param(15, marks=pytest.mark.slow)])
def test_a_run_under_a_latency_budget_continues_though_times_are_measured_anew(
    monkeypatch, tmp_path: Path, stop
) -> None:
    clock = Clock(monkeypatch, overhead=0.2, drift=0.01)
    short = options(learning=replace(LEARNING, epochs=2), tuning=replace(TUNING, epochs=1))

    def run(batches, **changes):
        clock.reading += 3
        return learn_ranks(Residual(), batches, st.Budget(latency=0.6), latency=clock.latency(), **short, **changes)

    with pytest.raises(Stop):
        run(Stopping(stop), checkpoint=tmp_path)
    run(loader(), checkpoint=tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        {"multiplier": 1e-4},
        {"cost": "bytes"},
        {"schedule": Schedule(1, 2, 3)},
        {"normalize": False},
        {"dense": False},
        {"augmented": False},
        {"methods": [WeightSVD(("channel",))]},
    ],
)
def test_states_of_other_settings_are_refused(other) -> None:
    model = settled("mlp")
    given = {"multiplier": 1e-6, "cost": "parameters"}
    state = LearnedRanks(model, st.find(model), **given).state_dict()
    with pytest.raises(CheckpointError, match="belongs to another run"):
        LearnedRanks(model, st.find(model), **given | other).load_state_dict(state)


def test_finish_after_the_first_step_had_other_methods() -> None:
    model, batches = settled("mlp"), batches_for("mlp")
    sites = st.calibrate(model, st.find(model), batches)
    ranks = LearnedRanks(model, sites, multiplier=1e-5, cost="parameters", start=[ActivationSVD()])
    assert any(entry.choice.method == "ActivationSVD" for entry in ranks.plan)
    _, plan = ranks.finish()
    assert {entry.choice.method for entry in plan} <= {"WeightSVD", ""}


def test_the_candidates_of_a_result_can_be_selected_from_and_applied() -> None:
    model, batches = settled("mlp"), batches_for("mlp")
    result = learn_ranks(
        model,
        [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches],
        BUDGET,
        learning=Recipe(epochs=1),
        tuning=Recipe(epochs=0),
    )
    assert ZERO not in {option.choice for row in result.candidates for option in row.options}
    plan = st.select(result.candidates, st.Budget(parameters=0.4))
    with pytest.raises(st.PlanError, match="has other numbers in the sites"):
        st.apply(model, result.sites, plan)
    trained = with_weights_of(result, model)
    small = st.apply(trained, result.sites, plan)
    assert parameter_count(small) == plan.costs["parameters"]


@pytest.mark.slow
def test_results_of_a_path_do_not_change_afterwards() -> None:
    kept = []
    results = budget_path(
        Residual(),
        loader(),
        [st.Budget(parameters=0.8), st.Budget(parameters=0.5)],
        done=lambda r: kept.append([w.clone() for site in r.sites for w in site.weights]),
        **options(learning=Recipe(epochs=1), tuning=Recipe(epochs=0)),
    )
    now = [w for site in results[0].sites for w in site.weights]
    assert all(torch.equal(a, b) for a, b in zip(kept[0], now, strict=True))


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(2, 11), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((3, 16), (5, 16), (4, 13), (7, 40)))],
)
def test_the_schedule_is_gone_through_to_its_end(epochs: int, steps: int) -> None:
    result = learn(
        learning=Recipe(epochs=epochs),
        tuning=Recipe(epochs=0),
        schedule=Schedule(0.1, 1.1, steps),
        patience=None,
        weigh=False,
    )
    assert len(result.trajectory) == steps


def test_evaluate_sees_the_nested_network_in_evaluation_mode_and_moves_no_generator() -> None:
    model, seen = settled("residual").train(), []

    def evaluate(net: nn.Module) -> float:
        torch.randn(3)
        seen.append(net.training)
        return 0.0

    before = torch.get_rng_state()
    LearnedRanks(model, st.find(model), BUDGET, evaluate=evaluate)
    assert seen == [False]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_can_be_kept_and_read(bad: float) -> None:
    model = settled("mlp")
    ranks = LearnedRanks(model, st.find(model), BUDGET, evaluate=lambda net: bad)
    ranks.load_state_dict(ranks.state_dict())
    assert Trajectory.from_json(ranks.trajectory.to_json()).records[0].metric is None


def test_a_budget_that_the_methods_cannot_meet_is_refused_at_once() -> None:
    model, batches = settled("mlp"), batches_for("mlp")
    sites = st.calibrate(model, st.find(model), batches)
    with pytest.raises(InfeasibleBudgetError):
        LearnedRanks(model, sites, st.Budget(parameters=0.45), methods=[WeightSVD(multiple_of=8)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_their_layer_at_any_time(bad: float) -> None:
    model = settled("residual")
    ranks = LearnedRanks(model, st.find(model), BUDGET)
    model.conv2.weight.data[0, 0, 0, 0] = bad
    with pytest.raises(FloatingPointError, match="layer 'conv2'"):
        ranks.finish()
    with pytest.raises(FloatingPointError, match="layer 'conv2'"):
        LearnedRanks(model, st.find(model), BUDGET)


def test_a_loss_that_is_not_finite_is_told_before_the_weights_that_come_of_it() -> None:
    model = settled("mlp")
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1.*look in the batches"):
        st.learn_ranks(model, batches_for("mlp"), BUDGET, loss=lambda out, _: out.sum() * float("nan"))


def test_after_such_an_error_the_table_is_that_of_the_weights() -> None:
    model = settled("mlp")
    ranks = LearnedRanks(model, st.find(model), BUDGET)
    perturb(model[0])
    held = model[2].weight[0, 0].item()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        ranks.c_step()
    model[2].weight.data[0, 0] = held
    ranks.c_step()
    assert ranks.table == LearnedRanks(model, st.find(model), BUDGET).table


def test_rank_zero_of_a_layer_that_no_rank_pays_for_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(8, 8))
    ranks = LearnedRanks(model, st.find(model), multiplier=1e3, cost="parameters", dense=False)
    _, plan = ranks.finish()
    assert plan["0"].choice == DENSE
    options = [Option(LowRankChoice("channel", k, method="svd"), 0.1, {"macs": 8.0 * k}) for k in (1, 2)]
    row = Row("a", "Linear", (Option(DENSE, 0.0, {"macs": 8.0}), *options, Option(ZERO, 1.0, {"macs": 0.0})))
    assert buildable(row, ZERO) == 0


@pytest.mark.parametrize("normalize", [False, True])
def test_a_layer_of_zeros_has_rank_zero(normalize: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    model[1].weight.data.zero_()
    given = {"multiplier": 1e-3, "cost": "parameters", "normalize": normalize, "schedule": Schedule(10, 1, 3)}
    for dense in (False, True):
        ranks = LearnedRanks(model, st.find(model), dense=dense, **given)
        assert ranks.trajectory.records[0].ranks[1] == 0


def test_a_loaded_state_sums_in_the_same_order() -> None:
    model = nn.Sequential()
    for name in "zyxwvutsrq":
        model.add_module(name, nn.Linear(16, 16))
    ranks = LearnedRanks(model, st.find(model), BUDGET)
    for _ in range(5):
        perturb(model)
        before = ranks.penalty().item()
        ranks.load_state_dict(ranks.state_dict())
        assert ranks.penalty().item() == before
        ranks.c_step()


@pytest.mark.parametrize("damage", ["empty", "trajectory", "plan"])
def test_states_that_are_none_are_refused(damage: str) -> None:
    model = settled("mlp")
    ranks = LearnedRanks(model, st.find(model), BUDGET)
    state = {} if damage == "empty" else ranks.state_dict()
    if state:
        state[damage] = state[damage][:-5]
    with pytest.raises(CheckpointError):
        ranks.load_state_dict(state)


def test_output_energy_needs_calibrated_sites() -> None:
    model = settled("mlp")
    with pytest.raises(ValueError, match="energy='output' needs"):
        LearnedRanks(model, st.find(model), BUDGET, energy="output")


def test_deeply_nested_text_is_no_trajectory() -> None:
    with pytest.raises(ValueError, match="not a trajectory of ranks"):
        Trajectory.from_json('{"zzz":' + "[" * 100_000)


def test_plans_of_methods_with_unfoldings_survive_json() -> None:
    model = settled("mlp")
    table = st.tabulate(st.find(model), [WeightSVD(unfoldings=("channel",))])
    plan = st.select(table, BUDGET)
    assert Plan.from_json(plan.to_json()) == plan


def test_methods_that_need_calibration_are_refused_under_weight_energy() -> None:
    model = settled("mlp")
    sites = st.calibrate(model, st.find(model), batches_for("mlp"))
    with pytest.raises(ValueError, match="one of ActivationSVD needs it: give energy='output'"):
        LearnedRanks(model, sites, BUDGET, methods=[ActivationSVD()])


def test_a_layer_that_could_only_be_dropped_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, (1, 3)), nn.Flatten(), nn.Linear(8, 4))
    methods = [st.WeightSVD(unfoldings=("depth-first",), to_full_rank=True)]
    with pytest.raises(st.PlanError, match=r"site '0' \(Conv2d 1x3\): WeightSVD offers no rank for it.*dropped whole"):
        st.LearnedRanks(model, st.find(model), multiplier=1e-9, cost="parameters", methods=methods, dense=False)


def test_a_kernel_of_one_row_has_the_split_that_is_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, (1, 3)))
    methods = [st.WeightSVD(unfoldings=("width-first",), to_full_rank=True, multiple_of=1)]
    ranks = st.LearnedRanks(model, st.find(model), multiplier=0.0, cost="parameters", methods=methods, dense=False)
    (entry,) = ranks.plan
    assert entry.choice.settings["unfolding"] == "channel"
    assert entry.choice.settings["rank"] == 8


class OneWay(torch.autograd.Function):
    """Computes something, and raises where gradients come back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise KeyError("no way back")


class Blocked(nn.Module):
    """Two layers, with something between them that gradients do not come through."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(6, 8), nn.Linear(8, 4), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    ("between", "said"),
    [
        (OneWay.apply, "between layers 'first' and 'second' the backward pass raises KeyError.*Mend its backward"),
        (lambda x: x.exp().mul_(y := x.sigmoid()) + y.mul_(2), "layers 'first' and 'second'.*out of place"),
        (lambda x: torch.from_numpy(x.numpy()), "raises RuntimeError when it is trained on a batch.*tensors alone"),
    ],
)
@pytest.mark.parametrize("learns", [True, False])
def test_a_pass_that_raises_in_training_is_told_with_layer_reason_and_cure(
    between: Callable[[torch.Tensor], torch.Tensor], said: str, learns: bool
) -> None:
    batches = [(torch.randn(16, 6), torch.zeros(16, dtype=torch.long))]
    one = Recipe(epochs=1)
    learned, tuned = partial(learn_ranks, budget="macs=60%", learning=one, tuning=one), partial(fine_tune, epochs=1)
    with pytest.raises(TrainingError, match=said) as caught:
        (learned if learns else tuned)(Blocked(between), batches)
    assert isinstance(caught.value.__cause__, (KeyError, RuntimeError))
    assert "needs no gradients" in str(caught.value)


def test_outputs_without_gradients_cannot_be_trained() -> None:
    batches = [(torch.randn(16, 6), torch.zeros(16, dtype=torch.long))]
    model = Blocked(lambda x: x)
    model.second.requires_grad_(False)
    model.between = torch.Tensor.detach
    with pytest.raises(TrainingError, match="does not depend on a weight that is trained"):
        fine_tune(model, batches, epochs=1)


def test_sites_of_another_network_are_told() -> None:
    torch.manual_seed(0)
    sites = st.find(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    for other, said in (
        (
            nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)),
            "the weight of layer '0' is torch.float32 of shape",
        ),
        (nn.Sequential(nn.Linear(6, 8)), "the model has no layer '2'. Find and calibrate"),
    ):
        with pytest.raises(ValueError, match=said):
            LearnedRanks(other, sites, BUDGET)
