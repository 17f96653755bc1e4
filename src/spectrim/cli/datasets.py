"""Files of the built-in data -> samples in memory, or opened when they are asked for."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spectrim.cli.batches import Batches, ImageFiles, InMemory, Source
from spectrim.cli.data import Data
from spectrim.cli.data_files import as_number, lines_of
from spectrim.cli.data_options import ArrayOptions, FolderOptions, ImageOptions
from spectrim.cli.references import Reference, UsageError, need
from spectrim.network.printing import count

_MANY = 2**31
"""No classes are so many; numbers of other kinds are."""


def batches_of(data: Data, device: str) -> Batches:
    """The batches of built-in data."""
    options, source = data.options, _SOURCES[data.reference.scheme](data)
    mean, std = options.normalisation
    augment = options.augment if isinstance(options, ImageOptions) else "none"
    batches = Batches(source, options.batch, options.shuffle, options.seed, mean, std, augment=augment, device=device)
    return batches.take(options.limit)


def _digits(data: Data) -> Source:
    bunch = need("sklearn.datasets", data.reference, "scikit-learn").load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(labels)) % 4 == 1
    mine = ~held_out if data.options.split == "train" else held_out
    return InMemory(images[mine], labels[mine])


def _cifar10(data: Data) -> Source:
    images, labels = [], []
    for path in data.files:
        records = np.fromfile(path, np.uint8).reshape(-1, 3073)
        if records[:, 0].max() > 9:
            raise UsageError(
                f"data {data.reference.text!r}: {str(path)!r} holds label {records[:, 0].max()}, not 0 to 9"
            )
        labels.append(records[:, 0].astype(np.int64))
        images.append(records[:, 1:].reshape(-1, 3, 32, 32))
    return InMemory(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


def _idx(data: Data) -> Source:
    images = _read_idx(data.files[0], 3, data.reference)
    labels = _read_idx(data.files[1], 1, data.reference)
    if len(images) != len(labels):
        raise UsageError(f"data {data.reference.text!r}: {len(images)} images but {len(labels)} labels")
    return InMemory(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def _read_idx(path: Path, dimensions: int, reference: Reference) -> np.ndarray:
    """An IDX file: two zero bytes, the type (8 is uint8), the number of axes, each length big-endian, the data."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UsageError(f"data {reference.text!r}: {str(path)!r} cannot be decompressed: {error}") from error
    start = 4 + 4 * dimensions
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise UsageError(f"data {reference.text!r}: {str(path)!r} is no IDX file of {dimensions} axes of bytes")
    shape = struct.unpack(f">{dimensions}I", raw[4:start])
    if len(raw) - start != math.prod(shape):  # numpy's product of these would wrap around
        raise UsageError(f"data {reference.text!r}: {str(path)!r} promises {shape} and holds {len(raw) - start} bytes")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


def _images(data: Data) -> Source:
    options = data.options
    assert isinstance(options, FolderOptions)
    paths, labels, names = data.files
    scaled, square = options.scaled, options.square
    if options.leaves(map(ImageFiles.size_of, paths)):
        scaled, square = 0, options.crop or 0
    return ImageFiles(paths, torch.tensor(labels) if labels else None, names, scaled, square)


def _arrays(data: Data) -> Source:
    assert isinstance(data.options, ArrayOptions)
    (file, inputs, labels), text = data.files, data.reference.text
    try:
        with np.load(file, allow_pickle=False) as held:
            # What is no array of numpy comes as bytes.
            values, targets = np.asarray(held[inputs]), np.atleast_1d(held[labels]) if labels else None
    except MemoryError:
        raise
    except Exception as error:  # zip archives, their ways to compress and headers of numpy have errors of their own
        objects = "it holds Python objects, which may run code: save numbers" if "allow_pickle" in str(error) else ""
        why = objects or f"{error}: save or copy it again"
        raise UsageError(f"data {text!r}: {str(file)!r} cannot be read: {why}") from error
    if not values.size:
        raise UsageError(f"data {text!r}: array {inputs!r} is empty, of shape {values.shape}: give samples")
    if values.ndim < 2 or values.dtype.kind not in "iuf":
        raise UsageError(
            f"data {text!r}: array {inputs!r} is {values.dtype} {values.shape}; expected numbers with one axis for "
            "samples and at least one more"
        )
    if targets is not None and len(targets) != len(values):
        raise UsageError(f"data {text!r}: {len(values)} samples in {inputs!r} but {len(targets)} in {labels!r}")
    # torch has no numbers of another byte order, nor of more than 64 bits.
    width = min(values.dtype.itemsize, 8)
    samples, words = _channels_first(values.astype(f"={values.dtype.kind}{width}", copy=False))
    known, names = (None, ()) if targets is None else _classes(targets, labels, text)
    return InMemory(torch.from_numpy(np.ascontiguousarray(samples)), known, words, names)


def _channels_first(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Images as networks take them, and what was done; other arrays as they are.

    Images are bytes ``[n, h, w]``, or have 1, 3 or 4 channels on their last axis and not on their first.
    """
    if values.ndim == 3 and values.dtype == np.uint8:
        return values[:, None], "one channel"
    if values.ndim == 4 and values.shape[3] in (1, 3, 4) and values.shape[1] not in (1, 3, 4):
        return values.transpose(0, 3, 1, 2), "channels moved to the front"
    return values, ""


def _classes(values: np.ndarray, name: str, text: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels, one a sample, as numbers of classes, and names of the classes; words are numbered in their order."""
    names: tuple[str, ...] = ()
    if values.size != len(values):
        raise UsageError(
            f"data {text!r}: labels {name!r} are of shape {values.shape}; expected one class a sample: of one-hot rows "
            "save .argmax(1); for data without write labels=none"
        )
    values = values.reshape(-1)
    if values.dtype.kind in "OUS":
        words, values = np.unique(values, return_inverse=True)
        names = tuple(map(str, words))
    if values.dtype.kind == "f" and np.all(np.isfinite(values) & (values == np.round(values)) & (values < _MANY)):
        values = values.astype(np.int64)
    if values.dtype.kind not in "iub" or (values.size and not 0 <= values.min() <= values.max() < _MANY):
        raise UsageError(
            f"data {text!r}: labels {name!r} are {values.dtype} such as {values[0]}; expected classes 0, 1, 2, ... or "
            "words; for data without write labels=none"
        )
    return torch.from_numpy(values.astype(np.int64)), names


def _table(data: Data) -> Source:
    (file, names, labels), text = data.files, data.reference.text
    rows, targets = [], []
    lines = lines_of(file, text)
    next(lines)
    for line, row in lines:
        if len(row) != len(names):
            raise UsageError(f"data {text!r}, line {line}: {len(row)} values for {len(names)} columns")
        values = dict(zip(names, row, strict=True))
        targets.append(values.pop(labels).strip() if labels else "")
        rows.append([_number(value, name, line, text) for name, value in values.items()])
    if not rows:
        raise UsageError(f"data {text!r}: {str(file)!r} has no line after the names of its columns")
    columns = count(len(names) - bool(labels), "column")
    if not labels:
        return InMemory(torch.tensor(rows), None, columns)
    numbers = [as_number(target) for target in targets]
    known, words = _classes(np.array(targets if None in numbers else numbers), labels, text)
    return InMemory(torch.tensor(rows), known, columns, words)


def _number(value: str, name: str, line: int, text: str) -> float:
    number = as_number(value)
    if number is None:
        raise UsageError(
            f"data {text!r}, line {line}: column {name!r} is {value!r}, not a number; if it holds the labels write "
            f"?labels={name}"
        )
    return number


_SOURCES = {
    "digits": _digits, "cifar10": _cifar10, "fashion-mnist": _idx, "imagefolder": _images, "npz": _arrays,
    "csv": _table,
}  # fmt: skip
