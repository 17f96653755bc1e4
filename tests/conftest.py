"""Set-up for all tests: shape checks while they run, few threads, fixed seeds."""

from __future__ import annotations

import collections
import functools
import gc
import importlib.util
import inspect
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch


class Checks:
    """Checks of shapes at the first calls of a function in a test. One takes as long as a small product.

    Inner functions have none: they are made anew at every call of the outer one, and compiling checks takes longer
    than most calls do.
    """

    def __init__(self, jaxtyped: Callable[..., Any]) -> None:
        self.jaxtyped, self.limit = jaxtyped, 0
        self.of: object = None
        self.calls = collections.Counter[Callable[..., Any]]()

    def start(self, limit: int, of: object) -> None:
        """A test begins: so many calls of each function are checked, unless they were in another test of the same."""
        if of != self.of:
            self.calls.clear()
        self.limit, self.of = limit, of

    def decorator(self, **typechecker: Any) -> Callable[..., Any]:
        """What stands in for ``jaxtyping.jaxtyped`` in the modules that are checked."""
        decorate = self.jaxtyped(**typechecker)

        def checked_first(function: Callable[..., Any]) -> Callable[..., Any]:
            if not inspect.isfunction(function):
                return decorate(function)
            if "<locals>" in function.__qualname__:
                return function
            # Compiling checks takes milliseconds a function, and many are never asked for any.
            checked = functools.cache(lambda: decorate(function))

            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                if not self.limit or self.calls[function] >= self.limit:
                    return function(*args, **kwargs)
                self.calls[function] += 1
                return checked()(*args, **kwargs)

            return call

        return checked_first


# The hook must stand before the modules are imported. SPECTRIM_SHAPE_CHECKS says how many calls are
# checked; 0 has no hook at all.
SHAPE_CHECKS = int(os.environ.get("SPECTRIM_SHAPE_CHECKS", "1"))
CHECKS = Checks(jaxtyping.jaxtyped)
if SHAPE_CHECKS and importlib.util.find_spec("beartype"):
    jaxtyping.install_import_hook(["spectrim.linalg", "spectrim.network.factors"], "beartype.beartype")
    jaxtyping.jaxtyped = CHECKS.decorator

import hypothesis

# Many small operations: a second thread costs more than it does.
torch.set_num_threads(int(os.environ.get("SPECTRIM_TEST_THREADS", "1")))

# For a device that is not there torch keeps every seed to come with the whole stack of its caller: a millisecond each.
for device in (torch.cuda, torch.xpu):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None

# A first call may compile or import something slow: time limits a case would make tests flaky.
hypothesis.settings.register_profile(
    "spectrim",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("SPECTRIM_EXAMPLES", "15")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("spectrim")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``table``, cells that show every value of every axis run by default; the others are slow."""
    tables = collections.defaultdict[tuple[Any, ...], list[pytest.Function]](list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("table"):
            tables[item.parent, item.originalname].append(item)
    for cells in tables.values():
        every = cells[0].get_closest_marker("table").kwargs.get("every")
        for cell in set(cells) - set(cells[::every] if every else _covering(cells)):
            cell.add_marker(pytest.mark.slow)


def _covering(cells: list[pytest.Function]) -> list[pytest.Function]:
    """Cells that show every value of every axis: each time the one that shows most new ones."""
    values = {cell: {(axis, id(value)) for axis, value in cell.callspec.params.items()} for cell in cells}
    chosen, left = [], set().union(*values.values())
    while left:
        chosen.append(max(cells, key=lambda cell: len(values[cell] & left)))
        left -= values[chosen[-1]]
    return chosen


def pytest_collection_finish() -> None:
    """What has been imported stays, and need not be looked through whenever garbage is collected."""
    gc.collect()
    gc.freeze()
    # Tests leave little behind: it need not be looked for after every 700 objects.
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _shapes(request: pytest.FixtureRequest) -> None:
    """Shapes are checked in every test of the mathematics, and once in each file about those who call it."""
    folder = request.path.parent.name
    of = request.node.nodeid if folder == "linalg" else request.path
    CHECKS.start(SHAPE_CHECKS if folder in ("linalg", "network", "methods") else 0, of)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, alone or among others."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True, scope="session")
def _any_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured latencies stay out of the user's cache directory, and ranks on offer do not depend on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTRIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("SPECTRIM_REGISTER_WIDTH", "16")
        yield


@pytest.fixture(params=[8, 16], ids="register-{}".format)
def register_width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """For what rests on the default multiples of ranks in wide layers: once for each kind of CPU."""
    monkeypatch.setenv("SPECTRIM_REGISTER_WIDTH", str(request.param))
    return request.param
