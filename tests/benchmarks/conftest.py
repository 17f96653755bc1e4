"""Fixtures of the benchmarks that train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cases import one_thread


@pytest.fixture
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Random images in the layout of CIFAR-10, few of them held out."""
    monkeypatch.setattr("benchmarks.cifar.HELD_OUT", 50)
    draw = np.random.default_rng(0)
    for name, count in (*((f"data_batch_{i}", 50) for i in range(1, 6)), ("test_batch", 60)):
        records = draw.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / f"{name}.bin")
    return {"cifar10": tmp_path, "weights": {}, "work": tmp_path, "shared": tmp_path}
