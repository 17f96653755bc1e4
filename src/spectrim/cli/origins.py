"""What a finished compression was made from, with digests, and the lines of code that load it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from torch import nn

from spectrim.cli.models import SCHEMES
from spectrim.cli.references import Reference, parse
from spectrim.report import Origin, Part

_PACKAGED = {"digits": ("sklearn", "datasets/data/digits.csv.gz")}
"""Data that come with a package, and where."""
_LARGEST = 2 * 2**30
"""Bytes of data that are read once more for their digest."""


def origin(named: Mapping[str, str], seeds: Mapping[str, int], dense: nn.Module, small: nn.Module, load: str) -> Origin:
    """Where a compression by the command line comes from: by references and their roles."""
    parts = origin_parts(named, dense)
    parts += [Part.of_model("compressed network", type(small).__name__, small)]
    return Origin(shlex.join(["spectrim", *sys.argv[1:]]), tuple(parts), seeds, load)


def origin_parts(named: Mapping[str, str], dense: nn.Module) -> list[Part]:
    """What a run is made from, with digests: references by their role, and the dense network."""
    parts = [_part(role, text) for role, text in named.items()]
    return [*parts, Part.of_model("dense network", type(dense).__name__, dense)]


def _part(role: str, text: str) -> Part:
    """What a reference names, with the digest of the file or the folder that it leads to."""
    path = _path(parse(text))
    if path is None:
        return Part(role, text, of="no file of its own")
    try:
        parts = [path] if path.is_file() else path.rglob("*")
        if (size := sum(part.stat().st_size for part in parts)) > _LARGEST:
            return Part(role, text, of=f"not digested: {size / 2**30:.1f} GiB")
        return Part.of_files(role, text, path)
    except OSError as error:
        return Part(role, text, of=f"not digested: {error.strerror or error}")


def _path(reference: Reference) -> Path | None:
    """The file or folder that a reference leads to: itself, its Python file or module, or its place."""
    package, inside = _PACKAGED.get(reference.scheme, ("", ""))
    found = [
        reference.text,
        reference.scheme if reference.scheme.endswith(".py") else None,
        getattr(sys.modules.get(reference.scheme), "__file__", None) if reference.place else None,
        str(files(package).joinpath(inside)) if package in sys.modules else None,
        reference.place,
    ]
    paths = [Path(text).expanduser() for text in found if text]
    return next((path for path in paths if path.is_file() or path.is_dir()), None)


def load_lines(model: str, dense: nn.Module, written: Mapping[str, Path]) -> str:
    """Three lines of code that load what a compression of a model has written; files by what they hold."""
    if "transformers" in written:
        name = type(dense).__name__
        first = f"from transformers import {name}\nimport spectrim.hf  # lets from_pretrained build the layers"
        return f"{first}\nmodel = {name}.from_pretrained({str(written['transformers'])!r})"
    reference = parse(model)
    options = "".join(f", {name}={value!r}" for name, value in reference.options.items())
    where, made = reference.scheme, f"{reference.place}({options.removeprefix(', ')})"
    if scheme := SCHEMES.get(where):
        said = {"place": reference.place, "options": options, "kind": type(dense).__name__}
        first, made = scheme.imported.format(**said), scheme.made.format(**said)
    else:
        file = Path(where)
        module = file.stem if file.suffix == ".py" else where
        first = f"from {module} import {reference.place.partition('.')[0]}"
        first += f"  # {where}" if file.suffix == ".py" else ""
    return f"import spectrim\n{first}\nmodel = spectrim.load({made}, {str(written['model'])!r}).eval()"
