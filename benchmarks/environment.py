"""What a result was measured on, and with which code."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import spectrim
from spectrim.cost.latency import device_name

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, Any]:
    """Machine and library facts."""
    return {
        "cpu": device_name("cpu"),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def code_version() -> dict[str, Any]:
    """Version, commit, and whether the working tree differed from it."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return {"spectrim": spectrim.__version__, "commit": commit, "changed": bool(changed)}


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
