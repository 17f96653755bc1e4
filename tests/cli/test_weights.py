"""Files of weights that are not what their names say, of another form, or damaged: told without torch, with a cure."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectrim.cli.data import check_data
from spectrim.cli.models import check_reference, load_model
from spectrim.cli.references import UsageError
from spectrim.cli.weights import check_checkpoint, check_file, part_taken, read_weights
from spectrim.network.file_kinds import head_of, is_saved, not_safetensors


def state() -> dict[str, torch.Tensor]:
    import nets

    return nets.tiny().state_dict()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def saved(name: str) -> Callable[[], Path]:
    def write() -> Path:
        torch.save(state(), name)
        return Path(name)

    return write


def tensors(name: str) -> Callable[[], Path]:
    def write() -> Path:
        save_file(state(), name)
        return Path(name)

    return write


def text(name: str, content: bytes) -> Callable[[], Path]:
    def write() -> Path:
        Path(name).write_bytes(content)
        return Path(name)

    return write


def archive() -> Path:
    with zipfile.ZipFile("a.pt", "w") as file:
        file.writestr("x.txt", "x")
    return Path("a.pt")


def scripted() -> Path:
    with zipfile.ZipFile("s.pt", "w") as file:
        for name in ("s/data.pkl", "s/constants.pkl"):
            file.writestr(name, "x")
    return Path("s.pt")


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (text("w.pt", b""), "it is empty: copy it again"),
        (text("w.safetensors", b""), "it is empty: copy it again"),
        (text("w.pt", b"hello\n"), "not a checkpoint that torch.save wrote"),
        (text("w.safetensors", b"hello\n"), "no safetensors file"),
        (text("w.pt", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (text("w.bin", b"\n<!DOCTYPE html>"), "it is a web page"),
        (text("w.safetensors", (9).to_bytes(8, "little") + b'{"a": 3} '), "the list of its tensors is damaged"),
        (saved("w.safetensors"), "a name that ends in .pt"),
        (tensors("w.pt"), "a name that ends in .safetensors"),
        (archive, "torch.save did not write"),
        (scripted, r"a program of torch\.jit or torch\.export: save model\.state_dict\(\)"),
    ],
)
def test_what_a_file_is_is_told(write: Callable[[], Path], why: str):
    with pytest.raises(UsageError, match=why) as caught:
        check_file(path := write())
    assert repr(str(path)) in str(caught.value)


@pytest.mark.parametrize("write", [saved("w.pt"), tensors("w.safetensors")])
def test_a_part_that_is_missing_is_told(write: Callable[[], Path]):
    cut(path := write())
    with pytest.raises(UsageError, match="copy it again, or save it again"):
        check_file(path)


def test_a_changed_number_in_a_checkpoint_of_torch_is_told():
    path = saved("w.pt")()
    content = bytearray(path.read_bytes())
    at = content.find(state()["conv.weight"].numpy().tobytes())
    assert at > 0
    content[at + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"its part '\S+' is not what was written"):
        read_weights(path)


def test_an_archive_without_checksums_is_read():
    was = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved("w.pt")()
    finally:
        torch.serialization.set_crc32_options(was)
    assert read_weights(path).keys() == state().keys()


def test_a_checkpoint_of_a_compressed_model_is_no_other_file():
    for write, why in ((saved("w.pt"), "torch.save wrote it"), (tensors("w.safetensors"), "holds weights and no plan")):
        with pytest.raises(UsageError, match=f"{why}: give model.safetensors"):
            check_checkpoint(write())


@pytest.mark.parametrize("wrap", [lambda s: {"epoch": 3, "net": s}, lambda s: {"ema": {"decay": 1}, "model": s}])
def test_the_one_state_dict_in_a_file_is_taken(wrap: Callable[[object], object]):
    torch.save(wrap(state()), "w.ckpt")
    assert read_weights("w.ckpt").keys() == state().keys()


def test_of_several_state_dicts_one_must_be_named():
    torch.save({"old": state(), "new": state(), "epoch": 3}, "w.pt")
    with pytest.raises(UsageError, match="but 'old', 'new', 'epoch': save one of 'old', 'new' by itself"):
        read_weights("w.pt")


@pytest.mark.parametrize(("taken", "other"), [("state_dict", "state_dict_ema"), ("model", "ema")])
def test_which_of_several_state_dicts_is_taken_is_told(run, taken: str, other: str):
    torch.save({other: {k: v + 1 for k, v in state().items()}, taken: state()}, "w.pt")
    assert torch.equal(read_weights("w.pt")["conv.weight"], state()["conv.weight"])
    told = f"the weights of w.pt (its {taken!r}, not {other!r}: save another by itself to have it taken)"
    for arguments in (("profile",), ("evaluate", "--repeats", "0")):
        assert told in run(arguments[0], "nets:tiny", "-w", "w.pt", "--input", "1x8x8", *arguments[1:]).stderr
    torch.save({taken: state(), "epoch": 3}, "w.pt")
    assert part_taken("w.pt") == ""


def test_a_part_that_all_names_begin_with_is_left_out_where_they_fit_without():
    torch.save({"state_dict": {f"model.net.{name}": each + 1 for name, each in state().items()}}, "w.ckpt")
    loaded = load_model("nets:tiny", "w.ckpt").state_dict()
    assert all(torch.equal(loaded[name], each + 1) for name, each in state().items())
    torch.save({f"model.{name}": each for name, each in state().items()} | {"loss": torch.ones(1)}, "w.pt")
    with pytest.raises(UsageError, match="missing .* unexpected"):
        load_model("nets:tiny", "w.pt")


def test_a_folder_says_which_file_was_meant():
    Path("folder").mkdir()
    torch.save(state(), "folder/last.pt")
    with pytest.raises(UsageError, match=r"'folder' is a folder, not a file: write folder/last.pt"):
        check_file("folder")


@pytest.mark.parametrize(("name", "why"), [("meta", "no numbers"), ("sparse", "sparse, quantised or nested")])
def test_tensors_that_hold_no_plain_numbers_are_told(name: str, why: str):
    torch.save({key: each.to("meta") if name == "meta" else each.to_sparse() for key, each in state().items()}, "w.pt")
    with pytest.raises(UsageError, match=why) as caught:
        load_model("nets:tiny", "w.pt")
    assert "save the state_dict of a dense, loaded model" in str(caught.value)


def test_a_path_that_is_no_file_says_what_it_is_and_means_no_other():
    os.mkfifo("pipe.pt")
    Path("folder.pt").mkdir()
    for name, kind in (("pipe.pt", "a pipe"), ("folder.pt", "a folder")):
        with pytest.raises(UsageError, match=f"'{name}' is {kind}, not a file$"):
            check_file(name)
    for check in (lambda: check_data("pipe.npz", "test"), lambda: check_reference("pipe.py:build")):
        for name in ("pipe.npz", "pipe.py"):
            Path(name).unlink(missing_ok=True)
            os.mkfifo(name)
        with pytest.raises(UsageError, match="is a pipe, not a file$"):
            check()


def test_safetensors_of_every_length_of_header_are_safetensors(tmp_path: Path):
    file, lengths = tmp_path / "net.safetensors", set()
    for more in range(0, 256, 8):
        save_file({"weight": torch.zeros(1)}, file, {"note": "n" * more})
        head = head_of(file)
        lengths.add(head[0])
        assert not is_saved(head)
        assert not_safetensors(file, head, "") == ""
    assert 0x80 in lengths  # with which pickles begin
    torch.save({"weight": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert is_saved(head_of(tmp_path / "old.pt"))
