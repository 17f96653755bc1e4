from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectrim.cli.models import load_compressed, load_model
from spectrim.cli.references import UsageError
from spectrim.cli.results import write_result
from spectrim.cli.weights import read_weights

SHARD = "model-00001-of-00002.safetensors"


def test_factory_with_options_in_evaluation_mode():
    model = load_model("nets:tiny?width=5")
    assert model.conv.out_channels == 5
    assert not model.training
    assert isinstance(load_model("nets:Tiny"), nn.Module)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "wrapped.pth", "parallel.pt"])
def test_weight_files_fill_the_model(tmp_path: Path, suffix: str):
    import nets

    state = {k: v + 1 for k, v in nets.tiny().state_dict().items()}
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    elif suffix == "wrapped.pth":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif suffix == "parallel.pt":
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    loaded = load_model("nets:tiny", path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_missing_batch_counters_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import nets

    monkeypatch.setattr(nets, "normed", lambda: nn.BatchNorm1d(3), raising=False)
    state = {k: torch.rand(3) for k, v in nn.BatchNorm1d(3).state_dict().items() if v.dim()}
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_model("nets:normed", tmp_path / "w.safetensors").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())
    assert loaded["num_batches_tracked"] == 0


@pytest.mark.parametrize("error", [NotImplementedError(), RuntimeError("\n")])
def test_a_model_that_refuses_weights_without_a_word_is_told(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import nets

    class Refusing(nn.Linear):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise error

    monkeypatch.setattr(nets, "refusing", lambda: Refusing(3, 2), raising=False)
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="cannot be put into model 'nets:refusing': without a word"):
        load_model("nets:refusing", tmp_path / "w.safetensors")


class _Payload:
    def __reduce__(self):
        return (Path("pwned").write_text, ("code ran",))


def test_pickled_code_is_not_run(tmp_path: Path):
    torch.save({"x": _Payload()}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="cannot be read"):
        read_weights(tmp_path / "w.pt")
    assert not Path("pwned").exists()


def test_weights_that_do_not_fit_say_how(tmp_path: Path):
    import nets

    state = nets.tiny().state_dict()
    state["conv.weight"] = torch.zeros(2, 2)
    state["extra"] = state.pop("head.bias")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"1 missing \('head.bias'\); 1 unexpected \('extra'\); 1 of another shape"):
        load_model("nets:tiny", tmp_path / "w.safetensors")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="look like the weights of another network"):
        load_model("nets:tiny", tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.npz", b"", "expected .safetensors"),
        ("w.safetensors", b"garbage", "cannot be read"),
        ("w.pt", b"garbage", "cannot be read"),
    ],
)
def test_bad_weight_files(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_weights(tmp_path / name)
    assert name in str(caught.value)


def test_weights_must_be_tensors(tmp_path: Path):
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(UsageError, match="no mapping of names to tensors"):
        read_weights(tmp_path / "w.pt")
    with pytest.raises(UsageError, match="is not a file"):
        read_weights(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("resnet18", "is not known"),
        ("nets:gone", "has no attribute 'gone'"),
        ("no_such_module:f", "cannot import"),
        ("nets:not_a_model", "returned a str, not a torch.nn.Module"),
        ("nets:tiny?depth=3", "cannot be called with {'depth': 3}"),
        ("timm:", "names no model"),
        ("hf:", "names no model"),
        ("torchvision:", "names no model"),
    ],
)
def test_bad_references_are_quoted(reference: str, message: str):
    with pytest.raises(UsageError) as caught:
        load_model(reference)
    assert message in str(caught.value)
    assert repr(reference) in str(caught.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        load_model("timm:resnet18")


@pytest.mark.parametrize("weights", [True, False])
def test_libraries_are_asked_for_pretrained_weights_unless_there_is_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: bool
):
    import nets

    asked: list[tuple[str, dict[str, object]]] = []

    def make(name: str, **options: object) -> nn.Module:
        asked.append((name, options))
        return nets.tiny()

    timm, vision = ModuleType("timm"), ModuleType("torchvision.models")
    timm.create_model, vision.get_model = make, make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", vision)
    save_file(nets.tiny().state_dict(), tmp_path / "w.safetensors")
    path = tmp_path / "w.safetensors" if weights else None
    load_model("timm:resnet18?num_classes=10", path)
    load_model("torchvision:vgg16", path)
    assert asked == [
        ("resnet18", {"pretrained": not weights, "num_classes": 10}),
        ("vgg16", {"weights": None if weights else "DEFAULT"}),
    ]


def test_hf_builds_the_architecture_of_the_configuration(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.BertConfig(**options, intermediate_size=8, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    model = load_model(f"hf:{tmp_path / 'bert'}")
    assert type(model).__name__ == "BertForSequenceClassification"
    with pytest.raises(UsageError, match="there is no such folder"):
        load_model(f"hf:{tmp_path / 'missing'}")


def _edited(folder: Path, name: str, **entries: object) -> None:
    record = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**record, **entries}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda f: (f / SHARD).unlink(), f"No such file or directory: .*{SHARD}"),
        (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-9]), f"{SHARD!r} cannot be read.* copy it again"),
        (lambda f: (f / SHARD).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda f: (f / "config.json").write_text("{"), "is not a valid JSON file"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "KeyError: '(weight_map|metadata)'"),
        (lambda f: _edited(f, "config.json", hidden_act="foo"), "KeyError: 'foo'"),
        (lambda f: _edited(f, "config.json", hidden_size="a"), "field 'hidden_size': .*expected int, got str"),
        (lambda f: _edited(f, "config.json", architectures=[3]), r"names \[3\], of which transformers .* has no class"),
        (lambda f: _edited(f, "config.json", architectures=["GPT2Model"]), "model_type 'bert' and names GPT2Model"),
        (lambda f: _edited(f, "config.json", num_hidden_layers=2), "16 of its weights would be random, first 'encoder"),
        (lambda f: _edited(f, "config.json", intermediate_size=9), "3 of its weights would be random"),
    ],
)  # fmt: skip
def test_damaged_hf_folders_are_told_in_one_sentence(tmp_path: Path, damage: Callable[[Path], object], why: str):
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.BertConfig(**options, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert", max_shard_size="6KB")
    assert (tmp_path / "bert" / SHARD).is_file()
    damage(tmp_path / "bert")
    with pytest.raises(UsageError, match=why) as caught:
        load_model(f"hf:{tmp_path / 'bert'}")
    assert str(caught.value).count("\n") == 0


def test_hf_folders_of_compressed_models_are_written_and_read(tmp_path: Path):
    pytest.importorskip("transformers")
    from tests.hf.nets import compressed, logits

    small, plan = compressed("llama", "bytes")
    files = write_result(SimpleNamespace(model=small, plan=plan), tmp_path / "out")  # type: ignore[arg-type]
    model = load_model(f"hf:{files['transformers']}")
    assert torch.equal(logits(model, "llama"), logits(small, "llama"))
    again = load_compressed(f"hf:{files['transformers']}", files["model"])
    assert torch.equal(logits(again, "llama"), logits(small, "llama"))
