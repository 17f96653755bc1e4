"""Where the files of built-in data lie: they are looked for, and refused where they cannot be read, without torch."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path

from spectrim.cli.data_options import ArrayOptions, DataOptions, TableOptions
from spectrim.cli.references import Reference, UsageError, installed, nearest, not_a_file
from spectrim.errors import did_you_mean

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
_INPUTS = ("x", "inputs", "images", "data", "features", "input", "image")
_LABELS = ("y", "labels", "targets", "classes", "label", "target", "class")


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
        raise UsageError(f"data {reference.text!r}: {not_a_file(file, reference.place)}")
    return file


def digits(reference: Reference, options: DataOptions) -> tuple[()]:
    if reference.place:
        raise UsageError(f"data {reference.text!r}: digits come with scikit-learn and take no folder")
    installed("sklearn", reference, "scikit-learn")
    return ()


def cifar10(reference: Reference, options: DataOptions) -> tuple[Path, ...]:
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


def idx(reference: Reference, options: DataOptions) -> tuple[Path, ...]:
    folder, part = _directory(reference), "train" if options.split == "train" else "t10k"
    found = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise UsageError(f"data {reference.text!r}: neither {name!r} nor {name + '.gz'!r} is in {str(folder)!r}")
        found.append(path)
    return tuple(found)


def images(reference: Reference, options: DataOptions) -> tuple[tuple[Path, ...], tuple[int, ...], tuple[str, ...]]:
    """Image files, the class of each, and the names of the classes; no classes for loose files.

    Classes are numbered as the part for training has them, if there is one: a part for testing may lack some.
    """
    installed("PIL", reference, "pillow")
    root = _directory(reference)
    parts = ("train",) if options.split == "train" else ("test", "val")
    training, root = root / "train", next((root / part for part in parts if (root / part).is_dir()), root)
    folders = _classes_in(root)
    names = [each.name for each in _classes_in(training)] or [each.name for each in folders]
    if strange := [each.name for each in folders if each.name not in names]:
        raise UsageError(
            f"data {reference.text!r}: class {strange[0]!r} is in {str(root)!r} and not in {str(training)!r}, by which "
            "classes are numbered: give it a folder there, which may be empty, or take it away"
        )
    found = [(path, names.index(folder.name)) for folder in folders for path in _pictures(folder, "**/*")]
    if found:
        paths, labels = zip(*found, strict=True)
        return paths, labels, tuple(names)
    loose = tuple(_pictures(root, "*"))
    if not loose:
        held = sorted({path.suffix.lower() for path in root.rglob("*") if path.is_file() and path.suffix})
        others = f"; its files are {', '.join(held[:4])}" if held else ""
        raise UsageError(
            f"data {reference.text!r}: no images in {str(root)!r} (loose, or one folder a class){others}. Images are "
            f"{', '.join(sorted(_SUFFIXES))}"
        )
    return loose, (), ()


def _classes_in(folder: Path) -> list[Path]:
    """Folders of classes in a folder, if that is one."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in there if path.is_dir() and not _is_hidden(path.name))


def _pictures(folder: Path, pattern: str) -> Iterator[Path]:
    for path in sorted(folder.glob(pattern)):
        if path.suffix.lower() in _SUFFIXES and not any(map(_is_hidden, path.relative_to(folder).parts)):
            yield path


def _is_hidden(name: str) -> bool:
    """What notebooks and macOS leave beside images (``.ipynb_checkpoints``, ``._cat.jpg``): no class and no image."""
    return name.startswith(".") or name == "__MACOSX"


def arrays(reference: Reference, options: ArrayOptions) -> tuple[Path, str, str]:
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


def lines_of(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of a table with the number of the line that each ends on; empty lines are left out."""
    import csv

    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines)
            for row in filter(None, reader):
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"data {text!r} is no table in UTF-8, separated by commas: {error}") from error


def table(reference: Reference, options: TableOptions) -> tuple[Path, tuple[str, ...], str]:
    """A file, the names of its columns, and that of the labels; no name for no labels."""
    file = _file(reference)
    (_, header), (_, first) = ([*itertools.islice(lines_of(file, reference.text), 2), (0, []), (0, [])])[:2]
    names = tuple(name.strip() for name in header)
    if not names:
        raise UsageError(f"data {reference.text!r}: {str(file)!r} is empty")
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), "")):
        raise UsageError(f"data {reference.text!r}: its columns are separated by {other!r}: separate them by commas")
    if all(as_number(name) is not None for name in names):
        raise UsageError(f"data {reference.text!r}: its first line must name the columns; it is {','.join(names[:4])}")
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise UsageError(f"data {reference.text!r}: two of its columns are named {twice[0]!r}: name each otherwise")
    # Without a name that says so they are the one column that holds words.
    words = [name for name, value in zip(names, first, strict=False) if as_number(value) is None]
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


def as_number(text: str) -> float | None:
    """A number as tables have it, and not as Python has it, with ``_`` between digits; None for a word."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None
