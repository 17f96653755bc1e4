"""Files of version 0.1 are read, and give what they gave (see ``kept.py``)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import spectrim as st
from benchmarks.golden_nets import dense
from tests.golden.kept import CHECKPOINTS, FILES, PLANS, Kept, learn, tune

OUTPUTS = load_file(FILES / "outputs.safetensors")


def agrees(found: Tensor, name: str, tolerance: float = 1e-5) -> bool:
    """Whether it is the output that was kept, but for the rounding of other CPUs."""
    kept = OUTPUTS[name]
    return found.shape == kept.shape and float((found - kept).abs().max()) <= tolerance * float(kept.abs().max())


def lost(kept: Kept, found: Tensor) -> float:
    """How far it is from what the dense network answers."""
    wanted = kept.answer(dense(kept.net))
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_carried_out_as_it_was(name):
    text = (FILES / f"{name}.json").read_text()
    assert all("module" not in record for record in json.loads(text)["methods"].values())
    plan = st.Plan.from_json(text)
    assert st.Plan.from_json(plan.to_json()) == plan
    kept = PLANS[name]
    small = kept.apply(plan)
    if not kept.data:
        assert agrees(kept.answer(small), name, 1e-4)
        return
    # What is fitted to data may be fitted better than in version 0.1: the same layers, and no more lost than then.
    # Which samples are held out makes 0.97 to 1.35 times as much of it.
    assert lost(kept, kept.answer(small)) <= 1.4 * lost(kept, OUTPUTS[name])
    if name in CHECKPOINTS:
        loaded = st.load(dense(kept.net, seed=7), FILES / f"{name}.safetensors")
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (small, loaded)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_gives_its_model(name):
    kept = PLANS[name]
    loaded = st.load(dense(kept.net, seed=7), FILES / f"{name}.safetensors")
    assert agrees(kept.answer(loaded), name)


def test_a_run_of_learned_ranks_goes_on(tmp_path: Path):
    folder = shutil.copytree(FILES / "learning", tmp_path / "learning")
    result = learn(folder)
    net = PLANS["perceptron"]
    assert lost(net, net.answer(result.model)) <= 1.25 * lost(net, OUTPUTS["learning"])
    assert [record.ranks for record in result.trajectory.records] == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    # Nothing was trained again.
    assert (folder / "learning.safetensors").read_bytes() == (FILES / "learning/learning.safetensors").read_bytes()


def test_a_run_of_fine_tuning_goes_on(tmp_path: Path):
    file = Path(shutil.copy(FILES / "tuned.safetensors", tmp_path))
    kept = PLANS["perceptron"]
    small = st.load(dense(kept.net), FILES / "perceptron.safetensors")
    before = kept.answer(small)
    tune(small, file)
    assert agrees(kept.answer(small), "tuned")
    assert not torch.equal(kept.answer(small), before)
    assert file.read_bytes() == (FILES / "tuned.safetensors").read_bytes()


def test_the_formats_kept_are_those_of_the_library():
    """The set has files of both formats, and shared, sparse and removed parts are really in them."""

    def metadata(name: str) -> dict[str, str]:
        with safe_open(FILES / f"{name}.safetensors", "pt") as file:
            return file.metadata()

    assert {name: metadata(name)["format_version"] for name in ("low-rank", "sparse")} == {
        "low-rank": "1",
        "sparse": "2",
    }
    assert json.loads(metadata("shared")["shared"])
    kinds = {entry.choice.kind for name in PLANS for entry in st.Plan.read(FILES / f"{name}.json")}
    assert kinds == {"dense", "low_rank", "shared_basis", "low_rank_plus_sparse", "kept_channels"}
