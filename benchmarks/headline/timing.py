"""``--stage timing``: kept networks beside the dense ones, in turns, in every runtime; for a quiet machine.

Eager, ``torch.compile`` and ONNX Runtime on the CPU, at every batch. Each line holds the medians and the interval in
which the ratio of the two lies in 99 of 100 cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from benchmarks.environment import environment, today
from spectrim.nn.timing import Speed, measure_latency

# As the file of results calls them, and as the library does.
RUNTIMES = {"eager": "eager", "compiled": "compile", "ONNX Runtime": "onnxruntime"}


def timed(
    row: Mapping[str, Any], dense: nn.Module, small: nn.Module, example: Any, *, runtime: str, batch: int, threads: int,
    repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Times of a kept network and the dense one in turns, or why there are none."""
    key = {name: row[name] for name in ("network", "budget", "arm")}
    found: dict[str, Any] = {**key, "runtime": runtime, "batch": batch, "threads": threads}
    try:
        both = {"dense": dense, "small": small}
        times = measure_latency(both, example, repeats=repeats, threads=threads, runtime=RUNTIMES[runtime])
    except Exception as error:  # any reason is a line
        return {**found, "failed": f"{type(error).__name__}: {error}"[:200], "date": today()}
    speed = Speed.of(times["dense"], times["small"])
    return {
        **found, "dense_ms": round(times["dense"].p50, 4), "ms": round(times["small"].p50, 4),
        "p90_over_p50": round(times["small"].p90 / times["small"].p50, 3), "faster": round(speed.ratio, 3),
        "low": round(speed.low, 3), "high": round(speed.high, 3), "load": environment()["load_average"],
        "date": today(),
    }  # fmt: skip
