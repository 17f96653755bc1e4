"""tabulate and apply on tiny models."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.application import apply
from spectrim.cost.counted import macs, parameters, size_bytes
from spectrim.errors import PlanError
from spectrim.linalg.unfold import unfold, unfolding
from spectrim.methods import Curve, LowRankMethod
from spectrim.network.choices import Choice, ZeroChoice
from spectrim.network.factors import LowRank
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Site, Sites, Statistics
from spectrim.nn.find import find
from spectrim.nn.modules import Factored
from spectrim.nn.surgery import parameter_count
from spectrim.nn.watch.calibrate import calibrate
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates, Option
from spectrim.selection.plan import Plan, make_plan
from spectrim.tables import default_methods, retabulate, tabulate
from spectrim.testing import check_method
from tests.cases import MODELS, batches_for, one_thread, settled


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def prepared(name: str) -> tuple[nn.Module, Sites, list[Tensor]]:
    model, batches = settled(name), batches_for(name)
    return model, calibrate(model, find(model), batches, rows=None), batches


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def output_error(small: nn.Module, model: nn.Module, batches: list[Tensor]) -> float:
    inputs = torch.cat(batches)
    wanted, found = model.eval()(inputs), small.eval()(inputs)
    return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


# tabulate


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", MODELS)
def test_rows_have_the_dense_option_first_and_others_that_save(name: str) -> None:
    _, sites, _ = prepared(name)
    table = tabulate(sites)
    assert [row.site for row in table] == [site.name for site in sites]
    assert table.unit == "output energy"
    methods = {method.name: method for method in default_methods(sites)}
    assert set(table.methods) == set(methods) == {"ActivationSVD", "ActivationTucker2"}
    functions = {"parameters": parameters, "bytes": size_bytes, "macs": macs}
    for row, site in zip(table, sites, strict=True):
        assert row.options[0].choice.is_dense
        assert row.options[0].error == 0
        assert row.options[0].costs == {cost: function(site.layers) for cost, function in functions.items()}
        assert len(row.options) > 1
        for option in row.options[1:]:
            assert not option.choice.is_dense
            assert any(option.costs[cost] < row.dense.costs[cost] for cost in functions)
            specs = methods[option.choice.method].layers(site, option.choice)
            assert option.costs == {cost: function(specs) for cost, function in functions.items()}
        assert {key.split("/")[0] for key in row.spectra} == {"ActivationSVD"}
    offered = {row.site: {option.choice.method for option in row.options} for row in table}
    for site in sites:
        assert ("ActivationTucker2" in offered[site.name]) == (
            math.prod(site.spec.kernel) > 1 and site.spec.groups == 1
        )


@pytest.mark.parametrize("name", MODELS)
def test_dense_costs_are_those_of_the_whole_model(name: str) -> None:
    model, sites, batches = prepared(name)
    dense = tabulate(sites).dense
    assert dense["parameters"] == parameter_count(model)
    assert dense["bytes"] == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batches[0])
    assert dense["macs"] == counter.get_total_flops() / 2 / len(batches[0])


def test_units_never_mix() -> None:
    _, sites, _ = prepared("mlp")
    bare = dataclasses.replace(sites, sites=tuple(dataclasses.replace(s, statistics=Statistics()) for s in sites))
    assert tabulate(bare).unit == "weight energy"
    assert default_methods(bare) == [st.WeightSVD()]
    mixed = dataclasses.replace(sites, sites=(*bare.sites[:1], *sites.sites[1:]))
    with pytest.raises(ValueError, match="different units .output energy, weight energy."):
        tabulate(mixed, [st.WeightSVD()])


def test_without_a_run_there_are_no_macs() -> None:
    sites = find(settled("cnn"))
    table = tabulate(sites)
    assert set(table.dense) == {"parameters", "bytes"}
    with pytest.raises(ValueError, match="limits macs, which the table does not hold"):
        st.select(table, Budget(macs=0.5))


def test_methods_that_a_plan_could_not_tell_apart_are_refused() -> None:
    _, sites, _ = prepared("mlp")
    with pytest.raises(ValueError, match="two methods are called 'ActivationSVD'.*sweeps=0.*subclass"):
        tabulate(sites, [st.ActivationSVD(sweeps=0), st.ActivationSVD(sweeps=4)])


def test_costs_of_ones_own_and_progress() -> None:
    _, sites, _ = prepared("cnn")
    told = []
    table = tabulate(sites, costs={"layers": len}, progress=lambda *report: told.append(report))
    assert told == [("tabulate", 1, 3), ("tabulate", 2, 3), ("tabulate", 3, 3)]
    for row in table:
        layers = [1 if o.choice.is_dense else 3 if o.choice.kind == "tucker" else 2 for o in row.options]
        assert [o.costs["layers"] for o in row.options] == layers
    assert table.dense["layers"] == 3


def fake_latency(slow: float = 1.0) -> st.Latency:
    """Milliseconds in step with MACs, and a fixed time for each layer."""

    def timer(chains, **_: object) -> list[float]:
        return [sum(slow * macs([spec]) * 1e-4 + 0.05 for spec in chain) for chain in chains]

    return st.Latency(cache=None, timer=timer)


def test_latency_is_a_further_cost_and_guard_drops_what_does_not_pay() -> None:
    _, sites, _ = prepared("residual")
    with pytest.raises(ValueError, match="guard=True needs latency"):
        tabulate(sites, guard=True)
    table, guarded = (tabulate(sites, latency=fake_latency(), dense_latency=9.0, guard=g) for g in (False, True))
    assert table.dense["latency"] == pytest.approx(9.0)
    assert table.fixed["latency"] > 0
    assert table.facts["threads"] == 1
    slower = {r.site: [o for o in r.options if o.costs["latency"] >= r.dense.costs["latency"]] for r in table}
    assert any(len(options) > 1 for options in slower.values())
    for before, after in zip(table, guarded, strict=True):
        kept = [o for o in before.options[1:] if o.costs["latency"] < before.dense.costs["latency"]]
        assert list(after.options) == [before.dense, *kept]
    # Without a measured whole the fixed part is that of the untouched layers: here there are none.
    assert tabulate(sites, latency=fake_latency()).fixed["latency"] == 0


def test_ranks_on_offer_are_those_of_the_machine_that_was_measured(register_width: int) -> None:
    """Whatever this machine is: the same facts give the same table, also when it is made again."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 16))
    sites = calibrate(model, find(model), [torch.randn(8, 256)])
    for told in (8, 16):
        latency = dataclasses.replace(fake_latency(), register_width=told)
        table = tabulate(sites, [st.WeightSVD()], latency=latency)
        assert [o.choice.rank for o in table.rows[0].options[1:]] == list(range(told, 128, told))
        assert st.select(table, st.Budget(latency=0.5)).facts["register_width"] == told
        assert retabulate(table, sites, [st.WeightSVD()]) == table
    plain = tabulate(sites, [st.WeightSVD()]).rows[0].options
    assert plain[1].choice.rank == register_width


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", MODELS)
def test_options_that_save_nothing_are_kept_if_they_are_asked_for(name: str) -> None:
    _, sites, _ = prepared(name)
    methods = [st.WeightSVD(multiple_of=1, to_full_rank=True)]
    table, dear = tabulate(sites, methods), tabulate(sites, methods, dear=True)
    for site, row, longer in zip(sites, table, dear, strict=True):
        saving = [o for o in longer.options[1:] if any(o.costs[c] < longer.dense.costs[c] for c in longer.dense.costs)]
        assert list(row.options) == [longer.dense, *saving]
        assert [o.choice for o in longer.options[1:]] == list(methods[0].curve(site).choices)
        assert len(longer.options) > len(row.options)
    assert dear.dense == table.dense


def moved(sites: Sites) -> Sites:
    """The same sites with other weights."""
    drawn = torch.Generator().manual_seed(4)

    def change(weight: Tensor) -> Tensor:
        return weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=drawn)

    changed = (dataclasses.replace(s, weight=change(s.weight)) for s in sites)
    return dataclasses.replace(sites, sites=tuple(changed))


@pytest.mark.table
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("data", ["none", "calibrated", "weighted"])
def test_a_table_made_again_is_the_table_of_the_changed_weights(name: str, data: str) -> None:
    model, sites, batches = prepared(name)
    sites = find(model) if data == "none" else sites
    sites = st.sensitivity(model, sites, batches) if data == "weighted" else sites
    methods = default_methods(sites)
    before, other = tabulate(sites, methods), moved(sites)
    expected = tabulate(other, methods)
    assert retabulate(before, other, methods) == expected != before
    assert retabulate(before, sites, methods) == before
    dear = tabulate(sites, [st.WeightSVD(multiple_of=1, to_full_rank=True)], dear=True)
    again = tabulate(other, [st.WeightSVD(multiple_of=1, to_full_rank=True)], dear=True)
    assert retabulate(dear, other, [st.WeightSVD(multiple_of=1, to_full_rank=True)]) == again


def test_a_table_made_again_takes_costs_over_and_leaves_other_rows() -> None:
    _, sites, _ = prepared("residual")
    counted = []

    def count(specs: Sequence[LayerSpec]) -> float:
        counted.append(specs)
        return float(len(counted))

    methods = [st.WeightSVD()]
    table = tabulate(sites, methods, costs={"calls": count}, latency=fake_latency(), guard=True)
    calls, other = len(counted), moved(sites)
    part = dataclasses.replace(other, sites=other.sites[1:2])
    found = retabulate(table, part, methods)
    assert len(counted) == calls
    assert found.fixed == table.fixed
    for number, (row, was, fresh) in enumerate(zip(found, table, tabulate(other, methods), strict=True)):
        if number != 1:
            assert row is was
            continue
        assert [(o.choice, o.costs) for o in row.options] == [(o.choice, o.costs) for o in was.options]
        errors = {o.choice: o.error for o in fresh.options}
        assert [o.error for o in row.options] == [errors[o.choice] for o in row.options]
        assert row != was


def test_options_of_no_method_keep_their_errors_and_unknown_ones_are_refused() -> None:
    _, sites, _ = prepared("mlp")
    table = tabulate(sites, [st.WeightSVD()])
    own = Option(ZeroChoice(0), 0.75, dict.fromkeys(table.costs, 0.0))
    rows = tuple(dataclasses.replace(row, options=(*row.options, own)) for row in table)
    for row in retabulate(dataclasses.replace(table, rows=rows), moved(sites), [st.WeightSVD()]):
        assert row.options[-1] is own
    with pytest.raises(
        ValueError, match="site '0': the methods do not offer WeightSVD's 'channel, rank 1', which the table has"
    ):
        retabulate(table, sites, [st.WeightSVD(multiple_of=3)])
    with pytest.raises(ValueError, match="site '0': the methods do not offer WeightSVD"):
        retabulate(table, sites, [st.ActivationSVD()])


# apply


def planned(table: Candidates, share: float = 0.5) -> Plan:
    return st.select(table, Budget(parameters=share))


def every_site(table: Candidates, method: str, rank: int) -> Plan:
    """The option of this method with the rank nearest to the one given, at every site."""
    picks = []
    for row in table:
        held = [(abs(o.choice["rank"] - rank), k) for k, o in enumerate(row.options) if o.choice.method == method]
        picks.append(min(held)[1])
    return make_plan(table, picks, budget={}, selector="test")


@pytest.mark.table
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reconstruct", [False, True])
def test_apply_leaves_the_original_alone_and_replays(name: str, reconstruct: bool) -> None:
    model, sites, batches = prepared(name)
    model.train()
    before = copy.deepcopy(model.state_dict())
    plan = planned(tabulate(sites), 0.7)
    small = apply(model, sites, plan, batches, reconstruct=reconstruct)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert not any(hook for m in model.modules() for hook in (m._forward_hooks, m._forward_pre_hooks))
    assert any(isinstance(m, Factored) for m in small.modules())
    assert not any(isinstance(m, Factored) for m in model.modules())
    assert {id(p) for p in small.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    assert parameter_count(small) == plan.costs["parameters"] < parameter_count(model)
    torch.manual_seed(99)
    assert same(small, apply(model, sites, plan, batches, reconstruct=reconstruct))
    assert same(small, apply(model, sites, Plan.from_json(plan.to_json()), batches, reconstruct=reconstruct))


@pytest.mark.table
@pytest.mark.parametrize("method", [st.WeightSVD(), st.ActivationSVD()])
@pytest.mark.parametrize("reconstruct", [False, True])
def test_the_model_has_as_many_parameters_as_planned_also_without_biases(
    method: LowRankMethod, reconstruct: bool
) -> None:
    model, sites, batches = prepared("residual")
    plan = every_site(tabulate(sites, [method]), method.name, 3)
    small = apply(model, sites, plan, batches, reconstruct=reconstruct)
    assert parameter_count(small) == plan.costs["parameters"]
    for entry in plan:
        assert (small.get_submodule(entry.site).second.bias is not None) is entry.choice["bias"]


def test_a_dense_plan_changes_nothing() -> None:
    model, sites, batches = prepared("residual")
    table = tabulate(sites)
    plan = make_plan(table, [0] * len(table.rows), budget={}, selector="test")
    small = apply(model, sites, plan, batches)
    assert same(small, model)
    assert output_error(small, model, batches) == 0


@pytest.mark.parametrize("method", ["ActivationSVD", "WeightSVD"])
def test_reconstruction_lowers_the_output_error(method: str) -> None:
    model, sites, batches = prepared("residual")
    plan = every_site(tabulate(sites, [getattr(st, method)()]), method, 3)
    once = output_error(apply(model, sites, plan), model, batches)
    fitted = output_error(apply(model, sites, plan, batches), model, batches)
    assert fitted < once
    assert fitted < output_error(apply(model, sites, plan, batches, reconstruct=False), model, batches)


def test_reconstruction_fits_the_second_factor_where_patches_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrim.nn.watch.watchers.FULL_PATCH", 4)
    monkeypatch.setattr("spectrim.nn.watch.watchers.FULL_LINEAR", 4)
    model, sites, batches = prepared("residual")
    assert not any(site.statistics.input is not None for site in sites)
    plan = every_site(tabulate(sites, [st.WeightSVD()]), "WeightSVD", 3)
    once, fitted = apply(model, sites, plan), apply(model, sites, plan, batches)
    assert output_error(fitted, model, batches) < output_error(once, model, batches)
    assert parameter_count(fitted) == plan.costs["parameters"]
    for entry in plan:
        before, after = once.get_submodule(entry.site), fitted.get_submodule(entry.site)
        assert torch.equal(before.first.weight, after.first.weight)
        assert not torch.equal(before.second.weight, after.second.weight)


def test_batchnorm_is_estimated_anew_where_nothing_was_reconstructed() -> None:
    model, sites, batches = prepared("residual")
    plan = every_site(tabulate(sites, [st.WeightSVD()]), "WeightSVD", 2)

    def moved(**options: object) -> bool:
        small = apply(model, sites, plan, batches, **options)  # type: ignore[arg-type]
        return not torch.equal(small.norm2.running_mean, model.norm2.running_mean)

    assert moved(reconstruct=False)
    assert not moved()
    assert moved(batchnorm=True)
    assert not moved(reconstruct=False, batchnorm=False)


def test_a_module_that_is_used_twice_is_replaced_under_both_names() -> None:
    model, sites, batches = prepared("twice")
    assert sites["block"].spec.names == ("block", "again")
    assert len(sites["block"].spec.inputs) == 2
    plan = every_site(tabulate(sites), "ActivationSVD", 4)
    for options in ({}, {"reconstruct": False}):
        small = apply(model, sites, plan, batches, **options)  # type: ignore[arg-type]
        assert small.block is small.again
        assert isinstance(small.block, Factored)
        assert parameter_count(small) == plan.costs["parameters"]
        assert output_error(small, model, batches) < 1


def test_reconstruction_refits_dense_layers_after_the_first_changed_one() -> None:
    model, sites, batches = prepared("mlp")
    table = tabulate(sites)
    row = table.rows[1]
    pick = next(k for k, o in enumerate(row.options) if o.choice.method == "ActivationSVD" and o.choice["rank"] == 4)
    plan = make_plan(table, [0, pick, 0], budget={}, selector="test")
    small, plain = apply(model, sites, plan, batches), apply(model, sites, plan)
    assert torch.equal(small[0].weight, model[0].weight)
    # How far its weight goes is told by samples held out; its mean is corrected in any case.
    assert not torch.equal(small[4].bias, model[4].bias)
    assert torch.equal(plain[4].weight, model[4].weight)
    assert output_error(small, model, batches) < output_error(plain, model, batches)


def test_wrong_plans_and_batches_are_refused() -> None:
    model, sites, batches = prepared("mlp")
    plan = planned(tabulate(sites))
    with pytest.raises(PlanError, match="pass a list or a DataLoader, not an iterator"):
        apply(model, sites, plan, iter(batches))
    other = dataclasses.replace(plan, entries=(dataclasses.replace(plan.entries[0], site="ghost"), *plan.entries[1:]))
    with pytest.raises(PlanError, match="sites that the model does not have: 'ghost'"):
        apply(model, sites, other)
    changed = next(entry for entry in plan if not entry.choice.is_dense)
    with pytest.raises(PlanError, match=f"site '{changed.site}' uses method .*, which the plan does not describe"):
        apply(model, sites, dataclasses.replace(plan, methods={}))
    records = {name: {**record, "type": "Unheard"} for name, record in plan.methods.items()}
    with pytest.raises(PlanError, match="needs method 'Unheard'; known are"):
        apply(model, sites, dataclasses.replace(plan, methods=records))


@dataclass(frozen=True)
class FirstRows(LowRankMethod):
    """Keeps the first rows of the unfolded weight: a poor method, but one of a user's own."""

    gain: float = 1.0

    def curve(self, site: Site) -> Curve:
        choices, errors = [], []
        for how in self.offered(site.spec):
            energy = unfold(site.weight, how).double().square().sum((0, 2))
            for rank in self.ranks(site.spec, how):
                if rank <= len(energy):
                    choices.append(self.choice(site, how, rank, bias=site.spec.bias))
                    errors.append(float(energy[rank:].sum() / energy.sum()))
        return Curve(tuple(choices), tuple(errors), "weight energy")

    def factorize(self, site: Site, choice: Choice) -> LowRank:
        how = unfolding(site.spec.kernel, choice["unfolding"])
        matrix = unfold(site.weight, how) * self.gain
        left = torch.eye(matrix.shape[1])[:, : choice["rank"]].expand(len(matrix), -1, -1)
        return LowRank(left.to(matrix), matrix[:, : choice["rank"]], None, how, site.spec.shape[1:])


def test_a_method_of_ones_own() -> None:
    model, sites, batches = prepared("cnn")
    mine = FirstRows(unfoldings=("channel",), gain=1.0)
    assert check_method(mine, layers=["linear-tokens-no-bias"]) > 0
    table = tabulate(sites, [mine])
    plan = st.select(table, Budget(parameters=0.7))
    assert {entry.choice.method for entry in plan} <= {"FirstRows", ""}
    small = apply(model, sites, plan, batches, reconstruct=False)
    assert parameter_count(small) == plan.costs["parameters"]
    # An imported class is found by its name; methods= takes precedence over what the plan records.
    assert same(small, apply(model, sites, plan, batches, reconstruct=False, methods=[mine]))
    louder = apply(model, sites, plan, reconstruct=False, methods=[dataclasses.replace(mine, gain=2.0)])
    assert not same(small, louder)
