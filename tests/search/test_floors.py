"""The least that sets of methods can leave of a network is known before anything is fitted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.errors import InfeasibleBudgetError
from spectrim.methods import ActivationCP, ActivationSVD, ActivationTucker2, LowRankPlusSparse, Method, PrincipalFilters
from spectrim.network.groups import group
from spectrim.network.sites import Sites
from spectrim.search.floors import Floor
from spectrim.search.stepwise import select_in_steps
from spectrim.tables import default_methods

IMPOSSIBLE = 1e-9


def calibrated(net: nn.Module, batch: torch.Tensor) -> Sites:
    net = net.eval()
    return st.calibrate(net, st.couple(net, st.find(net), batch), [batch])


@pytest.fixture(scope="module")
def convolutions() -> Sites:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2)]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(12 * 9, 10))
    return calibrated(net, torch.randn(16, 3, 8, 8))


@pytest.fixture(scope="module")
def perceptron() -> Sites:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU()]
    return calibrated(nn.Sequential(*layers, nn.Linear(24, 6)), torch.randn(64, 16))


LOW_RANK: tuple[Method, ...] = (ActivationSVD(), ActivationTucker2())
SETS: dict[str, tuple[Method, ...]] = {
    "low rank": LOW_RANK,
    "chains": (*LOW_RANK, ActivationCP(evaluations=8)),
    "sparse": (*LOW_RANK, LowRankPlusSparse(turns=3, densities=(0.0, 0.01, 0.1), ranks=2)),
    "filters": (PrincipalFilters(),),
    "filters, then low rank": (PrincipalFilters(), *LOW_RANK),
}


def lowest(call: Any) -> float:
    """The lowest cost that the error of an impossible budget names."""
    try:
        call()
    except InfeasibleBudgetError as error:
        return error.lowest
    raise AssertionError("the budget was met")


@pytest.mark.table
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("net", ["convolutions", "perceptron"])
def test_the_floor_is_what_the_table_can_reach(net: str, name: str, request) -> None:
    sites, methods = request.getfixturevalue(net), SETS[name]
    table, floor = st.tabulate(sites, list(methods)), Floor(sites, methods)
    for cost in ("parameters", "macs", "bytes"):
        budget = st.Budget(**{cost: IMPOSSIBLE})
        if name.startswith("filters"):
            reached = lowest(lambda b=budget: select_in_steps(sites, methods, b, table=table))
        else:
            reached = lowest(lambda b=budget: st.select(table, b))
        told = lowest(lambda b=budget: floor.check(b))
        # Which unfolding of a low-rank part a sparse one stands beside is told by fitting.
        assert reached * (0.98 if name == "sparse" else 1 - 1e-9) <= told <= reached * (1 + 1e-9)


def test_layers_that_share_factors_have_a_floor_too(perceptron: Sites) -> None:
    sites = group(perceptron)
    methods = tuple(default_methods(sites))
    assert sites.groups
    table, budget = st.tabulate(sites, list(methods)), st.Budget(parameters=IMPOSSIBLE)
    assert lowest(lambda: Floor(sites, methods).check(budget)) == lowest(lambda: st.select(table, budget))


class Silent(ActivationSVD):
    """Does not know what costs least."""

    def leanest(self, site: Any) -> None:
        return None


def test_a_budget_at_the_floor_is_not_refused_and_one_below_it_is(convolutions: Sites) -> None:
    floor, table = Floor(convolutions, LOW_RANK), st.tabulate(convolutions, list(LOW_RANK))
    least = lowest(lambda: floor.check(st.Budget(macs=IMPOSSIBLE)))
    within, below = (st.Budget.absolute({"macs": least * (1 + by)}) for by in (1e-6, -1e-6))
    floor.check(within)
    assert st.select(table, within).costs["macs"] == pytest.approx(least)
    assert lowest(lambda: floor.check(below)) == least


@pytest.mark.parametrize(
    ("methods", "budget"),
    [
        ((Silent(),), st.Budget(macs=IMPOSSIBLE)),
        (LOW_RANK, st.Budget(latency=IMPOSSIBLE)),
        (LOW_RANK, st.Budget(joules=IMPOSSIBLE)),
    ],
)
def test_what_is_not_known_is_not_refused_and_what_is_known_beside_it_is(
    convolutions: Sites, methods: tuple[Method, ...], budget: st.Budget
) -> None:
    Floor(convolutions, methods).check(budget)
    assert lowest(lambda: Floor(convolutions, LOW_RANK).check(budget.replace(macs=IMPOSSIBLE))) > 0


def refuses(self: object, site: object) -> None:
    raise AssertionError("fitted for a budget that is out of reach")


@pytest.mark.parametrize("methods", [None, "auto"])
def test_an_impossible_budget_is_refused_before_any_set_is_fitted(methods, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10)]
    net, batches = nn.Sequential(*layers).eval(), [torch.randn(16, 3, 8, 8)]
    for method in (ActivationCP, LowRankPlusSparse, PrincipalFilters):
        monkeypatch.setattr(method, "curve", refuses)
    with pytest.raises(InfeasibleBudgetError, match="the lowest reachable is") as raised:
        st.compress(net, batches, st.Budget(macs=10, parameters=1e-9), methods=methods)
    assert 0 < raised.value.lowest < raised.value.dense
