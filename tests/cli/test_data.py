from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from spectrim.cli.batches import Batches, InMemory
from spectrim.cli.data import CALIBRATION, load_data, read_data
from spectrim.cli.references import UsageError


def _batches(text: str, **options) -> Batches:
    found = load_data(text, **options)
    assert isinstance(found, Batches)
    return found


def _all(batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def _cifar(folder: Path, each: int = 3) -> np.ndarray:
    records = np.random.default_rng(0).integers(0, 256, (6 * each, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, part in zip(names, np.split(records, 6), strict=True):
        part.tofile(folder / name)
    return records


def _idx(path: Path, values: np.ndarray, *, packed: bool) -> None:
    raw = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(raw))
    else:
        path.write_bytes(raw)


def test_digits_split_is_disjoint_and_complete():
    train, test = _all(_batches("digits?split=train")), _all(_batches("digits"))
    assert len(train[1]) + len(test[1]) == 1797
    assert train[0].shape[1:] == test[0].shape[1:] == (1, 8, 8)
    assert test[0].min() == 0
    assert test[0].max() == 1
    assert set(test[1].tolist()) == set(range(10))


def test_cifar10_reads_the_binary_layout(tmp_path: Path):
    records = _cifar(tmp_path)
    images, labels = _all(_batches(f"cifar10:{tmp_path}?split=train&normalise=none&batch=4"))
    assert labels.tolist() == records[:15, 0].tolist()
    # Three planes of 32 x 32, red first, row by row.
    wanted = torch.from_numpy(records[:15, 1:].reshape(15, 3, 32, 32).copy()).float() / 255
    torch.testing.assert_close(images, wanted)
    assert _all(_batches(f"cifar10:{tmp_path}"))[1].tolist() == records[15:, 0].tolist()


def test_normalisation_subtracts_the_mean_and_divides_by_the_spread(tmp_path: Path):
    _cifar(tmp_path)
    plain = _all(_batches(f"cifar10:{tmp_path}?normalise=none"))[0]
    shifted = _all(_batches(f"cifar10:{tmp_path}?normalise=0.1,0.2,0.3/0.5,0.25,2"))[0]
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2.0)]):
        torch.testing.assert_close(shifted[:, channel], (plain[:, channel] - mean) / std)
    imagenet = _all(_batches(f"cifar10:{tmp_path}"))[0]
    torch.testing.assert_close(imagenet[:, 2], (plain[:, 2] - 0.406) / 0.225)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_reads_idx_files(tmp_path: Path, packed: bool):
    values = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    _idx(tmp_path / "t10k-images-idx3-ubyte", values, packed=packed)
    _idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(5, dtype=np.uint8), packed=packed)
    images, labels = _all(_batches(f"fashion-mnist:{tmp_path}"))
    torch.testing.assert_close(images[:, 0], torch.from_numpy(values).float() / 255)
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_image_folder_resizes_and_crops_the_middle(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    for name, width, height in [("ants", 40, 20), ("bees", 20, 40), ("bees", 30, 30)]:
        (tmp_path / "test" / name).mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4, 0] = 255
        image.fromarray(pixels).save(tmp_path / "test" / name / f"{width}.png")
    batches = _batches(f"imagefolder:{tmp_path}?resize=16&crop=8&normalise=none")
    images, labels = _all(batches)
    assert images.shape == (3, 3, 8, 8)
    assert labels.tolist() == [0, 1, 1]
    assert batches.classes == 2
    assert (images[:, 0, 4, 4] > 0.9).all()
    assert (images[:, 1] == 0).all()


def test_what_is_hidden_in_an_image_folder_is_no_class_and_no_image(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    for name in ("ants/1.png", "bees/1.png", ".ipynb_checkpoints/1.png", "bees/.ipynb_checkpoints/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "ants" / "._1.png").write_bytes(b"resource fork")
    batches = _batches(f"imagefolder:{tmp_path}?split=test&normalise=none")
    assert _all(batches)[1].tolist() == [0, 1]
    assert batches.classes == 2


def test_images_of_16_bits_keep_their_greys_and_those_of_32_are_refused(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    greys = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image.fromarray(greys).save(tmp_path / "deep.png")
    (pixels,) = _batches(f"imagefolder:{tmp_path}?normalise=none")
    expected = torch.from_numpy(greys.astype(np.float32) / 65535).expand(1, 3, 8, 8)
    torch.testing.assert_close(pixels, expected, atol=0.5 / 255 + 1e-6, rtol=0)
    (tmp_path / "deep.png").unlink()
    image.fromarray(greys.astype(np.float32) / 65535).save(tmp_path / "real.tif")
    with pytest.raises(UsageError, match="'.*real.tif' holds numbers of 32 bits.* save it with 8 or 16 bits"):
        list(_batches(f"imagefolder:{tmp_path}?normalise=none"))


def test_order_follows_from_seed_and_epoch_alone():
    first, second = (_batches("digits?split=train&shuffle=true&augment=crop") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    second.set_epoch(1)
    assert not torch.equal(_all(first)[1], _all(second)[1])
    assert torch.equal(_all(first)[1].sort().values, _all(second)[1].sort().values)
    second.set_epoch(0)
    assert torch.equal(_all(first)[0], _all(second)[0])


def test_crops_are_shifted_copies_and_flips_mirror_them():
    image = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(32, 1, 8, 8)
    padded = torch.nn.functional.pad(image[:1], (1, 1, 1, 1))
    shifted = [padded[0, :, t : t + 8, left : left + 8] for t in range(3) for left in range(3)]
    for mode, allowed in (("crop", shifted), ("crop-flip", [*shifted, *(s.flip(2) for s in shifted)])):
        found = _all(Batches(InMemory(image, torch.zeros(32)), augment=mode))[0]
        seen = {next(i for i, s in enumerate(allowed) if torch.equal(s, one)) for one in found}
        assert len(seen) > 4


def test_limit_takes_the_same_samples_again_and_calibration_is_limited(tmp_path: Path):
    few = _all(_batches("digits?limit=40&seed=3"))[0]
    assert len(few) == 40
    assert torch.equal(few, _all(_batches("digits?limit=40&seed=3"))[0])
    assert not torch.equal(few, _all(_batches("digits?limit=40&seed=4"))[0])
    calibration = _batches("digits", purpose="calibration")
    assert calibration.samples == min(CALIBRATION, 1348)
    assert not calibration.shuffle
    training = _batches("digits", purpose="training")
    assert training.shuffle
    assert training.augment == "crop"


def test_factories_get_their_options():
    assert sum(len(x) for x, _ in load_data("nets:batches?samples=32")) == 32


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("", "is no reference"),
        ("nonsense", "write digits, cifar10"),
        ("cifar10", "names no folder"),
        ("cifar10:nowhere", "'nowhere' is not a folder"),
        ("digits:here", "take no folder"),
        ("digits?split=dev", "split=dev must be train or test"),
        (
            "digits?batch=big",
            "batch is 'big'; expected a whole number; the options of digits are split: text = ",
        ),
        ("digits?batch=0", "must be at least 1"),
        ("digits?augment=mixup", "must be none, crop or crop-flip"),
        ("digits?speed=3", "there is no option 'speed'; the options of digits are split: text"),
        ("digits?batch", "write key=value"),
        ("digits?normalise=1/2/3", "normalise=1/2/3 must be none"),
        ("digits?normalise=0.5/0", "normalise=0.5/0 must be none"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("nets:nothing", "has no attribute 'nothing'"),
        ("nets:NUMBER", "is a int, not callable"),
        ("nets:stream", "can be read once only"),
        ("nets:batches?colour=red", "cannot be called with"),
        ("not a module:f", "is not known"),
        ("imagefoldr:there/is/none", "Did you mean 'imagefolder'?"),
        ("cifar-10:there", "Did you mean 'cifar10'?"),
    ],
)
def test_bad_references_are_quoted(reference: str, message: str):
    with pytest.raises(UsageError) as caught:
        load_data(reference)
    assert message in str(caught.value)
    assert repr(reference) in str(caught.value) or reference in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"test_batch\.bin' is missing"):
        load_data(f"cifar10:{tmp_path}")
    (tmp_path / "test_batch.bin").write_bytes(bytes(3072))
    with pytest.raises(UsageError, match="not a multiple of 3073"):
        load_data(f"cifar10:{tmp_path}")
    (tmp_path / "test_batch.bin").write_bytes(bytes([77]) + bytes(3072))
    with pytest.raises(UsageError, match="holds label 77"):
        load_data(f"cifar10:{tmp_path}")
    with pytest.raises(UsageError, match="neither 't10k-images"):
        load_data(f"fashion-mnist:{tmp_path}")
    images = tmp_path / "t10k-images-idx3-ubyte"
    (tmp_path / "t10k-labels-idx1-ubyte").touch()
    for content, message in [
        (b"\0\0", "no IDX file"),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 2, 2) + bytes(7), "promises"),
    ]:
        images.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            load_data(f"fashion-mnist:{tmp_path}")
    images.unlink()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"not compressed")
    with pytest.raises(UsageError, match="cannot be decompressed"):
        load_data(f"fashion-mnist:{tmp_path}")
    with pytest.raises(UsageError, match="no images"):
        load_data(f"imagefolder:{tmp_path}")


def test_options_are_listed_with_the_defaults_that_hold():
    with pytest.raises(UsageError) as caught:
        read_data("digits?sise=3", "calibration")
    assert "split: text = train" in str(caught.value)
    assert "limit: a whole number = 2048" in str(caught.value)


@pytest.mark.table(every=2)
@pytest.mark.parametrize("command", ["compress", "sweep"])
def test_a_loader_that_shuffles_gives_what_a_list_gives(run, command: str) -> None:
    """Samples that are held out are known by their place in a batch."""

    def error(data: str) -> float:
        found = run.json(command, "nets:tiny", "-d", data, "-b", "macs=50%", "--out", data[5:], "--no-report")
        return found["agreement"]["error"] if command == "compress" else found["points"][0]["error"]

    assert error("nets:shuffled") == pytest.approx(error("nets:batches"), rel=1e-3)
