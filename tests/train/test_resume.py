"""A stopped run ends in the weights of an unstopped one, whatever stopped it."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectrim.errors import CheckpointError
from spectrim.train import Loop, Recipe, fine_tune
from spectrim.train import resume as resuming
from tests.train import mortal, small, training_script
from tests.train.small import Net, accuracy, equal, loader, weights


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


def test_a_run_killed_at_any_moment_ends_equal(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "run.safetensors", tmp_path / "killed.safetensors"
    command = [training_script.__file__, str(out), f"checkpoint={checkpoint}", "mortal=yes"]
    expected = training_script.train()
    steps, draw = [], random.Random()
    with mortal.runs(*command, cwd=tmp_path) as runs:
        for _ in range(2):
            seen = written(checkpoint)
            runs.killed(lambda seen=seen: written(checkpoint) != seen, draw.uniform(0, 0.15))
            steps.append(resuming.read(checkpoint)[1]["step"])
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


@pytest.mark.parametrize("call", ["save_file", "fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_checkpoint(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    resuming.write(path, {"a": torch.ones(3)}, {"step": 1})
    owner = resuming if call == "save_file" else os

    def fail(*arguments: Any) -> None:
        if call == "save_file":
            arguments[1].write_bytes(b"half")
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fail)
        with pytest.raises(Stop):
            resuming.write(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, record = resuming.read(path)
    assert record["step"] == 1
    assert torch.equal(tensors["a"], torch.ones(3))
    resuming.write(path, {"a": torch.zeros(3)}, {"step": 3})
    assert resuming.read(path)[1]["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


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
