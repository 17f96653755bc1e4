"""The lines that load a compressed network, and what a report says it was made from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from torch import nn

from spectrim.cli.origins import load_lines, origin
from spectrim.nn.checkpoint import save
from spectrim.selection.plan import Plan

NET = "from torch import nn\nclass Nets:\n    @staticmethod\n    def build(width=2):\n     return nn.Linear(3, width)\n"


def test_the_three_lines_load_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("nets_to_load.py").write_text(NET)
    dense = nn.Linear(3, 4)
    save(dense, Plan((), {"macs": 12.0}, {"macs": 12.0}), "model.safetensors")
    lines = load_lines("./nets_to_load.py:Nets.build?width=4", dense, {"model": Path("model.safetensors")})
    assert len(lines.splitlines()) == 3
    known: dict[str, nn.Linear] = {}
    exec(lines, {}, known)
    assert known["model"].weight.equal(dense.weight)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("timm:resnet18?num_classes=3", "timm.create_model('resnet18', pretrained=False, num_classes=3)"),
        ("torchvision:resnet18", "torchvision.models.get_model('resnet18', weights=None)"),
        ("some.package:net", "from some.package import net\n"),
    ],
)
def test_references_become_calls(reference: str, words: str):
    assert words in load_lines(reference, nn.Linear(1, 1), {"model": Path("m.safetensors")})


def test_a_model_of_transformers_is_loaded_by_its_own_class():
    lines = load_lines("hf:some/name", nn.Linear(1, 1), {"model": Path("m"), "transformers": Path("out/transformers")})
    assert lines.splitlines()[-1] == "model = Linear.from_pretrained('out/transformers')"


def test_an_origin_has_a_digest_of_all_that_has_a_file(tmp_path: Path):
    data = tmp_path / "data"
    (data / "inner").mkdir(parents=True)
    (data / "inner" / "a.bin").write_bytes(b"1")
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"numbers")
    named = {"model": "no.such:net", "weights": str(weights), "test data": f"cifar10:{data}?limit=3"}
    model = nn.Linear(2, 2)
    made = origin(named, {"training": 3}, model, model, "load it")
    parts = {part.role: part for part in made.parts}
    assert parts["weights"].digest == hashlib.sha256(b"numbers").hexdigest()
    assert parts["test data"].digest == hashlib.sha256(b"inner/a.bin\0" + b"1").hexdigest()
    assert (parts["model"].digest, parts["model"].of) == ("", "no file of its own")
    assert parts["dense network"].digest == parts["compressed network"].digest != ""
    # What the tests were called with follows, if anything.
    assert made.command.split()[0] == "spectrim"
    assert made.load == "load it"
    assert dict(made.seeds) == {"training": 3}
