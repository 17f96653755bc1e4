from __future__ import annotations

import copy
import functools
import json
import math
import os
import pickle
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import spectrim as st
from spectrim.errors import CheckpointError
from spectrim.network import tensor_files
from spectrim.network.choices import Choice
from spectrim.network.state_values import equal, put_together, taken_apart
from spectrim.nn.build import skeleton
from spectrim.nn.checkpoint import check_savable, load, read_plan, same_weights, save
from spectrim.nn.find import find
from spectrim.nn.modules import Factored
from spectrim.nn.surgery import parameter_count, replace_module, size_in_bytes
from spectrim.selection.plan import Entry, Plan
from tests.nn.layers import ConvNet
from tests.nn.nets import CHOICES, compressed, low_rank, plan_of


def header_of(data: bytes) -> tuple[dict, bytes]:
    """Without digests, as of files that were written before there were any: what is changed must be seen by itself."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for key in (tensor_files.TENSORS, tensor_files.TEXTS):
        header.get("__metadata__", {}).pop(key, None)
    return header, data[8 + length :]


def with_header(header: dict | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture
def file(tmp_path):
    """A compressed network saved."""
    path = tmp_path / "small.safetensors"
    model = compressed(ConvNet(), CHOICES)
    save(model, plan_of(CHOICES), path)
    return path, model


def test_a_compressed_network_comes_back_bit_for_bit(file):
    path, model = file
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 6, 6))
    save(model, plan_of(CHOICES), path)
    again = load(ConvNet(), path)
    assert same_weights(again, model)
    assert int(again.norm.num_batches_tracked) == 1
    assert [n for n, m in again.named_modules() if isinstance(m, Factored)] == ["stem", "grouped", "up"]
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert read_plan(path) == plan_of(CHOICES)


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_not_what_the_plan_makes_is_not_saved_with_it(file, merged):
    path, model = file
    kept = path.read_bytes()
    with pytest.raises(CheckpointError, match="layer 'stem' is a plain Conv2d, and the plan makes it .*rank"):
        save(st.merge(model) if merged else ConvNet(), plan_of(CHOICES), path)
    assert path.read_bytes() == kept


def test_a_model_without_the_layers_of_the_plan_is_not_saved_with_it(file):
    path, _ = file
    kept = path.read_bytes()
    with pytest.raises(CheckpointError, match="changes layer 'stem', and the Linear has no layer of this name"):
        save(nn.Linear(3, 3), plan_of(CHOICES), path)
    assert path.read_bytes() == kept


def test_saving_replaces_the_file_and_leaves_nothing_else(file):
    path, model = file
    with torch.no_grad():
        model.head.weight.zero_()
    save(model, plan_of(CHOICES), path)
    assert not load(ConvNet(), path).head.weight.any()
    assert [p.name for p in path.parent.iterdir()] == ["small.safetensors"]


def test_a_write_that_fails_leaves_the_old_file_and_no_part(file, monkeypatch):
    path, model = file
    first = path.read_bytes()

    def half(tensors, target, metadata):
        target.write_bytes(first[:50])
        raise OSError("disk full")

    monkeypatch.setattr("spectrim.network.tensor_files.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save(model, plan_of(CHOICES), path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["small.safetensors"]


class Shared(nn.Module):
    """A shared module, tied weights, buffers of several kinds, and a view."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b = self.a
        self.embed, self.out = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("table", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("empty2", torch.zeros(0))
        self.register_buffer("flag", torch.tensor(True))


def test_shared_modules_and_tied_tensors_are_stored_once_and_stay_shared(tmp_path):
    choices = {"a": low_rank(2)}
    model = compressed(Shared(), choices)
    path = tmp_path / "shared.safetensors"
    save(model, plan_of(choices), path)
    header, _ = header_of(path.read_bytes())
    stored = set(header) - {"__metadata__"}
    assert stored == {
        "a.0.weight", "a.1.weight", "a.1.bias", "fc.weight", "fc.bias", "embed.weight", "table", "empty", "empty2",
        "flag",
    }  # fmt: skip
    again = load(Shared(), path)
    assert again.a is again.b
    assert again.out.weight is again.embed.weight
    assert same_weights(again, model)


def test_views_of_one_tensor_are_stored_for_themselves(tmp_path):
    model = nn.Module()
    base = torch.randn(10, 4)
    model.register_buffer("top", base[:3])
    model.register_buffer("turned", base[:4].t())
    model.register_buffer("wide", torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last))
    path = tmp_path / "views.safetensors"
    save(model, plan_of({}), path)
    assert path.stat().st_size < 2000
    again = nn.Module()
    for name, value in model.named_buffers():
        again.register_buffer(name, torch.zeros(value.shape))
    assert same_weights(load(again, path), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_are_cast_to_the_dtype_of_the_model(file, dtype):
    path, model = file
    again = load(ConvNet().to(dtype), path)
    assert again.stem[0].weight.dtype == dtype
    assert torch.equal(again.stem[0].weight, model.stem[0].weight.to(dtype))


def test_state_that_is_no_tensor_cannot_be_saved(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"code": 1}

    with pytest.raises(CheckpointError, match="_extra_state"):
        save(nn.Sequential(Odd(2, 2)), plan_of({}), tmp_path / "odd.safetensors")
    assert not list(tmp_path.iterdir())


class Other(ConvNet):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), "layer 'stem', but this model does not have it"),
        (lambda: Other(head=nn.Linear(7, 5)), "'head.weight' has shape"),
        (lambda: Other(extra=nn.Linear(2, 2)), "missing .first 'extra.weight'"),
        (lambda: Other(head=nn.Linear(6, 5, bias=False)), "unknown .first 'head.bias'"),
        (lambda: Other(up=nn.ConvTranspose2d(8, 6, 1)), "'up.1.weight' has shape"),
        (lambda: Other(grouped=nn.Conv2d(8, 8, 3, groups=8)), "'grouped', but depthwise"),
        (lambda: Other(stem=nn.Conv2d(3, 2, (3, 1))), "'stem'"),
        (lambda: ConvNet().to("meta"), "meta device"),
    ],
)
def test_another_architecture_names_the_first_thing_that_does_not_fit(file, make, message):
    with pytest.raises(CheckpointError, match=message):
        load(make(), file[0])


def test_a_tensor_of_another_kind_of_number_is_refused(file):
    path, _ = file
    header, body = header_of(path.read_bytes())
    header["head.bias"]["dtype"] = "I32"
    path.write_bytes(with_header(header, body))
    with pytest.raises(CheckpointError, match="'head.bias' is torch.int32"):
        load(ConvNet(), path)


def test_every_truncation_is_refused(file):
    path, _ = file
    data = path.read_bytes()
    for size in range(0, len(data), 64):
        path.write_bytes(data[:size])
        for read in (lambda: load(ConvNet(), path), lambda: read_plan(path)):
            with pytest.raises(CheckpointError, match="small.safetensors"):
                read()


def test_a_file_that_is_missing_or_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load(ConvNet(), tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError):
        load(ConvNet(), tmp_path)


RAN = []


class Bomb:
    def __reduce__(self):
        return (RAN.append, (1,))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"model": Bomb()}, tmp_path / "model.pt")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Bomb()))
    torch.save(ConvNet().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("model.pt", "model.pkl", "old.pt"):
        with pytest.raises(CheckpointError, match=r"torch\.save wrote it: give the file that spectrim\.save wrote"):
            load(ConvNet(), tmp_path / name)
    assert not RAN


@pytest.mark.parametrize("name", ["net.pt2", "NET.ONNX"])
def test_names_of_exported_programs_are_refused_for_weights(name, tmp_path):
    file = tmp_path / name
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    data = [(torch.randn(4, 8), torch.zeros(4, dtype=torch.long))]
    result = st.compress(model, [batch for batch, _ in data], "parameters=90%")
    with pytest.raises(ValueError, match="exported program: give a name ending in .safetensors"):
        save(result, file)
    with pytest.raises(ValueError, match="its name says an exported program"):
        st.fine_tune(result.model, data, checkpoint=file)
    assert not file.exists()
    file.write_bytes(b"PK\x03\x04 and more of it")
    with pytest.raises(CheckpointError, match="it is an exported program: give the file of weights that save wrote"):
        load(ConvNet(), file)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty: copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "fetch that with git lfs pull"),
        (b"<!DOCTYPE html>", "a web page and not the file"),
        (b'{"entries": []}', "it is no safetensors file, or it is damaged: copy it again"),
    ],
)
def test_what_a_file_is_in_place_of_a_checkpoint_is_told(content: bytes, why: str, tmp_path):
    (path := tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=why) as caught:
        load(ConvNet(), path)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_neither_read_nor_written(tmp_path):
    inside, pipe = tmp_path / "model.safetensors", tmp_path / "pipe"
    os.mkfifo(pipe)  # which would be waited for
    for path, why in ((pipe, "it is a pipe: give the file"), (os.devnull, "it is a device: give the file")):
        with pytest.raises(CheckpointError, match=why):
            load(ConvNet(), path)
        with pytest.raises(OSError, match="give the name of a file"):
            tensor_files.write(Path(path), {"a": torch.zeros(2)}, {})
    inside.touch()
    with pytest.raises(CheckpointError, match=rf"it is a folder: write {inside}"):
        load(ConvNet(), tmp_path)
    with pytest.raises(TypeError, match="path is an int: expected a str"):
        load(ConvNet(), 3)  # pyright: ignore[reportArgumentType]


def test_a_safetensors_file_of_another_library_is_refused(tmp_path):
    path = tmp_path / "plain.safetensors"
    for metadata in (None, {"format": "pt"}, {"format": "spectrim"}):
        save_file({"w": torch.zeros(2)}, path, metadata)
        with pytest.raises(CheckpointError, match="not a Spectrim checkpoint"):
            load(ConvNet(), path)


def huge_shape(h, body):
    h["head.weight"]["shape"] = [2**40, 2**40]


def negative_shape(h, body):
    h["head.weight"]["shape"] = [-6, -5]


def overlapping(h, body):
    names = [n for n in h if n != "__metadata__"]
    h[names[1]]["data_offsets"] = h[names[0]]["data_offsets"]


def outside(h, body):
    h["head.weight"]["data_offsets"] = [0, 2**50]


def backwards(h, body):
    h["head.weight"]["data_offsets"] = h["head.weight"]["data_offsets"][::-1]


def unknown_dtype(h, body):
    h["head.weight"]["dtype"] = "O"


def change_plan(**fields):
    def change(h, body):
        plan = json.loads(h["__metadata__"]["plan"])
        entry = plan["entries"][0]
        for name, value in fields.items():
            (entry["choice"]["settings"] if name in ("rank", "unfolding") else entry["choice"])[name] = value
        h["__metadata__"]["plan"] = json.dumps(plan)

    return change


def layer_twice(h, body):
    plan = json.loads(h["__metadata__"]["plan"])
    plan["entries"].append(plan["entries"][0])
    h["__metadata__"]["plan"] = json.dumps(plan)


def metadata(name, value):
    def change(h, body):
        h["__metadata__"][name] = value

    return change


def other_site(name):
    def change(h, body):
        h["__metadata__"]["plan"] = h["__metadata__"]["plan"].replace('"stem"', json.dumps(name))

    return change


DEEP = "[" * 100_000 + "]" * 100_000
HEADERS = {
    "huge shape": huge_shape,
    "negative shape": negative_shape,
    "overlapping offsets": overlapping,
    "offsets outside": outside,
    "offsets backwards": backwards,
    "unknown dtype": unknown_dtype,
    "huge rank": change_plan(rank=2**62),
    "rank beyond 64 bits": change_plan(rank=2**80),
    "negative rank": change_plan(rank=-1),
    "rank as text": change_plan(rank="3"),
    "unknown kind": change_plan(kind="exec"),
    "unknown unfolding": change_plan(unfolding="__import__"),
    "layer twice": layer_twice,
    "deep plan": metadata("plan", DEEP),
    "plan of another version": metadata("plan", '{"entries": [], "costs": {}, "dense_costs": {}, "version": 99}'),
    "plan is a list": metadata("plan", "[]"),
    "plan is code": metadata("plan", "__import__('os').system('true')"),
    "plan is no text": metadata("plan", 3),
    "deep shared": metadata("shared", DEEP),
    "shared is a list": metadata("shared", "[]"),
    "shared of numbers": metadata("shared", '{"head.weight": 1}'),
    "shared of nothing": metadata("shared", '{"head.weight": "nowhere"}'),
    "shared of another name": metadata("shared", '{"surplus": "head.weight"}'),
    "shared is no JSON": metadata("shared", "{"),
    "another format version": metadata("format_version", "2"),
    "another format": metadata("format", "pt"),
    "empty site name": other_site(""),
    "dunder site": other_site("__class__"),
    "inner site": other_site("stem.weight"),
    "norm as site": other_site("norm"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_refused(file, name):
    path, _ = file
    header, body = header_of(path.read_bytes())
    HEADERS[name](header, body)
    path.write_bytes(with_header(header, body))
    with pytest.raises(CheckpointError, match="small.safetensors"):
        load(ConvNet(), path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"null", DEEP.encode(), b'{"a":' * 50_000, b"\xff" * 64, b'{"__metadata__": {"a": "\x00"}}'],
    ids=["empty", "object", "list", "null", "deep", "deep objects", "not utf-8", "control"],
)
def test_headers_that_are_no_headers_are_refused(tmp_path, text):
    path = tmp_path / "small.safetensors"
    path.write_bytes(with_header(text, b""))
    with pytest.raises(CheckpointError, match="small.safetensors"):
        load(ConvNet(), path)


def test_header_lengths_that_lie_are_refused(file):
    path, _ = file
    data = path.read_bytes()
    for length in (0, 1, 2**31, 2**63, 2**64 - 1, len(data), len(data) + 1):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(CheckpointError):
            load(ConvNet(), path)


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


WORDS = (b"null", b"1e999", b"-1", b"[]", b"{}", b'"', b"9" * 20, b"\\u0000", b"true", b"dense", b"0", b"3")


def edited(data: bytes, draw: random.Random, end: int) -> bytes:
    """One to four edits before ``end``: bytes set, bits flipped, pieces cut out, doubled or replaced, words put in."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at, size = draw.randrange(max(1, min(end, len(out)))), draw.choice((1, 1, 2, 8, 40))
        kind = draw.randrange(6)
        if kind == 0:
            out[at : at + 1] = draw.randbytes(1)
        elif kind == 1 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            out[at : at + size] = draw.randbytes(size)
        else:
            out[at : at + size] = draw.choice(WORDS)
    return bytes(out)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The file with edits anywhere, in its header, or in the plan inside the header with all around it kept true."""
    (length,) = struct.unpack("<Q", data[:8])
    kind = draw.randrange(4)
    if kind == 0:
        return edited(data, draw, len(data))
    if kind == 1:
        header = edited(data[8 : 8 + length], draw, length)
        return with_header(header, data[8 + length :])
    header, body = header_of(data)
    field = header["__metadata__"]
    name = draw.choice(("plan", "plan", "plan", "shared"))
    field[name] = edited(field[name].encode(), draw, len(field[name])).decode(errors="replace")
    return with_header(header, body)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutations_give_a_clear_error_or_a_sound_model(count, tmp_path, monkeypatch):
    path = tmp_path / "tiny.safetensors"
    choices = {"0": low_rank(2), "1": Choice()}
    save(compressed(tiny(), choices), plan_of(choices), path)
    data = with_header(*header_of(path.read_bytes()))
    for name in ("eval", "exec"):
        monkeypatch.setattr(f"builtins.{name}", lambda *_: pytest.fail("code was run"))
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    sizes = {3 * 3 + 3, 2 * 3 + 2 * 3 + 3, 1 * 3 + 1 * 3 + 3, 3 * 3 + 3 * 3 + 3}
    draw, refused, unnamed, loaded = random.Random(0), 0, 0, 0
    for _ in range(count):
        # Truncating a file on opening takes milliseconds on some file systems.
        with path.open("r+b") as file:
            file.write(mutated(data, draw))
            file.truncate()
        try:
            model = load(tiny(), path)
        except CheckpointError as error:
            refused += 1
            unnamed += str(path) not in str(error)
            continue
        loaded += 1
        assert sum(p.numel() for p in model[0].parameters()) in sizes
        assert model[0](torch.zeros(1, 3)).shape == (1, 3)
        assert all(isinstance(m, (nn.Linear, Factored, nn.Sequential)) for m in model.modules())
        assert all(math.isfinite(s.spec.features) for s in find(model))
    assert not unnamed
    assert refused > 0.4 * count
    assert loaded > 0.01 * count


def test_loading_does_not_import_what_a_file_names(file):
    before = set(sys.modules)
    load(ConvNet(), file[0])
    assert not {m for m in set(sys.modules) - before if not m.startswith(("torch", "safetensors"))}


# Layers that share factors.

GROUP = ("0", "2", "4")


def joined(kind: str = "shared_basis", **settings: object) -> Choice:
    given = {"unfolding": "channel", "rank": 3, "left_rank": 1, "bias": True, **settings}
    return Choice(kind, "some-method", given)  # type: ignore[arg-type]


def plan_of_group(choice: Choice) -> Plan:
    entry = Entry("group", "3 x Linear", choice, 0.1, {"parameters": 1.0}, {"parameters": 2.0}, GROUP)
    return Plan((entry,), costs={"parameters": 1.0}, dense_costs={"parameters": 2.0})


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))


def sharing(choice: Choice) -> nn.Module:
    """The stack with random factors."""
    model = stack()
    sites = find(model)
    for name, module in zip(GROUP, skeleton(choice, [sites[name].spec for name in GROUP]), strict=True):
        replace_module(model, [name], module)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


SHARED = {
    "left": (joined(rank=2, left_rank=2), ["0.weight"]),
    "right": (joined(rank=2, left_rank=0), ["1.weight"]),
    "both": (joined(), ["0.parts.0.weight", "1.parts.1.weight"]),
    "once": (joined(rank=2, left_rank=2, once=True), ["0.layer.weight"]),
}


@pytest.mark.parametrize("share", SHARED)
def test_shared_factors_are_stored_once_and_come_back_as_one_parameter(share, tmp_path):
    choice, names = SHARED[share]
    model, path = sharing(choice), tmp_path / "shared.safetensors"
    save(model, plan_of_group(choice), path)
    header, body = header_of(path.read_bytes())
    assert len(body) == size_in_bytes(model)
    assert json.loads(header["__metadata__"]["shared"]) == {f"{n}.{name}": f"0.{name}" for n in "24" for name in names}
    again = load(stack(), path)
    assert same_weights(again, model)
    assert parameter_count(again) == parameter_count(model)
    for name in names:
        assert again.get_parameter(f"0.{name}") is again.get_parameter(f"2.{name}") is again.get_parameter(f"4.{name}")
    x = torch.randn(3, 5)
    assert torch.equal(again(x), model(x))
    halved = load(stack().double(), path)
    assert parameter_count(halved) == parameter_count(model)
    assert halved.get_parameter(f"4.{names[0]}").dtype == torch.float64


def test_a_file_in_which_shared_factors_differ_is_refused(tmp_path):
    choice, (name,) = SHARED["left"]
    model, path = sharing(choice), tmp_path / "apart.safetensors"
    model[2][0].weight = nn.Parameter(model[2][0].weight + 1)
    save(model, plan_of_group(choice), path)
    with pytest.raises(CheckpointError, match=f"'0.{name}' and '2.{name}' are one"):
        load(stack(), path)
    model[2][0].weight = nn.Parameter(model[0][0].weight.detach().clone())
    save(model, plan_of_group(choice), path)
    assert same_weights(load(stack(), path), model)


def group_of(**fields):
    def change(h, body):
        plan = json.loads(h["__metadata__"]["plan"])
        entry = plan["entries"][0]
        for name, value in fields.items():
            (entry if name == "members" else entry["choice"] if name == "kind" else entry["choice"]["settings"])[
                name
            ] = value
        h["__metadata__"]["plan"] = json.dumps(plan)

    return change


GROUPS = {
    "a member twice": group_of(members=["0", "2", "2"]),
    "an unknown member": group_of(members=["0", "2", "layer"]),
    "a member that is no layer": group_of(members=["0", "1", "2"]),
    "a member less": group_of(members=["0", "2"]),
    "one member": group_of(members=["0"]),
    "no members": group_of(members=[]),
    "members in a list": group_of(members=[["0"], ["2"]]),
    "members of numbers": group_of(members=[0, 2]),
    "a choice for one layer": group_of(kind="low_rank"),
    "a huge rank": group_of(rank=2**62),
    "a left rank above the rank": group_of(left_rank=4),
    "a negative left rank": group_of(left_rank=-1),
    "another left rank": group_of(left_rank=2),
    "once in two parts": group_of(once=True),
    "once as text": group_of(once="yes"),
    "no rank": group_of(rank=None),
    "shared with another tensor": metadata("shared", '{"2.0.parts.0.weight": "0.1.parts.0.weight"}'),
}


@pytest.mark.parametrize("name", GROUPS)
def test_hostile_plans_of_groups_are_refused(name, tmp_path):
    choice, _ = SHARED["both"]
    path = tmp_path / "small.safetensors"
    save(sharing(choice), plan_of_group(choice), path)
    header, body = header_of(path.read_bytes())
    GROUPS[name](header, body)
    path.write_bytes(with_header(header, body))
    with pytest.raises(CheckpointError, match="small.safetensors"):
        load(stack(), path)


@pytest.mark.parametrize("share", ["both", "once"])
def test_mutated_plans_of_groups_give_a_clear_error_or_a_sound_model(share, tmp_path):
    choice, _ = SHARED[share]
    path = tmp_path / "small.safetensors"
    save(sharing(choice), plan_of_group(choice), path)
    data, draw, refused, unnamed, loaded = with_header(*header_of(path.read_bytes())), random.Random(1), 0, 0, 0
    for _ in range(200):
        with path.open("r+b") as file:
            file.write(mutated(data, draw))
            file.truncate()
        try:
            model = load(stack(), path)
        except CheckpointError as error:
            refused += 1
            unnamed += str(path) not in str(error)
            continue
        loaded += 1
        assert model(torch.zeros(1, 5)).shape == (1, 5)
        assert parameter_count(model) <= parameter_count(stack()) + 3 * 2 * 5 * 5
    assert not unnamed
    assert refused > 40
    assert loaded > 2


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


SPARSE = st.LowRankPlusSparse(densities=(0.0, 0.1, 0.3), ranks=2, turns=4)
BATCHES = [torch.randn(32, 12, generator=torch.Generator().manual_seed(n)) for n in range(2)]


@functools.cache
def once() -> nn.Module:
    return st.compress(Three().eval(), BATCHES, st.Budget(macs=0.7)).model


def twice(*, merged: bool = False, **options) -> st.Result:
    model = copy.deepcopy(once())
    return st.compress(st.merge(model) if merged else model, BATCHES, **options)


@pytest.mark.parametrize(
    ("options", "version"),
    [
        ({"budget": st.Budget(macs=0.8)}, "3"),
        ({"budget": st.Budget(parameters=0.8), "methods": SPARSE}, "3"),
        ({"budget": st.Budget(macs=0.7), "merged": True}, "1"),
    ],
    ids=["low rank", "sparse", "merged"],
)
def test_what_was_compressed_again_is_rebuilt_from_the_dense_network(options, version, tmp_path):
    result, path = twice(**options), tmp_path / "small.safetensors"
    for model in (result.model, copy.deepcopy(result.model)):
        save(model, result.plan, path)
        texts = tensor_files.read(path, weights=False)[1]
        assert texts["format_version"] == version
        again = load(Three(), path).eval()
        assert same_weights(again, result.model)
        assert torch.equal(again(BATCHES[0]), result.model(BATCHES[0]))
    # What was loaded knows as much.
    save(again, read_plan(path), path)
    assert same_weights(load(Three(), path), result.model)


def test_parts_that_were_compressed_before_the_whole_come_back(tmp_path):
    whole = nn.Sequential(st.compress(Three().eval(), BATCHES, st.Budget(macs=0.7)).model, nn.Linear(6, 12)).eval()
    result = st.compress(whole, BATCHES, st.Budget(macs=0.9))
    save(result.model, result.plan, tmp_path / "small.safetensors")
    again = load(nn.Sequential(Three(), nn.Linear(6, 12)), tmp_path / "small.safetensors")
    assert same_weights(again, result.model)


@pytest.mark.filterwarnings("ignore")
def test_a_state_that_no_file_holds_is_told_before_there_is_anything_to_save(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.cell = nn.Linear(8, 8), nn.LSTM(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.cell(self.into(x))[0]

    if not {"fbgemm", "qnnpack", "x86"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("no quantised kernels on this machine")
    packed = torch.ao.quantization.quantize_dynamic(Recurrent().eval(), {nn.LSTM}, dtype=torch.qint8)
    with pytest.raises(CheckpointError, match=r"state 'cell\..*compress the network before it is quantised"):
        check_savable(packed)
    with pytest.raises(CheckpointError, match="compress the network before it is quantised"):
        st.sweep(packed, None, folder=tmp_path / "sweep", keep_models=True)  # pyright: ignore[reportArgumentType]
    check_savable(Recurrent())


def test_a_table_of_earlier_plans_that_is_none_is_refused(tmp_path):
    result, path = twice(budget=st.Budget(macs=0.8)), tmp_path / "small.safetensors"
    save(result.model, result.plan, path)
    header, body = header_of(path.read_bytes())
    path.write_bytes(with_header(header, body))
    load(Three(), path)
    for earlier in ("{", "[1]", '["{}"]', "{}"):
        header["__metadata__"]["earlier"] = earlier
        path.write_bytes(with_header(header, body))
        with pytest.raises(CheckpointError):
            load(Three(), path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [torch.qint8, torch.float16])
def test_layers_that_were_quantised_before_are_saved_too(kind, tmp_path):
    def made() -> nn.Module:
        model = Three()
        model.b = torch.ao.quantization.quantize_dynamic(nn.Sequential(model.b), {nn.Linear}, dtype=kind)[0]
        return model.eval()

    result, path = st.compress(made(), BATCHES, st.Budget(macs=0.85)), tmp_path / "small.safetensors"
    save(result.model, result.plan, path)
    again = load(made(), path)
    assert same_weights(again, result.model)
    assert torch.equal(again(BATCHES[0]), result.model(BATCHES[0]))
    with pytest.raises(CheckpointError, match="another architecture"):
        load(Three(), path)
    header, body = header_of(path.read_bytes())
    for record in (
        '{"dtype": "load"}',
        '{"tuple": [{"tensor": "nowhere"}]}',
        "3",
        '{"dtype": "qint8", "quantised": 1}',
    ):
        values = json.loads(header["__metadata__"]["values"])
        values["b._packed_params._packed_params"] = json.loads(record)
        path.write_bytes(
            with_header({**header, "__metadata__": {**header["__metadata__"], "values": json.dumps(values)}}, body)
        )
        with pytest.raises(CheckpointError, match="_packed_params"):
            load(made(), path)


def test_values_of_a_state_are_taken_apart_and_put_together():
    weight = torch.randn(3, 4)
    channels = torch.quantize_per_channel(weight, torch.rand(3) + 0.1, torch.zeros(3, dtype=torch.long), 0, torch.qint8)
    value = (torch.quantize_per_tensor(weight, 0.1, 3, torch.quint8), [channels, None, 2.5], torch.qint8, "text")
    record, tensors = taken_apart("w", value)
    again, used = put_together(json.loads(json.dumps(record)), tensors)
    assert used == set(tensors)
    assert equal(again, value)
    assert not equal((*again[:-1], "other"), value)
    with pytest.raises(TypeError, match="object"):
        taken_apart("w", [object()])


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_stored_is_named(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 3)), {nn.LSTM}, dtype=torch.qint8)
    with pytest.raises(CheckpointError, match="_all_weight_values.*ScriptObject"):
        save(model, Plan((), {}, {}), tmp_path / "small.safetensors")


def test_a_network_that_is_compressed_already_is_told_where_to_begin(tmp_path):
    made = [compressed(ConvNet(), {"stem": low_rank(2)}) for _ in range(2)]
    save(made[0], plan_of({"stem": low_rank(2)}), tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match=r"layer 'stem', but it is compressed already .*before any compression"):
        load(made[1], tmp_path / "small.safetensors")


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compiled", "parallel"]
)
def test_what_compiles_or_distributes_a_network_has_no_part_in_its_file(wrap, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(64, 32)
    result = st.compress(model, [x], "macs=50%")
    wrapped = wrap(result.model)
    st.save(wrapped, result.plan, tmp_path / "small.safetensors")
    assert torch.equal(st.load(copy.deepcopy(model), tmp_path / "small.safetensors")(x), result.model(x))
    carried = st.carry_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, wrapped)
    assert not carried.reset
    # What was wrapped before it was compressed has the names that its plan has, and is loaded into its like.
    outer = wrap(copy.deepcopy(model))
    result = st.compress(outer, [x], "macs=50%")
    st.save(result, tmp_path / "outer.safetensors")
    assert torch.equal(st.load(wrap(copy.deepcopy(model)), tmp_path / "outer.safetensors")(x), result.model(x))
    st.carry_optimizer(torch.optim.SGD(outer.parameters(), lr=0.1), outer, result.model)
