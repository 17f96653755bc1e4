"""Sparse layers in training: supports that stay, and supports that move."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.errors import CheckpointError
from spectrim.nn.layers import canonical
from spectrim.nn.surgery import merge, size_in_bytes
from spectrim.train import Recipe, Regrow, add_product_decay, factored_pairs, fine_tune, product_penalty
from spectrim.train.regrow import swapped
from tests.train.small import accuracy, equal, fixed_batches, loader, weights
from tests.train.sparse_nets import Net, linear, masked, squares
from tests.train.test_resume import Stop, stop_at

# What is resumed is another network than was begun with, so that nothing of it can be left.
pytestmark = pytest.mark.filterwarnings("ignore:.*began with other weights")

OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "bfloat16": {"precision": "bfloat16", "memory_format": "channels_last"},
    "clip": {"clip": 0.01},
    # Turns the whole weight: entries without a gradient move.
    "mixing": {"optimizer": lambda groups: Mixing([p for group in groups for p in group["params"]], lr=0.01)},
}


class Mixing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.grad.mean())
        return super().step(closure)


def supports(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.mask.clone() for name, layer in masked(model).items()}


def outside(model: nn.Module) -> float:
    """The largest entry outside a mask."""
    return max(float(canonical(m.layer)[0][~m.support].abs().max()) for m in masked(model).values())


@pytest.mark.parametrize("option", OPTIONS)
def test_supports_stay_as_they_are(option: str) -> None:
    model = Net(patterns=("unstructured", "2:4"))
    before, start = supports(model), weights(model)
    result = fine_tune(model, fixed_batches(), epochs=2, **OPTIONS[option])
    assert all(torch.equal(mask, before[name]) for name, mask in supports(model).items())
    assert outside(model) == 0.0
    moved = [
        not torch.equal(layer.layer.weight, start[f"{name}.layer.weight"]) for name, layer in masked(model).items()
    ]
    assert len(moved) == 3
    assert all(moved)
    assert math.isfinite(result.history[-1].loss)


def run(model: nn.Module, moves: bool, recipe: Recipe, path: Path | None = None, stop: int | None = None) -> Any:
    """A run, with masks that move every other step if asked; ``stop`` ends it after so many steps."""
    hook: Any = Regrow(model, every=2, until=14) if moves else (lambda _: None)
    if stop is not None:
        hook = Both(hook, stop_at(stop))
    return fine_tune(model, loader(), recipe=recipe, evaluate=accuracy, checkpoint=path, after_step=hook)


class Both:
    """Two hooks, one after the other, with the state of the first."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second

    def __call__(self, model: nn.Module) -> None:
        self.first(model)
        self.second(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.first, name)


@pytest.mark.table
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("option", ["sgd", "adamw"])
@pytest.mark.parametrize("every", [3, None])
def test_stopped_runs_end_equal(moves: bool, option: str, every: int | None, tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, checkpoint_every=every, keep="best", **OPTIONS[option])
    whole = Net()
    expected = run(whole, moves, recipe)
    path = tmp_path / "run.safetensors"
    for step in (4, 3, 8):
        with pytest.raises(Stop):
            run(Net(), moves, recipe, path, step)
        torch.randn(7)
    model = Net(seed=5)
    result = run(model, moves, recipe, path)
    assert equal(weights(model), weights(whole))
    assert result.history == expected.history
    fixed = [torch.equal(mask, supports(Net())[name]) for name, mask in supports(model).items()]
    assert all(fixed) != moves


# What one move does.


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it was given."""

    def step(self, closure: Any = None) -> Any:
        self.given = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def whole_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the weight of the only layer, mask or not."""
    weight = model[0].layer.weight.detach().clone().requires_grad_(True)
    squares(x @ weight.T, y).backward()
    assert weight.grad is not None
    return weight.grad


def test_a_move_drops_the_smallest_and_grows_where_the_whole_gradient_is_largest() -> None:
    torch.manual_seed(0)
    model, x, y = linear(0.25), torch.randn(40, 24), torch.randn(40, 16)
    optimizer = Recorder(model.parameters(), lr=0.1, momentum=0.9)
    regrow = Regrow(model, every=2, until=100, share=0.5)
    regrow.attach(optimizer)
    layer = model[0]
    for step in (1, 2):
        before = layer.mask.clone()
        dense = whole_gradient(model, x, y)
        squares(model(x), y).backward()
        # Watched or not, the parameter gets what is inside its mask.
        torch.testing.assert_close(layer.layer.weight.grad, dense * before)
        optimizer.step()
        optimizer.zero_grad()
        trained = layer.layer.weight.detach().clone()
        regrow(model)
        if step == 1:
            assert torch.equal(layer.mask, before)
    count = round(regrow.share_at(2) * int(before.sum()))
    inside = before.flatten().nonzero().flatten()
    dropped = inside[trained.flatten()[inside].abs().argsort()[:count]]
    stay = before.flatten().clone()
    stay[dropped] = False
    best = dense.flatten().abs().masked_fill(stay, -1).argsort(descending=True)[:count]
    wanted = stay.clone()
    wanted[best] = True
    assert torch.equal(layer.mask.flatten(), wanted)
    assert count > 10
    assert not torch.equal(layer.mask, before)
    kept, fresh = layer.mask & before, layer.mask & ~before
    assert torch.equal(layer.layer.weight[kept], trained[kept])
    assert not layer.layer.weight[~kept].any()
    momentum = optimizer.state[layer.layer.weight]["momentum_buffer"]
    assert fresh.any()
    assert not momentum[~kept].any()
    assert momentum[kept].all()


def test_watching_changes_nothing_that_is_trained() -> None:
    """The masks would move after the last step but one, but the share is too small to move a single entry."""
    models = [Net(), Net()]
    for model, hook in zip(models, (None, lambda model: Regrow(model, every=1, until=10**9, share=1e-9)), strict=True):
        after = None if hook is None else hook(model)
        fine_tune(model, fixed_batches(), epochs=2, clip=0.5, optimizer="adamw", after_step=after)
    assert equal(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("patterns", [("unstructured", "rows"), ("2x2", "2:4"), ("1x4", "2x1")])
def test_patterns_and_sizes_are_kept(patterns: tuple[str, str]) -> None:
    model = Net(patterns=patterns)
    before, size = supports(model), size_in_bytes(model)
    fine_tune(model, fixed_batches(), epochs=3, after_step=Regrow(model, every=2, until=16, share=0.5))
    assert outside(model) == 0.0
    assert size_in_bytes(model) == size
    moved = 0
    for name, layer in masked(model).items():
        opened = layer.pattern.open(layer.support)
        assert torch.equal(opened.any(-1), opened.all(-1))
        kept = layer.pattern.kept(layer.original.shape, float(before[name].double().mean()))
        assert set(opened.any(-1).sum(1).tolist()) == {kept}
        moved += not torch.equal(layer.mask, before[name])
    assert moved == 3


def test_nothing_moves_from_until_on_and_nothing_is_left_on_the_model() -> None:
    model = Net()
    seen: list[dict[str, Tensor]] = []
    regrow = Regrow(model, every=2, until=6)
    fine_tune(model, fixed_batches(), epochs=3, after_step=Both(regrow, lambda m: seen.append(supports(m))))
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(seen)]
    # After steps 2 and 4: the first of these differences lies between steps 1 and 2.
    assert [number + 2 for number, moved in enumerate(changed) if moved] == [2, 4]
    assert regrow.step == len(seen) == 18
    for layer in masked(model).values():
        assert not layer._forward_pre_hooks
        assert not layer._forward_hooks
        assert not layer.layer.weight._backward_hooks
    assert [regrow.share_at(step) for step in (0, 3, 6, 99)] == pytest.approx([0.3, 0.15, 0.0, 0.0])


def test_copies_that_are_made_while_gradients_are_watched_watch_nothing() -> None:
    model, x, y = linear(0.25), torch.randn(40, 24), torch.randn(40, 16)
    regrow = Regrow(model, every=1, until=9)
    regrow.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        squares(other(x), y).backward()
        assert not other[0].layer.weight.grad[~other[0].mask].any()
        assert other[0].mask.sum() == model[0].mask.sum()
    with torch.no_grad():
        assert torch.equal(model(x), model.eval()(x))
    # What fails in the middle leaves the mask in place.
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    assert int(model[0].mask.sum()) == 96
    regrow.detach()
    squares(model(x), y).backward()
    assert not model[0].layer.weight.grad[~model[0].mask].any()


def test_frozen_layers_stay() -> None:
    model = Net()
    model.head.layer.weight.requires_grad_(False)
    before = supports(model)
    fine_tune(model, fixed_batches(), epochs=1, after_step=Regrow(model, every=2, until=9))
    moved = {name for name, mask in supports(model).items() if not torch.equal(mask, before[name])}
    assert moved == {"stem", "body.sparse"}


def test_moving_finds_a_planted_support_that_training_alone_cannot() -> None:
    torch.manual_seed(3)
    truth = torch.where(torch.rand(16, 24) < 0.15, torch.randn(16, 24), torch.zeros(16, 24))
    x = torch.randn(256, 24)
    batches = [(part, part @ truth.T) for part in x.split(32)]
    losses = {}
    for name in ("fixed", "moving"):
        model = linear(0.25)
        hook = Regrow(model, every=10, until=250) if name == "moving" else None
        result = fine_tune(
            model, batches, loss=squares, epochs=40, lr=0.2, weight_decay=0.0, distillation=None, after_step=hook
        )
        losses[name] = result.history[-1].loss
    assert losses["moving"] < 1e-4 < 1e-2 < losses["fixed"]


# Moves alone.


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_swapped_keeps_every_pool_at_its_number(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    kept = torch.zeros(3, 5, dtype=torch.bool)
    kept[:, :2] = True
    size, growth = torch.rand(3, 5, generator=generator), torch.rand(3, 5, generator=generator)
    moved = swapped(kept, size, growth, count)
    assert moved.sum(1).tolist() == [2, 2, 2]
    # By definition: the smallest of all that are kept go, and every pool takes the best of what is not kept then.
    order = sorted(itertools.product(range(3), range(2)), key=lambda at: float(size[at]))[:count]
    for pool in range(3):
        stay = [unit for unit in range(2) if (pool, unit) not in order]
        free = sorted((u for u in range(5) if u not in stay), key=lambda u: -float(growth[pool, u]))
        assert moved[pool].nonzero().flatten().tolist() == sorted([*stay, *free[: 2 - len(stay)]])


def test_what_is_dropped_comes_back_where_its_gradient_is_largest() -> None:
    kept = torch.tensor([[True, True, False, False]])
    moved = swapped(kept, torch.tensor([[0.1, 1.0, 0.0, 0.0]]), torch.tensor([[9.0, 0.0, 1.0, 2.0]]), 1)
    assert torch.equal(moved, kept)


@pytest.mark.parametrize("spread", ["normal", "equal", "few", "alternating"])
def test_the_largest_of_many_are_found(spread: str) -> None:
    """Many enough to be looked at in a sample first, which may deceive."""
    values = torch.rand(250_001, generator=torch.Generator().manual_seed(1))
    if spread == "equal":
        values = torch.ones_like(values)
    elif spread == "few":
        values = torch.where(values < 1e-4, values, torch.zeros_like(values))
    elif spread == "alternating":
        values[::2] += 10
    kept = torch.zeros(1, values.numel(), dtype=torch.bool)
    kept[0, :4000] = True
    # The first 3000 are dropped, and may come back.
    moved = swapped(kept, torch.arange(values.numel()).float().unsqueeze(0), values.unsqueeze(0), 3000)[0]
    assert bool(moved[3000:4000].all())
    moved[3000:4000] = False
    free = torch.cat([values[:3000], values[4000:]])
    assert torch.equal(values[moved].sort().values, free.topk(3000).values.flip(0))


# Options and state.


@pytest.mark.parametrize("wrong", [{"every": 0}, {"until": 0}, {"share": 0.0}, {"share": 1.5}])
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Regrow(linear(0.5), **{"until": 5, **wrong})  # type: ignore[arg-type]


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer with a mask"):
        Regrow(nn.Linear(2, 2), until=5)
    model = linear(0.5)
    regrow = Regrow(model, until=5)
    with pytest.raises(RuntimeError, match="attach"):
        regrow(model)
    with pytest.raises(ValueError, match="another model"):
        regrow(linear(0.5))


def test_a_state_of_other_options_or_of_none_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1)
    path = tmp_path / "run.safetensors"
    model = Net()
    fine_tune(model, fixed_batches(), recipe=recipe, checkpoint=path, after_step=Regrow(model, every=2, until=14))
    with pytest.raises(CheckpointError, match="every, until and share"):
        fine_tune(model, fixed_batches(), recipe=recipe, checkpoint=path, after_step=Regrow(model, every=3, until=14))
    path.unlink()
    fine_tune(model, fixed_batches(), recipe=recipe, checkpoint=path)
    with pytest.raises(CheckpointError, match="no state of Regrow"):
        fine_tune(model, fixed_batches(), recipe=recipe, checkpoint=path, after_step=Regrow(model, until=14))


# Decay.


def test_in_a_sum_the_product_is_decayed_for_itself() -> None:
    model = Net()
    (pair,) = factored_pairs(model)
    assert pair.name == "body.pair"
    dense = merge(nn.ModuleList([model.body.pair]))[0]
    expected = 0.3 / 2 * dense.weight.detach().square().sum()
    torch.testing.assert_close(product_penalty(model, 0.3).detach(), expected)
    add_product_decay([pair], 0.3)
    assert model.body.pair[0].weight.grad is not None
    assert model.body.sparse.layer.weight.grad is None
