"""D5: the examples and the notebook run in the suite, as its own test runs them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as Tree
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.run import claim

TEST = "tests/test_examples.py"
MINUTES = 5


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Run the examples' test. The whole suite's time is that of a ``make test`` beside it, which the caller states as

    SPECTRIM_SUITE_SECONDS=280 make bench-door BENCH_ARGS="D5 --force"
    """
    table = Path(paths["work"]) / "examples.xml"
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", TEST, f"--junitxml={table}"], cwd=ROOT, capture_output=True, check=False
    )
    seconds = time.perf_counter() - start
    rows = [
        {
            "name": case.attrib["name"],
            "seconds": round(float(case.attrib["time"]), 2),
            "passed": not list(case),
        }
        for case in Tree.parse(table).iter("testcase")
    ]
    ran = [row for row in rows if "[" in row["name"]]
    scripts = [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.ipynb")]
    suite = float(os.environ.get("SPECTRIM_SUITE_SECONDS", "nan"))
    claims = {
        "D5": claim(
            sum(row["passed"] for row in ran),
            f"of {len(scripts)} examples and notebooks ran",
            f"all; the suite within {MINUTES} minutes",
            all(row["passed"] for row in rows)
            and len(ran) == len(scripts)
            and suite is not None
            and suite <= 60 * MINUTES,
            f"{seconds:.0f} s for all of them; " + ("suite not timed" if math.isnan(suite) else f"suite {suite:.0f} s"),
        )
    }
    return {"claims": claims, "examples": rows, "notes": []}
