"""What Python files and modules hold, read from their text: nothing is imported, so that a typo is told at once."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import shlex
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from spectrim.cli.references import Reference, UsageError, check_form, filled, not_a_file
from spectrim.errors import did_you_mean

_SHOWN = 6


def check_factory(reference: Reference, what: str, arguments: int | None = 0) -> None:
    """Refuse ``module:function`` if its source shows that it is not there, or cannot be called as it is written.

    What no source shows (extension modules, names that come by ``import *``) is left to the import.

    Parameters
    ----------
    arguments
        How many arguments the function will get beside the options of the reference; None if it is not called so.
    """
    check_form(reference, what)
    source = _source(reference, what)
    if source is None:
        return
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"), str(source))
    except (SyntaxError, UnicodeDecodeError, OSError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UsageError(f"{what} {reference.text!r}: {reference.scheme} is no valid Python{line}: {error}") from error
    held = dict(_definitions(tree.body))
    name = reference.place.partition(".")[0]
    if "*" in held or "__getattr__" in held:
        return
    if name not in held:
        functions = [each for each, node in held.items() if isinstance(node, _CALLED) and not each.startswith("_")]
        there = f"; it has {', '.join(functions[:_SHOWN])}" if functions else "; it defines no function or class"
        close = did_you_mean(name, functions)
        raise UsageError(f"{what} {reference.text!r}: {reference.scheme} has no {name!r}{there}.{close}")
    if name == reference.place and arguments is not None:
        _check_call(held[name], reference, what, arguments)


def names_nothing(scheme: str) -> bool:
    """Whether a scheme that is not built in is neither a file nor a module, seen without importing one."""
    if "." in scheme or Path(f"{scheme}.py").is_file():
        return False
    return not scheme.isidentifier() or importlib.util.find_spec(scheme) is None


def _source(reference: Reference, what: str) -> Path | None:
    """The file of a module; None if it is not known without importing something."""
    if reference.scheme.endswith(".py"):
        file = Path(reference.scheme).expanduser()
        if not file.is_file():
            raise UsageError(f"{what} {reference.text!r}: {not_a_file(file, reference.scheme)}")
        return file
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    first, *rest = reference.scheme.split(".")
    if reference.place.startswith("//"):
        raise UsageError(f"{what} {reference.text!r} is an address: fetch the file, and name what you have fetched")
    if reference.scheme in sys.modules:
        return None  # what it holds now is what counts
    spec = importlib.util.find_spec(first)
    if spec is None:
        file = Path(f"{first}.py")
        there = [each.stem for each in Path.cwd().glob("*.py")]
        cure = f" Did you mean {file}:{reference.place}?" if file.is_file() else did_you_mean(first, there)
        raise UsageError(
            f"{what} {reference.text!r}: cannot import {first!r}: there is no such module, and no built-in name; a "
            f"function in a file is written ./file.py:{reference.place}.{cure}"
        )
    for part in rest:
        inside = spec.submodule_search_locations
        spec = PathFinder.find_spec(part, inside) if inside else None  # which imports nothing
        if spec is None:
            return None  # something that the package makes
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


_CALLED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _definitions(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names that a module's text gives to something, and where; ``*`` for all of another module."""
    for node in body:
        if isinstance(node, _CALLED):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield (alias.asname or alias.name).partition(".")[0], node
        else:
            for each in ast.walk(node):
                if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                    yield each.id, node
            for part in ("body", "orelse", "handlers", "finalbody"):
                for inner in getattr(node, part, ()):
                    yield from _definitions(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def _check_call(node: ast.stmt, reference: Reference, what: str, arguments: int) -> None:
    """Refuse a call that a function's parameters do not allow; what is decorated may take anything."""
    if isinstance(node, ast.ClassDef) and not node.decorator_list:
        inits = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        node, arguments = (inits[0] if inits else node), arguments + 1
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return
    places = len(node.args.posonlyargs) + len(node.args.args)
    if places < arguments and node.args.vararg is None:
        raise UsageError(
            f"{what} {reference.text!r}: {reference.place}() is called with {arguments} argument, and takes {places}: "
            f"give it a parameter, as def {reference.place}(layer)"
        )
    _check_options(reference, what, node.args, min(arguments, places))


def _check_options(reference: Reference, what: str, parameters: ast.arguments, taken: int) -> None:
    """Refuse options that are no parameters behind the first ``taken``, and a lack of those that must be given."""
    given, named = reference.options, _parameters(parameters)
    allowed = [*named][taken:]
    needed = [name for name in allowed if named[name] and name not in given]
    unknown = [name for name in given if name not in named]
    if unknown and parameters.kwarg is None:
        options = f"its parameters are {', '.join(allowed)}" if allowed else "it has no parameters"
        raise UsageError(
            f"{what} {reference.text!r}: {reference.place} takes no {unknown[0]!r}; {options}."
            f"{did_you_mean(unknown[0], allowed)}"
        )
    if needed:
        joint = "&" if given else "?"
        whole = shlex.quote(f"{reference.text}{joint}{'&'.join(f'{name}=VALUE' for name in needed)}")
        raise UsageError(
            f"{what} {reference.text!r}: {reference.place}() must be given {', '.join(map(repr, needed))}: write "
            f"{whole}"
        )


def _parameters(takes: ast.arguments) -> dict[str, bool]:
    """Whether parameters must be given, by their names."""
    places, optional = [*takes.posonlyargs, *takes.args], len(takes.defaults)
    found = {each.arg: number < len(places) - optional for number, each in enumerate(places)}
    return found | {each.arg: value is None for each, value in zip(takes.kwonlyargs, takes.kw_defaults, strict=True)}


def check_source_options(module: str, kind: str, options: Mapping[str, str], place: str, name: str) -> None:
    """Refuse options, or values, that a class of this package does not take by its source."""
    classes = _classes(Path(__file__).parents[1].joinpath(*module.split(".")))
    # A class that gives a field another default has it once.
    fields = {field[0]: field for each in _lineage(kind, classes) for field in _fields(each)}
    filled(dataclasses.make_dataclass(kind, fields.values()), options, place, name)


@functools.cache
def _classes(folder: Path) -> dict[str, ast.ClassDef]:
    """Those of a folder by their names; reading all of its files takes a tenth of a second."""
    found: dict[str, ast.ClassDef] = {}
    for file in sorted(folder.glob("*.py")):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        constants = {ast.unparse(each.targets[0]): each.value for each in body if isinstance(each, ast.Assign)}
        for kind in (each for each in body if isinstance(each, ast.ClassDef)):
            found[kind.name] = kind
            for node in kind.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Name):
                    node.value = constants.get(node.value.id, node.value)
    return found


def _lineage(kind: str, classes: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """A class after those that it derives from, as far as they are known."""
    for base in classes[kind].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _lineage(base.id, classes)
    yield classes[kind]


def _fields(kind: ast.ClassDef) -> Iterator[tuple[str, Any, Any]]:
    for node in kind.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        written = ast.unparse(node.annotation)
        if written.startswith("ClassVar"):
            continue
        default = ast.literal_eval(node.value) if node.value is not None else dataclasses.MISSING
        # Annotations are those of our own methods: builtins and what typing has.
        annotation = eval(written, {**vars(typing)})
        yield node.target.id, annotation, dataclasses.field(default=default)
