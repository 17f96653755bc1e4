"""Arrays, tables and folders of images as data."""

from __future__ import annotations

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
