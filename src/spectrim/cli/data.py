"""Data references -> batches.

==========================  ===============================================================================
reference                   data
==========================  ===============================================================================
``digits``                  scikit-learn's 8 x 8 digits: 1,797 images, every fourth one for testing
``cifar10:DIR``             the binary layout: ``data_batch_1.bin`` to ``5``, ``test_batch.bin``
``fashion-mnist:DIR``       IDX files ``train-images-idx3-ubyte`` and so on, plain or ``.gz``; MNIST too
``imagefolder:DIR``         one folder a class, or ``DIR/train`` and ``DIR/test`` (or ``val``) with such folders; images
                            that lie in no folder of a class are without labels, for calibration and distillation
``package.module:factory``  whatever iterable of batches the callable returns; options become its arguments
``./file.py:factory``       the same, of a Python file
==========================  ===============================================================================

The built-in ones take options after a question mark, as in ``cifar10:DIR?split=train&limit=2048``; see
:class:`DataOptions`.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from spectrim.cli.batches import Batches, ImageFiles, InMemory, Source
from spectrim.cli.references import Reference, UsageError, call, factory, filled, need, parse

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
}
CALIBRATION = 2048
_AUGMENT = {"digits": "crop", "cifar10": "crop-flip", "fashion-mnist": "crop-flip", "imagefolder": "crop-flip"}
_NORMALISE = {"cifar10": "imagenet", "imagefolder": "imagenet"}
Purpose = Literal["test", "calibration", "training"]
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
_BUILT_IN = ("digits", "cifar10", "fashion-mnist", "imagefolder")


@dataclass(frozen=True)
class DataOptions:
    """Options of the built-in data.

    Attributes
    ----------
    split
        ``train`` or ``test``.
    batch
        Samples a batch.
    limit
        Use this many samples, drawn at random with ``seed``; 0 for all.
    shuffle
        Another order each epoch.
    augment
        ``none``, ``crop`` or ``crop-flip``; see :class:`spectrim.cli.batches.Batches`.
    seed
        Of the order, the draw and the augmentation.
    normalise
        ``none`` (pixels 0..1), ``half`` (to -1..1), ``imagenet``, ``cifar10``, ``fashion-mnist``, or numbers as
        ``mean,mean,mean/std,std,std``.
    resize, crop
        For image folders: the shorter side, then the middle square.
    """

    split: str = "test"
    batch: int = 128
    limit: int = 0
    shuffle: bool = False
    augment: str = "none"
    seed: int = 0
    normalise: str = "none"
    resize: int = 256
    crop: int = 224


def load_data(text: str, *, purpose: Purpose = "test", device: str = "cpu") -> Iterable[Any]:
    """The batches that a reference names.

    Parameters
    ----------
    text
        The reference.
    purpose
        Sets the defaults of the built-in data. ``test`` is the test split; ``calibration`` is 2,048 samples of the
        training split; ``training`` is the training split, shuffled and augmented (digits are not mirrored).
    device
        Where built-in batches go.

    Raises
    ------
    UsageError
        If the reference, an option or a file cannot be used.
    """
    reference = parse(text)
    if reference.scheme not in _BUILT_IN:
        if not reference.place:
            if Path(text).is_dir():
                raise UsageError(f"data {text!r} is a folder: for a folder of images write imagefolder:{text}")
            if Path(text).is_file():
                raise UsageError(
                    f"data {text!r} is a file: write a function that returns a list of batches from it, and give that "
                    "as file.py:function"
                )
            raise UsageError(
                f"data {text!r} is not known: write {', '.join(_BUILT_IN)}, package.module:factory or file.py:factory"
            )
        found = call(factory(reference, "data"), reference, "data")
        if not isinstance(found, Iterable):
            raise UsageError(f"data {text!r} returned a {type(found).__name__}, not an iterable of batches")
        if iter(found) is found:
            raise UsageError(f"data {text!r} returned an iterator, which can be read once only; return a list")
        return found
    options = filled(
        DataOptions, reference.texts, repr(text), reference.scheme, split="test" if purpose == "test" else "train",
        limit=CALIBRATION if purpose == "calibration" else 0, shuffle=purpose == "training",
        augment=_AUGMENT[reference.scheme] if purpose == "training" else "none",
        normalise=_NORMALISE.get(reference.scheme, "none"),
    )  # fmt: skip
    if options.split not in {"train", "test"}:
        raise UsageError(f"{text!r}: split={options.split} must be train or test")
    if options.augment not in {"none", "crop", "crop-flip"}:
        raise UsageError(f"{text!r}: augment={options.augment} must be none, crop or crop-flip")
    if options.batch < 1:
        raise UsageError(f"{text!r}: batch={options.batch} must be at least 1")
    mean, std = _normalisation(options.normalise, text)
    train = options.split == "train"
    readers = {"digits": _digits, "cifar10": _cifar10, "fashion-mnist": _idx}
    if reference.scheme == "imagefolder":
        source: Source = _folder(reference, train, options)
    else:
        source = readers[reference.scheme](reference, train)
    batches = Batches(
        source, options.batch, options.shuffle, options.seed, mean, std, augment=options.augment, device=device
    )
    return batches.take(options.limit)


def _normalisation(text: str, reference: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if text in NORMALISATIONS:
        return NORMALISATIONS[text]
    mean, _, std = text.partition("/")
    try:
        numbers = tuple(float(v) for v in mean.split(",")), tuple(float(v) for v in std.split(","))
    except ValueError:
        numbers = (), ()
    if not numbers[0] or len(numbers[0]) != len(numbers[1]) or min(numbers[1]) <= 0:
        raise UsageError(
            f"{reference!r}: normalise={text} must be {', '.join(NORMALISATIONS)} or numbers as 0.5,0.5,0.5/0.2,0.2,0.2"
        )
    return numbers


def _directory(reference: Reference) -> Path:
    if not reference.place:
        raise UsageError(f"data {reference.text!r} names no folder: write {reference.scheme}:DIR")
    folder = Path(reference.place)
    if not folder.is_dir():
        raise UsageError(f"data {reference.text!r}: {reference.place!r} is not a folder")
    return folder


def _digits(reference: Reference, train: bool) -> Source:
    if reference.place:
        raise UsageError(f"data {reference.text!r}: digits come with scikit-learn and take no folder")
    bunch = need("sklearn.datasets", reference, "scikit-learn").load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(labels)) % 4 == 1
    mine = ~held_out if train else held_out
    return InMemory(images[mine], labels[mine])


def _cifar10(reference: Reference, train: bool) -> Source:
    folder = _directory(reference)
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    images, labels = [], []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UsageError(f"data {reference.text!r}: {str(path)!r} is missing (the binary version)")
        raw = np.fromfile(path, np.uint8)
        if raw.size == 0 or raw.size % 3073:
            raise UsageError(f"data {reference.text!r}: {str(path)!r} has {raw.size} bytes, not a multiple of 3073")
        records = raw.reshape(-1, 3073)
        if records[:, 0].max() > 9:
            raise UsageError(f"data {reference.text!r}: {str(path)!r} holds label {records[:, 0].max()}, not 0 to 9")
        labels.append(records[:, 0].astype(np.int64))
        images.append(records[:, 1:].reshape(-1, 3, 32, 32))
    return InMemory(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


def _idx(reference: Reference, train: bool) -> Source:
    folder, part = _directory(reference), "train" if train else "t10k"
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", 3, reference)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", 1, reference)
    if len(images) != len(labels):
        raise UsageError(f"data {reference.text!r}: {len(images)} images but {len(labels)} labels")
    return InMemory(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def _read_idx(folder: Path, name: str, dimensions: int, reference: Reference) -> np.ndarray:
    """An IDX file: two zero bytes, the type (8 is uint8), the number of axes, each length big-endian, the data."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise UsageError(f"data {reference.text!r}: neither {name!r} nor {name + '.gz'!r} is in {str(folder)!r}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UsageError(f"data {reference.text!r}: {str(path)!r} cannot be decompressed: {error}") from error
    start = 4 + 4 * dimensions
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise UsageError(f"data {reference.text!r}: {str(path)!r} is no IDX file of {dimensions} axes of bytes")
    shape = struct.unpack(f">{dimensions}I", raw[4:start])
    if len(raw) - start != int(np.prod(shape)):
        raise UsageError(f"data {reference.text!r}: {str(path)!r} promises {shape} and holds {len(raw) - start} bytes")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


def _folder(reference: Reference, train: bool, options: DataOptions) -> Source:
    need("PIL.Image", reference, "pillow")
    if not 0 < options.crop <= options.resize:
        raise UsageError(f"{reference.text!r}: crop={options.crop} must lie between 1 and resize={options.resize}")
    root = _directory(reference)
    parts = ("train",) if train else ("test", "val")
    root = next((root / part for part in parts if (root / part).is_dir()), root)
    classes = sorted(p for p in root.iterdir() if p.is_dir())
    found = [
        (path, label)
        for label, folder in enumerate(classes)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not found:
        loose = sorted(path for path in root.iterdir() if path.suffix.lower() in _SUFFIXES)
        if not loose:
            raise UsageError(f"data {reference.text!r}: no images in {str(root)!r} (loose, or one folder a class)")
        return ImageFiles(loose, None, 0, options.resize, options.crop)
    paths, labels = zip(*found, strict=True)
    return ImageFiles(paths, torch.tensor(labels), len(classes), options.resize, options.crop)
