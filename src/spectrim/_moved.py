"""Module paths of versions 0.1 and 0.2, which lead to where their names live now until 0.3.

``import spectrim`` puts :class:`Finder` at the end of the import system's list, so that it is asked only for what does
not exist. To go with version 0.3.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Where a former module's names live; of several modules the first that has a name.
HOMES: dict[str, tuple[str, ...]] = {
    "spectrim.budget": ("spectrim.selection.budget",),
    "spectrim.channel_plans": ("spectrim.search",),
    "spectrim.channel_plans.stepwise": ("spectrim.search.stepwise",),
    "spectrim.channel_plans.widths": ("spectrim.search.widths",),
    "spectrim.chains": ("spectrim.cost.chains", "spectrim.cost.rounds"),
    "spectrim.costs": ("spectrim.cost.counted",),
    "spectrim.coupling": ("spectrim.network.coupling",),
    "spectrim.factors": ("spectrim.network.factors",),
    "spectrim.groups": ("spectrim.network.groups",),
    "spectrim.latency": ("spectrim.cost.latency",),
    "spectrim.narrowing": ("spectrim.network.narrowing",),
    "spectrim.plan": ("spectrim.selection.plan", "spectrim.selection.candidates", "spectrim.network.choices"),
    "spectrim.rates": ("spectrim.search.published_ranks",),
    "spectrim.selectors": ("spectrim.selection.selectors",),
    "spectrim.sites": ("spectrim.network.sites", "spectrim.network.layer"),
    "spectrim.stepwise": ("spectrim.search.stepwise",),
    "spectrim.trajectory": ("spectrim.selection.trajectory",),
    "spectrim.unfold": ("spectrim.linalg.unfold",),
    "spectrim.widths": ("spectrim.search.widths",),
    "spectrim.methods.published_ranks": ("spectrim.search.published_ranks",),
    "spectrim.nn.batches": ("spectrim.nn.watch.batches",),
    "spectrim.nn.calibrate": ("spectrim.nn.watch.calibrate",),
    "spectrim.nn.filters": ("spectrim.nn.channels.graph",),
    "spectrim.nn.kernels": ("spectrim.nn.sparse.kernels",),
    "spectrim.nn.products": ("spectrim.nn.sparse.products",),
    "spectrim.nn.sensitivity": ("spectrim.nn.watch.sensitivity",),
}


def _fewer(kept: Sequence[int], of: int, sides: str) -> list[tuple[str, str, int]]:
    choices: Any = importlib.import_module("spectrim.network.choices")
    choice = choices.Choice("kept_channels", settings={"kept": tuple(kept), "of": of, "sides": sides})
    return [(place.module, place.axis, place.entries) for place in choice.lost]


def _fixed(sites: Any, functions: Mapping[str, Callable[..., float]]) -> dict[str, float]:
    others = {"parameters": sites.other_parameters, "bytes": sites.other_bytes, "macs": sites.other_macs}
    return {
        name: sum(cost((spec,)) for spec in sites.untouched) + others.get(name, 0.0) for name, cost in functions.items()
    }


# Functions that have no successor of the same kind, by the former module.
GONE: dict[str, dict[str, Callable[..., Any]]] = {
    "spectrim.costs": {"fixed": _fixed},
    "spectrim.coupling": {"fewer": _fewer},
}


class Finder:
    """Answers for the former paths with a module that looks its names up where they live now.

    It has what is asked of a finder and of a loader; their base classes would load ``importlib.resources``.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in HOMES:
            return None
        package = any(name.startswith(f"{fullname}.") for name in HOMES)
        return ModuleSpec(fullname, self, is_package=package)  # pyright: ignore[reportArgumentType]

    def create_module(self, spec: ModuleSpec) -> None:
        """Any module will do."""

    def exec_module(self, module: ModuleType) -> None:
        homes = HOMES[module.__name__]
        warnings.warn(
            f"{module.__name__} has moved to {' and '.join(homes)}, and the former path goes with version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        modules = [importlib.import_module(home) for home in homes]
        module.__dict__.update(GONE.get(module.__name__, {}))

        def look_up(name: str) -> Any:
            for home in modules:
                if hasattr(home, name):
                    return getattr(home, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__doc__ = modules[0].__doc__
        module.__dict__["__getattr__"] = look_up
        names = {name for home in modules for name, value in vars(home).items() if not isinstance(value, ModuleType)}
        module.__dict__["__all__"] = sorted(name for name in names if name[0] != "_")
