from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run, sparse_kernels
from spectrim.linalg import csr
from spectrim.nn.sparse.kernels import Kernel

pytestmark = pytest.mark.skipif(not csr.is_available(), reason="this torch has no fast CSR products")
EXPERIMENT = Path(run.__file__).parent / "experiments" / "sparse_kernels.json"


def result(tmp_path: Path) -> dict[str, Any]:
    held = json.loads(EXPERIMENT.read_text())
    threads = torch.get_num_threads()
    target = tmp_path / "result.json"
    run.run("sparse_kernels", {**held, **held["smoke"]}, {"work": tmp_path / "work"}, target)
    assert torch.get_num_threads() == threads
    return json.loads(target.read_text())


def test_every_case_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_kernels, "_REST", 2**12)
    held = result(tmp_path)
    assert [row["density"] for row in held["rows"]] == [0.1, 0.6]
    for row in held["rows"]:
        assert all(row[f"{name} ms"] > 0 for name in ("dense", "low rank", "sum, dense", "sum, csr"))
        assert row["chosen_to_best"] >= 1
        assert row["macs_to_dense"] == pytest.approx(2 * 8 / 128 + row["density"], abs=1e-3)
    claim = held["claims"]["S6"]
    assert claim["value"] == max(row["chosen_to_best"] for row in held["rows"])
    assert claim["met"] == (claim["value"] <= 1.05)


def test_a_wrong_choice_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, timed = sparse_kernels.choose_kernels, sparse_kernels._measured

    def wrong(*args: Any, **options: Any) -> Any:
        return tuple(dataclasses.replace(c, kernel=Kernel.CSR) for c in choose(*args, **options))

    def slowed(models: Any, *rest: Any) -> Any:
        found = timed(models, *rest)
        slow = sparse_kernels.Timing(tuple(10 * max(found["sum, dense"].samples) for _ in range(2)))
        return {**found, "sum, csr": slow}

    monkeypatch.setattr(sparse_kernels, "_REST", 2**12)
    monkeypatch.setattr(sparse_kernels, "choose_kernels", wrong)
    monkeypatch.setattr(sparse_kernels, "_measured", slowed)
    claim = result(tmp_path)["claims"]["S6"]
    assert not claim["met"]
    assert claim["value"] >= 10


def test_the_sum_has_the_density_and_the_bias() -> None:
    dense, total = sparse_kernels.layers(32, 4, 0.25)
    assert float(total.sparse.mask.double().mean()) == 0.25
    weight, bias = total.whole()
    assert torch.equal(bias, dense.bias)
    x = torch.randn(3, 32)
    torch.testing.assert_close(total(x), torch.nn.functional.linear(x, weight[0], bias))
