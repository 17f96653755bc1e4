"""The structure of the package in figures: rooms, arrows between them, and the size of functions.

A room is a module of the package's root, or a folder with the modules that lie in it. An arrow leads from a room to
another one that a module of it imports from, inside functions and for type checkers too; however many lines import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BRANCHES = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.comprehension)


@dataclass(frozen=True)
class Function:
    """One function: where it is, and how large."""

    place: str
    lines: int  # of the body, without the docstring
    # McCabe's number: one, and one for each condition, loop, handler, clause of a comprehension and further operand
    # of ``and`` and ``or``, nested functions included.
    branches: int
    parameters: int  # all but ``self`` and ``cls``


def sources(package: Path) -> list[Path]:
    """The modules of a package."""
    return sorted(package.rglob("*.py"))


def lines(package: Path) -> int:
    """Lines of all modules together."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources(package))


def room(package: Path, path: Path) -> str:
    """The room a module lies in: its folder, or itself in the root."""
    inside = path.relative_to(package)
    return inside.stem if len(inside.parts) == 1 else "/".join(inside.parts[:-1])


def arrows(package: Path) -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports from the second."""
    homes = {_dotted(package, path): room(package, path) for path in sources(package)}
    found = set()
    for path in sources(package):
        here = room(package, path)
        for name in _imported(path):
            # Of `from package.module import name` the longest part that is a module counts.
            parts = name.split(".")
            home = next((h for n in range(len(parts), 0, -1) if (h := homes.get(".".join(parts[:n])))), None)
            if home is not None and home != here:
                found.add((here, home))
    return found


def functions(package: Path) -> Iterator[Function]:
    """All functions and methods."""
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                yield Function(
                    f"{path.relative_to(package).as_posix()}:{node.name}",
                    (node.end_lineno or 0) - body[0].lineno + 1 if body else 0,
                    1 + sum(_decisions(inner) for inner in ast.walk(node)),
                    sum(argument.arg not in ("self", "cls") for argument in arguments),
                )


def _decisions(node: ast.AST) -> int:
    return len(node.values) - 1 if isinstance(node, ast.BoolOp) else int(isinstance(node, _BRANCHES))


def _dotted(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
