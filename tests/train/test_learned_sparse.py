"""Learned ranks with low rank plus sparse among the methods."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.methods import LowRankPlusSparse, Method, WeightSVD
from spectrim.network.choices import DENSE, Choice
from spectrim.network.sites import Statistics
from spectrim.nn.sparse.layers import Masked, Summed
from spectrim.nn.surgery import parameter_count
from spectrim.selection.candidates import Option, Row
from spectrim.selection.trajectory import Trajectory
from spectrim.tables import tabulate
from spectrim.train import LearnedRanks, Loop, Recipe, Schedule, learn_ranks
from spectrim.train.c_step import ZERO, CStep, buildable, rank, with_distances, with_zero, without_zero
from tests.cases import batches_for, settled
from tests.train.learned import perturb, timeless
from tests.train.small import equal, weights
from tests.train.sparse_nets import squares

SMALL = LowRankPlusSparse(densities=(0.0, 0.05, 0.2), ranks=2, multiple_of=1)
RECIPE = Recipe(epochs=8, lr=0.05, weight_decay=0.0, distillation=None)


def sparse(rank: int, density: float, pattern: str = "unstructured") -> Choice:
    settings = {"rank": rank, "density": density, "pattern": pattern, "unfolding": "channel", "bias": True}
    return Choice("low_rank_plus_sparse", "LowRankPlusSparse", settings)


# A layer that is low rank plus sparse.


class Planted:
    """``y = (L + S) x``, ``L`` of rank 2 and ``S`` with 5 % of the entries."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        low = normal(32, 2) @ normal(2, 48) / 2
        few = torch.where(torch.rand(32, 48, generator=generator) < 0.05, 3 * normal(32, 48), torch.zeros(32, 48))
        self.weight = low + few
        inputs = normal(512, 48)
        self.batches = [(x, x @ self.weight.T) for x in inputs.split(32)]
        self.model = nn.Sequential(nn.Linear(48, 32, bias=False))
        with torch.no_grad():
            self.model[0].weight.copy_(self.weight + 0.3 * normal(32, 48))

    def error(self, model: nn.Module) -> float:
        wanted = self.weight.square().sum()
        with torch.no_grad():
            found = model(torch.eye(48)).T
        return float((found - self.weight).square().sum() / wanted)


METHODS: dict[str, list[Method]] = {
    "both": [dataclasses.replace(SMALL, densities=(0.0, 0.05, 0.1, 0.21), ranks=6), WeightSVD(multiple_of=1)],
    "low rank": [WeightSVD(multiple_of=1)],
    "sparse": [LowRankPlusSparse(densities=(0.05, 0.1, 0.15, 0.2), ranks=0)],
}


@pytest.mark.slow
def test_low_rank_plus_sparse_is_chosen_where_it_is_the_truth() -> None:
    errors = {}
    for name, methods in METHODS.items():
        planted = Planted()
        result = learn_ranks(
            planted.model, planted.batches, st.Budget(parameters=0.212), methods=methods, start=methods,
            schedule=Schedule(0.02, 1.5, 16), learning=RECIPE, tuning=RECIPE, loss=squares, weigh=False,
            energy="weight",
        )  # fmt: skip
        errors[name] = planted.error(result.model)
        assert result.plan.costs["parameters"] <= 0.212 * 32 * 48
        if name == "both":
            choice = result.plan["0"].choice
            assert (choice.kind, choice["rank"]) == ("low_rank_plus_sparse", 2)
            assert choice["density"] > 0
            assert isinstance(result.model[0], Summed)
            assert parameter_count(result.model) == result.plan.costs["parameters"]
            assert result.trajectory.records[-1].choices == (str(choice),)
            assert Trajectory.from_json(result.trajectory.to_json()) == result.trajectory
    assert errors["both"] < 1e-3
    assert errors["both"] < 0.01 * min(errors["low rank"], errors["sparse"])


# The C step.


@pytest.mark.parametrize(
    ("network", "energy"),
    [("mlp", "weight"), ("mlp", "output"), pytest.param("residual", "output", marks=pytest.mark.slow)],
)
def test_copies_are_those_of_the_method_and_the_budget_holds(network: str, energy: str) -> None:
    model = settled(network)
    sites = st.calibrate(model, st.find(model), batches_for(network))
    ranks = LearnedRanks(
        model, sites, st.Budget(parameters=0.4), methods=[SMALL], start=[SMALL], energy=energy,
        schedule=Schedule(0.1, 1.5, 3),
    )  # fmt: skip
    for _ in range(2):
        perturb(model)
        # Measured on the weights before the step, which the copies are made of.
        plan = ranks.c_step()
        assert plan.costs["parameters"] <= plan.budget["parameters"]
        kinds = {entry.choice.kind for entry in plan}
        assert "low_rank_plus_sparse" in kinds
        nested = dict(ranks.nested().named_modules())
        for entry in plan:
            if entry.choice.is_dense:
                continue
            layer: Any = nested[entry.site]
            present = dataclasses.replace(
                sites[entry.site],
                weight=_canonical(model.get_submodule(entry.site)),
                statistics=sites[entry.site].statistics if energy == "output" else Statistics(),
            )
            (low,) = SMALL.factorize(present, entry.choice).dense()
            torch.testing.assert_close(_canonical(layer), low, rtol=1e-4, atol=1e-5)
    record = ranks.trajectory.records[-1]
    assert all(0 <= r <= full for r, full in zip(record.ranks, ranks.trajectory.full, strict=True))
    small, plan = ranks.finish(batches_for(network))
    assert parameter_count(small) <= plan.budget["parameters"]
    assert any(isinstance(module, (Masked, Summed)) for module in small.modules())
    for inputs in batches_for(network):
        assert bool(small(inputs).isfinite().all())


def _canonical(layer: Any) -> Tensor:
    groups = getattr(layer, "groups", 1)
    return layer.weight.detach().unflatten(0, (groups, -1)).clone()


def test_options_that_follow_the_weights_are_made_anew() -> None:
    """The best unfolding and the best box of kernel positions turn with the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[0].weight.zero_()[:, :, 0].normal_()
    method = dataclasses.replace(SMALL, patterns=("unstructured", "taps"), densities=(0.0, 0.1))
    sites = st.find(model)
    options = {"costs": {"layers": len}}
    step = CStep(
        sites, [method], st.Budget(parameters=0.5), None, cost="parameters", normalize=True, dense=True, options=options
    )
    before = step.table
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.transpose(2, 3).flip(3).clone())
    sites = st.find(model)
    step.renew(sites)
    wanted = with_zero(tabulate(sites, [method], costs={"layers": len}), sites)
    assert step.table == wanted
    assert {o.choice for o in before["0"].options} != {o.choice for o in step.table["0"].options}
    step.renew(sites)
    assert step.table == wanted
    plan = step.choose(sites, 1.0)
    assert plan["0"].choice["pattern"] == "taps-3x1@0x2"
    table, last = step.last(sites, 1.0, plan)
    assert last["0"].choice == plan["0"].choice
    assert all(option.choice != ZERO for option in table["0"].options)


@pytest.mark.slow
def test_a_stopped_run_ends_equal() -> None:
    def made(seed: int) -> tuple[nn.Module, LearnedRanks]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
        method = dataclasses.replace(SMALL, patterns=("unstructured", "taps"), densities=(0.0, 0.2))
        ranks = LearnedRanks(
            model, st.find(model), multiplier=1e-4, cost="parameters", methods=[method],
            schedule=Schedule(0.05, 2.0, 4), every=4,
        )  # fmt: skip
        return model, ranks

    torch.manual_seed(9)
    batches = [(torch.randn(8, 3, 6, 6), torch.randint(4, (8,))) for _ in range(6)]
    recipe = Recipe(epochs=2, lr=0.1, distillation=None)
    model, ranks = made(0)
    Loop(model, batches, recipe, penalty=ranks, after_step=ranks.after_step).run()
    stopped, first = made(0)
    loop = Loop(stopped, batches, recipe, penalty=first, after_step=first.after_step)
    loop.run(until=1)
    again, second = made(0)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for name, tensor in again.state_dict().items():
            tensor.copy_(stopped.state_dict()[name])
    perturb(again)
    perturb_like(stopped, again)
    assert second.c_step() == first.c_step()
    assert timeless(second.trajectory.records) == timeless(first.trajectory.records)
    assert equal(weights(second.nested()), weights(first.nested()))
    small, plan = ranks.finish()
    assert len(ranks.trajectory) == 4
    assert parameter_count(small) == plan.costs["parameters"]


def perturb_like(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict(other.state_dict())


# Tables.


def option(choice: Choice, error: float, cost: float) -> Option:
    return Option(choice, error, {"parameters": cost})


def test_a_sparse_weight_alone_is_a_choice_and_not_nothing() -> None:
    alone, both = sparse(0, 0.05), sparse(2, 0.1)
    row = Row("a", "Linear", (option(DENSE, 0, 100), option(both, 0.1, 40), option(alone, 0.5, 5), option(ZERO, 1, 0)))
    table = st.Candidates((row,), {"parameters": 0.0}, "weight energy")
    assert [o.choice for o in without_zero(table).rows[0].options] == [DENSE, both, alone]
    built = without_zero(table).rows[0]
    assert built.options[buildable(built, alone)].choice == alone
    assert built.options[buildable(built, both)].choice == both
    # The least that can be built in place of nothing is the sparse weight, and what costs more than dense is not.
    assert built.options[buildable(built, ZERO)].choice == alone
    dear = dataclasses.replace(built, options=(*built.options[:2], option(alone, 0.5, 500)))
    assert dear.options[buildable(dear, alone)].choice == DENSE
    assert dear.options[buildable(dear, ZERO)].choice == both
    assert (rank(alone, 9), rank(both, 9), rank(ZERO, 9), rank(DENSE, 9)) == (0, 2, 0, 9)


def test_words_tell_choices_apart() -> None:
    made = [sparse(0, 0.05), sparse(2, 0.05), sparse(2, 0.1), sparse(2, 0.1, "rows"), ZERO, DENSE]
    words = [str(choice) for choice in made]
    assert words[:4] == [
        "5 % unstructured", "channel, rank 2 + 5 % unstructured", "channel, rank 2 + 10 % unstructured",
        "channel, rank 2 + 10 % rows",
    ]  # fmt: skip
    assert len(set(words)) == len(words)
    assert str(sparse(3, 0.0)) == "channel, rank 3"


def test_a_dropped_layer_of_zeros_loses_nothing() -> None:
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4))
    nn.init.zeros_(model[0].weight)
    sites = st.find(model)
    table = with_distances(with_zero(tabulate(sites, [SMALL]), sites), sites, 1.0, normalize=True)
    assert all(o.error == 0 for o in table["0"].options)
    assert any(o.error > 0 for o in table["1"].options)
