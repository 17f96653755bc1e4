"""Names in files of weights that wrappers, loggers and tied layers leave otherwise than the model has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from spectrim import CheckpointError, load
from spectrim.cli.references import UsageError
from spectrim.cli.weight_names import as_named
from spectrim.cli.weights import check_file, fill


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.words(tokens)).mean(1))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def filled(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    fill(model, state, "net.py:build", "w.pt")
    return model.state_dict()


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model._orig_mod.{name}",
        lambda name: name.replace("2.", "2._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name.replace('0.', '0._fsdp_wrapped_module._checkpoint_wrapped_module.')}",
    ],
)
def test_what_wrappers_put_into_names_is_left_out(renamed) -> None:
    state = net().state_dict()
    assert same(filled({renamed(name): each for name, each in state.items()}, net()), state)


def test_an_average_of_models_is_a_model() -> None:
    model = net()
    state = torch.optim.swa_utils.AveragedModel(model).state_dict()
    assert "n_averaged" in state
    assert same(filled(dict(state), net()), model.state_dict())


def test_a_name_that_the_model_has_is_its_own() -> None:
    inner = nn.ModuleDict({"_orig_mod": nn.Linear(2, 2), "n_averaged": nn.Linear(2, 2)})
    assert as_named(inner.state_dict(), inner.state_dict()).keys() == inner.state_dict().keys()
    both = {"a.weight": torch.ones(1), "_orig_mod.a.weight": torch.zeros(1)}
    assert as_named(both, {"a.weight": torch.ones(1)}).keys() == both.keys()


def test_tied_tensors_may_be_in_a_file_once(tmp_path: Path) -> None:
    model = Tied()
    save_model(model, str(tmp_path / "w.safetensors"))
    for kept in ("words.weight", "head.weight"):
        once = {name: each for name, each in model.state_dict().items() if name == kept or name[0] == "m"}
        assert same(filled(once, Tied()), model.state_dict())
        assert same(filled({f"model.{name}": each for name, each in once.items()}, Tied()), model.state_dict())


def test_tied_tensors_that_differ_in_a_file_are_of_another_network() -> None:
    state = {name: each.clone() for name, each in Tied().state_dict().items()}
    state["head.weight"] += 1
    with pytest.raises(UsageError, match=r"'words.weight' and 'head.weight' differ in it and are one tensor"):
        filled(state, Tied())


@pytest.mark.parametrize(
    ("beside", "why"),
    [
        ({"criterion.weight": torch.ones(2)}, "all that the model has lies under 'model.': save that alone, {k[6:]: v"),
        ({f"ema.{name}": each for name, each in net().state_dict().items()}, "lies under 'model.' and under 'ema.'"),
    ],
)
def test_where_the_model_lies_in_a_file_of_more_is_told(beside: dict[str, Tensor], why: str) -> None:
    state = {f"model.{name}": each for name, each in net().state_dict().items()} | beside
    with pytest.raises(UsageError) as caught:
        filled(state, net())
    assert why in str(caught.value)
    assert "another network" not in str(caught.value)


@pytest.mark.parametrize("end", ["1e999", "-1e999", "NaN", "1e17", "[4]", "null"])
def test_places_of_tensors_that_are_none_are_damage(end: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(1)}, file)
    text = f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": [0, {end}]}}}}'.encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(UsageError, match=r"cannot be read: (the list of its tensors is damaged|it should have)"):
        check_file(file)
    with pytest.raises(CheckpointError, match=r"w\.safetensors: "):
        load(net(), file)


def test_a_home_folder_is_meant_where_no_shell_says_so(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nets

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    torch.save(nets.tiny().state_dict(), tmp_path / "home/w.pt")
    options = ("--input", "1x8x8", "-b", "macs=60%", "--no-report")
    run("compress", "nets:tiny", "--weights=~/w.pt", "--out=~/small", *options)
    run("compare", "~/small")
    assert (tmp_path / "home/small/model.safetensors").is_file()
    assert not Path("~").exists()
    assert "'~nobody-here/w.pt'" in run("profile", "nets:tiny", "-w", "~nobody-here/w.pt", code=2).stderr
