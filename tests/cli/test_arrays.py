"""Arrays, tables and folders of images as data."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from spectrim.cli.batches import Batches
from spectrim.cli.data import load_data, read_data
from spectrim.cli.references import UsageError


def samples(text: str, **options) -> tuple[torch.Tensor, torch.Tensor | None, Batches]:
    found = load_data(text, **options)
    assert isinstance(found, Batches)
    batches = list(found)
    if torch.is_tensor(batches[0]):
        return torch.cat(batches), None, found
    inputs, labels = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(labels), found


def test_images_in_an_array_come_as_networks_take_them():
    values = np.arange(2 * 6 * 5 * 3, dtype=np.uint8).reshape(2, 6, 5, 3)
    np.savez("a.npz", images=values, labels=np.array(["dog", "cat"]))
    inputs, labels, batches = samples("a.npz")
    torch.testing.assert_close(inputs, torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255)
    assert labels is not None
    assert labels.tolist() == [1, 0]
    assert "channels moved to the front" in batches.preparation
    assert samples("a.npz?labels=none")[1] is None
    normalised = samples("a.npz?normalise=0.5,0.5,0.5/0.5,0.25,0.5")[0]
    torch.testing.assert_close(normalised[:, 1], (inputs[:, 1] - 0.5) / 0.25)
    with pytest.raises(UsageError, match="2 means, and samples have 3 channels"):
        samples("a.npz?normalise=0.1,0/1,1")


def test_parts_of_an_archive_are_those_that_are_meant():
    tokens = np.array([[1, 2], [3, 4], [5, 6]])
    np.savez("parts.npz", x_train=tokens, y_train=np.zeros(3), x_test=tokens[:1], y_test=np.ones(1))
    inputs, labels, _ = samples("parts.npz?shuffle=false", purpose="training")
    assert inputs.dtype == torch.int64
    assert inputs.tolist() == tokens.tolist()
    assert labels is not None
    assert labels.tolist() == [0, 0, 0]
    assert samples("parts.npz")[0].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("bad.npz?inputs=imgs", "no array 'imgs' in it, but images, extra. Did you mean 'images'?"),
        ("bad.npz?labels=extra", "4 samples in 'images' but 2 in 'extra'"),
        ("bad.npz?inputs=extra", "array 'extra' is float64 (2,)"),
        ("no.npz", "there is no file 'no.npz'"),
        ("text.npz", "is no file that numpy.savez wrote"),
        ("named.npz", "which array holds the inputs? It has first, second: write named.npz?inputs=first"),
        ("regression.npz", "labels 'y' are float64 such as 0.5; expected classes"),
        ("rows.csv?labels=none", "line 2: column 'kind' is 'a', not a number"),
        ("rows.csv?labels=knid", "Did you mean 'kind'?"),
        ("short.csv", "line 3: 1 values for 2 columns"),
        ("unnamed.csv", "its first line must name the columns; it is 1,2"),
        ("empty.csv", "is empty"),
    ],
)
def test_what_cannot_be_read_is_said(reference: str, why: str):
    np.savez("bad.npz", images=np.zeros((4, 2)), extra=np.zeros(2))
    np.savez("named.npz", first=np.zeros((4, 2)), second=np.zeros(4))
    np.savez("regression.npz", x=np.zeros((4, 2)), y=np.full(4, 0.5))
    for name, text in {
        "text.npz": "text", "rows.csv": "a,b,kind\n1,2,a\n", "short.csv": "a,b\n1,2\n3\n", "unnamed.csv": "1,2\n3,4\n",
        "empty.csv": "",
    }.items():  # fmt: skip
        Path(name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        samples(reference)
    assert why in str(caught.value)


def test_a_table_has_columns_of_numbers_and_one_of_labels():
    Path("t.csv").write_text("length,width,species\n1,2,red\n3,4.5,blue\n5,6,red\n", encoding="utf-8")
    inputs, labels, _ = samples("t.csv")
    assert inputs.tolist() == [[1, 2], [3, 4.5], [5, 6]]
    assert labels is not None
    assert labels.tolist() == [1, 0, 1]
    Path("n.csv").write_text("length,width\n1,2\n", encoding="utf-8")
    assert samples("n.csv")[1] is None
    assert samples("t.csv?normalise=1,2/2,2")[0].tolist() == [[0, 0], [1, 1.25], [2, 2]]


def test_images_are_left_as_large_as_they_are_where_asked(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    for name, size in (("a", (10, 12)), ("b", (10, 12))):
        image.fromarray(np.full((size[1], size[0], 3), 51, np.uint8)).save(f"{name}.png")
    found = load_data(f"imagefolder:{tmp_path}?resize=0&normalise=none")
    assert isinstance(found, Batches)
    (batch,) = found
    assert torch.is_tensor(batch)
    assert batch.shape == (2, 3, 12, 10)
    torch.testing.assert_close(batch, torch.full_like(batch, 0.2))
    usual = load_data(f"imagefolder:{tmp_path}")
    assert isinstance(usual, Batches)
    assert (batches := list(usual))
    assert torch.is_tensor(batches[0])
    assert batches[0].shape == (2, 3, 12, 10)
    assert "left as they are (?resize=256 enlarges them), normalised by imagenet" in usual.preparation
    assert "?normalise=none" in usual.preparation
    asked = load_data(f"imagefolder:{tmp_path}?resize=256")
    assert isinstance(asked, Batches)
    assert "which enlarges them: ?resize=10 leaves them as they are" in asked.preparation
    assert read_data(f"imagefolder:{tmp_path}?resize=8").options.square == 8  # type: ignore[attr-defined]
    image.new("RGB", (4, 4)).save("c.png")
    with pytest.raises(UsageError, match=r"several sizes \(10 x 12, 4 x 4\): write \?resize=PIXELS"):
        list(load_data(f"imagefolder:{tmp_path}?resize=0"))
    Path("d.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"d.png' cannot be read as an image"):
        list(load_data(f"imagefolder:{tmp_path}"))


@pytest.mark.parametrize("kind", [">f4", ">i2", "g"])
def test_numbers_of_another_byte_order_or_width_are_read(kind: str):
    np.savez("other.npz", x=np.arange(6).reshape(2, 3).astype(kind))
    assert samples("other.npz")[0].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        (
            {"x": np.zeros((0, 3, 4), "f4"), "y": np.zeros(0, int)},
            r"array 'x' is empty, of shape \(0, 3, 4\): give samples",
        ),
        ({"x": np.ones((2, 3)), "y": np.eye(2)}, r"labels 'y' are of shape \(2, 2\); expected one class a sample"),
        ({"x": np.ones((2, 3)), "y": np.array(1)}, "2 samples in 'x' but 1 in 'y'"),
        ({"x": np.ones((2, 3), complex)}, "array 'x' is complex128"),
        ({"x": np.array([[{}]], dtype=object)}, "it holds Python objects, which may run code: save numbers"),
    ],
)
def test_arrays_without_numbers_are_told(arrays: dict[str, np.ndarray], why: str):
    np.savez("none.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=why):
        load_data("none.npz")


def test_a_changed_array_and_half_a_file_are_told():
    np.savez("whole.npz", x=np.arange(600, dtype="f4").reshape(100, 6))
    content = bytearray(Path("whole.npz").read_bytes())
    Path("half.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="or it is damaged: save or copy it again"):
        load_data("half.npz")
    content[1000] ^= 1
    Path("changed.npz").write_bytes(content)
    with pytest.raises(UsageError, match="save or copy it again"):
        load_data("changed.npz")


@pytest.mark.parametrize("mark", [";", "\t"])
def test_tables_that_are_separated_otherwise_are_told(mark: str):
    Path("t.csv").write_text(f"a{mark}b{mark}label\n1{mark}2{mark}x\n")
    with pytest.raises(UsageError, match=f"separated by {mark!r}: separate them by commas".replace("\\", r"\\")):
        load_data("t.csv")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a,a,y\n1,2,0\n", "two of its columns are named 'a'"),
        ("a,b,,\n1,2,3,4\n", "two of its columns are named ''"),
        ("a,y\n1_000,0\n", "line 2: column 'a' is '1_000', not a number"),
        ("a,y\n1,-1\n2,0\n", "labels 'y' are int64 such as -1; expected classes"),
        ("a,y\n1,0.5\n2,1.5\n", "labels 'y' are float64 such as 0.5; expected classes"),
        ("a,y\n1,inf\n2,1\n", "labels 'y' are float64 such as inf; expected classes"),
        ("a,y\n1,1e300\n2,1\n", "labels 'y' are float64 such as 1e+300; expected classes"),
        ("a,y\n1,0\n" + "2,1\n" * 2000 + "\udce4,1\n", "is no table in UTF-8"),
        (f'a,y\n1,0\n"{"1" * 200_000}",1\n', "field larger than field limit"),
    ],
)
def test_a_table_that_is_read_otherwise_than_it_was_meant_is_refused(text: str, why: str):
    Path("t.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UsageError) as caught:
        samples("t.csv")
    assert why in str(caught.value)


def npy(shape: bytes, kind: bytes = b"'<f4'") -> bytes:
    head = (b"{'descr': %s, 'fortran_order': False, 'shape': %s, }" % (kind, shape)).ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(48)


@pytest.mark.parametrize(
    "part",
    [b"", b"garbage", npy(b"(%s, 3)" % (b"9" * 60)), npy(b"(True, 12)"), npy(b"(4, 3)", b"'|O'"), npy(b"[" * 3000)],
)
def test_an_archive_whose_part_is_no_array_is_refused(part: bytes):
    with zipfile.ZipFile("d.npz", "w") as archive:
        archive.writestr("x.npy", part)
    with pytest.raises(UsageError, match=r"'d\.npz'.* (cannot be read|expected numbers)"):
        samples("d.npz")


def test_labels_that_no_model_has_answers_for_are_refused():
    for labels in (np.full(4, 2**63 + 2**63 - 100, np.uint64), np.full(4, 2**40), np.full(4, np.inf)):
        np.savez("l.npz", x=np.zeros((4, 2)), y=labels)
        with pytest.raises(UsageError, match="labels 'y' are .*expected classes"):
            samples("l.npz")


def test_images_that_cannot_be_read_are_named_at_once(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "photos"
    folder.mkdir()
    file = folder / "a.png"
    image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
    whole = bytearray(file.read_bytes())
    whole[16:24] = (60_000).to_bytes(4, "big") * 2
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    for name, data, why in (
        ("large.png", bytes(whole), "cannot be read as an image .*pixels"),
        ("bad.ppm", b"P6\n2m 2\n255\n" + bytes(12), "cannot be read as an image"),
    ):
        (folder / name).write_bytes(data)
        with pytest.raises(UsageError, match=f"'{folder / name}' {why}"):
            list(load_data(f"imagefolder:{folder}?resize=8"))
        (folder / name).unlink()
    image.new("RGB", (30_000, 1)).save(folder / "long.png")
    with pytest.raises(UsageError, match=r"long.png' of 30000 x 1 pixels would become 7680000 x 256; write a smaller"):
        list(load_data(f"imagefolder:{folder}"))
    (folder / "long.png").unlink()
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(UsageError, match=r"pipe.png' is a pipe, not an image"):
        list(load_data(f"imagefolder:{folder}"))


def test_a_part_for_testing_has_the_classes_of_the_part_for_training(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    for place in ("train/a", "train/b", "train/c", "test/a", "test/c"):
        (tmp_path / place).mkdir(parents=True)
        image.new("RGB", (8, 8)).save(tmp_path / place / "0.png")
    found = load_data(f"imagefolder:{tmp_path}")
    assert isinstance(found, Batches)
    assert [labels.tolist() for _, labels in found] == [[0, 2]]
    assert (found.classes, found.names) == (3, ("a", "b", "c"))
    (tmp_path / "test/d").mkdir()
    with pytest.raises(UsageError, match=r"class 'd' is in .*test' and not in .*train'"):
        load_data(f"imagefolder:{tmp_path}")


def test_words_for_classes_must_be_the_same_in_training_and_testing(run):
    rows = [(*np.eye(8)[n % 8], "abcd"[n % 4]) for n in range(32)]

    def table(name: str, words: str) -> str:
        lines = ["f0,f1,f2,f3,f4,f5,f6,f7,kind", *(",".join(map(str, row)) for row in rows if row[-1] in words)]
        Path(name).write_text("\n".join(lines), encoding="utf-8")
        return name

    whole, part = table("a.csv", "abcd"), table("t.csv", "acd")
    options = ("compress", "nets:perceptron", "-d", whole, "-b", "macs=60%", "--no-report", "--epochs", "1")
    told = run(*options, "--train", whole, "--test", part, code=2).stderr
    assert "'b' is one in --train but not in --test: give --test" in told
    assert not Path("compressed").exists()
    told = run("evaluate", "nets:perceptron", "-d", part, "--repeats", "1").stderr
    assert "The 3 classes of the samples are numbered from 0 in alphabetical order" in told
    assert "numbered from 0" not in run("evaluate", "nets:perceptron", "-d", whole, "--repeats", "1").stderr
    np.savez("x.npz", x=np.zeros((4, 8), np.float32))
    assert "augment is for images" in run("profile", "nets:perceptron", "-d", "x.npz?augment=crop", code=2).stderr
