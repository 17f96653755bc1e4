"""What the numbers of a report were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version


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
        "spectrim": version("spectrim"),
    }
    if torch.cuda.is_available():
        facts["accelerator"] = f"{device_name('cuda')}, CUDA {torch.version.cuda}"
    return facts
