"""What a run of learned ranks ends in, how its state is kept, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.errors import CheckpointError, InfeasibleBudgetError, PlanError
from spectrim.nn.surgery import parameter_count
from spectrim.selection.plan import Plan
from spectrim.testing import sample_inputs
from spectrim.train import LearnedRanks, Schedule
from tests.cases import batches_for, settled
from tests.train.learned import canonical, perturb, timeless, truncated
from tests.train.small import equal, weights


def test_finish_builds_the_ranks_of_the_last_step_and_leaves_the_model() -> None:
    model = settled("mlp", dtype=torch.float64)
    sites = st.find(model)
    ranks = LearnedRanks(model, sites, multiplier=2e-4, cost="parameters", dense=False, schedule=Schedule(0.1, 1, 3))
    perturb(model)
    ranks.c_step()
    assert all(rank > 0 for rank in ranks.trajectory.records[-1].ranks)
    perturb(model)
    before, parameters = weights(model), {id(p) for p in model.parameters()}
    small, plan = ranks.finish()
    assert equal(weights(model), before)
    assert parameters.isdisjoint(id(p) for p in small.parameters())
    assert plan.multipliers == {"parameters": 2e-4}
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    assert parameter_count(small) == plan.costs["parameters"]
    expected = copy.deepcopy(model)
    for entry, last in zip(plan, ranks.plan, strict=True):
        layer = expected.get_submodule(entry.site)
        if entry.choice.is_dense:
            assert last.costs["parameters"] >= last.dense_costs["parameters"]
        else:
            assert entry.choice == last.choice
            layer.weight.data = truncated(canonical(layer, layer.weight), entry)[0]
    inputs = sample_inputs((12,), 8, dtype=torch.float64)
    torch.testing.assert_close(small(inputs), expected(inputs))


def test_rank_zero_becomes_the_lowest_rank_and_ranks_that_do_not_pay_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False))
    model[1].weight.data = torch.eye(6)
    model[2].weight.data *= 1e-3
    options = {"multiplier": 1e-3, "cost": "parameters", "dense": False, "normalize": False}
    ranks = LearnedRanks(model, st.find(model), schedule=Schedule(1, 1, 1), **options)
    assert ranks.trajectory.records[0].ranks[1:] == (6, 0)
    small, plan = ranks.finish()
    assert plan["1"].choice.is_dense
    assert plan["2"].choice["rank"] == 1
    assert isinstance(small[1], nn.Linear)
    assert plan.costs["parameters"] == parameter_count(small) < parameter_count(model)


@pytest.mark.slow
def test_finish_with_batches_fits_the_factors_to_the_responses(tmp_path: Path) -> None:
    model, batches = settled("residual"), batches_for("residual")
    sites = st.sensitivity(model, st.calibrate(model, st.find(model), batches), batches)
    for energy in ("weight", "output"):
        ranks = LearnedRanks(model, sites, st.Budget(macs=0.5), energy=energy)
        plain, fitted = ranks.finish(reconstruct=False), ranks.finish(batches)
        assert fitted[1].costs["macs"] <= 0.5 * fitted[1].dense_costs["macs"]
        assert parameter_count(fitted[0]) == fitted[1].costs["parameters"]
        with torch.no_grad():
            off = [float((net(batches[0]) - model(batches[0])).square().sum()) for net in (plain[0], fitted[0])]
        assert off[1] < off[0]
        st.save(*fitted, tmp_path / "small.safetensors")
        again = st.load(settled("residual"), tmp_path / "small.safetensors")
        assert torch.equal(again(batches[0]), fitted[0](batches[0]))


# State.


@pytest.mark.table
@pytest.mark.parametrize(
    "given",
    [
        {"budget": st.Budget(parameters=0.5), "augmented": True},
        {"multiplier": 2e-4, "cost": "parameters", "dense": False},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_continues_from_its_state_bit_for_bit(given: dict, dtype: torch.dtype) -> None:
    def begin() -> tuple[nn.Module, LearnedRanks]:
        torch.manual_seed(0)
        model = settled("residual", dtype=dtype)
        return model, LearnedRanks(model, st.find(model), schedule=Schedule(0.1, 2, 9), every=2, **given)

    def go_on(model: nn.Module, ranks: LearnedRanks, batches: range) -> None:
        for batch in batches:
            torch.manual_seed(batch)
            perturb(model, 0.05)
            gradients = torch.autograd.grad(ranks.penalty(), list(model.parameters()), allow_unused=True)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter.data -= 0.1 * gradient
            ranks.after_step(model)

    whole, expected = begin()
    go_on(whole, expected, range(11))
    for stop in (0, 3, 4, 10):
        model, ranks = begin()
        go_on(model, ranks, range(stop))
        state = {key: tensor.clone() for key, tensor in ranks.state_dict().items()}
        held = weights(model)
        other, again = begin()
        go_on(other, again, range(1))
        other.load_state_dict(held)
        again.load_state_dict(state)
        go_on(other, again, range(stop, 11))
        assert equal(weights(other), weights(whole))
        assert equal(weights(again.nested()), weights(expected.nested()))
        assert again.plan.to_json() == expected.plan.to_json()
        assert timeless(again.trajectory.records) == timeless(expected.trajectory.records)
        assert equal(weights(again.finish()[0]), weights(expected.finish()[0]))


def test_a_loaded_state_does_not_share_memory_with_what_was_loaded() -> None:
    model = settled("mlp")
    ranks = LearnedRanks(model, st.find(model), st.Budget(parameters=0.5))
    state = ranks.state_dict()
    ranks.load_state_dict(state)
    before = ranks.penalty().item()
    for tensor in state.values():
        tensor.zero_()
    assert ranks.penalty().item() == before


# Errors.


def test_options_that_do_not_fit_together_are_refused() -> None:
    model, budget = settled("mlp"), st.Budget(parameters=0.5)
    sites = st.find(model)
    for wrong in ({}, {"budget": budget, "multiplier": 1e-6}):
        with pytest.raises(ValueError, match="either a budget or multiplier="):
            LearnedRanks(model, sites, **wrong)
    for options, message in (
        ({"energy": "outputs"}, "energy='outputs' must be 'weight' or 'output'"),
        ({"energy": "output", "normalize": False}, "normalize=False is for weight energy"),
        ({"dense": False}, "dense=False is for a multiplier"),
        ({"every": 0}, "every=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LearnedRanks(model, sites, budget, **options)
    for multiplier in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"multiplier {multiplier} must be finite"):
            LearnedRanks(model, sites, multiplier=multiplier, cost="parameters")
    with pytest.raises(ValueError, match="which the table does not hold \\(it has parameters, bytes\\)"):
        LearnedRanks(model, sites, multiplier=1e-6)
    with pytest.raises(ValueError, match="limits macs, which the table does not hold"):
        LearnedRanks(model, sites, st.Budget(macs=0.5))
    with pytest.raises(PlanError, match="Sequential has no layer to compress"):
        LearnedRanks(model, st.find(model, skip=nn.Linear), budget)
    with pytest.raises(ValueError, match="after_step needs every="):
        LearnedRanks(model, sites, budget).after_step(model)
    with pytest.raises(ValueError, match="penalty belongs to another model"):
        LearnedRanks(model, sites, budget)(copy.deepcopy(model))


def test_a_budget_out_of_reach_is_refused_at_once() -> None:
    model = settled("mlp")
    with pytest.raises(InfeasibleBudgetError, match="parameters <= 12 cannot be met"):
        LearnedRanks(model, st.find(model), st.Budget(parameters=12))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_their_layer(bad: float) -> None:
    model = settled("residual")
    ranks = LearnedRanks(model, st.find(model), st.Budget(parameters=0.5))
    model.conv2.weight.data[0, 1, 2, 0] = bad
    with pytest.raises(FloatingPointError, match="layer 'conv2' has weights that are not finite. Lower lr"):
        ranks.c_step()
    assert (ranks.step, len(ranks.trajectory)) == (1, 1)


def test_states_of_other_runs_are_refused() -> None:
    model, budget = settled("mlp"), st.Budget(parameters=0.6)
    sites = st.find(model)
    state = LearnedRanks(model, sites, budget).state_dict()
    wide = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    others = [
        LearnedRanks(model, sites, st.Budget(parameters=0.7)),
        LearnedRanks(model, sites, multiplier=1e-6, cost="parameters"),
        LearnedRanks(model, st.find(model, skip="0"), budget),
        LearnedRanks(wide, st.find(wide), budget),
        LearnedRanks(model, sites, budget, schedule=Schedule(0.5, 2.0, 3)),
        LearnedRanks(model, sites, budget, normalize=False),
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="the checkpoint belongs to another run: "):
            other.load_state_dict(state)
        assert other.step == 1
    with pytest.raises(CheckpointError, match="belongs to another run: budget was None and is "):
        LearnedRanks(model, sites, budget).load_state_dict(others[1].state_dict())


def test_states_of_version_0_1_with_a_budget_are_taken() -> None:
    model, budget = settled("mlp"), st.Budget(parameters=0.6)
    sites = st.find(model)
    state = LearnedRanks(model, sites, budget).state_dict()
    run = json.loads(bytes(state["run"].tolist()))
    # As version 0.1 wrote it: the fields of the budget then, and methods without a module.
    run["budget"] = {"parameters": 0.6, "macs": None, "bytes": None, "latency": None}
    for record in run["methods"]:
        del record["module"]
    state["run"] = torch.tensor(list(json.dumps(run).encode()), dtype=torch.uint8)
    other = LearnedRanks(model, sites, budget)
    other.load_state_dict(state)
    assert other.state_dict().keys() == state.keys()
    with pytest.raises(CheckpointError, match=r"belongs to another run: budget was \{'parameters': 0.6, "):
        LearnedRanks(model, sites, st.Budget(parameters=0.6, bytes=0.9)).load_state_dict(state)


def test_c_steps_are_spread_over_a_run_whose_batches_they_do_not_divide() -> None:
    model, steps, batches = settled("mlp"), 8, 45
    schedule = Schedule(0.1, 1.5, steps)
    ranks = LearnedRanks(
        model, st.find(model), st.Budget(parameters=0.6), schedule=schedule, every=batches / (steps - 1)
    )
    done = []
    for _ in range(batches):
        ranks.after_step(model)
        done.append(ranks.step)
    assert done[-2:] == [steps - 1, steps], "the last C step comes after the last batch"
    gaps = [done.count(step) for step in range(1, steps)]
    assert max(gaps) - min(gaps) <= 1
    assert ranks.trajectory.records[-1].mu == schedule.mu(steps - 1)
