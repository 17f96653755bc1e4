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
:mod:`spectrim.cli.data_options`. A reference is read, and its files are looked for (:mod:`spectrim.cli.data_files`),
without torch; :mod:`spectrim.cli.datasets` reads the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spectrim.cli import data_files
from spectrim.cli.data_options import ArrayOptions, DataOptions, FolderOptions, ImageOptions, TableOptions
from spectrim.cli.references import Reference, UsageError, call_reference, factory, filled, parse
from spectrim.cli.sources import check_factory, names_nothing
from spectrim.errors import did_you_mean, with_article

CALIBRATION = 2048
Purpose = Literal["test", "calibration", "training"]


@dataclass(frozen=True)
class Scheme:
    """A built-in kind of data."""

    options: type[DataOptions]  # what may stand after the question mark
    # Finds the files, and refuses what cannot be read before anything is.
    locate: Callable[[Reference, Any], tuple[Any, ...]]
    augment: str = "none"  # what is done to training images unless the reference says otherwise
    normalise: str = "none"  # the same of all
    # Which of what ``locate`` returns tells whether there are labels, and how there would be some; without a cure there
    # are always.
    labels: int = 0
    cure: str = ""


@dataclass(frozen=True)
class Data:
    """A reference that was read: what it names is there, as far as can be seen without loading it."""

    reference: Reference
    scheme: Scheme | None = None  # of built-in data; None for a function
    options: DataOptions = DataOptions()
    files: tuple[Any, ...] = ()  # what the scheme has found

    def check_labels(self, option: str) -> None:
        """Refuse built-in data whose files have no labels, for what an option needs them for."""
        scheme = self.scheme
        if scheme is not None and scheme.cure and not self.files[scheme.labels]:
            raise UsageError(f"{option}: data {self.reference.text!r} have no labels, which it needs: {scheme.cure}")

    def load(self, device: str = "cpu") -> Iterable[Any]:
        """The batches."""
        if self.scheme is not None:
            from spectrim.cli.datasets import batches_of

            return batches_of(self, device)
        found = call_reference(factory(self.reference, "data"), self.reference, "data")
        text = self.reference.text
        if not isinstance(found, Iterable) or isinstance(found, str | bytes | Mapping) or _is_one_thing(found):
            raise UsageError(
                f"data {text!r} returned {with_article(type(found).__name__)}, not an iterable of batches: return a "
                "list of them, or a DataLoader"
            )
        if iter(found) is found:
            raise UsageError(f"data {text!r} returned an iterator, which can be read once only; return a list")
        return found


def _is_one_thing(found: object) -> bool:
    """Whether what can be iterated over is one tensor, one network, or one batch of inputs and targets."""
    from torch import Tensor, nn

    shapes = [each.shape for each in found if isinstance(each, Tensor)] if isinstance(found, tuple) else []
    pair = len(shapes) == 2 and shapes[0] != shapes[1]
    return isinstance(found, Tensor | nn.Module) or pair


def load_data(text: str | None, *, purpose: Purpose = "test", device: str = "cpu") -> Any:
    """The batches that a reference names; None where none is given.

    Parameters
    ----------
    purpose
        Sets the defaults of the built-in data. ``test`` is the test split; ``calibration`` is 2,048 samples of the
        training split; ``training`` is the training split, shuffled and augmented (digits are not mirrored).
    """
    return None if text is None else read_data(text, purpose).load(device)


def check_data(text: str, purpose: Purpose, labelled: str = "") -> None:
    """Refuse what :func:`load_data` could not load, as far as is seen without torch, or what lacks labels."""
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
        if close and names_nothing(reference.scheme):
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


SCHEMES: dict[str, Scheme] = {
    "digits": Scheme(ImageOptions, data_files.digits, "crop"),
    "cifar10": Scheme(ImageOptions, data_files.cifar10, "crop-flip", "imagenet"),
    "fashion-mnist": Scheme(ImageOptions, data_files.idx, "crop-flip"),
    "imagefolder": Scheme(
        FolderOptions, data_files.images, "crop-flip", "imagenet", 1, "put the images into one folder a class"
    ),
    "npz": Scheme(ArrayOptions, data_files.arrays, labels=2, cure="name the array that holds them by ?labels=NAME"),
    "csv": Scheme(TableOptions, data_files.table, labels=2, cure="name the column that holds them by ?labels=NAME"),
}
_FILES = ("npz", "csv")
