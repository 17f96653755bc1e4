"""What a shell offers where a value is typed. Nothing is loaded but the names of files in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spectrim.cli.methods import NAMES
from spectrim.selection.budget import COSTS

_MODELS = ("timm:", "torchvision:", "hf:")


def _files(*suffixes: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        """Folders, and files of some kinds, that begin so."""
        found = []
        for path in sorted(Path().glob(f"{incomplete}*") if not Path(incomplete).is_absolute() else ()):
            if path.is_dir():
                found.append(f"{incomplete[: len(incomplete) - len(Path(incomplete).name)]}{path.name}/")
            elif not suffixes or path.suffix in suffixes:
                found.append(f"{incomplete[: len(incomplete) - len(Path(incomplete).name)]}{path.name}")
        return found

    return complete


def methods(incomplete: str) -> list[str]:
    """Names of methods."""
    return [name for name in NAMES if name.startswith(incomplete)]


def budgets(incomplete: str) -> list[str]:
    """Costs, as budgets begin."""
    return [f"{cost}=" for cost in COSTS if cost.startswith(incomplete)]


def costs(incomplete: str) -> list[str]:
    """Costs of the library."""
    return [cost for cost in COSTS if cost.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Recipes of principal filters."""
    return [text for text in ("kl", "energy=0.95") if text.startswith(incomplete)]


def devices(incomplete: str) -> list[str]:
    """Devices."""
    return [name for name in ("cpu", "cuda", "auto") if name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Built-in names, and Python files up to their colon."""
    files = [f"{name}:" if name.endswith(".py") else name for name in _files(".py")(incomplete)]
    return [name for name in _MODELS if name.startswith(incomplete)] + files


def data(incomplete: str) -> list[str]:
    """Built-in names, folders after them, files of arrays and Python files."""
    scheme, colon, place = incomplete.partition(":")
    if colon:
        return [f"{scheme}:{name}" for name in _files()(place) if name.endswith("/")]
    names = ("digits", "cifar10:", "fashion-mnist:", "imagefolder:")
    files = [f"{name}:" if name.endswith(".py") else name for name in _files(".py", ".npz", ".csv")(incomplete)]
    return [name for name in names if name.startswith(incomplete)] + files
