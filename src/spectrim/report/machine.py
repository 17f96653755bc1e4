"""What the numbers of a report were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine_facts() -> dict[str, str]:
    """Processor, memory, threads, accelerator and versions, as text by name."""
    import torch

    facts = {
        "processor": _processor(),
        "cores": str(os.cpu_count() or "unknown"),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "spectrim": _version(),
    }
    if torch.cuda.is_available():
        facts["accelerator"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return facts


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # no such file outside Linux
    return platform.processor() or platform.machine() or "unknown"


def _version() -> str:
    try:
        return version("spectrim")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"
