"""``--stage timing``: kept networks beside the dense ones, in turns, in every runtime; for a quiet machine.

Eager, ``torch.compile`` and ONNX Runtime on the CPU, at every batch. Each line holds the medians and the interval in
which the ratio of the two lies in 99 of 100 cases.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from benchmarks.environment import environment, today
from benchmarks.headline.network import run_on
from spectrim.nn.timing import Speed, measure_latency


class Exported(nn.Module):
    """An ONNX file run by ONNX Runtime, as a module."""

    def __init__(self, model: nn.Module, example: Any, threads: int) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            st.export_onnx(model, example, path, dynamic_batch=False)
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, *tensors: Tensor, **named: Tensor) -> Any:
        names = [each.name for each in self.session.get_inputs()]
        given = named or dict(zip(names, tensors, strict=True))
        return self.session.run(None, {name: tensor.numpy() for name, tensor in given.items()})


def compiled(model: nn.Module, example: Any, threads: int) -> nn.Module:
    """The network after ``torch.compile``, run once."""
    made: Any = torch.compile(copy.deepcopy(model), dynamic=False)
    run_on(made, example)
    return made


RUNTIMES: dict[str, Callable[[nn.Module, Any, int], nn.Module]] = {
    "eager": lambda model, example, threads: model,
    "compiled": compiled,
    "ONNX Runtime": Exported,
}


def timed(
    row: Mapping[str, Any], dense: nn.Module, small: nn.Module, example: Any, *, runtime: str, batch: int, threads: int,
    repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Times of a kept network and the dense one in turns, or why there are none."""
    key = {name: row[name] for name in ("network", "budget", "arm")}
    found: dict[str, Any] = {**key, "runtime": runtime, "batch": batch, "threads": threads}
    torch.set_num_threads(threads)
    try:
        both = {name: RUNTIMES[runtime](m.eval(), example, threads) for name, m in (("dense", dense), ("small", small))}
        times = measure_latency(both, example, repeats=repeats)
    except Exception as error:  # any reason is a line
        return {**found, "failed": f"{type(error).__name__}: {error}"[:200], "date": today()}
    speed = Speed.of(times["dense"], times["small"])
    return {
        **found, "dense_ms": round(times["dense"].p50, 4), "ms": round(times["small"].p50, 4),
        "p90_over_p50": round(times["small"].p90 / times["small"].p50, 3), "faster": round(speed.ratio, 3),
        "low": round(speed.low, 3), "high": round(speed.high, 3), "load": environment()["load_average"],
        "date": today(),
    }  # fmt: skip
