"""Learned ranks in one call, several budgets of one run, and runs that were stopped."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.application import Applied
from spectrim.errors import CheckpointError, InfeasibleBudgetError, PlanError
from spectrim.methods import WeightSVD
from spectrim.nn.modules import Factored
from spectrim.nn.surgery import parameter_count
from spectrim.selection.trajectory import Trajectory
from spectrim.train import LearnedResult, Recipe, Schedule, budget_path, learn_ranks
from spectrim.train import resume as resuming
from spectrim.train.one_shot import Candidate, better
from tests.train import learning_script, mortal
from tests.train.learned import timeless, with_weights_of
from tests.train.learning_script import SCHEDULE, Residual, Stop, Stopping, calibration, learn, options, path, shuffled
from tests.train.small import accuracy, equal, fixed_batches, loader, weights

BUDGET = st.Budget(parameters=0.5)


def same(one: LearnedResult, other: LearnedResult) -> None:
    """All that two runs have in common if one of them was stopped: everything but times."""
    assert equal(weights(one.model), weights(other.model))
    assert one.plan.to_json() == other.plan.to_json()
    assert timeless(one.trajectory.records) == timeless(other.trajectory.records)
    assert one.trajectory.budget == other.trajectory.budget
    for mine, theirs in ((one.learning, other.learning), (one.tuning, other.tuning)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert dataclasses.replace(mine, seconds=0) == dataclasses.replace(theirs, seconds=0)


@pytest.mark.slow
def test_statistics_rest_on_as_many_rows_as_are_asked_for() -> None:
    steps = options(skip="stem") | {"learning": Recipe(epochs=0), "tuning": Recipe(epochs=0)}
    counts = [
        max(layer.statistics.rows for layer in learn_ranks(Residual(), loader(), BUDGET, **steps, **rows).sites)
        for rows in ({"positions": 1}, {"positions": 2}, {"rows": None})
    ]
    assert 2 * counts[0] == counts[1] < counts[2]


def test_a_run_ends_in_a_factored_network_within_the_budget(tmp_path: Path) -> None:
    model, batches = Residual(), loader()
    model.conv1.eval()
    before, modes = weights(model), [module.training for module in model.modules()]
    result = learn_ranks(model, batches, BUDGET, **options(skip="stem"))
    assert equal(weights(model), before)
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert {id(p) for p in result.model.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    assert any(isinstance(module, Factored) for module in result.model.modules())
    plan = result.plan
    assert parameter_count(result.model) == plan.costs["parameters"] <= 0.5 * parameter_count(model)
    assert plan.budget == result.trajectory.budget == {"parameters": 0.5 * parameter_count(model)}
    assert result.report.plan is plan
    assert ("stem", "Conv2d 3x3", "skipped on request") in result.report.skipped
    # Of the trained network; its samples were trained on.
    agreed = result.report.agreement
    assert agreed is not None
    assert not agreed.held_out
    assert agreed.samples == result.report.samples
    assert 0 < agreed.error < 1
    assert result.trajectory.sites == tuple(entry.site for entry in plan) == ("conv1", "conv2", "head")
    assert [record.mu for record in result.trajectory.records] == [SCHEDULE.mu(step) for step in range(8)]
    assert all(record.costs["parameters"] <= plan.budget["parameters"] for record in result.trajectory.records)
    assert result.learning is not None
    assert result.tuning is not None
    assert (result.learning.epochs, result.learning.steps, result.learning.last) == (4, 24, None)
    assert (result.tuning.epochs, result.tuning.steps, result.tuning.last) == (2, 12, accuracy(result.model.eval()))
    st.save(result.model, plan, tmp_path / "small.safetensors")
    again = st.load(Residual(), tmp_path / "small.safetensors").eval()
    inputs = fixed_batches()[0][0]
    assert torch.equal(again(inputs), result.model(inputs))
    result.trajectory.write(tmp_path / "ranks.json")
    assert Trajectory.read(tmp_path / "ranks.json") == result.trajectory


@pytest.mark.slow
def test_learning_pulls_the_weights_to_low_rank() -> None:
    weak, strong = (learn(schedule=Schedule(mu, 1, 8), learning=Recipe(epochs=4, lr=0.02)) for mu in (1e-3, 5.0))
    last = [result.trajectory.records[-1].distance for result in (weak, strong)]
    assert last[1] < 0.3 * last[0]
    losses = [record.loss for result in (weak, strong) for record in (result.learning or result.tuning).history]
    assert min(losses) > 0


@pytest.mark.slow
def test_a_multiplier_takes_the_place_of_the_budget() -> None:
    small = {}
    for multiplier in (1e-5, 1e-3, 1.0):
        result = learn_ranks(
            Residual(), loader(), multiplier=multiplier, cost="parameters", dense=False,
            **options(tuning=Recipe(epochs=1)),
        )  # fmt: skip
        assert result.plan.budget == result.trajectory.budget == {}
        assert result.plan.multipliers == {"parameters": multiplier}
        small[multiplier] = parameter_count(result.model)
        assert small[multiplier] == result.plan.costs["parameters"]
        for entry, rank in zip(result.plan, result.trajectory.records[-1].ranks, strict=True):
            assert entry.choice.is_dense or entry.choice["rank"] == max(1, rank)
    assert result.trajectory.records[-1].ranks == (0, 0, 0, 0)
    assert small[1.0] < small[1e-3] < small[1e-5] <= parameter_count(Residual())


@pytest.mark.slow
def test_learning_ends_early_when_choices_have_settled_near_low_rank() -> None:
    learning, schedule = Recipe(epochs=12, lr=0.02, schedule="constant", weight_decay=0), Schedule(8, 1, 36)
    found = {
        patience: learn(patience=patience, learning=learning, tuning=Recipe(epochs=0), schedule=schedule)
        for patience in (3, None)
    }
    early, whole = found[3], found[None]
    assert whole.learning is not None
    assert early.learning is not None
    assert whole.learning.epochs == 12
    epochs = early.learning.epochs
    assert 0 < epochs < 12
    assert early.trajectory.settled >= 3
    assert early.trajectory.records[-1].distance <= 0.05
    assert early.tuning is None
    records = timeless(whole.trajectory.records)
    assert timeless(early.trajectory.records) == records[: len(early.trajectory)]
    # An epoch earlier it had not settled, or was not near.
    before = dataclasses.replace(early.trajectory, records=early.trajectory.records[:-3])
    assert before.settled < 3 or before.records[-1].distance > 0.05


def test_without_learning_it_is_one_choice_on_the_weights_as_they_are() -> None:
    result = learn(learning=Recipe(epochs=0), tuning=Recipe(epochs=0), weigh=False)
    assert (result.learning, result.tuning) == (None, None)
    assert len(result.trajectory) == 1
    sites = st.find(Residual())
    table = st.tabulate(st.calibrate(Residual(), sites, fixed_batches()), [WeightSVD()])
    assert result.plan.costs.keys() == table.dense.keys()
    calibrated = st.calibrate(Residual(), sites, fixed_batches(48, 24))
    by_data = st.select(st.tabulate(calibrated, [st.ActivationSVD()]), BUDGET)
    assert [e.choice for e in result.plan] == [e.choice for e in by_data]
    by_weight = learn(learning=Recipe(epochs=0), tuning=Recipe(epochs=0), energy="weight")
    bare = st.tabulate(sites, [WeightSVD()])
    assert [e.choice for e in by_weight.plan] == [e.choice for e in st.select(bare, BUDGET)]


@pytest.mark.slow
@pytest.mark.parametrize("metric", [False, True])
def test_learning_that_does_harm_gives_way_to_what_compress_makes(metric: bool) -> None:
    # Steps that are far too large.
    model, harm = Residual().eval(), Recipe(epochs=1, lr=0.5, warmup=0.0, clip=None)
    inputs = calibration()[0][0]

    def alike(small: nn.Module) -> float:
        return -float((small(inputs) - model(inputs)).square().mean())

    settings = options(learning=harm, tuning=Recipe(epochs=0), evaluate=alike if metric else None)
    result = learn_ranks(model, fixed_batches(), BUDGET, **settings)
    alone = st.compress(model, calibration(), BUDGET, groups=False)
    assert result.plan.costs == alone.plan.costs
    assert [e.choice for e in result.plan] == [e.choice for e in alone.plan]
    assert equal(weights(result.model), weights(alone.model))
    assert sum("learning has not paid" in note for note in result.report.notes) == 1
    assert result.learning is not None


def test_of_two_networks_the_one_that_loses_less_goes_on() -> None:
    applied = [Applied(nn.Linear(1, 1)) for _ in range(2)]
    found = learn(learning=Recipe(epochs=0), tuning=Recipe(epochs=0))
    learned, other = (Candidate(each, found.plan, found.candidates, found.sites) for each in applied)

    def lost(numbers: tuple[float, float]) -> Any:
        return lambda model: dict(zip((id(each.model) for each in applied), numbers, strict=True))[id(model)]

    def fails(model: nn.Module) -> float:
        raise ValueError("no targets")

    assert better(learned, other, lost((1.0, 0.5)))[0] is other
    for judge in (lost((0.5, 1.0)), lost((1.0, 1.0)), lost((1.0, float("nan"))), fails):
        assert better(learned, other, judge) == (learned, ())
    assert better(learned, None, fails) == (learned, ())
    assert better(learned, other, lost((float("inf"), 1.0)))[0] is other


@pytest.mark.slow
def test_calibration_may_come_from_an_iterator_or_from_the_batches() -> None:
    held = fixed_batches()
    settings = options(learning=Recipe(epochs=1), tuning=Recipe(epochs=0))
    results = [
        learn_ranks(Residual(), held, BUDGET, **settings | {"calibration": calibration})
        for calibration in (held, iter(held), None)
    ]
    for other in results[1:]:
        same(results[0], other)
    assert results[0].report.samples == 48


@pytest.mark.slow
def test_several_budgets_of_one_run() -> None:
    model = Residual()
    before, told = weights(model), []
    budgets = [st.Budget(parameters=share) for share in (0.8, 0.6, 0.4)]
    settings = options(learning=Recipe(epochs=2, lr=0.02), tuning=Recipe(epochs=1))
    results = budget_path(model, loader(), budgets, done=told.append, **settings)
    assert equal(weights(model), before)
    assert told == list(results)
    counts = [parameter_count(result.model) for result in results]
    assert counts == sorted(counts, reverse=True)
    for result, budget, count in zip(results, budgets, counts, strict=True):
        assert count == result.plan.costs["parameters"] <= budget.limits(result.plan.dense_costs)["parameters"]
        assert result.trajectory.budget == budget.limits(result.plan.dense_costs)
        assert result.tuning is not None
    parameters = [id(parameter) for result in results for parameter in result.model.parameters()]
    assert len(set(parameters)) == len(parameters)
    # The first is what one budget alone gives; the next goes on from its dense weights and not from the given ones.
    same(results[0], learn_ranks(model, loader(), budgets[0], **settings))
    alone = learn_ranks(model, loader(), budgets[1], **settings)
    first, again = results[1].trajectory.records[0], alone.trajectory.records[0]
    assert first.distance < again.distance


def test_what_cannot_be_learned_is_refused() -> None:
    with pytest.raises(ValueError, match="either a budget or multiplier="):
        learn_ranks(Residual(), loader(), **options())
    with pytest.raises(ValueError, match="either a budget or multiplier="):
        learn_ranks(Residual(), loader(), BUDGET, **options(multiplier=1e-6))
    with pytest.raises(ValueError, match="give at least one budget"):
        budget_path(Residual(), loader(), [], **options())
    with pytest.raises(PlanError, match="Residual has no layer to compress .stem: skipped on request; "):
        learn_ranks(Residual(), loader(), BUDGET, **options(skip=[nn.Conv2d, nn.Linear]))
    with pytest.raises(PlanError, match="Sequential has no layer to compress .it has no linear or conv layers."):
        learn_ranks(nn.Sequential(nn.ReLU()), loader(), BUDGET, **options())
    with pytest.raises(InfeasibleBudgetError, match="cannot be met: the lowest reachable is"):
        learn_ranks(Residual(), loader(), st.Budget(parameters=0.01), **options())
    with pytest.raises(TypeError, match="has no length"):
        learn_ranks(Residual(), (batch for batch in loader()), BUDGET, **options())
    with pytest.raises(TypeError, match="learning ranks has no option 'rate'"):
        learn_ranks(Residual(), loader(), BUDGET, **options(rate=1))


def test_weights_that_explode_name_their_layer() -> None:
    with pytest.raises(FloatingPointError, match=r"layer '\w+' has weights that are not finite. Lower lr"):
        learn(learning=Recipe(epochs=4, lr=1e30, warmup=0.0))


# Stopped runs.


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", [{}, pytest.param({"multiplier": 2e-4, "cost": "parameters", "dense": False}, marks=pytest.mark.slow)]
)
def test_a_run_that_was_stopped_anywhere_ends_equal(start: dict[str, Any], tmp_path: Path) -> None:
    def run(batches: Any, **changes: Any) -> LearnedResult:
        return learn_ranks(Residual(), batches, None if start else BUDGET, **options(**start, **changes))

    whole = run(loader())
    # In the first epoch, before and after a checkpoint; in between; in the last; in tuning, which reads the batches of
    # the stopped epoch again.
    for at in (1, 4, 9, 8, 7, 9):
        with pytest.raises(Stop):
            run(Stopping(at), checkpoint=tmp_path)
        torch.randn(7)
        random.random()
    assert {file.name for file in tmp_path.iterdir()} >= {"learning.safetensors", "tuning.safetensors"}
    same(whole, run(loader(), checkpoint=tmp_path))
    # What is finished is returned at once.
    same(whole, run(Stopping(0), checkpoint=tmp_path))


@pytest.mark.slow
def test_a_path_that_was_stopped_ends_equal(tmp_path: Path) -> None:
    whole = path()
    # In learning and in tuning of the second budget.
    for at in (18 + 7, 9):
        with pytest.raises(Stop):
            path(Stopping(at), checkpoint=tmp_path)
    for name in ("learning", "tuning"):
        assert [file.parent.name for file in sorted(tmp_path.glob(f"*/{name}.safetensors"))] == ["00", "01"]
    for one, other in zip(whole, path(checkpoint=tmp_path), strict=True):
        same(one, other)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_equal(tmp_path: Path) -> None:
    out = tmp_path / "killed.safetensors"
    steps: dict[str, int] = {}
    with mortal.runs(learning_script.__file__, str(out), str(tmp_path), cwd=tmp_path) as runs:
        for name in ("learning.safetensors", "tuning.safetensors"):
            checkpoint = tmp_path / name
            runs.killed(checkpoint.exists, random.SystemRandom().uniform(0, 0.03))
            steps[name] = resuming.read_checkpoint(checkpoint)[1]["step"]
        assert not out.exists(), f"nothing was killed, checkpoints at {steps}"
        runs.whole()
    expected = learn(shuffled())
    found = st.load(Residual(), out)
    assert equal(weights(found), weights(expected.model)), f"checkpoints at {steps}"
    records = Trajectory.read(f"{out}.json").records
    assert timeless(records) == timeless(expected.trajectory.records), f"checkpoints at {steps}"


@pytest.mark.slow
def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"checkpoint": tmp_path, "energy": "weight", "calibration": None}
    with pytest.raises(Stop):
        learn(Stopping(10), **settings)
    with pytest.raises(CheckpointError, match="belongs to another run: budget was "):
        learn_ranks(Residual(), loader(), st.Budget(parameters=0.6), **options(**settings))
    with pytest.raises(CheckpointError, match=r"lr was 0\.02 and is 0\.01"):
        learn(**settings, learning=Recipe(epochs=4, lr=0.01, checkpoint_every=2))
    with pytest.raises(CheckpointError, match=r"belongs to another model .*stem\.weight is \(8, 1, 3, 3\)"):
        learn_ranks(Residual(width=6), loader(), BUDGET, **options(**settings))
    (tmp_path / "learning.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="cannot be read"):
        learn(**settings)


@pytest.mark.slow
def test_the_given_model_is_the_teacher_unless_there_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectrim.train import learning as module

    seen = []

    class Watched(module.Loop):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            seen.append((kwargs["teacher"], kwargs["loss"]))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(module, "Loop", Watched)
    model, other, loss = Residual(), copy.deepcopy(Residual()), nn.CrossEntropyLoss()
    settings = options(learning=Recipe(epochs=1), tuning=Recipe(epochs=1), weigh=False)
    for given in ({}, {"teacher": other}, {"loss": loss}):
        learn_ranks(model, fixed_batches(8), BUDGET, **settings, **given)
    assert seen == [(model, None)] * 2 + [(other, None)] * 2 + [(None, loss)] * 2


@pytest.mark.slow
def test_the_table_of_a_result_selects_networks_that_can_be_built() -> None:
    model, batches = Residual(), loader()
    result = learn_ranks(model, batches, BUDGET, **options())
    assert not any(option.choice.kind == "zero" for row in result.candidates for option in row.options)
    lowest = sum(min(o.costs["parameters"] for o in row.options) for row in result.candidates)
    tight = st.Budget(parameters=f"{1.05 * (lowest + result.candidates.fixed['parameters'])}")
    plan = st.select(result.candidates, tight)
    small = st.apply(with_weights_of(result, model), result.sites, plan)
    assert parameter_count(small) == plan.costs["parameters"] < result.plan.costs["parameters"]


@pytest.mark.slow
def test_calibration_from_shuffled_batches_does_not_depend_on_what_ran_before() -> None:
    batches, found = shuffled(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(learn_ranks(Residual(), batches, BUDGET, **options(calibration=None)))
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(weights(found[0].model), weights(found[1].model))


def test_a_later_budget_that_cannot_be_met_is_refused_before_the_first_is_trained() -> None:
    class Counted(nn.ReLU):
        passes = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counted.passes += self.training
            return super().forward(x)

    batches = [(torch.randn(16, 12), torch.zeros(16, dtype=torch.long))]
    model = nn.Sequential(nn.Linear(12, 16), Counted(), nn.Linear(16, 4))
    one = Recipe(epochs=3)
    with pytest.raises(st.InfeasibleBudgetError, match="parameters <= "):
        st.budget_path(model, batches, ["macs=70%", "parameters=1%"], learning=one, tuning=one)
    assert Counted.passes <= 1


def test_an_option_of_a_training_is_told_where_it_belongs() -> None:
    with pytest.raises(TypeError, match=r"epochs=1 is of a training: write learning=Recipe\(epochs=1\)"):
        learn_ranks(Residual(), loader(), BUDGET, epochs=1)
