"""A stopped run ends in the weights of an unstopped one, whatever stopped it."""

from __future__ import annotations

import itertools
import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectrim.errors import CheckpointError
from spectrim.network import tensor_files
from spectrim.train import Loop, Recipe, fine_tune
from spectrim.train import resume as resuming
from tests.train import mortal, small, training_script
from tests.train.small import Net, accuracy, equal, loader, weights

# What is resumed is often another network than was begun with, so that nothing of it can be left.
pytestmark = pytest.mark.filterwarnings("ignore:.*began with other weights")


class Stop(Exception):
    """Stands for whatever ends a process."""


def stop_at(step: int) -> Any:
    counter = itertools.count(1)

    def after_step(_: nn.Module) -> None:
        if next(counter) == step:
            raise Stop

    return after_step


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "bfloat16": {"precision": "bfloat16", "memory_format": "channels_last"},
    "rmsprop": {"optimizer": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5)},
}


@pytest.mark.table
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("every", [1, 4, None])
def test_stopped_runs_end_equal(option: str, every: int | None, tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, checkpoint_every=every, keep="best", **OPTIONS[option])
    whole = Net()
    expected = fine_tune(whole, loader(), recipe=recipe, evaluate=accuracy, teacher=Net(seed=1))
    path = tmp_path / "run.safetensors"
    for step in (5, 4, 9):
        with pytest.raises(Stop):
            fine_tune(
                Net(), loader(), recipe=recipe, evaluate=accuracy, teacher=Net(seed=1), checkpoint=path,
                after_step=stop_at(step),
            )  # fmt: skip
        torch.randn(11)
    model = Net(seed=9)
    result = fine_tune(model, loader(), recipe=recipe, evaluate=accuracy, teacher=Net(seed=1), checkpoint=path)
    assert equal(weights(model), weights(whole))
    assert result.history == expected.history
    assert (result.best, result.best_epoch, result.steps) == (expected.best, expected.best_epoch, expected.steps)


def test_a_finished_run_is_returned_at_once(tmp_path: Path) -> None:
    model, again = Net(), Net(seed=4)
    first = fine_tune(model, loader(), epochs=2, checkpoint=tmp_path / "run")
    second = fine_tune(again, loader(), epochs=2, checkpoint=tmp_path / "run", after_step=stop_at(1))
    assert equal(weights(model), weights(again))
    assert second.history == first.history


def test_generators_of_the_loader_are_kept(tmp_path: Path) -> None:
    def data() -> Any:
        own = torch.Generator().manual_seed(5)
        return torch.utils.data.DataLoader(small.Textures(), 8, shuffle=True, generator=own)

    models = Net(), Net()
    fine_tune(models[0], data(), epochs=3)
    with pytest.raises(Stop):
        fine_tune(models[1], data(), epochs=3, checkpoint=tmp_path / "run", checkpoint_every=1, after_step=stop_at(9))
    fine_tune(models[1], data(), epochs=3, checkpoint=tmp_path / "run", checkpoint_every=1)
    assert equal(weights(models[0]), weights(models[1]))


class Pull:
    """A penalty with a state that grows from phase to phase."""

    def __init__(self) -> None:
        self.amount = torch.zeros(())

    def __call__(self, model: nn.Module) -> Tensor:
        return self.amount * sum((p.square().sum() for p in model.parameters()), torch.zeros(()))

    def state_dict(self) -> dict[str, Tensor]:
        return {"amount": self.amount}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.amount = state["amount"]


def test_phases_with_a_changing_penalty_resume(tmp_path: Path) -> None:
    def phases(model: nn.Module, checkpoint: Path | None, after_step: Any = None) -> list[float]:
        pull, amounts = Pull(), []
        loop = Loop(
            model, loader(), Recipe(epochs=4, checkpoint_every=1), penalty=pull, checkpoint=checkpoint,
            after_step=after_step,
        )  # fmt: skip
        for phase in range(2):
            if loop.epoch <= 2 * phase and loop.step <= 12 * phase:
                pull.amount = torch.tensor(0.01 * (phase + 1))
            loop.run(until=2 * (phase + 1))
            amounts.append(pull.amount.item())
        return amounts

    whole, model = Net(), Net()
    expected = phases(whole, None)
    with pytest.raises(Stop):
        phases(model, tmp_path / "run", stop_at(15))
    assert phases(model, tmp_path / "run")[-1] == expected[-1]
    assert equal(weights(whole), weights(model))


def written(path: Path) -> int:
    """When a file was written last, in nanoseconds; 0 if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_equal(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "run.safetensors", tmp_path / "killed.safetensors"
    command = [training_script.__file__, str(out), f"checkpoint={checkpoint}", "mortal=yes"]
    expected = training_script.train()
    steps, draw = [], random.Random()
    with mortal.runs(*command, cwd=tmp_path) as runs:
        for _ in range(2):
            seen = written(checkpoint)
            runs.killed(lambda seen=seen: written(checkpoint) != seen, draw.uniform(0, 0.15))
            steps.append(resuming.read_checkpoint(checkpoint)[1]["step"])
        assert steps[0] > 0
        assert steps == sorted(steps)
        assert not out.exists(), f"nothing was killed, checkpoints at {steps}"
        runs.whole()
    assert equal(load_file(out), weights(expected)), f"checkpoints at {steps}"


def finished(path: Path, **options: Any) -> None:
    fine_tune(Net(), loader(16), epochs=1, checkpoint=path, **options)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    finished(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"run: the training checkpoint cannot be read .*truncated"):
            finished(path)
    path.write_bytes(whole)
    finished(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save_file(Net().state_dict(), path)
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        finished(path)


@pytest.mark.parametrize(("place", "why"), [("", "it is a folder"), ("file/run", "'.*file' is a file, no folder")])
def test_a_checkpoint_without_a_place_is_told_before_training(place: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    asked: list[int] = []
    with pytest.raises((CheckpointError, OSError), match=why):
        fine_tune(
            Net(), loader(), epochs=1, checkpoint=tmp_path / place, evaluate=lambda m: float(asked.append(1) or 1)
        )
    assert not asked
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_checkpoints_of_other_models_recipes_and_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    finished(path)
    with pytest.raises(CheckpointError, match=r"another model .*stem\.weight is \(8, 1, 3, 3\).*\(6, 1, 3, 3\)"):
        fine_tune(Net(width=6), loader(16), epochs=1, checkpoint=path)
    with pytest.raises(CheckpointError, match="weight is missing in it"):
        fine_tune(nn.Linear(3, 2), loader(16), epochs=1, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"momentum was 0\.9 and is 0\.8"):
        finished(path, momentum=0.8)
    with pytest.raises(CheckpointError, match="steps_per_epoch was 2 and is 6"):
        fine_tune(Net(), loader(48), epochs=1, checkpoint=path)
    with pytest.raises(CheckpointError, match="teacher was False and is True"):
        finished(path, teacher=Net())


def test_numbers_of_numpy_are_written_as_numbers(tmp_path: Path) -> None:
    fine_tune(Net(), loader(16), epochs=1, lr=np.float64(0.25), checkpoint=tmp_path / "run")
    assert resuming.read_checkpoint(tmp_path / "run")[1]["run"]["lr"] == 0.25


@pytest.mark.parametrize("call", ["save_file", "fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_checkpoint(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    resuming.write_checkpoint(path, {"a": torch.ones(3)}, {"step": 1})
    owner = tensor_files if call == "save_file" else os

    def fail(*arguments: Any) -> None:
        if call == "save_file":
            arguments[1].write_bytes(b"half")
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fail)
        with pytest.raises(Stop):
            resuming.write_checkpoint(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, record = resuming.read_checkpoint(path)
    assert record["step"] == 1
    assert torch.equal(tensors["a"], torch.ones(3))
    resuming.write_checkpoint(path, {"a": torch.zeros(3)}, {"step": 3})
    assert resuming.read_checkpoint(path)[1]["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def rewritten(path: Path, change: Any, out: Path) -> None:
    """A checkpoint with its tensors or its record changed, as one without digests."""
    tensors, record = resuming.read_checkpoint(path)
    change(tensors, record)
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, out, {resuming._KEY: json.dumps({"format": 1, **record})}
    )


def put(part: str, *keys: Any, to: Any) -> Any:
    """Change of one value, given or as a function of what it was; ``None`` removes it."""

    def change(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        held: Any = tensors if part == "tensors" else record
        for key in keys[:-1]:
            held = held[key]
        if to is None:
            del held[keys[-1]]
        else:
            held[keys[-1]] = (
                to(held.get(keys[-1]) if isinstance(held, dict) else held[keys[-1]]) if callable(to) else to
            )

    return change


def nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan"))


WEIGHT, MOMENTUM = "model/stem.weight", "optimizer/0/momentum_buffer"
DAMAGE: dict[str, tuple[Any, str]] = {
    "epochs beyond the recipe": (put("record", "epoch", to=10**6), "1000000 epochs are done of 2"),
    "an epoch less": (put("record", "epoch", to=1), "history"),
    "a negative batch": (put("record", "batch", to=-1), "batch"),
    "batches beyond the epoch": (put("record", "batch", to=9), "9 more"),
    "another step": (put("record", "step", to=3), "3 steps are not 2 epochs"),
    "a step as text": (put("record", "step", to="4"), "step"),
    "no step": (put("record", "step", to=None), "step"),
    "a number too long": (put("record", "step", to=10**400), "step"),
    "a loss that is not finite": (put("record", "history", 0, "loss", to=float("nan")), "not finite"),
    "a best that never was": (put("record", "best", to=[99.0, 1]), "99.0"),
    "an unknown field": (put("record", "step_", to=lambda _: 1), "step_"),
    "no run": (put("record", "run", to=[]), "run"),
    "weights that are not finite": (put("tensors", WEIGHT, to=nan), "stem.weight holds numbers that are not finite"),
    "weights of another dtype": (put("tensors", WEIGHT, to=Tensor.half), "stem.weight is torch.float16"),
    "weights missing": (put("tensors", WEIGHT, to=None), "stem.weight is missing"),
    "momentum of another dtype": (put("tensors", MOMENTUM, to=Tensor.half), "momentum_buffer"),
    "momentum of another shape": (put("tensors", MOMENTUM, to=lambda t: t[:1]), "momentum_buffer"),
    "momentum that is not finite": (put("tensors", MOMENTUM, to=nan), "momentum_buffer"),
    "momentum of no weight": (put("tensors", "optimizer/99/momentum_buffer", to=lambda _: torch.ones(1)), "none of"),
    "no groups": (put("record", "optimizer", "groups", to=[]), "groups"),
    "another momentum": (put("record", "optimizer", "groups", 0, "momentum", to=0.1), "momentum"),
    "a rate that is not finite": (put("record", "optimizer", "groups", 0, "lr", to=float("inf")), "lr"),
    "no sum of losses": (put("tensors", "loss/sum", to=None), "sum of losses"),
    "a generator missing": (put("tensors", "random/torch", to=None), "'torch' is missing"),
    "a generator cut": (put("tensors", "random/torch", to=lambda t: t[:9]), "'torch'"),
    "numpy beyond its words": (put("tensors", "random/numpy", to=lambda t: t + 10**6), "random generators"),
    "python's of another version": (put("tensors", "random/python", to=lambda t: t + 1), "random generators"),
    "an unknown part": (put("tensors", "more/a", to=lambda _: torch.ones(1)), "'more'"),
    "best weights that are not wanted": (put("tensors", "best/stem.weight", to=lambda _: torch.ones(1)), "best"),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("done") / "run"
    fine_tune(Net(), loader(16), epochs=2, evaluate=accuracy, checkpoint=path)
    return path


@pytest.mark.parametrize("what", DAMAGE)
def test_what_cannot_be_is_refused_and_the_model_left_alone(what: str, done: Path, tmp_path: Path) -> None:
    change, message = DAMAGE[what]
    rewritten(done, change, tmp_path / "run")
    model = Net(seed=3)
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    with pytest.raises(CheckpointError, match=rf"run: .*{message}"):
        fine_tune(model, loader(16), epochs=2, evaluate=accuracy, checkpoint=tmp_path / "run")
    assert equal(weights(model), before)


def test_a_checkpoint_without_digests_continues(done: Path, tmp_path: Path) -> None:
    rewritten(done, lambda tensors, record: None, tmp_path / "run")
    models = Net(seed=1), Net(seed=2)
    for model, path in zip(models, (done, tmp_path / "run"), strict=True):
        fine_tune(model, loader(16), epochs=2, evaluate=accuracy, checkpoint=path)
    assert equal(weights(models[0]), weights(models[1]))


def test_a_run_that_died_between_the_last_batch_and_the_end_of_its_epoch_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = Net(), Net(seed=5)
    fine_tune(whole, loader(16), epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_finish_epoch", lambda loop: stop_at(1)(loop.model))
        with pytest.raises(Stop):
            fine_tune(Net(), loader(16), epochs=2, checkpoint=tmp_path / "run", checkpoint_every=1)
    assert resuming.read_checkpoint(tmp_path / "run")[1]["batch"] == 2
    fine_tune(model, loader(16), epochs=2, checkpoint=tmp_path / "run", checkpoint_every=1)
    assert equal(weights(model), weights(whole))


def test_every_bit_of_a_checkpoint_counts(done: Path, tmp_path: Path) -> None:
    data, path = done.read_bytes(), tmp_path / "run"
    length = int.from_bytes(data[:8], "little")
    for at in (*range(8 + length, len(data), 4001), data.index(b'"lr') + 8, data.index(b"seconds") + 12):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match="run: "):
            fine_tune(Net(), loader(16), epochs=2, evaluate=accuracy, checkpoint=path)


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "run"
    finished(path)
    names = load_file(path).keys()
    assert {"model/stem.weight", "random/torch", "random/python", "random/numpy", "loss/sum"} <= set(names)
    assert any(name.startswith("optimizer/") and name.endswith("momentum_buffer") for name in names)


def test_optimizers_with_odd_state_are_refused(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.state[self.param_groups[0]["params"][0]]["history"] = [1, 2]

    with pytest.raises(TypeError, match="Odd keeps 'history' as list"):
        finished(tmp_path / "run", optimizer=Odd)


def test_a_run_that_began_with_other_weights_goes_on_and_says_so(tmp_path: Path) -> None:
    path, recipe = tmp_path / "run.safetensors", Recipe(epochs=2)
    begun = Net()
    Loop(begun, loader(), recipe, checkpoint=path).run(until=1)
    other = Net(seed=1)
    with pytest.warns(
        UserWarning, match="began with other weights than the model has now, in 'stem.weight': the model"
    ):
        Loop(other, loader(), recipe, checkpoint=path)
    assert equal(weights(other), weights(begun))
    alike = Net()
    with torch.no_grad():
        alike.stem.weight.mul_(-(1 + 1e-5))  # as another machine may give factors
    Loop(alike, loader(), recipe, checkpoint=path).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loop(alike, loader(), recipe, checkpoint=path)  # where the run is
    with pytest.warns(UserWarning, match="began with other weights"):  # what they were is kept
        Loop(other, loader(), recipe, checkpoint=path)
