"""References on the command line: ``scheme:place?key=value&key=value``.

Models and data are named the same way. A scheme is a built-in name (``timm``, ``cifar10``) or an importable module, the
place is what follows the first colon, and the options are passed to whatever the reference names.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from spectrim.errors import SpectrimError

Value = str | int | float | bool
T = TypeVar("T")


class UsageError(SpectrimError, ValueError):
    """The command line says something that cannot be carried out; the message quotes it."""


@dataclass(frozen=True)
class Reference:
    """A reference taken apart.

    Attributes
    ----------
    text
        As given, for messages.
    scheme, place
        What stands before and after the first colon; ``place`` is empty without one.
    options
        What follows the question mark, numbers and true / false converted.
    """

    text: str
    scheme: str
    place: str = ""
    options: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


def parse(text: str) -> Reference:
    """Take a reference apart.

    Raises
    ------
    UsageError
        If it is empty or an option is not ``key=value``.
    """
    head, _, query = text.strip().partition("?")
    scheme, _, place = head.partition(":")
    if not scheme:
        raise UsageError(f"{text!r} is no reference: write NAME:PLACE, optionally followed by ?key=value&key=value")
    options: dict[str, Value] = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"cannot read option {item!r} of {text!r}: write key=value, several joined by &")
        options[key] = _convert(value)
    return Reference(text, scheme, place, options)


def _convert(text: str) -> Value:
    """Numbers, true and false as JSON has them; everything else stays text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def fill(reference: Reference, options: T) -> T:
    """A copy of a dataclass of options with those of the reference filled in.

    Raises
    ------
    UsageError
        For an option the dataclass does not have, or a value of another type than its default.
    """
    defaults = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}  # type: ignore[arg-type]
    for key, value in reference.options.items():
        if key not in defaults:
            raise UsageError(f"{reference.text!r} has unknown option {key!r}; known: {', '.join(defaults)}")
        kind = type(defaults[key])
        if kind is str:
            continue
        if type(value) is not kind:
            raise UsageError(f"option {key}={value} of {reference.text!r} must be of type {kind.__name__}")
    given = {k: str(v) if isinstance(defaults[k], str) else v for k, v in reference.options.items()}
    return dataclasses.replace(options, **given)  # type: ignore[type-var]


def factory(reference: Reference, what: str) -> Callable[..., Any]:
    """Import the callable that ``package.module:attribute`` names.

    The working directory is searched too, as ``python -m`` does.

    Parameters
    ----------
    what
        ``model`` or ``data``, for messages.

    Raises
    ------
    UsageError
        If the module cannot be imported, has no such attribute, or the attribute cannot be called.
    """
    if not reference.place or not all(part.isidentifier() for part in reference.scheme.split(".")):
        raise UsageError(
            f"{what} {reference.text!r} is not known: write package.module:factory or one of the built-in names"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(reference.scheme)
    except ImportError as error:
        raise UsageError(f"{what} {reference.text!r}: cannot import {reference.scheme!r}: {error}") from error
    for part in reference.place.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{what} {reference.text!r}: {reference.scheme!r} has no attribute {reference.place!r}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{what} {reference.text!r}: {reference.place!r} is a {type(found).__name__}, not callable")
    return found


def call(function: Callable[..., Any], reference: Reference, what: str, *args: Any, **more: Any) -> Any:
    """Call what a reference names with its options.

    Raises
    ------
    UsageError
        If the signature does not take them.
    """
    import inspect

    arguments = {**more, **reference.options}
    try:
        inspect.signature(function).bind(*args, **arguments)
    except TypeError as error:
        raise UsageError(f"{what} {reference.text!r} cannot be called with {arguments}: {error}") from error
    except ValueError:  # some builtins have no signature
        pass
    return function(*args, **arguments)


def need(module: str, reference: Reference, install: str) -> Any:
    """Import an optional library that a reference needs.

    Raises
    ------
    UsageError
        If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{reference.text!r} needs {module}, which cannot be imported ({error}). Run: pip install {install}"
        ) from error
