"""The same script alone, under ``accelerate launch``, and as two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spectrim.train import batches as batching
from spectrim.train import fine_tune
from spectrim.train.devices import assign
from tests.cases import ENVIRONMENT
from tests.train import training_script
from tests.train.small import equal, fixed_batches, weights

pytest.importorskip("accelerate")


def launch(out: Path, launcher: list[str], *options: str) -> None:
    command = [sys.executable, "-m", *launcher, training_script.__file__, str(out), *options]
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_one_launched_process_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``accelerate launch`` does, without a program of its own for it."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    monkeypatch.chdir(tmp_path)
    for name, value in (ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}).items():
        monkeypatch.setenv(name, value)
    options = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", training_script.__file__, str(tmp_path / "out"), "epochs=3"]
    launch_command(launch_command_parser().parse_args(options))
    assert equal(load_file(next(tmp_path.glob("out*"))), weights(training_script.train(epochs=3)))


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs the gloo backend")
def test_two_processes_give_the_same_weights(tmp_path: Path) -> None:
    """44 samples in batches of 8: the last batch has 4. Each process does half of each.

    ``accelerate launch --cpu`` starts one process whatever it is told, so torchrun starts the two.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch(tmp_path / "out", launcher, "kind=plain", "epochs=6", f"checkpoint={tmp_path / 'run'}")
    expected = weights(training_script.train(kind="plain", epochs=6))
    first, second = (load_file(tmp_path / f"out{rank}") for rank in range(2))
    assert equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_cover_it_and_keep_the_mean() -> None:
    batch = {"inputs": torch.randn(7, 3), "labels": torch.arange(7), "scale": torch.tensor(2.0)}
    parts = [batching.part(batch, i, 3) for i in range(3)]
    assert torch.equal(torch.cat([p["labels"] for p, _ in parts]), batch["labels"])
    assert all(p["scale"] == 2 for p, _ in parts)
    mean = sum(share * p["inputs"].mean() for p, share in parts) / 3
    torch.testing.assert_close(mean, batch["inputs"].mean())
    assert batching.part(batch, 1, 9) == (batch, 1.0)


def test_accelerate_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    found = assign(model, True)
    assert (found.device.type, found.index, found.count) == ("cpu", 0, 1)
    monkeypatch.setattr("spectrim.train.devices.find_spec", lambda _: None)
    assert assign(model, None).count == 1
    with pytest.raises(ModuleNotFoundError, match=r"accelerate=True needs .*spectrim\[train\]"):
        assign(model, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModuleNotFoundError, match="WORLD_SIZE=2"):
        fine_tune(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), fixed_batches(), epochs=1)
