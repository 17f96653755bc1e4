"""Training of networks whose layers share factors, and learned ranks where sharing is on offer."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.errors import CheckpointError
from spectrim.linalg.unfold import unfold, unfolding
from spectrim.methods import Method
from spectrim.nn.checkpoint import same_weights
from spectrim.nn.surgery import merge, parameter_count
from spectrim.train import LearnedRanks, Loop, Recipe, Schedule, fine_tune
from tests.test_joint_apply import Convolutions, applied, case, planned, ties
from tests.train.learned import perturb
from tests.train.small import equal, weights

# What is resumed is another network than was begun with, so that nothing of it can be left.
pytestmark = pytest.mark.filterwarnings("ignore:.*began with other weights")

TRAINED = [("convolutions", "both"), ("attention", "left"), ("attention", "right")]


def labelled(net: str) -> list[tuple[Tensor, Tensor]]:
    """Batches with what the dense network answers, made of three directions so that it can be learned."""
    held = case(net)
    with torch.no_grad():
        return [(x, held.model(x).argmax(1)) for batch in held.batches for x in batch.split(16)]


def started(net: str, methods: str) -> nn.Module:
    """The network of a plan, away from its best weights."""
    model = copy.deepcopy(applied(net, methods, False))
    torch.manual_seed(3)
    perturb(model, 0.5)
    return model


class Stop(Exception):
    """Stands for whatever ends a process."""


def stop_at(step: int) -> Callable[[nn.Module], None]:
    counter = itertools.count(1)

    def after_step(_: nn.Module) -> None:
        if next(counter) == step:
            raise Stop

    return after_step


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05, "weight_decay": 1e-3},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "bfloat16": {"precision": "bfloat16", "memory_format": "channels_last", "lr": 0.05},
}


@pytest.mark.table
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("net", "methods"), TRAINED)
def test_training_lowers_the_loss_and_keeps_what_is_shared(net: str, methods: str, option: str, tmp_path: Path) -> None:
    if option == "bfloat16" and net == "attention":
        pytest.skip("channels-last is for images")
    model, held = started(net, methods), case(net)
    before, count, old = ties(model), parameter_count(model), weights(model)
    result = fine_tune(model, labelled(net), teacher=held.model, epochs=4, **OPTIONS[option])
    assert result.history[-1].loss < 0.95 * result.history[0].loss
    assert ties(model) == before
    assert parameter_count(model) == count
    for first, *others in before:
        state = weights(model)
        assert not torch.equal(state[first], old[first])
        assert all(torch.equal(state[first], state[other]) for other in others)
    path = tmp_path / "model.safetensors"
    st.save(model, planned(net, methods), path)
    assert same_weights(st.load(type(held.model)(), path), model)


@pytest.mark.table(every=3)
@pytest.mark.parametrize(("net", "methods"), TRAINED)
def test_stopped_runs_end_equal(net: str, methods: str, tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, lr=0.05, checkpoint_every=1, weight_decay=1e-3)
    whole = started(net, methods)
    expected = fine_tune(whole, labelled(net), recipe=recipe)
    path = tmp_path / "run"
    for step in (3, 4):
        model = started(net, methods)
        with pytest.raises(Stop):
            fine_tune(model, labelled(net), recipe=recipe, checkpoint=path, after_step=stop_at(step))
    model = copy.deepcopy(applied(net, methods, True))
    result = fine_tune(model, labelled(net), recipe=recipe, checkpoint=path)
    assert equal(weights(model), weights(whole))
    assert result.history == expected.history
    assert ties(model) == ties(whole)


def test_a_step_is_that_of_the_sum_of_gradients() -> None:
    """Plain descent on tied factors moves as the untied gradients add up."""
    model = started("attention", "left").double()
    apart = merge(model)
    (x, y), rate = labelled("attention")[0], 0.1
    tied = {names[0] for names in ties(model)}
    nn.functional.cross_entropy(model(x.double()), y).backward()
    nn.functional.cross_entropy(apart(x.double()), y).backward()
    before = weights(model)
    expected: dict[str, Tensor] = {}
    for names in ties(model):
        total = torch.zeros_like(before[names[0]])
        for name in names:
            # dL/dU of a layer W = V U is V^T dL/dW.
            site = name.removesuffix(".weight").removesuffix(".layer").removesuffix(".0")
            dense: Any = apart.get_submodule(site).weight
            total += before[f"{site}.1.weight"].mT @ dense.grad
        expected[names[0]] = before[names[0]] - rate * total
    assert tied == set(expected)
    torch.optim.SGD(model.parameters(), lr=rate).step()
    for name, wanted in expected.items():
        torch.testing.assert_close(weights(model)[name], wanted)


def test_with_accelerate_the_weights_are_the_same() -> None:
    pytest.importorskip("accelerate")
    models = [started("attention", "left") for _ in range(2)]
    for model, accelerate in zip(models, (False, True), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            fine_tune(model, labelled("attention"), epochs=2, lr=0.05, accelerate=accelerate)
    assert equal(*map(weights, models))
    assert ties(models[0]) == ties(models[1])


def test_accelerate_prepares_trains_and_stores_what_is_shared_once(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = started("attention", "left")
    plain, before = copy.deepcopy(model), ties(model)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (plain, model)]
    prepared, optimizer = accelerator.prepare(model, optimizers[1])
    for x, y in labelled("attention")[:2]:
        for net, back, step in ((plain, Tensor.backward, optimizers[0]), (prepared, accelerator.backward, optimizer)):
            step.zero_grad()
            back(nn.functional.cross_entropy(net(x), y))
            step.step()
    found = accelerator.unwrap_model(prepared)
    assert ties(found) == before
    assert same_weights(found, plain)
    accelerator.save_model(prepared, str(tmp_path))
    stored = (tmp_path / "model.safetensors").stat().st_size
    names = len(list(found.state_dict()))
    assert 4 * parameter_count(found) < stored < 4 * parameter_count(found) + 200 * names
    again = copy.deepcopy(applied("attention", "left", False))
    accelerate.load_checkpoint_in_model(again, str(tmp_path))
    assert same_weights(again, found)
    assert ties(again) == before


def test_processes_that_average_gradients_count_a_shared_one_once(tmp_path: Path) -> None:
    if not torch.distributed.is_gloo_available():
        pytest.skip("needs the gloo backend")
    model = started("attention", "left")
    plain = copy.deepcopy(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        x, y = labelled("attention")[0]
        for net in (wrapped, plain):
            for _ in range(2):
                nn.functional.cross_entropy(net(x), y).backward()
    finally:
        torch.distributed.destroy_process_group()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


# Learned ranks.

LEFT: list[Method] = [st.JointSVD("left", unfoldings=("channel",))]
MIXED: list[Method] = [*LEFT, st.WeightSVD(unfoldings=("channel",))]
BUDGET = st.Budget(parameters=0.4)


def learning(net: str, methods: list[Method], **options: Any) -> LearnedRanks:
    """Learned ranks of a copy of the network."""
    held = case(net)
    given: Mapping[str, Any] = {"schedule": Schedule(0.01, 2.0, 5), "budget": BUDGET, "start": methods, **options}
    return LearnedRanks(copy.deepcopy(held.model), held.grouped, methods=methods, **given)


def joined(ranks: LearnedRanks) -> list[tuple[str, ...]]:
    return [entry.members for entry in ranks.plan if entry.members and not entry.choice.is_dense]


def alike(model: nn.Module) -> None:
    """Give repeated layers one first factor, so that sharing loses nothing."""
    for names in case("convolutions").grouped.groups.values():
        if len(names) < 3:
            continue
        basis = torch.randn(2, 8, 3, 3)
        for name in names:
            layer: Any = model.get_submodule(name)
            with torch.no_grad():
                layer.weight.copy_(torch.einsum("or,rihw->oihw", torch.randn(8, 2), basis))


@pytest.mark.parametrize("net", ["convolutions", "attention"])
def test_c_steps_meet_the_budget_and_low_rank_copies_share_a_factor(net: str) -> None:
    ranks = learning(net, LEFT)
    limit = 0.4 * ranks.plan.dense_costs["parameters"]
    for step in range(3):
        assert joined(ranks)
        assert ranks.plan.costs["parameters"] <= limit
        assert ranks.trajectory.records[-1].costs["parameters"] == ranks.plan.costs["parameters"]
        nested = st.find(ranks.nested())
        for entry in ranks.plan:
            if not entry.members or entry.choice.is_dense:
                continue
            how = unfolding(nested[entry.members[0]].spec.kernel, entry.choice["unfolding"])
            stack = torch.cat([unfold(nested[name].weight, how) for name in entry.members], dim=-1)
            values = torch.linalg.svdvals(stack.double())[0]
            assert values[entry.choice["rank"] :].sum() < 1e-5 * values.sum()
        if step < 2:
            perturb(ranks.model)
            ranks.c_step()


def test_layers_that_have_a_factor_in_common_are_joined_where_separate_ones_are_on_offer_too() -> None:
    model = copy.deepcopy(case("convolutions").model)
    alike(model)
    ranks = LearnedRanks(
        model, st.group(st.find(model)), st.Budget(parameters=0.2), methods=MIXED, schedule=Schedule(1, 2, 3)
    )
    assert sorted(map(len, joined(ranks))) == [3, 3]
    assert ranks.trajectory.records[-1].distance < 1e-3
    perturb(model, 3.0)
    ranks.c_step()
    small, plan = ranks.finish()
    assert parameter_count(small) == plan.costs["parameters"] <= 0.2 * plan.dense_costs["parameters"]


@pytest.mark.parametrize("net", ["convolutions", "attention"])
def test_the_penalty_pulls_every_member_to_its_copy(net: str) -> None:
    ranks = learning(net, LEFT)
    perturb(ranks.model)
    penalty = ranks.penalty()
    penalty.backward()
    nested = dict(ranks.nested().named_parameters())
    members = [name for names in joined(ranks) for name in names]
    assert members
    total = 0.0
    for name in members:
        weight: Any = ranks.model.get_submodule(name).weight
        pull = ranks.mu * (weight - nested[f"{name}.weight"]).detach()
        torch.testing.assert_close(weight.grad, pull)
        total += float(pull.square().sum()) / (2 * ranks.mu)
    assert total <= float(penalty.detach()) * (1 + 1e-5)


@pytest.mark.table
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("methods", [LEFT, MIXED], ids=["left", "mixed"])
@pytest.mark.parametrize("net", ["convolutions", "attention"])
def test_the_state_comes_back_and_goes_on_bit_for_bit(net: str, methods: list[Method], augmented: bool) -> None:
    ranks = learning(net, methods, augmented=augmented)
    perturb(ranks.model)
    ranks.c_step()
    again = learning(net, methods, augmented=augmented)
    again.model.load_state_dict(ranks.model.state_dict())
    again.load_state_dict(ranks.state_dict())
    one, other = ranks.state_dict(), again.state_dict()
    # The penalty adds up in the order of its terms, and rounds accordingly.
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(again.penalty(), ranks.penalty())
    assert again.c_step() == ranks.c_step()
    small, plan = ranks.finish()
    twin, same = again.finish()
    assert plan == same
    assert same_weights(small, twin)


def test_the_state_of_a_run_with_other_groups_is_refused() -> None:
    state = learning("attention", LEFT).state_dict()
    held = case("attention")
    groups = dict(list(held.grouped.groups.items())[:-1])
    other = LearnedRanks(
        copy.deepcopy(held.model),
        st.group(held.sites, groups),
        st.Budget(parameters=0.9),
        methods=[*LEFT, st.WeightSVD()],
    )
    assert json.loads(bytes(state["run"].tolist()))["groups"].keys() == held.grouped.groups.keys()
    with pytest.raises(CheckpointError, match="groups was"):
        other.load_state_dict(state)


@pytest.mark.table(every=2)
@pytest.mark.parametrize("net", ["convolutions", "attention"])
def test_finish_gives_factors_that_are_shared_and_can_be_trained_on(net: str) -> None:
    ranks = learning(net, LEFT)
    ranks.c_step()
    small, plan = ranks.finish(case(net).batches)
    assert not ties(ranks.model)
    groups = [entry for entry in plan if entry.members and not entry.choice.is_dense]
    assert groups
    assert sorted(len(names) for names in ties(small)) == sorted(len(entry.members) for entry in groups)
    assert parameter_count(small) == plan.costs["parameters"] <= 0.4 * plan.dense_costs["parameters"]
    before, lost = ties(small), case(net).lost(small)
    fine_tune(small, labelled(net), teacher=case(net).model, epochs=2, lr=0.01)
    assert ties(small) == before
    assert lost < 1


def test_a_price_in_place_of_a_budget_joins_layers_too() -> None:
    ranks = learning("attention", LEFT, budget=None, multiplier=1e-5, cost="parameters")
    assert joined(ranks)
    perturb(ranks.model)
    ranks.c_step()
    small, plan = ranks.finish()
    assert parameter_count(small) == plan.costs["parameters"]
    assert bool(ties(small)) == bool([e for e in plan if e.members and not e.choice.is_dense])


@pytest.mark.slow
@pytest.mark.table(every=2)
@pytest.mark.parametrize("accelerate", [False, True])
def test_a_stopped_run_of_learned_ranks_ends_equal(accelerate: bool, tmp_path: Path) -> None:
    if accelerate:
        pytest.importorskip("accelerate")

    def run(checkpoint: Path | None, stop: int | None = None) -> tuple[nn.Module, LearnedRanks]:
        ranks = learning("convolutions", LEFT, every=2, schedule=Schedule(0.01, 2.0, 4))
        stopping = stop_at(stop) if stop else lambda _: None

        def after_step(model: nn.Module) -> None:
            ranks.after_step(model)
            stopping(model)

        recipe = Recipe(epochs=3, lr=0.02, checkpoint_every=1)
        Loop(
            ranks.model, labelled("convolutions"), recipe, penalty=ranks, after_step=after_step, checkpoint=checkpoint,
            accelerate=accelerate,
        ).run()  # fmt: skip
        return ranks.finish()[0], ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        whole, expected = run(None)
        for step in (4, 4):
            with pytest.raises(Stop):
                run(tmp_path / "run", step)
        small, ranks = run(tmp_path / "run")
    assert ranks.step == expected.step == 4
    assert ranks.plan == expected.plan
    assert joined(ranks)
    assert isinstance(ranks.model, Convolutions)
    assert same_weights(ranks.model, expected.model)
    assert same_weights(small, whole)
    assert ties(small) == ties(whole) != []


def test_one_call_learns_with_groups() -> None:
    model = copy.deepcopy(case("convolutions").model)
    alike(model)
    recipe = Recipe(epochs=1, lr=1e-3)
    result = st.learn_ranks(
        model,
        labelled("convolutions"),
        st.Budget(parameters=0.2),
        groups=True,
        methods=LEFT,
        start=LEFT,
        learning=recipe,
        tuning=recipe,
        schedule=Schedule(1, 2, 3),
    )
    assert any(entry.members for entry in result.plan)
    assert parameter_count(result.model) == result.plan.costs["parameters"]
    assert result.sites.groups
    assert len(result.trajectory.records) == 3
