"""Which layers of a model a user leaves alone, and which ones the user keeps to."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from spectrim.errors import did_you_mean
from spectrim.network.layer import LayerSpec
from spectrim.nn.obstacles import pointless

Which = str | type | Callable[[str, nn.Module], bool]
"""Layers: a name pattern, a class of modules, or a function of a module's path and the module."""


@dataclass(frozen=True)
class Wanted:
    """What is left alone, and what is kept to."""

    skips: list[Which]
    onlys: list[Which]

    def check(self, paths: list[str]) -> None:
        """Raise ValueError for a name pattern that matches no layer."""
        for pattern in [*self.skips, *self.onlys]:
            if isinstance(pattern, str) and not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                raise ValueError(
                    f"the name pattern {pattern!r} matches no layer; layers are: {', '.join(paths) or 'none'}. "
                    f"For all layers of a part write 'part.*'.{_close(pattern, paths)}"
                )

    def reason(self, module: nn.Module, paths: tuple[str, ...], spec: LayerSpec | None) -> str | None:
        """Why a layer that could be factorised is left alone, or None."""
        # First: a depthwise layer is left out in any case, but only on request does it keep its channels.
        if any(_matches(which, paths, module) for which in self.skips):
            return "skipped on request"
        if spec is not None and (why := pointless(spec)):
            return why
        if self.onlys and not any(_matches(which, paths, module) for which in self.onlys):
            return "not among the layers asked for"
        return None


def _close(pattern: str, paths: list[str]) -> str:
    """A question where a part of the model was meant, or a layer was misspelt."""
    if any(path.startswith(f"{pattern}.") for path in paths):
        return f" Did you mean '{pattern}.*'?"
    return did_you_mean(pattern, paths)


def each_of(given: Which | Iterable[Which]) -> list[Which]:
    several = [given] if isinstance(given, (str, type, nn.Module)) or not isinstance(given, Iterable) else list(given)
    for which in several:
        if isinstance(which, nn.Module) or not (isinstance(which, (str, type)) or callable(which)):
            raise TypeError(
                f"cannot choose layers by {' '.join(repr(which).split())[:80]}: expected a name pattern such as "
                "'layer1.*', a module type, or a function (name, module) -> bool"
            )
    return several


def _matches(which: Which, paths: tuple[str, ...], module: nn.Module) -> bool:
    if isinstance(which, str):
        return any(fnmatch.fnmatchcase(path, which) for path in paths)
    if isinstance(which, type):
        return isinstance(module, which)
    return any(which(path, module) for path in paths)
