"""What a shell offers where a value is typed. Nothing is loaded but the names of files in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spectrim.cli.methods import NAMES
from spectrim.selection.budget import COSTS


def _files(*suffixes: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        """Folders, and files of some kinds, that begin so."""
        folder = incomplete[: len(incomplete) - len(Path(incomplete).name)]
        paths = sorted(Path().glob(f"{incomplete}*") if not Path(incomplete).is_absolute() else ())
        fit = [path for path in paths if path.is_dir() or not suffixes or path.suffix in suffixes]
        return [f"{folder}{path.name}{'/' * path.is_dir()}" for path in fit]

    return complete


def _words(*words: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        """Those that begin so."""
        return [word for word in words if word.startswith(incomplete)]

    return complete


methods = _words(*NAMES)
costs = _words(*COSTS)
budgets = _words(*(f"{cost}=" for cost in COSTS))
recipes = _words("kl", "energy=0.95")
devices = _words("cpu", "cuda", "auto")


def models(incomplete: str) -> list[str]:
    """Built-in names, and Python files up to their colon."""
    files = [f"{name}:" if name.endswith(".py") else name for name in _files(".py")(incomplete)]
    return _words("timm:", "torchvision:", "hf:")(incomplete) + files


def data(incomplete: str) -> list[str]:
    """Built-in names, folders after them, files of arrays and Python files."""
    scheme, colon, place = incomplete.partition(":")
    if colon:
        return [f"{scheme}:{name}" for name in _files()(place) if name.endswith("/")]
    files = [f"{name}:" if name.endswith(".py") else name for name in _files(".py", ".npz", ".csv")(incomplete)]
    return _words("digits", "cifar10:", "fashion-mnist:", "imagefolder:")(incomplete) + files
