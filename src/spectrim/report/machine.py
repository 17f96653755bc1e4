"""What the numbers of a report were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version


def machine_facts() -> dict[str, str]:
    """Processor, memory, threads, accelerator and versions, as text by name."""
    import torch

    from spectrim.nn.timing import device_name

    facts = {
        "processor": device_name("cpu"),
        "cores": str(os.cpu_count() or "unknown"),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "spectrim": _installed(),
    }
    if torch.cuda.is_available():
        facts["accelerator"] = f"{device_name('cuda')}, CUDA {torch.version.cuda}"
    return facts


def _installed() -> str:
    """The version of this package; a source tree that is not installed has none."""
    try:
        return version("spectrim")
    except PackageNotFoundError:
        return "not installed"
