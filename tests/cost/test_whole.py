"""What a network costs, whatever the cost: by itself, in a table, with groups, with channels, in a finished model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.cost import counted
from spectrim.cost.latency import Latency
from spectrim.cost.whole import Network
from spectrim.errors import InfeasibleBudgetError
from spectrim.network.choices import Choice
from spectrim.network.layer import LayerSpec
from spectrim.nn.standing import StandIn
from spectrim.search.published_ranks import at_rate
from spectrim.search.stepwise import select_in_steps
from spectrim.search.widths import recommend
from spectrim.selection.budget import Limit
from tests.cases import MODELS, batches_for, one_thread, settled
from tests.nn.coupled_nets import made

METHODS = [st.ActivationSVD(multiple_of=1), st.WeightSVD(multiple_of=1)]
FILTERS = st.PrincipalFilters(multiple_of=1)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def joules(specs: Sequence[LayerSpec]) -> float:
    """A cost that the library knows nothing of: numbers stored, and inputs at another price."""
    return sum(1e-3 * spec.stored + 2e-3 * spec.in_channels for spec in specs)


def joules_of(model: nn.Module) -> float:
    plain = (m for m in model.modules() if not isinstance(m, StandIn))
    layers = [module for module in plain if isinstance(module, (nn.Conv2d, nn.Linear))]
    inputs = [layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features for layer in layers]
    return sum(1e-3 * layer.weight.numel() + 2e-3 * n for layer, n in zip(layers, inputs, strict=True))


def calibrated(name: str) -> tuple[nn.Module, list[Tensor], st.Sites]:
    model, batches = settled(name), batches_for(name)
    return model, batches, st.calibrate(model, st.find(model), batches)


def coupled(name: str) -> tuple[nn.Module, list[Tensor], st.Sites]:
    pytest.importorskip("torch_pruning")
    model, x = made(name, samples=48, dtype=torch.float32)
    return model, [x], st.calibrate(model, st.couple(model, st.find(model), x), [x])


def picked(plan: st.Plan) -> Mapping[str, Choice]:
    return {entry.site: entry.choice for entry in plan if not entry.choice.is_dense}


def clock(chains: Sequence[Sequence[LayerSpec]], **options: object) -> list[float]:
    return [0.01 * len(chain) + 1e-4 * counted.macs(chain) for chain in chains]


@pytest.mark.table
@pytest.mark.parametrize("budget", [st.Budget(joules=0.7), st.Budget(joules="80%", macs=0.7, parameters=0.9)])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "twice"])
def test_a_cost_of_the_users_own_is_limited_alone_and_with_others(name: str, budget: st.Budget) -> None:
    model, batches, sites = calibrated(name)
    table = st.tabulate(sites, METHODS, costs={"joules": joules})
    assert table.dense["joules"] == pytest.approx(joules_of(model))
    plan = st.select(table, budget)
    assert plan.costs["joules"] == pytest.approx(joules_of(st.apply(model, sites, plan, batches)))
    for cost, limit in budget.limits(table.dense).items():
        assert plan.costs[cost] <= limit * (1 + 1e-9)
    tighter = st.select(table, budget.replace(joules=Limit(0.99 * plan.costs["joules"])))
    assert tighter.costs["joules"] <= 0.99 * plan.costs["joules"] * (1 + 1e-9)
    assert tighter.loss > plan.loss


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", ["chain", "residual", "projection", "depthwise", "flatten"])
def test_a_cost_of_the_users_own_is_limited_where_channels_go(name: str) -> None:
    model, batches, sites = coupled(name)
    plan, table = select_in_steps(sites, [FILTERS], st.Budget(joules=0.7), costs={"joules": joules})
    assert plan.dense_costs["joules"] == pytest.approx(joules_of(model))
    assert table.dense["joules"] == pytest.approx(joules_of(model))
    small = joules_of(st.apply(model, sites, plan, batches))
    assert plan.costs["joules"] == pytest.approx(small)
    assert small <= 0.7 * joules_of(model) * (1 + 1e-9)
    by_spectrum = recommend(sites, st.Budget(joules=0.7), method=FILTERS, costs={"joules": joules})
    small = joules_of(st.apply(model, sites, by_spectrum, batches))
    assert by_spectrum.costs["joules"] == pytest.approx(small)
    assert small <= 0.7 * joules_of(model) * (1 + 1e-9)


@pytest.mark.slow
def test_channels_and_ranks_share_a_budget_of_the_users_own() -> None:
    model, batches, sites = coupled("flatten")
    budget = st.Budget(joules=0.5, parameters=0.6)
    plan, _ = select_in_steps(sites, [FILTERS, *METHODS], budget, costs={"joules": joules})
    small = joules_of(st.apply(model, sites, plan, batches))
    assert plan.costs["joules"] == pytest.approx(small)
    assert small <= 0.5 * joules_of(model) * (1 + 1e-9)
    assert plan.costs["parameters"] <= 0.6 * plan.dense_costs["parameters"] * (1 + 1e-9)


def test_a_group_is_counted_in_place_of_its_sites() -> None:
    model, _, sites = calibrated("residual")
    sites = st.group(sites, {"pair": ("conv1", "conv2")})
    joint = st.JointSVD("left", multiple_of=1)
    methods = [*METHODS, joint]
    table = st.tabulate(sites, methods, costs={"joules": joules})
    assert table.dense["joules"] == pytest.approx(joules_of(model))
    plan = st.select(table, st.Budget(joules=0.55))
    network = Network(sites, counted.known(sites, {"joules": joules}), methods)
    assert network.cost(picked(plan)) == pytest.approx(dict(plan.costs))
    choice: Any = table["pair"].options[3].choice
    parts = {**network.cost(), "joules": joules_of(model)}
    shared = network.cost({"pair": choice})
    assert shared["joules"] - parts["joules"] == pytest.approx(
        joules(joint.layers(sites["pair"], choice)) - joules([sites["conv1"].spec, sites["conv2"].spec])
    )
    assert shared["parameters"] == table.dense["parameters"] - (
        table["pair"].dense.costs["parameters"] - table["pair"].options[3].costs["parameters"]
    )


def test_what_cannot_be_met_is_named_with_and_without_channels() -> None:
    _, _, sites = calibrated("mlp")
    with pytest.raises(InfeasibleBudgetError, match="budget joules") as caught:
        st.select(st.tabulate(sites, METHODS, costs={"joules": joules}), st.Budget(joules=0.001, macs=0.9))
    assert 0 < caught.value.lowest < caught.value.dense
    _, _, sites = coupled("chain")
    with pytest.raises(InfeasibleBudgetError, match="budget joules"):
        select_in_steps(sites, [FILTERS], st.Budget(joules=0.001), costs={"joules": joules})
    with pytest.raises(InfeasibleBudgetError, match="budget joules"):
        recommend(sites, st.Budget(joules=0.001), costs={"joules": joules})
    with pytest.raises(ValueError, match="limits joules, which the table does not hold"):
        select_in_steps(sites, [FILTERS], st.Budget(joules=0.5))


@pytest.mark.table
@pytest.mark.parametrize("dense_latency", [None, 0.001, 100.0])
@pytest.mark.parametrize("name", ["chain", "projection", "depthwise", "attention"])
def test_a_table_adds_up_to_what_the_network_costs(name: str, dense_latency: float | None) -> None:
    _, _, sites = coupled(name)
    methods = [FILTERS, *METHODS]
    latency = Latency(cache=None, threads=1, timer=clock)
    table = st.tabulate(sites, methods, latency=latency, dense_latency=dense_latency, costs={"joules": joules})
    network = Network(sites, counted.known(sites, {"joules": joules}), methods, latency, dense_latency)
    dense = network.cost()
    assert table.dense == pytest.approx(dense)
    if dense_latency is not None:
        assert dense["latency"] >= dense_latency * (1 - 1e-12)
    for row in table:
        # One choice at a time is exact; what a layer of coupled channels costs is in its own row as well.
        option = row.options[-1]
        alone = {c: value + option.costs[c] - row.dense.costs[c] for c, value in table.dense.items()}
        assert network.row(row.site, {row.site: option.choice}) == pytest.approx(dict(option.costs))
        if not row.of_channels:
            assert network.cost({row.site: option.choice}) == pytest.approx(alone)
        around = network.fixed((r.site for r in table), {row.site: option.choice})
        rows = [network.estimate(r.site, {row.site: option.choice}) for r in table]
        total = {c: value + sum(costs[c] for costs in rows) for c, value in around.items()}
        assert total == pytest.approx(network.cost({row.site: option.choice}))


def test_the_estimate_counts_channels_on_both_sides_of_a_layer_once() -> None:
    _, _, sites = coupled("twice")
    (coupling,) = (c for c in sites.couplings if {side.name for side in c.on("in")} & {s.name for s in c.on("out")})
    network = Network(sites, {}, [FILTERS], Latency(cache=None, threads=1, timer=clock))
    picks = {coupling.name: st.tabulate(sites, [FILTERS])[coupling.name].options[-1].choice}
    assert network.estimate("b", picks) == pytest.approx(network.row("b", picks))


def test_plans_at_a_rate_cost_what_the_network_costs() -> None:
    _, _, sites = calibrated("residual")
    sites = st.group(sites, {"pair": ("conv1", "conv2")})
    plan = at_rate(sites, 0.5)
    assert any(entry.members for entry in plan)
    methods = [st.WeightSVD(multiple_of=1), st.JointSVD("right", multiple_of=1)]
    network = Network(sites, counted.known(sites), methods)
    assert network.cost(picked(plan)) == dict(plan.costs)
    assert network.cost() == dict(plan.dense_costs)


@pytest.mark.parametrize("answer", [None, "much", np.ones(2)])
def test_a_cost_that_gives_no_number_is_named(answer: object) -> None:
    sites = st.find(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(TypeError, match=r"cost 'joules' gave .*: expected a number"):
        st.tabulate(sites, costs={"joules": lambda layers: answer})  # type: ignore[arg-type, return-value]
