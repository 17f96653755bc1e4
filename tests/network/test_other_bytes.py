"""Names of files that are no UTF-8, as any other bytes may be on a Unix disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.cli.weights import read_weights
from spectrim.network.file_kinds import in_utf8
from spectrim.network.files import write_text
from spectrim.nn.checkpoint import read_plan, same_weights
from spectrim.report.origin import Part

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")

BATCHES = [torch.randn(32, 16, generator=torch.Generator().manual_seed(0))]


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / os.fsdecode(b"caf\xe9")
    found.mkdir()
    return found


def test_models_and_plans_are_read_where_they_were_written(folder: Path) -> None:
    result = st.compress(make(), BATCHES, st.Budget(macs=0.7))
    file, plan = folder / os.fsdecode(b"small \xff.safetensors"), folder / os.fsdecode(b"\xff.json")
    st.save(result, file)
    assert same_weights(st.load(make(), file), result.model)
    assert read_plan(file, whole=True) == result.plan
    result.plan.write(plan)
    assert st.Plan.read(plan) == result.plan
    sweep = [st.sweep(make(), BATCHES, ["macs=70%"], folder=folder / "sweep", keep_models=True) for _ in range(2)]
    assert sweep[0][0].notes == sweep[1][0].notes
    assert {path.name for path in folder.iterdir()} == {file.name, plan.name, "sweep"}


def test_weights_are_read_by_name_and_damaged_files_told_by_it(folder: Path) -> None:
    from safetensors.torch import save_file

    weights = folder / os.fsdecode(b"w\xff.safetensors")
    save_file(make().state_dict(), weights)
    assert read_weights(weights).keys() == make().state_dict().keys()
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(st.CheckpointError, match="it should have .* bytes and has"):
        st.load(make(), weights)


@pytest.mark.slow
def test_onnx_is_checked_under_any_name(folder: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = folder / os.fsdecode(b"net\xff.onnx")
    assert st.export_onnx(make(), BATCHES[0], file) < 1e-4
    assert onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"]).get_inputs()


def test_names_that_are_utf8_are_left_alone(tmp_path: Path) -> None:
    with in_utf8(tmp_path / "é") as path:
        assert path == tmp_path / "é"


def test_texts_and_digests_take_any_name(folder: Path) -> None:
    write_text(folder / "page.html", f"{folder.name} é")
    assert (folder / "page.html").read_text(encoding="utf-8") == "caf\\udce9 é"
    (folder / os.fsdecode(b"x\xff")).touch()
    assert len(Part.of_files("data", "photographs", folder).digest) == 64
