"""The experiments on shared factors run at a size that takes seconds, and count and measure what they say."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim as st
from benchmarks import joint_counts, joint_latency, joint_minilm, run
from benchmarks.paper_resnets import PaperResNet
from spectrim.linalg.moments import Moments
from spectrim.network.groups import residual

EXPERIMENTS = Path(run.__file__).parent / "experiments"


def config(name: str) -> dict[str, Any]:
    held = json.loads((EXPERIMENTS / f"{name}.json").read_text())
    return {**held, **held["smoke"]}


def result(name: str, tmp_path: Path, **paths: Any) -> dict[str, Any]:
    threads = torch.get_num_threads()
    target = tmp_path / f"{name}.json"
    run.run(name, config(name), {"cifar10": None, "weights": {}, "work": tmp_path / "work", **paths}, target)
    assert torch.get_num_threads() == threads
    return json.loads(target.read_text())


def test_counts_of_resnet18_are_the_published_ones(tmp_path: Path):
    held = result("joint_counts", tmp_path)
    assert held["claims"]["J1"]["met"]
    assert held["claims"]["J2"]["met"]
    assert len(held["rows"]) == 7
    assert all(row["ratio"] < row["factor"] for row in held["rows"])


def test_a_published_figure_that_differs_is_counted():
    asked = config("joint_counts")
    rates = asked["cases"][0]["rates"]["0.04"]
    rates["factors"]["LJSVD"] += 0.01
    rates["ranks"]["layer2/conv2"]["RJSVD-1"] += 1
    rates["flops_e8"]["SVD"] += 0.01
    claims = joint_counts.run(asked, {})["claims"]
    assert (claims["J1"]["value"], claims["J1"]["met"]) == (2, False)
    assert (claims["J2"]["value"], claims["J2"]["met"]) == (1, False)


def test_latency_is_measured_in_every_case(tmp_path: Path):
    held = result("joint_latency", tmp_path)
    (row,) = held["rows"]
    assert held["claims"]["J5"]["value"] == row["paired"] > 0
    assert row["dense ms"] > 0


@pytest.mark.parametrize("scheme", ["svd", "ljsvd", "rjsvd-1", "bi-jsvd"])
def test_timed_networks_have_the_parameters_of_the_plan(scheme: str):
    dense = PaperResNet("resnet18", width=8).eval()
    sites = residual(st.find(dense))
    small = joint_latency.factored(dense, sites, 0.3, scheme)
    plan = st.parameters(sites.untouched) + sites.other_parameters
    plan += sum(st.parameters(a.layers) for a in joint_latency.choices_at_rate(sites, 0.3, scheme))
    assert sum(p.numel() for p in small.parameters()) == plan
    assert small(torch.randn(1, 3, 32, 32)).isfinite().all()


@pytest.fixture
def encoder(tmp_path: Path) -> dict[str, Path]:
    """A tiny encoder of random weights with its tokenizer, and a text."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "encoder"
    folder.mkdir()
    words = ["whale", "ship", "sea", "captain", "harpoon", "white", "the", "and"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *string.ascii_lowercase]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = transformers.BertConfig(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(shape).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (4000,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(" ".join(words[n] for n in picks))
    return {"minilm": folder, "text": tmp_path / "text.txt"}


def test_an_encoder_is_compared_at_equal_parameters(tmp_path: Path, encoder: dict[str, Path]):
    held = result("joint_minilm", tmp_path, **encoder)
    rows = held["rows"]
    assert held["claims"]["J6"]["met"]
    for key in {(row["layers"], row["data"]) for row in rows}:
        some = [row for row in rows if (row["layers"], row["data"]) == key]
        separate = next(row for row in some if row["method"] == "WeightSVD")
        assert all(row["parameters"] <= separate["parameters"] for row in some)
        assert all(0 < row["least"] <= row["error"] <= row["most"] for row in some)
    once = next(row for row in rows if row["method"] == "JointSVD left" and row["layers"] == "q, k, v")
    separate = next(row for row in rows if row["method"] == "WeightSVD" and row["layers"] == "q, k, v")
    assert once["rank"] > separate["rank"]
    assert once["macs"] <= separate["macs"]
    assert [row["table"] for row in held["embeddings"]] == ["separate", "separate or joint"]
    assert all(row["parameters"] <= row["share"] + 1e-3 for row in held["embeddings"])
    assert held["embeddings"][1]["loss"] <= held["embeddings"][0]["loss"] + 1e-6


def test_what_a_layer_loses_is_what_its_outputs_lose():
    torch.manual_seed(0)
    layer, seen = torch.nn.Linear(6, 4), torch.randn(500, 6).double() @ torch.randn(6, 6).double() + 1
    held = Moments(1, 6)
    held.update(seen.unsqueeze(0))
    (part,) = st.find(torch.nn.Sequential(layer))
    weight = layer.weight.detach() + 0.1 * torch.randn(4, 6)
    shift = torch.randn(4) * 0.1
    found = joint_minilm._lost(part, weight.unsqueeze(0), shift, held)
    before = seen @ layer.weight.detach().double().T
    after = seen @ weight.double().T + shift.double()
    expected = (after - before).square().sum() / (before - before.mean(0)).square().sum()
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_a_text_that_is_too_short_is_refused(encoder: dict[str, Path]):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder["minilm"])
    asked = {"length": 16, "batch": 4, "windows": {"calibration": 8, "held_out": 4}}
    with pytest.raises(ValueError, match="the text has 4 tokens for calibration; expected 112 or more"):
        joint_minilm.windows(tokenizer, "whale ship sea and", asked)
