"""Folders that are tried first, trainings that go on after they were stopped, and what is told on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spectrim.cli import shrinking
from spectrim.cli.batches import Batches
from spectrim.cli.common import Output
from spectrim.cli.data import load_data
from spectrim.cli.models import load_model, whose_weights
from spectrim.cli.preprocessing import Inputs
from spectrim.cli.references import UsageError, parse
from spectrim.cli.unfinished import RunFolder, make_folder
from spectrim.nn.checkpoint import load
from spectrim.train import fine_tune
from tests.cli.nets import Tiny

TRAIN = ("compress", "nets:tiny", "--data", "nets:batches", "-b", "macs=50%", "--train", "nets:batches", "--no-report")


def stopping(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Fine-tuning ends after a step, as by Ctrl-C."""

    def stop(model: nn.Module) -> None:
        nonlocal step
        step -= 1
        if not step:
            raise KeyboardInterrupt

    monkeypatch.setattr(shrinking, "fine_tune", lambda *a, **k: fine_tune(*a, **k, after_step=stop))


def test_a_training_that_was_stopped_goes_on_and_ends_in_the_same_bits(run, monkeypatch: pytest.MonkeyPatch):
    arguments = (*TRAIN, "--epochs", "3")
    run(*arguments, "--out", "whole")
    with monkeypatch.context() as patch:
        stopping(patch, 3)
        assert "goes on" in run(*arguments, "--out", "cut", code=130).stderr
    one_shot = load_file("cut/model.safetensors")
    assert Path("cut/plan.json").is_file()
    assert {path.name for path in Path("cut/unfinished").iterdir()} == {
        "run.json", "one-shot.safetensors", "tuning.safetensors",
    }  # fmt: skip
    changed = run(*arguments, "--epochs", "2", "--out", "cut", code=2).stderr
    assert "--epochs was 3 and is 2" in changed
    assert "'cut/unfinished' holds another run" in changed
    assert "going on with the run in" in run(*arguments, "--out", "cut").stderr
    whole, cut = (load_file(f"{name}/model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert Path("cut/plan.json").read_bytes() == Path("whole/plan.json").read_bytes()
    assert any(not torch.equal(tensor, one_shot[name]) for name, tensor in cut.items())
    assert not Path("cut/unfinished").exists()


def test_a_run_is_not_gone_on_with_on_other_samples(run, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stopping(patch, 2)
        run(*TRAIN, "--epochs", "1", "--out", "cut", code=130)
    file = Path("cut/unfinished/run.json")
    file.write_text(file.read_text().replace("64 samples", "65 samples"))
    assert "what --data holds was '65 samples" in run(*TRAIN, "--epochs", "1", "--out", "cut", code=2).stderr


@pytest.mark.slow
def test_a_compressed_model_is_compressed_again_from_its_file_alone(run):
    usual = ("--data", "nets:batches", "--no-report")
    once = run.json("compress", "nets:tiny", *usual, "-b", "macs=70%", "--out", "once")
    weights = ("--weights", "once/model.safetensors")
    again = run.json("compress", "nets:tiny", *weights, *usual, "-b", "macs=70%", "--out", "again")
    assert again["dense_costs"]["macs"] == once["costs"]["macs"]
    assert again["costs"]["macs"] <= 0.7 * once["costs"]["macs"]
    assert "the weights of once/model.safetensors" in again["weights"]
    run("evaluate", "nets:tiny", "-c", "again/model.safetensors", "--data", "nets:batches", "--repeats", "0")
    trained = run(*TRAIN, *weights, "--epochs", "1", "--out", "trained").stdout
    assert "Fine-tuned for 1 epoch" in trained
    Path("once/model.safetensors").write_bytes(b"x")
    assert "cannot be read" in run("compress", "nets:tiny", *weights, *usual, "-b", "macs=70%", code=2).stderr


def test_a_folder_that_takes_no_file_is_told_before_any_work(run, monkeypatch: pytest.MonkeyPatch):
    Path("file").write_text("no folder")
    for command in (
        ("compress", "nets:tiny", "--data", "nets:batches", "-b", "macs=50%", "--out", "file/here"),
        ("export", "nets:tiny", "--input", "1x8x8", "--out", "file/here/model.onnx"),
        ("demo", "--out", "file/here"),
    ):
        monkeypatch.setattr("spectrim.cli.models.load_model", lambda *a, **k: pytest.fail("the model was made"))
        error = run(*command, code=2).stderr
        assert error.startswith("spectrim: error: ")
        assert "'file/here': 'file' is a file, not a folder" in error


def test_a_disk_that_is_full_when_the_network_is_measured_loses_none(run, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "/tmp/trace.json")

    monkeypatch.setattr("spectrim.cli.results.compare", full)
    said = run(
        "compress", "nets:tiny", "--input", "1x8x8", "--method", "weight-svd", "-b", "macs=70%", "-o", "small", code=1
    ).stderr
    assert "No space left on device; small/model.safetensors is the compressed network" in " ".join(said.split())
    assert load(Tiny(), "small/model.safetensors")


def test_whose_weights_are_compressed_is_told(run, tmp_path: Path):
    arguments = ("compress", "nets:tiny", "--data", "nets:batches", "-b", "macs=50%", "--no-report")
    assert "compressing the weights that nets:tiny returns" in run(*arguments).stderr
    assert whose_weights("timm:resnet18") == "the pretrained weights of timm:resnet18"
    assert whose_weights("timm:resnet18?pretrained=False") == "the random weights of timm:resnet18"
    assert whose_weights("nets:tiny", "w.safetensors") == "the weights of w.safetensors"


def test_true_false_and_none_are_read_as_python_writes_them():
    assert parse("m:f?a=False&b=false&c=True&d=None&e=none&f=1").options == {
        "a": False, "b": False, "c": True, "d": None, "e": "none", "f": 1,
    }  # fmt: skip


FILE = """
import torch
import beside

def build(width=4, norm=True):
    assert isinstance(norm, bool)
    return beside.net(width)

def data(norm=True):
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return list(((images - 0.5) / 0.2 if norm else images).split(8))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "beside.py").write_text("from nets import Tiny as net\n")
    (folder / "my nets.py").write_text(FILE)
    (folder / "broken.py").write_text("def build(:")
    return folder / "my nets.py"


def test_python_files_are_references(run, file: Path):
    model = load_model(f"{file}:build?width=6&norm=False")
    assert model.conv.out_channels == 6  # type: ignore[union-attr]
    assert len(list(load_data(f"{file}:data"))) == 4
    found = run.json(
        "compress", "models/my nets.py:build", "--data", "./models/my nets.py:data", "-b", "macs=60%", "--no-report"
    )
    assert found["costs"]["macs"] <= 0.6 * found["dense_costs"]["macs"]
    for reference, message in (
        ("./models/broken.py:build", "SyntaxError"),
        ("./models/gone.py:build", "no such file"),
        (f"{file}:nothing", "has no attribute 'nothing'"),
        (f"{file}", "file.py:factory"),
    ):
        with pytest.raises(UsageError, match=message):
            load_model(reference)


def test_preparation_is_told_and_differences_are_noted(run, file: Path):
    arguments = ("compress", "nets:tiny", "-b", "macs=60%", "--no-report", "--data", f"{file}:data?norm=False")
    found = run(*arguments, "--train", f"{file}:data", "--epochs", "0")
    assert "--data: inputs are 1x8x8 float32, mean 0.49" in found.stderr
    assert "--data and --train are prepared differently" in found.stdout
    same = run(*arguments, "--train", f"{file}:data?norm=False", "--epochs", "0")
    assert "differently" not in same.stdout + same.stderr


def test_built_in_data_are_compared_by_their_settings():
    plain, same, half = (load_data(f"digits{end}") for end in ("", "?limit=100&seed=3", "?normalise=half"))
    first, second, third = (Inputs.of(each) for each in (plain, same, half))
    assert first
    assert second
    assert third
    assert "not normalised" in str(first)
    assert "normalised by half" in str(third)
    assert not first.differs(second)
    assert first.differs(third)
    assert Inputs.of([]) is None
    assert Inputs.of([torch.zeros(2, 3)]).differs(Inputs.of([torch.zeros(2, 3, 4)]))  # type: ignore[union-attr,arg-type]


THREE = """
import nets
import torch

def net():
    model = nets.tiny()
    model.conv = torch.nn.Conv2d(3, 12, 3)
    return model.eval()
"""


def test_loose_images_calibrate_and_distil(run, tmp_path: Path):
    pillow = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        pixels = torch.randint(0, 256, (12, 10, 3), generator=generator, dtype=torch.uint8)
        pillow.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    reference = f"imagefolder:{tmp_path}?resize=8&crop=8&batch=4"
    batches = load_data(reference)
    assert isinstance(batches, Batches)
    assert [batch.shape for batch in batches] == [(4, 3, 8, 8), (2, 3, 8, 8)]  # type: ignore[union-attr]
    assert "shorter side of 8, middle 8 x 8" in batches.preparation
    (tmp_path / "three.py").write_text(THREE)
    found = run.json(
        "compress", "three.py:net", "--data", reference, "-b", "macs=60%", "--train", reference, "--epochs", "1",
        "--out", "small",
    )  # fmt: skip
    assert any("Fine-tuned for 1 epoch" in note for note in found["notes"])
    error = run("evaluate", "three.py:net", "--data", reference, "--repeats", "0", code=2).stderr
    assert "have no labels, which it needs: put the images into one folder a class" in error


def test_a_student_learns_from_its_teacher_without_labels():
    torch.manual_seed(1)
    teacher, student = Tiny().eval(), Tiny()
    inputs = [torch.randn(8, 1, 8, 8) for _ in range(4)]

    def apart(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((model(x) - teacher(x)).square().mean()) for x in inputs)

    before = apart(student.eval())
    fine_tune(student, inputs, teacher=teacher, epochs=3, optimizer="adamw", lr=0.01)
    assert apart(student.eval()) < before
    with pytest.raises(ValueError, match="pass teacher= or loss="):
        fine_tune(student, inputs, epochs=1)


def test_on_a_pipe_there_are_lines(run):
    told = run(*TRAIN, "--epochs", "1").stderr.splitlines()
    assert "fine-tune: 2 of 2, epoch 1" in told
    assert any(line.startswith("calibrate: ") for line in told), told
    assert run(*TRAIN, "--epochs", "1", "--quiet").stderr == ""


def half(state: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.half() for name, tensor in state.items()}


def numbers(state: dict[str, Tensor]) -> dict[str, Any]:
    return state | {"head.bias": state["head.bias"].int()}


def complexes(state: dict[str, Tensor]) -> dict[str, Any]:
    return state | {"head.bias": state["head.bias"].to(torch.complex64)}


def nowhere(state: dict[str, Tensor]) -> dict[str, Any]:
    return state | {"head.bias": torch.zeros(10, device="meta")}


def test_weights_are_numbers_of_the_models_kind(tmp_path: Path):
    state = Tiny().state_dict()
    torch.save(half(state), tmp_path / "half.pt")
    assert load_model("nets:tiny", tmp_path / "half.pt").head.bias.dtype == torch.float32  # type: ignore[union-attr]
    for change, message in (
        (numbers, "torch.int32, the model has torch.float32"),
        (complexes, "complex64"),
        (nowhere, "cannot be put into model 'nets:tiny'"),
    ):
        torch.save(change(state), tmp_path / "w.pt")
        with pytest.raises(UsageError, match=message):
            load_model("nets:tiny", tmp_path / "w.pt")


def test_the_record_of_a_run_is_json(run, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stopping(patch, 2)
        run(*TRAIN, "--epochs", "1", "--out", "cut", code=130)
    record = json.loads(Path("cut/unfinished/run.json").read_text())
    assert record["model"] == "nets:tiny"
    assert record["train"] == "nets:batches"
    assert "test" not in record


def test_a_removal_that_is_killed_leaves_no_half_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, folder = Output(), tmp_path / "unfinished"
    held = RunFolder(folder, {"model": "nets:tiny"})

    def kill(path: Path) -> None:
        raise KeyboardInterrupt

    for name in ("replace", "unlink"):
        held.claim()
        (folder / "plan.json").touch()
        with monkeypatch.context() as patch:
            patch.setattr(*((os, "replace", lambda *a: kill(folder)) if name == "replace" else (Path, "unlink", kill)))
            with pytest.raises(KeyboardInterrupt):
                held.remove()
        assert folder.exists() == (name == "replace")  # whole, or gone
        if folder.exists():
            assert {"plan.json", "run.json"} < {file.name for file in folder.iterdir()}
    make_folder(out, tmp_path)
    assert not list(tmp_path.iterdir())
    held.claim()
    (folder / "mine.txt").touch()
    held.remove()
    assert (folder / "mine.txt").exists()
