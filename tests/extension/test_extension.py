"""A method, a cost, a selector and a training trick of a user's own go all the way, with ``src`` untouched."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.selection.selectors import lagrangian
from tests.extension import kit
from tests.extension.kit import Shrink, Tucker2, Tucker2Choice, energy_of_cores, first_fit, joules, network

METHODS = [Tucker2(), st.WeightSVD()]


class Clock:
    """A timer that knows the time of each chain, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, chains: list[object], **options: object) -> list[float]:
        self.asked += [len(chain) for chain in chains]  # type: ignore[arg-type]
        return [1e-3 * len(chain) + st.macs(chain) * 1e-7 for chain in chains]  # type: ignore[arg-type]


def images(count: int = 2) -> list[Tensor]:
    return [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(n)) for n in range(count)]


def seen(model: nn.Module) -> st.Sites:
    return st.calibrate(model, st.find(model), images(1), statistics=False)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return network().eval()


@pytest.fixture(scope="module")
def table(dense: nn.Module) -> st.Candidates:
    return st.tabulate(seen(dense), METHODS, costs={"joules": joules})


def all_tucker(dense: nn.Module) -> st.Plan:
    """A plan of Tucker-2 wherever it fits."""
    return st.select(st.tabulate(seen(dense), [Tucker2()], costs={"joules": joules}), st.Budget(joules=0.4))


def test_the_table_has_the_method_and_the_cost(dense: nn.Module, table: st.Candidates) -> None:
    assert "joules" in table.costs
    assert math.isclose(table.dense["joules"], joules([site.layers[0] for site in seen(dense)]))
    offered = {option.choice.method for row in table for option in row.options}
    assert offered == {"", "Tucker2", "WeightSVD"}


@pytest.mark.parametrize("selector", [first_fit, lagrangian, None])
def test_a_plan_within_the_users_cost(table: st.Candidates, selector: object) -> None:
    plan = st.select(table, st.Budget(joules="50%"), *([selector] if selector else []))
    assert plan.costs["joules"] <= 0.5 * table.dense["joules"]
    assert plan.loss > 0
    if selector is first_fit:
        assert plan.selector == "first_fit"


def test_a_budget_of_the_users_cost_that_cannot_be_met(table: st.Candidates) -> None:
    with pytest.raises(st.InfeasibleBudgetError, match="joules"):
        st.select(table, st.Budget(joules=1e-6))


def test_three_layers_in_a_row_are_timed_as_one_chain(dense: nn.Module) -> None:
    clock = Clock()
    table = st.tabulate(seen(dense), [Tucker2()], latency=st.Latency(cache=None, threads=1, timer=clock))
    assert 3 in clock.asked
    for row in table:
        for option in row.options:
            if isinstance(option.choice, Tucker2Choice):
                layers = Tucker2().layers(seen(dense)[row.site], option.choice)
                assert option.costs["latency"] == pytest.approx(3e-3 + st.macs(layers) * 1e-7)
    plan = st.select(table, st.Budget(latency=0.8))
    assert any(entry.choice.kind == "tucker2" for entry in plan)


def test_the_network_is_the_plans(dense: nn.Module) -> None:
    plan = all_tucker(dense)
    small = st.apply(dense, seen(dense), plan)
    changed = [entry for entry in plan if entry.choice.kind == "tucker2"]
    assert len(changed) >= 2
    rebuilt = network().eval()
    for entry in changed:
        site = seen(dense)[entry.site]
        (weight,) = Tucker2().factorize(site, entry.choice).dense()
        rebuilt.get_submodule(entry.site).weight.data.copy_(weight[0])
    x = images(1)[0]
    assert torch.allclose(small(x), rebuilt(x), atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == plan.costs["parameters"]


def test_full_ranks_lose_nothing(dense: nn.Module) -> None:
    curve = Tucker2(shares=(1.0,)).curve(seen(dense)["2"])
    assert curve.errors == pytest.approx([0.0], abs=1e-6)


def test_compress_takes_all_of_it() -> None:
    model = network().eval()
    result = st.compress(
        model,
        images(),
        st.Budget(joules=0.4),
        methods=Tucker2(),
        costs={"joules": joules},
        selector=first_fit,
        sensitivity=False,
    )
    assert result.plan.costs["joules"] <= 0.4 * result.plan.dense_costs["joules"]
    assert "Tucker-2, ranks" in " ".join(str(entry.choice) for entry in result.plan)


def test_a_plan_and_a_checkpoint_come_back(dense: nn.Module, tmp_path: Path) -> None:
    plan = all_tucker(dense)
    plan.write(tmp_path / "plan.json")
    again = st.Plan.read(tmp_path / "plan.json")
    assert again == plan
    small = st.apply(dense, seen(dense), again)
    st.save(small, plan, tmp_path / "small.safetensors")
    loaded = st.load(network().eval(), tmp_path / "small.safetensors")
    x = images(1)[0]
    assert torch.equal(loaded(x), small(x))
    record = json.loads((tmp_path / "plan.json").read_text())["methods"]["Tucker2"]
    assert record["module"] == kit.__name__


def test_a_damaged_choice_names_its_field(dense: nn.Module) -> None:
    text = all_tucker(dense).to_json()
    with pytest.raises(st.PlanError, match="outputs"):
        st.Plan.from_json(text.replace('"outputs"', '"out"'))


def test_the_report_says_it_in_the_users_words(tmp_path: Path) -> None:
    result = st.compress(network().eval(), images(), st.Budget(macs=0.5), methods=[Tucker2()], sensitivity=False)
    page = st.write_report(tmp_path / "page.html", result).read_text(encoding="utf-8")
    assert "Tucker-2, ranks" in page


def test_training_with_a_trick_of_ones_own(dense: nn.Module) -> None:
    small = st.apply(dense, seen(dense), all_tucker(dense))
    data = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in images()]
    trick = Shrink(0.2)
    st.fine_tune(small, data, epochs=2, penalty=energy_of_cores, after_step=trick, progress=False)
    assert trick.steps == 4
    assert max(float(p.detach().abs().max()) for p in small.parameters()) <= 0.2 * (1 + 1e-6)
