"""References on the command line: ``scheme:place?key=value&key=value``.

Models and data are named the same way. A scheme is a built-in name (``timm``, ``cifar10``), an importable module or a
Python file (``./nets.py``), the place is what follows the colon, and the options are passed to whatever the reference
names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from spectrim.errors import SpectrimError, did_you_mean
from spectrim.network.file_kinds import no_file

Value = str | int | float | bool | None
T = TypeVar("T")


class UsageError(SpectrimError, ValueError):
    """The command line says something that cannot be carried out; the message quotes it and says what to write.

    Whatever reads, checks or loads what was given raises it where that cannot be used, and says so in no docstring.
    """


@dataclass(frozen=True)
class Reference:
    """A reference taken apart."""

    text: str  # as given, for messages
    # What stands before and after the first colon, or the one after the name of a file; ``place`` is empty without.
    scheme: str
    place: str = ""
    # What follows the question mark: texts of values by the option.
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Value]:
        """The values, numbers and true / false converted."""
        return {key: _convert(value) for key, value in self.texts.items()}


def parse(text: str) -> Reference:
    """Take a reference apart."""
    head, _, query = text.strip().partition("?")
    scheme, place = halves(head)
    if not scheme:
        raise UsageError(f"{text!r} is no reference: write NAME:PLACE, optionally followed by ?key=value&key=value")
    texts: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"cannot read option {item!r} of {text!r}: write key=value, several joined by &")
        texts[key] = value
    return Reference(text, scheme, place, texts)


def nearest(path: Path, pattern: str) -> str:
    """A question after the file or folder that was meant, of those that lie where there is none of this name."""
    folders = pattern.endswith("/")
    others = (each for each in path.parent.glob(pattern) if each != path and each.is_dir() == folders)
    return did_you_mean(str(path), map(str, others))


def not_a_file(path: Path, name: str) -> str:
    """What is said of a path where no file lies: that it is a folder or a pipe, or which file may have been meant."""
    if kind := no_file(path):
        return f"{name!r} is {kind}, not a file"
    return f"there is no file {name!r}.{nearest(path, f'*{path.suffix}')}"


def halves(text: str) -> tuple[str, str]:
    """What stands before and after the first colon; a file's name ends with its suffix, and may hold colons."""
    file, end, place = text.rpartition(".py:")
    if end:
        return f"{file}.py", place
    scheme, _, place = text.partition(":")
    return scheme, place


def _convert(text: str) -> Value:
    """Numbers as JSON has them, true, false and none as JSON or Python has them; everything else stays text."""
    if text == "None":
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def filled(kind: type[T], options: Mapping[str, str], place: str, name: str, **usual: Any) -> T:
    """An object of a dataclass whose fields are options on the command line, read as their types say.

    Parameters
    ----------
    options
        Texts by the field; those of a tuple's values are joined by ``+``.
    place, name
        Where the options stand, and what they are of; for messages.
    **usual
        Values where the options say nothing, of fields that there need not be; None for none.
    """
    try:
        hints = get_type_hints(kind)
    except NameError as error:  # imported for type checkers alone
        raise UsageError(f"{place}: the types of its options cannot be read: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    close = ""
    try:
        values = {key: value for key, value in usual.items() if key in fields and value is not None}
        for key, text in options.items():
            if key not in fields:
                close = did_you_mean(key, fields)
                raise ValueError(f"there is no option {key!r}")
            values[key] = _value(key, text, hints[key])
        return kind(**values)
    except (TypeError, ValueError) as error:
        each = "; ".join(f"{key}: {_type(hints[key])}{_default(field, usual)}" for key, field in fields.items())
        close = close and f".{close}"
        raise UsageError(f"{place}: {error}; the options of {name} are {each or 'none'}{close}") from error


def _value(key: str, text: str, kind: Any) -> Any:
    import msgspec

    if text.lower() == "none" and NoneType in get_args(kind):
        return None
    for value in (text, text.split("+")):
        try:
            return msgspec.convert(value, kind, strict=False)
        except (msgspec.ValidationError, TypeError):  # of another type, or one that no text stands for
            continue
    raise ValueError(f"{key} is {text!r}; expected {_type(kind)}")


_TYPES: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "none",
}


def _type(kind: Any) -> str:
    """What an option takes, in words."""
    if kind in _TYPES:
        return _TYPES[kind]
    origin, parts = get_origin(kind), [part for part in get_args(kind) if part is not ...]
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " or ".join(map(_type, parts))
    if origin is not None and parts:  # a sequence
        return f"{' or '.join(dict.fromkeys(map(_type, parts)))}, several joined by +"
    return inspect.formatannotation(kind)


def _default(field: dataclasses.Field[Any], usual: Mapping[str, Any]) -> str:
    """The default of an option, as it would be written."""
    if usual.get(field.name) is not None:
        value: Any = usual[field.name]
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return ", which must be given"
    else:
        value = field.default
    shown = "+".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return f" = {shown.lower() if value is None or isinstance(value, bool) else shown}"


def check_form(reference: Reference, what: str) -> bool:
    """Whether a reference is of a Python file, and not of a module."""
    file = reference.scheme.endswith(".py")
    if not reference.place and (file or Path(f"{reference.scheme}.py").is_file()):
        name = reference.scheme if file else f"{reference.scheme}.py"
        raise UsageError(f"{what} {reference.text!r} names no function: write file.py:factory, as {name}:build")
    if not reference.place or not (file or all(part.isidentifier() for part in reference.scheme.split("."))):
        raise UsageError(
            f"{what} {reference.text!r} is not known: write package.module:factory, file.py:factory or one of the "
            "built-in names"
        )
    return file


def factory(reference: Reference, what: str) -> Callable[..., Any]:
    """Import the callable that ``package.module:attribute`` names.

    The working directory is searched too, as ``python -m`` does.
    """
    file = check_form(reference, what)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = (_load if file else importlib.import_module)(reference.scheme)
    except Exception as error:  # the module is somebody else's and may raise anything
        reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{what} {reference.text!r}: cannot import {reference.scheme!r}: {reason}") from error
    for part in reference.place.split("."):
        if not hasattr(found, part):
            close = did_you_mean(part, [name for name in dir(found) if not name.startswith("_")])
            said = f"{what} {reference.text!r}: {reference.scheme!r} has no attribute {reference.place!r}"
            raise UsageError(f"{said}.{close}" if close else said)
        found = getattr(found, part)
    if not callable(found):
        said = f"{what} {reference.text!r}: {reference.place!r} is a {type(found).__name__}, not callable"
        raise UsageError(f"{said}: name a function or a class")
    return found


def _load(name: str) -> Any:
    """The module that a Python file is; the same one when it is asked for again.

    Modules in the file's folder can be imported by it, and it by its name, unless another one has that.
    """
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise ImportError("there is no such file")
    module, other = path.stem, f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    for known in (module, other):
        if getattr(sys.modules.get(known), "__file__", None) == str(path):
            return sys.modules[known]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is not None and spec.origin == str(path):
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(other, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    found = sys.modules[other] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(found)
    except BaseException:
        del sys.modules[other]
        raise
    return found


def call_reference(function: Callable[..., Any], reference: Reference, what: str, *args: Any, **more: Any) -> Any:
    """Call what a reference names with its options."""
    arguments = {**more, **reference.options}
    try:
        inspect.signature(function).bind(*args, **arguments)
    except TypeError as error:
        raise UsageError(f"{what} {reference.text!r} cannot be called with {arguments}: {error}") from error
    except ValueError:  # some builtins have no signature
        pass
    try:
        return function(*args, **arguments)
    except SpectrimError:
        raise
    except Exception as error:  # the function is somebody else's and may raise anything
        why = " ".join(str(error).split())
        given = f" for {arguments}" if arguments else ""
        raise UsageError(f"{what} {reference.text!r} raised {type(error).__name__}{given}: {why}") from error


def installed(package: str, reference: Reference, install: str) -> Path | None:
    """The folder of an optional package that a reference needs; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UsageError(f"{reference.text!r} needs {package}, which is not installed. Run: pip install {install}")
    return Path(spec.origin).parent if spec.origin else None


def need(module: str, reference: Reference, install: str) -> Any:
    """Import an optional library that a reference needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{reference.text!r} needs {module}, which cannot be imported ({error}). Run: pip install {install}"
        ) from error
