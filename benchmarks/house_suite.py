"""The library's own tests in one process, as the CPU is and as one with AVX2 alone (H2)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.run import claim

# A CPU with AVX2 and nothing newer, as torch's and oneDNN's kernels see it.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
# As make test has it: asserts are rewritten in the first run, and read in the second.
WRITTEN = {"PYTHONDONTWRITEBYTECODE": ""}


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Run the tests twice."""
    rows = [_suite(extra, config["suite"]) for extra in ({}, AVX2)]
    notes = ["The second run has the environment " + " ".join(f"{k}={v}" for k, v in AVX2.items()) + "."]
    return {"claims": {"H2": _ends(rows, config["seconds"])}, "rows": rows, "seeds": [0], "notes": notes}


def _suite(extra: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    """The library's own tests in one process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **WRITTEN, **extra}, capture_output=True, text=True)
    return {
        "environment": extra,
        "seconds": round(time.perf_counter() - start, 1),
        "exit": done.returncode,
        "last": done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:],
    }


def _ends(suite: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    worst = max(row["seconds"] for row in suite)
    met = worst <= seconds and all(row["exit"] == 0 for row in suite)
    told = "; ".join(f"{'AVX2 only' if row['environment'] else 'as it is'}: {row['last']}" for row in suite)
    return claim(worst, "s, the longer of two runs of the suite", f"<= {seconds:g} s, both green", met, told)
