"""The penalty and the multipliers of learned ranks, what is decomposed when, and a whole run on a toy problem."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.methods import Curve, WeightSVD
from spectrim.network.sites import Site
from spectrim.nn.surgery import parameter_count
from spectrim.testing import LAYERS
from spectrim.train import LearnedRanks, Schedule, learned_ranks
from tests.cases import settled
from tests.train.learned import canonical, perturb, truncated
from tests.train.small import equal, weights

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2}


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.table
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_penalty_gradient_copies_and_multipliers_follow_their_definitions(kind: str, dtype: torch.dtype) -> None:
    layer = LAYERS[kind].make().to(dtype)
    model, schedule = nn.Sequential(layer), Schedule(0.5, 2.0, 4)
    ranks = LearnedRanks(model, st.find(model), st.Budget(parameters=0.9), schedule=schedule, augmented=True)
    held = torch.zeros_like(canonical(layer, layer.weight))
    low = truncated(canonical(layer, layer.weight), ranks.plan["0"])
    for step in range(1, 4):
        mu = schedule.mu(step)
        assert (ranks.step, ranks.mu) == (step, mu)
        # Before any training the multipliers stay zero, and the last update is what the penalty has now.
        close(ranks.state_dict()["multiplier:0"], held, dtype, mu)
        close(canonical(layer, ranks.nested()[0].weight), low, dtype)
        perturb(model)
        weight = canonical(layer, layer.weight)
        pull = weight - low - held / mu
        penalty = ranks.penalty()
        assert penalty.item() == pytest.approx(mu / 2 * float(pull.square().sum()), rel=TOLERANCE[dtype])
        [gradient] = torch.autograd.grad(penalty, layer.weight)
        close(canonical(layer, gradient), mu * pull, dtype, mu)
        ranks.c_step()
        low = truncated(weight - held / mu, ranks.plan["0"])
        held = held - mu * (weight - low)
        assert ranks.trajectory.records[-1].mu == mu
        distance = float((weight - low).norm() / weight.norm())
        assert ranks.trajectory.records[-1].distance == pytest.approx(distance, rel=TOLERANCE[dtype])
    assert not ranks.state_dict()["multiplier:0"].requires_grad


def test_without_multipliers_the_penalty_is_quadratic() -> None:
    model = settled("mlp", dtype=torch.float64)
    ranks = LearnedRanks(model, st.find(model), st.Budget(parameters=0.5), schedule=Schedule(1, 3, 5))
    assert not ranks.augmented
    for _ in range(2):
        perturb(model)
        ranks.c_step()
    assert not any(key.startswith("multiplier") for key in ranks.state_dict())
    away = [(model[k].weight - ranks.nested()[k].weight).detach().square().sum() for k in (0, 2, 4)]
    assert ranks.penalty().item() == pytest.approx(27 / 2 * float(sum(away)))
    for site, entry in zip(ranks.sites, ranks.plan, strict=True):
        layer = model.get_submodule(site.name)
        low = canonical(layer, ranks.nested().get_submodule(site.name).weight)
        if not entry.choice.is_dense:
            torch.testing.assert_close(low, truncated(canonical(layer, layer.weight), entry))


def test_layers_left_dense_are_not_pulled_and_forget_their_multipliers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    low, flat = torch.outer(torch.arange(8.0), torch.arange(8.0)), torch.eye(8)
    for layer in model:
        layer.weight.data = low.double()
    ranks = LearnedRanks(
        model, st.find(model), multiplier=1e-3, cost="parameters", schedule=Schedule(1, 1.5, 9),
        methods=[WeightSVD(multiple_of=1)],
    )  # fmt: skip
    assert ranks.augmented
    assert ranks.trajectory.records[-1].choices == ("channel, rank 1", "channel, rank 1")
    perturb(model)
    model[1].weight.data = flat.double()
    ranks.c_step()
    assert ranks.trajectory.records[-1].choices[1] == "dense"
    assert torch.equal(ranks.nested()[1].weight, model[1].weight)
    gradients = torch.autograd.grad(ranks.penalty(), [layer.weight for layer in model], allow_unused=True)
    assert gradients[0].any()
    assert gradients[1] is None
    assert {key for key in ranks.state_dict() if key.startswith("multiplier")} == {"multiplier:0"}
    model[1].weight.data = low.double() + 0.01 * flat.double()
    weight, mu = model[1].weight.detach().clone(), ranks.mu
    ranks.c_step()
    assert ranks.trajectory.records[-1].choices[1] == "channel, rank 1"
    expected = -mu * (weight - truncated(weight[None], ranks.plan["1"])[0])
    torch.testing.assert_close(ranks.state_dict()["multiplier:1"][0], expected)


def test_all_dense_there_is_no_penalty() -> None:
    model = settled("mlp")
    ranks = LearnedRanks(model, st.find(model), st.Budget(parameters=1.0))
    assert all(entry.choice.is_dense for entry in ranks.plan)
    assert ranks.penalty().item() == 0
    record = ranks.trajectory.records[0]
    assert (record.ranks, record.distance, record.multipliers) == ((12, 16, 4), 0.0, {})
    assert equal(weights(ranks.nested()), weights(model))
    assert equal(weights(ranks.finish()[0]), weights(model))


@dataclass(frozen=True)
class Counted(WeightSVD):
    """Remembers which sites it was asked about."""

    asked: ClassVar[list[str]] = []

    def curve(self, site: Site) -> Curve:
        self.asked.append(site.name)
        return super().curve(site)


@pytest.mark.parametrize("augmented", [False, True])
def test_only_layers_that_moved_are_decomposed_again(augmented: bool) -> None:
    model = settled("residual")
    Counted.asked.clear()
    ranks = LearnedRanks(
        model, st.find(model), st.Budget(parameters=0.5), methods=[Counted()], augmented=augmented,
        schedule=Schedule(1, 2, 9),
    )  # fmt: skip
    assert Counted.asked == [site.name for site in ranks.sites]
    Counted.asked.clear()
    ranks.c_step()
    assert Counted.asked == []
    perturb(model.conv1)
    ranks.c_step()
    # With multipliers, those of the second C step have moved what the third decomposes, of all but dense layers.
    held = [entry.site for entry in ranks.plan if f"multiplier:{entry.site}" in ranks.state_dict()]
    assert Counted.asked == (held if augmented else ["conv1"])
    assert augmented == (len(held) > 1)
    fresh = LearnedRanks(model, st.find(model), st.Budget(parameters=0.5), methods=[Counted()])
    if not augmented:
        assert ranks.table == fresh.table


# A whole run on a toy problem.


def regression(rank: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the weight of rank three that made them, up to a little noise."""
    values = torch.tensor([5.0, 4.0, 3.0]).double()[:rank]
    left, right = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64))[0] for n in (10, 12))
    weight = (left * values) @ right.mT
    inputs = torch.randn(200, 12, dtype=torch.float64)
    return inputs, inputs @ weight.mT + 0.01 * torch.randn(200, 10, dtype=torch.float64), weight


@pytest.mark.parametrize("augmented", [False, True])
def test_ranks_grow_from_zero_to_the_true_one_and_the_weights_follow(augmented: bool) -> None:
    inputs, targets, true = regression()
    model = nn.Sequential(nn.Linear(12, 10, bias=False).double())
    model[0].weight.data = torch.linalg.lstsq(inputs, targets).solution.mT.contiguous()
    schedule = Schedule(1e-3, 1.6, 22)
    ranks = LearnedRanks(
        model, st.find(model), multiplier=1e-4, cost="parameters", dense=False, augmented=augmented, schedule=schedule
    )
    largest = float(torch.linalg.eigvalsh(inputs.mT @ inputs / 200)[-1])
    for _ in range(schedule.steps - 1):
        for _ in range(30):
            loss = (model(inputs) - targets).square().sum() / 400 + ranks.penalty()
            [gradient] = torch.autograd.grad(loss, model[0].weight)
            model[0].weight.data -= gradient / (largest + ranks.mu)
        ranks.c_step()
    found = [record.ranks[0] for record in ranks.trajectory.records]
    assert found[0] == 0
    assert found == sorted(found)
    assert found[-1] == 3
    assert ranks.trajectory.settled >= 5
    distances = [record.distance for record in ranks.trajectory.records]
    assert distances[0] == 1
    assert distances[-1] < 1e-3
    assert float((ranks.nested()[0].weight.detach() - true).norm()) < 0.01
    small, plan = ranks.finish()
    assert plan.costs["parameters"] == 3 * 22
    with torch.no_grad():
        torch.testing.assert_close(small(inputs), inputs @ true.mT, atol=0.02, rtol=0)


# Steps.


def test_after_step_takes_a_c_step_every_so_many_batches_until_the_schedule_is_over() -> None:
    model = settled("mlp")
    ranks = LearnedRanks(model, st.find(model), st.Budget(parameters=0.5), every=3, schedule=Schedule(steps=3))
    steps = []
    for _ in range(12):
        ranks.after_step(model)
        steps.append(ranks.step)
    assert steps == [1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]
    assert len(ranks.trajectory) == 3
    with pytest.raises(RuntimeError, match=r"all 3 C steps .* are done; call finish\(\)"):
        ranks.c_step()
    assert torch.equal(ranks(model), ranks.penalty())


def test_every_step_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(10, 4)  # every reading is four seconds after the last
    monkeypatch.setattr(learned_ranks, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    model = settled("residual")
    ranks = LearnedRanks(
        model, st.find(model), st.Budget(parameters=0.5), evaluate=lambda net: float(net.conv1.weight.sum()),
        schedule=Schedule(0.5, 2, 3),
    )  # fmt: skip
    for step in range(3):
        record = ranks.trajectory.records[-1]
        assert record.mu == 0.5 * 2**step
        assert record.metric == float(ranks.nested().conv1.weight.detach().sum())
        assert record.seconds == 4
        for rank, full, entry, word in zip(
            record.ranks, ranks.trajectory.full, ranks.plan, record.choices, strict=True
        ):
            assert rank == (full if entry.choice.is_dense else entry.choice["rank"])
            assert word == str(entry.choice)
        if step < 2:
            perturb(model)
            ranks.c_step()
    assert ranks.trajectory.sites == tuple(site.name for site in ranks.sites)
    # The largest rank over all unfoldings: 8 x 9 for a channel, 24 x 24 for an axis.
    assert ranks.trajectory.full == (9, 24, 24, 5)
    assert ranks.trajectory.dense_costs["parameters"] == parameter_count(model)
