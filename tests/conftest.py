"""Set-up for all tests: shape checks while they run, few threads, fixed seeds."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# Shapes and dtypes of the mathematics are checked at calls. The hook must stand before the modules are imported.
# A check takes as long as a small product, so not all tests have them: SPECTRIM_SHAPE_CHECKS=all does, 0 has none.
SHAPE_CHECKS = os.environ.get("SPECTRIM_SHAPE_CHECKS", "some")
if SHAPE_CHECKS != "0" and importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    install_import_hook(["spectrim.linalg", "spectrim.network.factors"], "beartype.beartype")

import hypothesis
import jaxtyping

torch.set_num_threads(int(os.environ.get("SPECTRIM_TEST_THREADS", "2")))

# A first call may compile or import something slow: time limits a case would make tests flaky.
hypothesis.settings.register_profile(
    "spectrim",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("SPECTRIM_EXAMPLES", "50")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("spectrim")


@pytest.fixture(autouse=True)
def _shapes(request: pytest.FixtureRequest) -> None:
    """Shapes are checked in all tests of the mathematics, and in the first case of each test of a method."""
    room, case = request.path.parent.name, (request.path, request.node.originalname)
    checked = room in ("linalg", "network") or (room == "methods" and case not in _CHECKED)
    _CHECKED.add(case)
    jaxtyping.config.update("jaxtyping_disable", SHAPE_CHECKS != "all" and not checked)


_CHECKED: set[tuple[Path, str]] = set()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, alone or among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
