"""Removal of filters on a part of the benchmarks' zoo: the same checks, on networks that take a moment each."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import spectrim as st
from benchmarks import zoo
from spectrim.network.coupling import Coupling, Side
from spectrim.nn.watch.batches import call, output_tensors

pytest.importorskip("torch_pruning")

OWN = [
    "resnet20-option-a", "densenet", "unet", "resnext", "se-resnet", "inception", "mobilenet-v3", "wavenet", "conv3d",
    "lenet", "style-transfer", "autoencoder", "conv-lstm", "shared-block", "two-outputs", "gated-conv",
]  # fmt: skip
TRANSFORMERS = ["hf-resnet-bottleneck", "hf-regnet-y", "hf-convnext", "hf-vit", "hf-t5-encoder", "hf-levit"]
# Shuffled channels: the dependency graph takes them for something else.
LEFT_ALONE = ["shufflenet-v2"]


# Seven seconds each.
LONG = ("hf-levit", "resnet20-option-a")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.table(every=5)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in (*OWN, *TRANSFORMERS)]
)
def test_what_is_left_is_the_network_without_the_channels(name: str):
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
    row = zoo.removed(name)
    assert row["passed"], row["fault"]
    assert row["outcome"] == "pruned"
    assert row["parameters_after"] < row["parameters"]
    assert row["compared"] > 0
    assert row["error"] <= 1e-4 * row["change"]


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_network_that_cannot_be_pruned_is_left_alone_and_says_why(name: str):
    row = zoo.removed(name)
    assert row["passed"], row["fault"]
    assert row["outcome"] == "skipped"
    assert row["parameters_after"] == row["parameters"]
    assert row["reasons"]


def test_a_wrong_coupling_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def shifted(model: nn.Module, sites: st.Sites, example: object) -> st.Sites:
        """The channels of the first convolution, but other columns of the second."""
        positions = torch.arange(8).unsqueeze(1)
        sides = (Side("0", "out", positions, 8), Side("3", "in", positions.flip(0), 8))
        return dataclasses.replace(sites, couplings=(Coupling("0:out", sides),))

    monkeypatch.setattr(zoo, "couple", shifted)
    row = zoo.removed("lenet")
    assert not row["passed"]
    assert "outputs differ" in row["fault"]


def test_a_crash_is_a_row(monkeypatch: pytest.MonkeyPatch):
    def broken(model: nn.Module, sites: st.Sites, example: object) -> st.Sites:
        raise RuntimeError("no graph")

    monkeypatch.setattr(zoo, "couple", broken)
    row = zoo.removed("lenet")
    assert (row["outcome"], row["passed"], row["fault"]) == ("crashed", False, "RuntimeError: no graph")


@pytest.mark.parametrize("name", ["resnext", "group-norm-resnet"])
def test_every_pool_keeps_as_many(name: str):
    model, example = zoo.build(name)
    sites = zoo.couple(model, st.find(model), example)
    pooled = [c for c in sites.couplings if c.pools > 1]
    assert pooled
    for coupling in pooled:
        kept = torch.tensor(zoo.keep(coupling, seed=1))
        counts = torch.bincount(kept // (coupling.channels // coupling.pools), minlength=coupling.pools)
        assert counts.tolist() == [len(kept) // coupling.pools] * coupling.pools
        assert len(kept) < coupling.channels


def test_the_same_seed_makes_the_same_network():
    (first, x), (second, y) = zoo.build("densenet"), zoo.build("densenet")
    other, _ = zoo.build("densenet", seed=1)
    outputs = [next(iter(output_tensors(call(m, x)))) for m in (first, second, other)]
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_there_are_enough_architectures():
    assert len(zoo.NETWORKS) >= 44


@pytest.mark.slow
def test_the_experiment_counts_what_holds(monkeypatch: pytest.MonkeyPatch):
    held = json.loads((Path(zoo.__file__).parent / "experiments" / "zoo.json").read_text())
    config = {**held, "networks": ["lenet", "conv3d", "shufflenet-v2"], "at_least": 3}
    found = zoo.run(config, {})
    claim = found["claims"]["P6"]
    assert (claim["value"], claim["met"]) == (3, True)
    assert [row["outcome"] for row in found["rows"]] == ["pruned", "pruned", "skipped"]
    monkeypatch.setattr(zoo, "_difference", lambda *_: (1.0, 1.0))
    claim = zoo.run(config, {})["claims"]["P6"]
    assert (claim["value"], claim["met"]) == (1, False)
    assert "wrong: lenet, conv3d" in claim["note"]
