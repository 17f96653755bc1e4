"""Data references -> batches.

==========================  ===============================================================================
reference                   data
==========================  ===============================================================================
``digits``                  scikit-learn's 8 x 8 digits: 1,797 images, every fourth one for testing
``cifar10:DIR``             the binary layout: ``data_batch_1.bin`` to ``5``, ``test_batch.bin``
``fashion-mnist:DIR``       IDX files ``train-images-idx3-ubyte`` and so on, plain or ``.gz``; MNIST too
``imagefolder:DIR``         one folder a class, or ``DIR/train`` and ``DIR/test`` (or ``val``) with such folders; images
                            that lie in no folder of a class are without labels, for calibration and distillation
``FILE.npz``                arrays of numpy: inputs, and labels if there are any
``FILE.csv``                a table with a line of names: numbers a column, and a column of labels if there is one
``package.module:factory``  whatever iterable of batches the callable returns; options become its arguments
``./file.py:factory``       the same, of a Python file
==========================  ===============================================================================

The built-in ones take options after a question mark, as in ``cifar10:DIR?split=train&limit=2048``; see
:class:`DataOptions` and the classes that derive from it. A reference is read, and its files are looked for, without
torch; :mod:`spectrim.cli.datasets` reads the files.
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spectrim.cli.references import Reference, UsageError, call, factory, filled, installed, nearest, parse
from spectrim.cli.sources import check_factory
from spectrim.errors import did_you_mean

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
}
CALIBRATION = 2048
AUGMENTATIONS = ("none", "crop", "crop-flip")
Purpose = Literal["test", "calibration", "training"]
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
_INPUTS = ("x", "inputs", "images", "data", "features", "input", "image")
_LABELS = ("y", "labels", "targets", "classes", "label", "target", "class")
SCALED, EDGE = 256, 224
# Where the files that a scheme has found tell of labels, and how there would be some.
_LABELLED = {
    "imagefolder": (1, "put the images into one folder a class"),
    "npz": (2, "name the array that holds them by ?labels=NAME"),
    "csv": (2, "name the column that holds them by ?labels=NAME"),
}
_SEEDS = 2**40  # times the million that epochs take it stays one that torch takes


@dataclass(frozen=True)
class DataOptions:
    """Options of all built-in data.

    Attributes
    ----------
    split
        ``train`` or ``test``, where the data have both.
    batch
        Samples a batch.
    limit
        Use this many samples, drawn at random with ``seed``; 0 for all.
    shuffle
        Another order each epoch.
    seed
        Of the order, the draw and the augmentation.
    normalise
        ``none`` (pixels 0..1, other numbers as they are), ``half`` (to -1..1), ``imagenet``, ``cifar10``,
        ``fashion-mnist``, or numbers as ``mean,mean,mean/std,std,std``: one a channel of images, one a column of a
        table.
    """

    split: str = "test"
    batch: int = 128
    limit: int = 0
    shuffle: bool = False
    seed: int = 0
    normalise: str = "none"

    def __post_init__(self) -> None:
        _ = self.normalisation
        if self.split not in ("train", "test"):
            raise ValueError(f"split={self.split} must be train or test")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch} must be at least 1")
        if self.limit < 0:
            raise ValueError(f"limit={self.limit} must be a number of samples, or 0 for all")
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed={self.seed} must lie between 0 and {_SEEDS - 1}")

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Means and standard deviations, by channel or one for all."""
        if self.normalise in NORMALISATIONS:
            return NORMALISATIONS[self.normalise]
        mean, _, std = self.normalise.partition("/")
        try:
            numbers = tuple(float(v) for v in mean.split(",")), tuple(float(v) for v in std.split(","))
        except ValueError:
            numbers = (), ()
        whole = all(math.isfinite(each) for each in (*numbers[0], *numbers[1]))
        if not numbers[0] or len(numbers[0]) != len(numbers[1]) or not whole or min(numbers[1]) <= 0:
            raise ValueError(
                f"normalise={self.normalise} must be {', '.join(NORMALISATIONS)} or numbers as 0.5,0.5,0.5/0.2,0.2,0.2"
            )
        return numbers


@dataclass(frozen=True)
class ImageOptions(DataOptions):
    """Options of images.

    Attributes
    ----------
    augment
        ``none``, ``crop`` or ``crop-flip``; see :class:`spectrim.cli.batches.Batches`.
    """

    augment: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"augment={self.augment} must be none, crop or crop-flip")


@dataclass(frozen=True)
class FolderOptions(ImageOptions):
    """Options of folders of image files.

    Attributes
    ----------
    resize
        Pixels that the shorter side is scaled to; 0 to leave images as large as they are, which all must be then. None
        for 256, and for 0 where all images are of one size below 224.
    crop
        Pixels of the square that is cut out of the middle: 224, or ``resize`` where that is less.
    """

    resize: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        resize = self.scaled
        if resize < 0:
            raise ValueError(f"resize={resize} must be 0 or more pixels")
        if self.crop is not None and not (self.crop > 0 and (resize == 0 or self.crop <= resize)):
            raise ValueError(f"crop={self.crop} must lie between 1 and resize={resize}")

    @property
    def scaled(self) -> int:
        """Pixels of the shorter side of images that are not left as they are; 0 if all are."""
        return SCALED if self.resize is None else self.resize

    @property
    def square(self) -> int:
        """Pixels of the square that is cut out; 0 for none."""
        return self.crop or min(self.scaled, EDGE)

    def leaves(self, sizes: Iterable[tuple[int, int]]) -> bool:
        """Whether images of these widths and heights stay as they are by default: one size, below the usual square."""
        if self.resize is not None:
            return self.resize == 0
        first = None
        for size in sizes:
            first = first or size
            if size != first or max(size) >= EDGE or min(size) < (self.crop or 0):
                return False
        return first is not None


@dataclass(frozen=True)
class ArrayOptions(ImageOptions):
    """Options of arrays of numpy.

    Attributes
    ----------
    inputs, labels
        Names of the arrays; ``labels=none`` for data without.
    """

    inputs: str = ""
    labels: str = ""


@dataclass(frozen=True)
class TableOptions(DataOptions):
    """Options of tables.

    Attributes
    ----------
    labels
        The column that holds labels, ``none`` for data without.
    """

    labels: str = ""


@dataclass(frozen=True)
class Scheme:
    """A built-in kind of data.

    Attributes
    ----------
    options
        What may stand after the question mark.
    locate
        Finds the files, and refuses what cannot be read before anything is.
    augment
        What is done to training images unless the reference says otherwise.
    normalise
        The same of all.
    """

    options: type[DataOptions]
    locate: Callable[[Reference, Any], tuple[Any, ...]]
    augment: str = "none"
    normalise: str = "none"


@dataclass(frozen=True)
class Data:
    """A reference that was read: what it names is there, as far as can be seen without loading it.

    Attributes
    ----------
    scheme
        Of built-in data; None for a function.
    files
        What the scheme has found.
    """

    reference: Reference
    scheme: Scheme | None = None
    options: DataOptions = DataOptions()
    files: tuple[Any, ...] = ()

    def check_labels(self, option: str) -> None:
        """Refuse built-in data whose files have no labels, for what an option needs them for."""
        place, cure = _LABELLED.get(self.reference.scheme, (0, ""))
        if cure and self.scheme is not None and not self.files[place]:
            raise UsageError(f"{option}: data {self.reference.text!r} have no labels, which it needs: {cure}")

    def load(self, device: str = "cpu") -> Iterable[Any]:
        """The batches.

        Raises
        ------
        UsageError
            If a file cannot be read, or a function does not return batches.
        """
        if self.scheme is not None:
            from spectrim.cli.datasets import batches_of

            return batches_of(self, device)
        found = call(factory(self.reference, "data"), self.reference, "data")
        text = self.reference.text
        if not isinstance(found, Iterable):
            raise UsageError(f"data {text!r} returned a {type(found).__name__}, not an iterable of batches")
        if iter(found) is found:
            raise UsageError(f"data {text!r} returned an iterator, which can be read once only; return a list")
        return found


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
    """
    return read_data(text, purpose).load(device)


def check_data(text: str, purpose: Purpose, labelled: str = "") -> None:
    """Refuse a reference that :func:`load_data` could not load, as far as that is seen without torch.

    Parameters
    ----------
    labelled
        The option, if it needs labels.
    """
    found = read_data(text, purpose)
    if found.scheme is None:
        check_factory(found.reference, "data")
    if labelled:
        found.check_labels(labelled)


def read_data(text: str, purpose: Purpose = "test") -> Data:
    """Read a reference and find its files."""
    reference = _of_file(parse(text))
    scheme = SCHEMES.get(reference.scheme)
    if scheme is None:
        if not reference.place:
            raise UsageError(_unknown(reference))
        close = did_you_mean(reference.scheme, SCHEMES)
        if close and Path(reference.place).exists():
            raise UsageError(f"data {text!r} is not known.{close}")
        return Data(reference)
    usual = {
        "split": "test" if purpose == "test" else "train", "limit": CALIBRATION if purpose == "calibration" else 0,
        "shuffle": purpose == "training", "augment": scheme.augment if purpose == "training" else "none",
        "normalise": scheme.normalise,
    }  # fmt: skip
    options = filled(scheme.options, reference.texts, repr(text), reference.scheme, **usual)
    return Data(reference, scheme, options, scheme.locate(reference, options))


def _of_file(reference: Reference) -> Reference:
    """``FILE.npz`` is short for ``npz:FILE.npz``."""
    suffix = Path(reference.scheme).suffix.lower().removeprefix(".")
    if reference.place or suffix not in _FILES:
        return reference
    return dataclasses.replace(reference, scheme=suffix, place=reference.scheme)


def _unknown(reference: Reference) -> str:
    text, path = reference.text, Path(reference.scheme)
    if path.is_dir():
        return f"data {text!r} is a folder: for a folder of images write imagefolder:{text}"
    if path.suffix == ".py" or Path(f"{path}.py").is_file():
        return f"data {text!r} names no function: write {path.with_suffix('.py')}:FUNCTION"
    if path.is_file():
        return (
            f"data {text!r} is a file: write a function that returns a list of batches from it, and give that "
            "as file.py:function"
        )
    if len(path.parts) > 1:
        return f"data {text!r}: there is no such file or folder"
    known = ", ".join(SCHEMES)
    return (
        f"data {text!r} is not known: write {known}, package.module:factory or file.py:factory."
        f"{did_you_mean(reference.scheme, SCHEMES)}"
    )


def _directory(reference: Reference) -> Path:
    if not reference.place:
        raise UsageError(f"data {reference.text!r} names no folder: write {reference.scheme}:DIR")
    folder = Path(reference.place).expanduser()
    if not folder.is_dir():
        close = nearest(folder, "*/")
        raise UsageError(f"data {reference.text!r}: {reference.place!r} is not a folder.{close}".removesuffix("."))
    return folder


def _file(reference: Reference) -> Path:
    if not reference.place:
        raise UsageError(f"data {reference.text!r} names no file: write {reference.scheme}:FILE")
    file = Path(reference.place).expanduser()
    if not file.is_file():
        raise UsageError(f"data {reference.text!r}: there is no file {reference.place!r}.{nearest(file, '*.*')}")
    return file


def _digits(reference: Reference, options: DataOptions) -> tuple[()]:
    if reference.place:
        raise UsageError(f"data {reference.text!r}: digits come with scikit-learn and take no folder")
    installed("sklearn", reference, "scikit-learn")
    return ()


def _cifar10(reference: Reference, options: DataOptions) -> tuple[Path, ...]:
    folder = _directory(reference)
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if options.split == "train" else ["test_batch.bin"]
    files = tuple(folder / name for name in names)
    for path in files:
        if not path.is_file():
            pickled = (folder / path.stem).is_file() or (folder / "cifar-10-batches-py").is_dir()
            python = " of the data set; this is the Python version" if pickled else ""
            raise UsageError(f"data {reference.text!r}: {str(path)!r} is missing (the binary version{python})")
        if (size := path.stat().st_size) == 0 or size % 3073:
            raise UsageError(f"data {reference.text!r}: {str(path)!r} has {size} bytes, not a multiple of 3073")
    return files


def _idx(reference: Reference, options: DataOptions) -> tuple[Path, ...]:
    folder, part = _directory(reference), "train" if options.split == "train" else "t10k"
    found = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise UsageError(f"data {reference.text!r}: neither {name!r} nor {name + '.gz'!r} is in {str(folder)!r}")
        found.append(path)
    return tuple(found)


def _images(reference: Reference, options: DataOptions) -> tuple[tuple[Path, ...], tuple[int, ...], int]:
    """Image files, the class of each, and how many classes there are; no classes for loose files."""
    installed("PIL", reference, "pillow")
    root = _directory(reference)
    parts = ("train",) if options.split == "train" else ("test", "val")
    root = next((root / part for part in parts if (root / part).is_dir()), root)
    classes = sorted(p for p in root.iterdir() if p.is_dir())
    found = [(path, label) for label, folder in enumerate(classes) for path in _pictures(folder.rglob("*"))]
    if found:
        paths, labels = zip(*found, strict=True)
        return paths, labels, len(classes)
    loose = tuple(_pictures(root.iterdir()))
    if not loose:
        held = sorted({path.suffix.lower() for path in root.rglob("*") if path.is_file() and path.suffix})
        others = f"; its files are {', '.join(held[:4])}" if held else ""
        raise UsageError(
            f"data {reference.text!r}: no images in {str(root)!r} (loose, or one folder a class){others}. Images are "
            f"{', '.join(sorted(_SUFFIXES))}"
        )
    return loose, (), 0


def _pictures(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in sorted(paths) if path.suffix.lower() in _SUFFIXES)


def _arrays(reference: Reference, options: ArrayOptions) -> tuple[Path, str, str]:
    """A file, and the names of the arrays that hold inputs and labels; no name for no labels."""
    file = _file(reference)
    try:
        with zipfile.ZipFile(file) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (zipfile.BadZipFile, OSError) as error:
        raise UsageError(
            f"data {reference.text!r}: {str(file)!r} is no file that numpy.savez wrote, or it is damaged: save or copy "
            "it again"
        ) from error
    known = {name.lower(): name for name in held}
    parts = (f"{{}}_{options.split}", f"{options.split}_{{}}", "{}")

    def one(option: str, asked: str, usual: tuple[str, ...], needed: bool) -> str:
        if asked:
            if asked not in held:
                close = did_you_mean(asked, held)
                raise UsageError(
                    f"data {reference.text!r}: there is no array {asked!r} in it, but {', '.join(held)}.{close}"
                )
            return asked
        names = (part.format(name) for part in parts for name in usual)
        found = next((known[name] for name in names if name in known), "")
        if not found and needed:
            example = held[0] if held else "NAME"
            raise UsageError(
                f"data {reference.text!r}: which array holds the inputs? It has {', '.join(held) or 'none'}: write "
                f"{reference.place}?{option}={example}"
            )
        return found

    inputs = one("inputs", options.inputs, _INPUTS, True)
    return file, inputs, "" if options.labels == "none" else one("labels", options.labels, _LABELS, False)


def _table(reference: Reference, options: TableOptions) -> tuple[Path, tuple[str, ...], str]:
    """A file, the names of its columns, and that of the labels; no name for no labels."""
    import csv

    file = _file(reference)
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines)
            names, first = tuple(name.strip() for name in next(reader, ())), next(reader, [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"data {reference.text!r} is no table in UTF-8, separated by commas: {error}") from error
    if not names:
        raise UsageError(f"data {reference.text!r}: {str(file)!r} is empty")
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), "")):
        raise UsageError(f"data {reference.text!r}: its columns are separated by {other!r}: separate them by commas")
    if all(_is_number(name) for name in names):
        raise UsageError(f"data {reference.text!r}: its first line must name the columns; it is {','.join(names[:4])}")
    # Without a name that says so they are the one column that holds words.
    words = [name for name, value in zip(names, first, strict=False) if not _is_number(value)]
    usual = [name for name in names if name.lower() in _LABELS] + words * (len(words) == 1)
    labels = options.labels or (usual[0] if usual else "none")
    if labels == "none":
        return file, names, ""
    if labels not in names:
        shown = ", ".join(names[:12])
        raise UsageError(
            f"data {reference.text!r}: there is no column {labels!r}; it has {shown}.{did_you_mean(labels, names)}"
        )
    return file, names, labels


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


SCHEMES: dict[str, Scheme] = {
    "digits": Scheme(ImageOptions, _digits, "crop"),
    "cifar10": Scheme(ImageOptions, _cifar10, "crop-flip", "imagenet"),
    "fashion-mnist": Scheme(ImageOptions, _idx, "crop-flip"),
    "imagefolder": Scheme(FolderOptions, _images, "crop-flip", "imagenet"),
    "npz": Scheme(ArrayOptions, _arrays),
    "csv": Scheme(TableOptions, _table),
}
_FILES = ("npz", "csv")
