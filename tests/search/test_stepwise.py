"""Plans that remove channels under a budget: what is counted is what the network costs."""

from __future__ import annotations

import collections
import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.cost.counted import macs as counted_macs
from spectrim.cost.counted import parameters
from spectrim.cost.latency import Latency
from spectrim.cost.whole import Network
from spectrim.errors import InfeasibleBudgetError
from spectrim.methods import Curve
from spectrim.network.sites import Layer, Sites
from spectrim.nn.flops import WorkCounter
from spectrim.nn.surgery import parameter_count, size_in_bytes
from spectrim.nn.watch.batches import evaluating
from spectrim.pipeline import output_error
from spectrim.search.remaining import Curves, asked_once
from spectrim.search.stepwise import Judging, OutOfTimeError, select_in_steps
from spectrim.selection.plan import Plan
from tests.cases import one_thread
from tests.nn.coupled_nets import made

pytest.importorskip("torch_pruning")

FILTERS = st.PrincipalFilters(multiple_of=1)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def calibrated(name: str) -> tuple[nn.Module, list[Tensor], Sites]:
    model, x = made(name, samples=48, dtype=torch.float32)
    batches = list(x.split(24))
    return model, batches, st.calibrate(model, st.couple(model, st.find(model), x), batches)


def macs(model: nn.Module, x: Tensor) -> float:
    with evaluating(model), WorkCounter() as counter:
        model(x[:1])
    return counter.get_total_flops() / 2


NETWORKS = ["chain", "residual", "projection", "concat", "depthwise", "grouped", "transposed", "flatten", "squeeze"]


@pytest.mark.table(every=5)
@pytest.mark.parametrize("cost", ["parameters", "macs", "bytes"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_costs_what_the_network_costs_and_no_more_than_allowed(name: str, cost: str) -> None:
    model, batches, sites = calibrated(name)
    plan, table = select_in_steps(sites, [FILTERS], st.Budget(**{cost: 0.7}))
    small = st.apply(model, sites, plan, batches)
    assert plan.costs["parameters"] == parameter_count(small)
    assert plan.costs["bytes"] == size_in_bytes(small)
    assert plan.costs["macs"] == pytest.approx(macs(small, batches[0]))
    assert plan.costs[cost] <= plan.budget[cost] * (1 + 1e-9) < plan.dense_costs[cost]
    assert plan.dense_costs[cost] == pytest.approx(table.dense[cost])
    assert plan.facts["steps"] >= 1


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_of_a_budget_is_spent(name: str) -> None:
    # No group can have its next width.
    _, _, sites = calibrated(name)
    plan, _ = select_in_steps(sites, [FILTERS], st.Budget(parameters=0.7))
    removed = {e.site: e.choice for e in plan if "kept" in e.choice.settings}
    assert removed
    # Channels that are lost for nothing are not given back.
    lossy = {e.site for e in plan if e.error > 0}
    assert lossy

    numbers = {name: len(choice["kept"]) for name, choice in removed.items()}
    network = Network(sites, {"parameters": parameters})
    assert network.cost(widths=numbers)["parameters"] == plan.costs["parameters"]
    for coupling in sites.couplings:
        if coupling.name in lossy & set(numbers):
            wider = {**numbers, coupling.name: numbers[coupling.name] + coupling.pools}
            assert network.cost(widths=wider)["parameters"] > plan.budget["parameters"]


def test_entries_add_up_to_the_network() -> None:
    _, _, sites = calibrated("residual")
    plan, _ = select_in_steps(sites, [FILTERS], st.Budget(macs=0.6))
    for cost, total in plan.costs.items():
        fixed = plan.dense_costs[cost] - sum(entry.dense_costs[cost] for entry in plan)
        assert fixed + sum(entry.costs[cost] for entry in plan) == pytest.approx(total)


def test_one_table_is_enough_where_no_layer_loses_channels_on_both_sides() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    x = torch.randn(32, 6)
    sites = st.calibrate(model, st.couple(model, st.find(model), x), [x])
    plan, table = select_in_steps(sites, [FILTERS], st.Budget(parameters=0.6))
    assert plan.facts["steps"] == 1
    assert "1 step" in plan.selector
    # Of such a table every selection is exact.
    assert plan.loss == pytest.approx(st.select(table, st.Budget(parameters=0.6)).loss)


def test_it_is_the_best_plan_of_a_small_network() -> None:
    _, _, sites = calibrated("chain")
    plan, table = select_in_steps(sites, [FILTERS], st.Budget(macs=0.6))

    rows = [row for row in table if row.kind.endswith("channels")]
    losses = []
    for options in itertools.product(*(row.options for row in rows)):
        pairs = list(zip(rows, options, strict=True))
        numbers = {row.site: len(o.choice["kept"]) for row, o in pairs if not o.choice.is_dense}
        if Network(sites, {"macs": counted_macs}).cost(widths=numbers)["macs"] <= plan.budget["macs"]:
            losses.append(sum(row.loss(o) for row, o in pairs))
    assert plan.loss <= min(losses) * 1.05


def test_an_infeasible_budget_says_how_low_it_gets() -> None:
    _, _, sites = calibrated("residual")
    with pytest.raises(InfeasibleBudgetError, match="lowest reachable") as caught:
        select_in_steps(sites, [FILTERS], st.Budget(parameters=0.01))
    assert 0 < caught.value.lowest < caught.value.dense


def test_what_removals_leave_is_told_of_as_a_share_of_the_dense_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spectrim.search.stepwise.check_reachable", lambda *_: None)  # it knows of the smallest alone
    model, _, sites = calibrated("residual")
    with pytest.raises(InfeasibleBudgetError) as raised:
        select_in_steps(sites, [st.PrincipalFilters(), st.ActivationSVD()], {"parameters": 2})
    assert raised.value.dense == parameter_count(model)


def test_other_methods_compete_and_a_judge_decides() -> None:
    model, batches, sites = calibrated("flatten")
    methods = [FILTERS, st.ActivationSVD(multiple_of=1)]
    seen: list[Plan] = []

    def judge(plan: Plan) -> float:
        seen.append(plan)
        return output_error(model, st.apply(model, sites, plan), batches)

    plan, _ = select_in_steps(sites, methods, st.Budget(parameters=0.5), trial=Judging(judge))
    tried = list(seen)
    assert len(tried) > 1
    assert judge(plan) == min(judge(other) for other in tried)
    # The first removes nothing, and so is the plan of the others alone.
    alone = st.select(st.tabulate(sites, methods[1:]), tried[0].budget)
    assert {e.site: e.choice for e in tried[0] if not e.of_channels} == {e.site: e.choice for e in alone}
    assert tried[0].costs == pytest.approx(alone.costs)
    assert tried[0].loss == pytest.approx(alone.loss)
    assert all(other.costs["parameters"] <= other.budget["parameters"] * (1 + 1e-9) for other in tried)
    small = st.apply(model, sites, plan, batches)
    assert parameter_count(small) == plan.costs["parameters"]
    # Without time for more than one there is a plan all the same.
    seen.clear()
    first, _ = select_in_steps(sites, methods, st.Budget(parameters=0.5), trial=Judging(judge, over=lambda: True))
    assert seen == [tried[0]]
    assert [entry.choice for entry in first] == [entry.choice for entry in tried[0]]


@pytest.mark.parametrize("others", [[], [st.ActivationSVD(multiple_of=1)]], ids=["alone", "mixed"])
def test_channels_that_are_too_few_to_remove_any_stay(others: list[st.Method]) -> None:
    model, batches, sites = calibrated("flatten")
    few = min(sites.couplings, key=lambda coupling: coupling.channels)
    assert any(coupling.channels > few.channels for coupling in sites.couplings)
    filters = st.PrincipalFilters(multiple_of=few.channels)
    plan, table = select_in_steps(sites, [filters, *others], st.Budget(parameters=0.7))
    assert few.name not in {row.site for row in table.rows}
    assert plan[few.name].choice.is_dense
    assert plan[few.name].costs == plan[few.name].dense_costs
    assert any(not entry.choice.is_dense for entry in plan)
    assert parameter_count(st.apply(model, sites, plan, batches)) == plan.costs["parameters"]


@pytest.mark.parametrize("overhead", [0.0, 2.0])
def test_milliseconds_are_those_of_the_layers_as_they_would_be(overhead: float) -> None:
    # With a constant for each call the times of two removals in one layer do not multiply, as the estimate has it.
    _, _, sites = calibrated("projection")

    def clock(chains, **options):
        return [1e-3 * counted_macs(chain) + overhead * len(chain) for chain in chains]

    latency = Latency(cache=None, threads=1, timer=clock)
    plan, _ = select_in_steps(sites, [FILTERS], st.Budget(latency=0.8), latency=latency)
    layers = sum(len(site.layers) for site in sites) + len(sites.untouched)
    assert plan.costs["latency"] <= plan.budget["latency"] * (1 + 1e-9) < plan.dense_costs["latency"]
    assert plan.costs["latency"] == pytest.approx(1e-3 * plan.costs["macs"] + overhead * layers, rel=1e-6)


def test_compress_meets_a_budget_in_one_call() -> None:
    model, batches, _ = calibrated("projection")
    result = st.compress(model, batches, st.Budget(macs=0.6), methods=[st.PrincipalFilters()])
    assert macs(result.model, batches[0]) == pytest.approx(result.plan.costs["macs"])
    assert result.plan.costs["macs"] <= 0.6 * macs(model, batches[0]) * (1 + 1e-9)
    assert "channels removed" in str(result.report)
    # Those that hold the channels are dense, and no longer what they were.
    narrower = {entry.site for entry in result.plan if entry.narrower}
    assert len(narrower) == result.plan.changed > 0
    sizes = {
        site.name: [net.get_parameter(f"{site.name}.weight").shape for net in (model, result.model)]
        for site in result.sites
    }
    assert narrower == {name for name, (before, after) in sizes.items() if before != after}
    closed = st.apply(model, result.sites, result.plan)
    assert output_error(model, result.model, batches) <= output_error(model, closed, batches) * 1.01


def test_a_cost_that_the_network_does_not_have_may_be_limited() -> None:
    _, _, sites = calibrated("chain")
    plain, _ = select_in_steps(sites, [FILTERS], st.Budget(parameters=0.7))
    plan, _ = select_in_steps(
        sites, [FILTERS], st.Budget(parameters=0.7, joules=0.5), costs={"joules": lambda specs: 0.0}
    )
    assert plan.costs["joules"] == plan.dense_costs["joules"] == 0
    assert plan.budget == {**plain.budget, "joules": 0}
    assert [entry.choice for entry in plan] == [entry.choice for entry in plain]
    with pytest.raises(ValueError, match="the dense network has no joules that a budget could limit"):
        select_in_steps(sites, [FILTERS], st.Budget(joules=0.5), costs={"joules": lambda specs: 0.0})


@pytest.mark.slow
def test_no_layer_is_asked_twice_with_the_same_channels_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: collections.Counter[tuple[str, bytes]] = collections.Counter()
    own = st.ActivationSVD.curve

    def curve(self: st.ActivationSVD, site: Layer) -> Curve:
        asked[site.name, site.weight.numpy().tobytes()] += 1
        return own(self, site)

    methods = [FILTERS, st.ActivationSVD(multiple_of=1)]
    model, batches, sites = calibrated("depthwise")
    fresh, _ = select_in_steps(sites, methods, st.Budget(macs=0.5))
    monkeypatch.setattr(st.ActivationSVD, "curve", curve)
    curves: Curves = {}
    for kept in (0.6, 0.6, 0.5):
        plan, _ = select_in_steps(sites, methods, st.Budget(macs=kept), asking=functools.partial(asked_once, curves))
    assert asked.total() == len(curves) - len(sites.couplings) > len(sites)
    assert set(asked.values()) == {1}
    assert plan.to_json() == fresh.to_json()

    # Several plans are made for the file's size, and for each set of methods.
    asked.clear()
    result = st.compress(model, batches, st.Budget.absolute({"bytes": 4200}), methods=methods)
    assert any(entry.of_channels and not entry.choice.is_dense for entry in result.plan)
    assert set(asked.values()) == {1}


def test_where_time_ends_the_plan_that_was_found_is_kept() -> None:
    sites = calibrated("chain")[2]
    methods, asked = [FILTERS, st.ActivationSVD()], []

    def over() -> bool:
        asked.append(True)
        return len(asked) > 1

    with pytest.raises(OutOfTimeError):
        select_in_steps(sites, methods, "macs=90%", trial=Judging(over=lambda: True, needed=False))
    # Over while the layers that the first removals leave are tabulated: no removals at all were planned before.
    plan, table = select_in_steps(sites, methods, "macs=90%", trial=Judging(over=over))
    assert len(asked) == 2
    assert all(entry.choice.is_dense for entry in plan if entry.of_channels)
    assert plan.costs["macs"] <= 0.9 * table.dense["macs"]


def test_what_a_method_offers_is_not_taken_for_what_it_offers_with_other_options() -> None:
    _, _, sites = calibrated("chain")
    site = next(iter(sites))
    curves: Curves = {}
    asked = asked_once(curves, {})
    one, other = st.ActivationSVD(multiple_of=1), st.ActivationSVD(multiple_of=4)
    assert asked(one, site).choices != asked(other, site).choices
    assert asked(st.ActivationSVD(multiple_of=1), site) is asked(one, site)
    assert len(curves) == 2
