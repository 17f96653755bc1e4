"""The training loop: what it reports, what its options do, and what it leaves as found."""

from __future__ import annotations

import copy
import math
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spectrim.train import Distillation, Loop, Recipe, TrainingResult, fine_tune
from tests.train.small import Net, accuracy, equal, fixed_batches, loader, weights


def test_the_loss_falls_and_the_network_learns() -> None:
    model, begin = Net(width=16), time.perf_counter()
    result = fine_tune(model, loader(96), epochs=12, lr=0.05, evaluate=accuracy)
    assert isinstance(result, TrainingResult)
    assert [r.epoch for r in result.history] == list(range(1, 13))
    assert result.history[-1].loss < 0.6 * result.history[0].loss
    assert result.last is not None
    assert result.last > 0.8
    assert (result.epochs, result.steps) == (12, 12 * 12)
    assert 0 < result.seconds <= time.perf_counter() - begin
    assert accuracy(model.eval()) == result.last


def test_a_training_that_makes_a_network_worse_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = Net(width=16)
    fine_tune(model, loader(96), epochs=12, lr=0.05)
    trained = copy.deepcopy(model)
    fine_tune(model, loader(96), epochs=1, lr=0.01)
    rash = Recipe(epochs=1, lr=1.0, clip=1.0)
    # A penalty may raise the loss as it is meant to.
    fine_tune(copy.deepcopy(trained), loader(96), recipe=rash, penalty=lambda net: 0 * net.stem.weight.sum())
    assert not caplog.records
    result = fine_tune(trained, loader(96), recipe=rash)
    (record,) = caplog.records
    assert f"{result.history[-1].loss:.3g} over the last epoch" in record.getMessage()
    assert record.getMessage().endswith("as lr=0.1 in place of 1")


def test_equal_seeds_give_equal_weights() -> None:
    models = [Net(), Net(), Net()]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        torch.randn(3)  # the state before does not matter
        fine_tune(model, loader(), epochs=1, seed=seed)
    assert equal(weights(models[0]), weights(models[1]))
    assert not equal(weights(models[0]), weights(models[2]))


def test_everything_else_is_left_as_found() -> None:
    model, teacher = Net(), Net(seed=1)
    model.drop.eval()
    teacher.norm.eval()
    modes = [[m.training for m in net.modules()] for net in (model, teacher)]
    before = weights(teacher)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    fine_tune(model, loader(), teacher=teacher, epochs=1, evaluate=accuracy)
    assert [[m.training for m in net.modules()] for net in (model, teacher)] == modes
    assert equal(before, weights(teacher))
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[index] # noqa: NPY002


@pytest.mark.slow
def test_a_teacher_alone_teaches() -> None:
    """With all the weight on the teacher the labels do not matter."""
    teacher = Net(width=16, seed=1)
    batches = fixed_batches(96)
    fine_tune(teacher, batches, epochs=8, lr=0.05)
    wrong = [(x, torch.zeros_like(y)) for x, y in batches]
    student = Net(width=16, seed=2)
    method = Distillation(temperature=2, weight=1)
    fine_tune(student, wrong, teacher=teacher, epochs=12, lr=0.05, distillation=method)
    assert accuracy(teacher.eval()) > 0.8
    assert accuracy(student.eval()) > 0.8


def test_teacher_outputs_from_a_cache_train_the_same() -> None:
    teacher, method = Net(seed=1).eval(), Distillation(2.0, 0.8)
    batches = fixed_batches()
    with torch.no_grad():
        cached = [(x, (y, teacher(x))) for x, y in batches]
    models = Net(), Net()
    fine_tune(models[0], batches, teacher=teacher, epochs=2, distillation=method)
    fine_tune(models[1], cached, loss=method.loss_on_pairs, epochs=2)
    torch.testing.assert_close(weights(models[0]), weights(models[1]))


def test_distillation_can_be_turned_off() -> None:
    models = Net(), Net()
    fine_tune(models[0], fixed_batches(), teacher=Net(seed=1), epochs=1, distillation=None)
    fine_tune(models[1], fixed_batches(), epochs=1)
    assert equal(weights(models[0]), weights(models[1]))


def test_keep_best_returns_to_the_best_epoch() -> None:
    metrics = iter([0.2, 0.9, 0.4, 0.3])
    seen: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.randn(5)  # must not change what follows
        seen.append(weights(model))
        return next(metrics)

    model, other = Net(), Net()
    result = fine_tune(model, loader(), epochs=4, evaluate=evaluate, keep="best")
    assert (result.best, result.best_epoch, result.last) == (0.9, 2, 0.3)
    assert equal(weights(model), seen[1])
    fine_tune(other, loader(), epochs=4)
    assert equal(weights(other), seen[3])


def test_evaluate_every_counts_epochs_and_the_last_one() -> None:
    result = fine_tune(Net(), loader(16), epochs=5, evaluate=lambda _: 0.5, evaluate_every=2)
    assert [r.metric for r in result.history] == [None, 0.5, None, 0.5, 0.5]


def test_clip_bounds_the_step() -> None:
    model, batches = Net(), fixed_batches()[:1]
    before = weights(model)
    options: dict[str, Any] = {"epochs": 1, "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    fine_tune(model, batches, clip=0.01, **options)
    moved = torch.stack([(p.detach() - before[n]).square().sum() for n, p in model.named_parameters()]).sum().sqrt()
    torch.testing.assert_close(moved, torch.tensor(0.01), rtol=1e-3, atol=0)


def test_a_penalty_comes_on_top_of_what_is_clipped() -> None:
    plain: dict[str, Any] = {"epochs": 1, "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    model, batches = Net(), fixed_batches()[:1]
    before = weights(model)
    fine_tune(model, batches, clip=1e-9, penalty=lambda net: 3 * net.stem.weight.sum(), **plain)
    after = weights(model)
    torch.testing.assert_close(after.pop("stem.weight"), before.pop("stem.weight") - 3)
    assert all(torch.allclose(after[n], before[n], atol=1e-6) for n, _ in model.named_parameters() if n in after)


@pytest.mark.parametrize("taught", [True, False], ids=["teacher", "labels"])
def test_networks_without_normalisation_train_at_the_defaults(taught: bool) -> None:
    torch.manual_seed(0)
    x, centres = torch.randn(256, 64), 3 * torch.randn(10, 64)
    y = torch.arange(256) % 10
    batches = list(zip((x + centres[y]).split(64), y.split(64), strict=True))
    wide = [part for _ in range(3) for part in (nn.Linear(64, 64), nn.ReLU())]
    teacher = nn.Sequential(*wide, nn.Linear(64, 10))
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.mul_(2.5)  # as sharp as trained ones are
    fine_tune(teacher, batches, epochs=20, lr=0.01)
    student = copy.deepcopy(teacher)
    result = fine_tune(student, batches, teacher=teacher if taught else None, epochs=3)
    assert all(math.isfinite(record.loss) for record in result.history)
    with torch.no_grad():
        right = torch.cat([student(inputs).argmax(1) == labels for inputs, labels in batches])
    assert float(right.float().mean()) > 0.95


def test_what_diverges_has_its_weights_again(tmp_path: Path) -> None:
    model = Net()
    fine_tune(model, fixed_batches(), epochs=1)
    before = weights(model)
    broken = [(x * float("nan"), y) for x, y in fixed_batches()]
    with pytest.raises(FloatingPointError, match="has the weights again that it had before this epoch. Lower lr, set"):
        fine_tune(model, broken, epochs=1)
    assert equal(weights(model), before)
    # The last step leaves weights that are not finite, which no loss has seen yet.
    with pytest.raises(FloatingPointError, match="'stem.weight' holds numbers that are not finite in epoch 1"):
        fine_tune(
            model, fixed_batches()[:1], epochs=1, checkpoint=tmp_path / "run",
            after_step=lambda net: net.stem.weight.data.fill_(float("inf")),
        )  # fmt: skip
    assert equal(weights(model), before)
    assert not (tmp_path / "run").exists()


def test_bfloat16_computes_low_and_stores_high() -> None:
    kinds: list[torch.dtype] = []
    model, teacher = Net(), Net(seed=1)
    for net in (model, teacher):
        net.stem.register_forward_hook(lambda _module, _inputs, output: kinds.append(output.dtype))
    result = fine_tune(model, loader(), teacher=teacher, epochs=4, lr=0.1, precision="bfloat16")
    assert set(kinds) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.history[-1].loss < result.history[0].loss


def test_channels_last_converts_model_and_inputs() -> None:
    formats: list[bool] = []
    model = Net()
    model.pair.register_forward_pre_hook(
        lambda _module, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    fine_tune(model, loader(16), epochs=1, memory_format="channels_last")
    assert formats
    assert all(formats)


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_frozen_normalisation_keeps_its_statistics(batch_norm) -> None:
    """Batches of one sample on another scale: normalised by themselves, they are not what the network computes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    )
    teacher, batches = (
        copy.deepcopy(model).eval(),
        [(torch.randn(1, 1, 4, 4) + 5.0, torch.zeros(1).long()) for _ in range(4)],
    )
    recipe = {"epochs": 2, "lr": 1e-3, "batch_norm": batch_norm, "weight_decay": 0.0}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fine_tune(model, batches, teacher=teacher, evaluate=lambda net: float(not net.training), **recipe)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert same == (statistics if batch_norm == "frozen" else set())
    assert result.last == 1.0
    assert all(module.training for module in model.modules())


def test_hooks_are_called_at_every_step() -> None:
    calls: list[str] = []
    model = Net()

    def penalty(net: nn.Module) -> Tensor:
        assert net is model
        calls.append("penalty")
        return 0.0 * model.stem.weight.sum()

    def after_step(net: nn.Module) -> None:
        assert net is model
        calls.append("after")
        with torch.no_grad():
            model.stem.weight[0].zero_()

    fine_tune(model, loader(), epochs=2, penalty=penalty, after_step=after_step)
    assert calls == ["penalty", "after"] * 12
    assert model.stem.weight[0].abs().max() == 0


def test_a_penalty_pulls() -> None:
    model = Net()
    fine_tune(model, loader(), epochs=5, lr=0.1, penalty=lambda _: 10 * model.stem.weight.square().sum())
    assert model.stem.weight.abs().max() < 0.1


def test_a_loop_can_pause_between_epochs() -> None:
    recipe = Recipe(epochs=4, momentum=0.9)
    model, other = Net(), Net()
    loop = Loop(model, loader(), recipe)
    assert loop.run(until=1).epochs == 1
    torch.randn(7)
    assert loop.run(until=1).steps == 6
    loop.run(until=3)
    loop.run()
    fine_tune(other, loader(), recipe=recipe)
    assert equal(weights(model), weights(other))
    with pytest.raises(ValueError, match="until=5 exceeds the 4 epochs"):
        loop.run(until=5)


def test_biases_and_normalisation_are_not_decayed() -> None:
    model = Net()
    before = weights(model)
    zero = lambda output, _: 0 * output.sum()  # noqa: E731
    fine_tune(model, fixed_batches(), loss=zero, epochs=1, lr=0.1, weight_decay=0.1)
    after = weights(model)
    assert torch.equal(after["norm.weight"], before["norm.weight"])
    assert torch.equal(after["stem.bias"], before["stem.bias"])
    assert after["stem.weight"].norm() < before["stem.weight"].norm()
    assert after["pair.0.weight"].norm() < before["pair.0.weight"].norm()


def test_frozen_parameters_stay() -> None:
    model = Net()
    model.stem.requires_grad_(False)
    model.pair[0].requires_grad_(False)
    before = weights(model)
    fine_tune(model, loader(), epochs=1)
    after = weights(model)
    assert torch.equal(after["stem.weight"], before["stem.weight"])
    assert torch.equal(after["pair.0.weight"], before["pair.0.weight"])
    assert not torch.equal(after["pair.1.weight"], before["pair.1.weight"])
    with pytest.raises(ValueError, match="Net has no parameter"):
        fine_tune(model.requires_grad_(False), loader(), epochs=1)


class Classifier(nn.Module):
    """Takes keyword arguments and returns a structure, as transformers' models do."""

    def __init__(self, own_loss: bool) -> None:
        super().__init__()
        self.net, self.own_loss = Net(), own_loss

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.net(pixels)
        own = nn.functional.cross_entropy(logits, labels) if self.own_loss and labels is not None else None
        return SimpleNamespace(logits=logits, loss=own)


@pytest.mark.parametrize("own_loss", [True, False])
def test_dict_batches_train_as_pairs_do(own_loss: bool) -> None:
    model, plain, teacher = Classifier(own_loss), Net(), Classifier(False)
    teacher.net = Net(seed=5)
    pairs = fixed_batches()
    fine_tune(model, [{"pixels": x, "labels": y} for x, y in pairs], teacher=teacher, epochs=2)
    fine_tune(plain, pairs, teacher=copy.deepcopy(teacher.net), epochs=2)
    assert equal(weights(model.net), weights(plain))


def test_set_epoch_is_called() -> None:
    class Data(list):
        epochs: list[int] = []  # noqa: RUF012 - one instance

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    data = Data(fixed_batches(16))
    fine_tune(Net(), data, epochs=3)
    assert data.epochs == [0, 1, 2]


def test_schedules() -> None:
    total = 100
    one_cycle, cosine, constant = (Recipe(schedule=s) for s in ("one_cycle", "cosine", "constant"))  # type: ignore[arg-type]
    rates = [one_cycle.lr_factor(s, total) for s in range(total)]
    assert rates.index(max(rates)) == 20
    assert max(rates) == pytest.approx(1)
    assert rates[0] < 0.1
    assert rates[-1] < 0.01
    assert cosine.lr_factor(0, total) == 1
    assert cosine.lr_factor(50, total) == pytest.approx(0.5)
    assert {constant.lr_factor(s, total) for s in range(total)} == {1.0}
    assert Recipe(schedule="constant", warmup=0.1).lr_factor(0, total) == pytest.approx(1 / 11)


def test_an_optimizer_of_ones_own() -> None:
    made: list[torch.optim.Optimizer] = []

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made.append(torch.optim.RMSprop(groups, lr=1e-3))
        return made[0]

    result = fine_tune(Net(), loader(), epochs=2, optimizer=make, schedule="constant", lr=0.002)
    assert made[0].param_groups[0]["weight_decay"] == 5e-4
    assert result.history[-1].lr == 0.002
    assert result.history[1].loss < result.history[0].loss


def test_batches_without_length_need_a_constant_rate() -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(fixed_batches(16))

    with pytest.raises(TypeError, match="Stream has no length"):
        fine_tune(Net(), Stream(), epochs=1)
    assert fine_tune(Net(), Stream(), epochs=2, schedule="constant").steps == 4
    with pytest.raises(ValueError, match="gave nothing in epoch 2"):
        fine_tune(Net(), iter(fixed_batches(16)), epochs=2, schedule="constant")


def test_errors_quote_their_inputs() -> None:
    batches = fixed_batches(8)
    with pytest.raises(TypeError, match="no option epoch;.*epochs"):
        fine_tune(Net(), batches, epoch=3)
    with pytest.raises(ValueError, match="schedule='step'.*'one_cycle'"):
        fine_tune(Net(), batches, schedule="step")
    with pytest.raises(ValueError, match="epochs=-1"):
        Recipe(epochs=-1)
    with pytest.raises(ValueError, match="lr=-0.1"):
        Recipe(lr=-0.1)
    with pytest.raises(ValueError, match="keep='best' needs evaluate="):
        fine_tune(Net(), batches, keep="best")
    with pytest.raises(TypeError, match="not a tuple of 3"):
        fine_tune(Net(), [(1, 2, 3)], epochs=1)
    model = Net()
    with pytest.raises(ValueError, match="teacher is the model itself"):
        fine_tune(model, batches, teacher=model)
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1"):
        fine_tune(Net(), [(x * float("nan"), y) for x, y in batches], epochs=1)
    own = nn.CrossEntropyLoss(ignore_index=7)
    with pytest.raises(FloatingPointError, match="look in the batches for .* labels that are all ignored"):
        fine_tune(Net(), [(x, torch.full_like(y, 7)) for x, y in batches], loss=own, epochs=1)


def test_the_progress_bar_shows_the_steps(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    fine_tune(Net(), loader(16), epochs=2, progress=True)
    # Not a terminal: lines.
    assert "4 of 4" in capfd.readouterr().err
    fine_tune(Net(), loader(16), epochs=2, progress=False)
    assert capfd.readouterr().err == ""


class Sum(nn.Module):
    """Takes two inputs, by place, by name or as one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layer(left + right)


class SumOfPair(Sum):
    def forward(self, pair: Any) -> Tensor:  # type: ignore[override]
        return super().forward(*pair)


@pytest.mark.parametrize("kind", [Sum, SumOfPair])
def test_inputs_are_given_to_models_as_in_calibration(kind: type[Sum]) -> None:
    left, right, labels = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) % 3
    torch.manual_seed(0)
    model, plain = kind(), nn.Linear(4, 3)
    plain.load_state_dict(model.layer.state_dict())
    fine_tune(model, [((left, right), labels)] * 2, epochs=2)
    fine_tune(plain, [(left + right, labels)] * 2, epochs=2)
    assert torch.allclose(model.layer.weight, plain.weight, atol=1e-5)
    if kind is Sum:
        named = kind()
        batch = {"left": left.half(), "right": right, "labels": labels, "path": ["a.png"] * 8}
        fine_tune(named, [batch] * 2, epochs=2)
        with pytest.raises(TypeError, match=r"Sum cannot be called.*2 inputs.*\(\(x, mask\), targets\)"):
            fine_tune(kind(), [(left, labels)] * 2, epochs=2)


def test_outputs_that_no_loss_can_be_taken_of_are_refused() -> None:
    class Best(Sum):
        def forward(self, left: Tensor) -> Any:  # type: ignore[override]
            return self.layer(left).topk(2)

    teacher, x = Best(), torch.randn(8, 4)
    with pytest.raises(TypeError, match="outputs are a topk.*pass loss="):
        fine_tune(Best(), [(x, torch.zeros(8, dtype=torch.long))] * 2, epochs=1, teacher=teacher)
    fine_tune(Best(), [(x,)] * 2, epochs=1, teacher=teacher)


class Keeps(Sum):
    def forward(self, left: Tensor) -> Tensor:  # type: ignore[override]
        self.seen = self.layer(left)
        self.all = [self.seen]
        return self.seen


def test_neither_model_nor_teacher_is_left_with_a_graph() -> None:
    model, teacher = Keeps(), Keeps()
    fine_tune(model, [(torch.randn(8, 4),)] * 2, epochs=1, teacher=teacher)
    assert copy.deepcopy(model).seen.grad_fn is None
    assert not hasattr(teacher, "seen")
