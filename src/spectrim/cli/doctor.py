"""``spectrim doctor``: what there is to work with, and what is missing and what that costs."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from spectrim.cli.common import Output, command
from spectrim.cli.models import hub_folder
from spectrim.errors import in_short
from spectrim.network.files import default_cache

_FOR = {
    "train": "fine-tuning and learned ranks: compress --train, path",
    "filters": "removing filters: --method principal-filters",
    "export": "export to .onnx",
    "hf": "models of Hugging Face: hf:NAME",
    "report": "report.html, figures, and folders of images",
}
"""What needs an extra of this package, by its name; extras for developers are left out."""
_BESIDE = {
    "scikit-learn": "the data digits, and demo",
    "torchvision": "models torchvision:NAME",
    "timm": "models timm:NAME",
}
"""What needs a package that is no extra."""
_CPU = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "amx_tile": "AMX", "asimd": "NEON",
        "sve": "SVE"}  # fmt: skip
_IMPORTED = {"scikit-learn": "sklearn", "pillow": "PIL", "torch-pruning": "torch_pruning"}


@dataclass(frozen=True)
class Requirement:
    """A package or an extra that something needs."""

    packages: Mapping[str, str | None]
    needed_for: str
    install: str

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name, found in self.packages.items() if found is None)


@command
def doctor(out: Output) -> None:
    """Say what is installed, what is not and what that costs; processor, threads, memory, caches.

    Examples
    --------
    $ spectrim doctor
    """
    parts = [
        *_extras(),
        *(Requirement({name: _version(name)}, what, f"pip install {name}") for name, what in _BESIDE.items()),
    ]
    # Folders that fill up: what this library measures, and what the libraries around it fetch.
    folders = {"measured times": default_cache(), "Hugging Face": hub_folder()}
    caches = {what: (folder, *_size(folder)) for what, folder in folders.items()}
    found: dict[str, Any] = {
        "versions": {"spectrim": _version("spectrim"), "python": platform.python_version(), "torch": _version("torch")},
        "machine": {"system": f"{platform.system()} {platform.release()} {platform.machine()}", **_processor()},
        "torch": _torch(),
        "memory": _memory(),
        "caches": {what: {"folder": str(at), "files": n, "bytes": size} for what, (at, n, size) in caches.items()},
        "parts": [
            {"packages": dict(each.packages), "needed_for": each.needed_for, "missing": list(each.missing),
             "install": each.install}
            for each in parts
        ],
    }  # fmt: skip
    out.document(found)
    for line in _lines(found, parts):
        out.print(line)


def _lines(found: Mapping[str, Any], parts: Sequence[Requirement]) -> Iterator[str]:
    """The report for people, as wide as the terminal and at most 80 columns."""
    width = min(shutil.get_terminal_size().columns, 80) if sys.stdout.isatty() else 80
    for name, text in _rows(found):
        yield from _wrapped(f"{name:<15}", text, width)
    yield ""
    there = [f"{name} {number}" for each in parts for name, number in each.packages.items() if number is not None]
    yield from _wrapped(f"{'installed':<15}", ", ".join(dict.fromkeys(there)) or "none of the optional packages", width)
    lacking = [each for each in parts if each.missing]
    for each in lacking:
        text = f"{', '.join(each.missing)}. Without: no {each.needed_for}. {each.install}"
        yield from _wrapped(f"{'not installed':<15}", text, width)
    if not lacking:
        yield "Nothing is missing."


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in found["versions"].items())
    machine, torch, memory = found["machine"], found["torch"], found["memory"]
    yield "versions", versions
    yield "Python", sys.executable
    yield "system", machine["system"]
    yield "processor", f"{machine['processor']}, {machine['cores']} cores"
    yield "features", ", ".join(machine["features"]) or "not told by the system"
    yield "torch", _words(torch)
    yield "memory", ", ".join(f"{size / 2**30:.1f} GiB {what}" for what, size in memory.items()) or "not known"
    for what, cache in found["caches"].items():
        size = f"{cache['files']} files, {cache['bytes'] / 1e6:,.1f} MB" if cache["files"] else "empty"
        yield what, f"{cache['folder']} ({size})"


def _wrapped(head: str, text: str, width: int) -> list[str]:
    narrow = width < 60
    indent = " " * (2 if narrow else len(head))
    return textwrap.wrap(f"{head}{text}", width, subsequent_indent=indent, break_on_hyphens=False)


def _words(torch: Mapping[str, Any]) -> str:
    if "error" in torch:
        return f"cannot be imported: {torch['error']}"
    devices = ", ".join(torch["accelerators"]) or "no accelerator"
    return f"computes with {torch['capability']} in {torch['threads']} threads; {devices}"


def _version(package: str) -> str | None:
    """The version of a package, None if it is not installed; also of one that a source tree holds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "?" if importlib.util.find_spec(_IMPORTED.get(package, package.replace("-", "_"))) else None


def _extras() -> Iterator[Requirement]:
    """The extras of this package, as its metadata list them."""
    try:
        lines = requires("spectrim") or []
    except PackageNotFoundError:  # run from a source tree that is not installed
        lines = []
    for extra, what in _FOR.items():
        names = [line for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]
        packages = dict.fromkeys(re.split(r"[^\w.-]", name, maxsplit=1)[0] for name in names)
        yield Requirement({name: _version(name) for name in packages}, what, f'pip install "spectrim[{extra}]"')


def _processor() -> dict[str, Any]:
    """The processor's name, and what it can compute with as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)[:1]).split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": name[1] if name else platform.processor() or platform.machine(),
        "cores": usable,
        "features": [words for flag, words in _CPU.items() if flag in flags],
    }


def _torch() -> dict[str, Any]:
    """What torch computes with, or why it cannot be imported."""
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything
        return {"error": in_short(error)}
    cuda = torch.cuda.is_available()
    accelerators = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else []
    if torch.backends.mps.is_available():
        accelerators.append("mps")
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerators": accelerators,
    }


def _memory() -> dict[str, int]:
    """Bytes of memory, and how many are free, as the system tells; what a container may take, where that is less."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        found = {what: 1024 * int(re.findall(rf"^{key}:\s*(\d+)", text, re.M)[0])
                 for what, key in (("in all", "MemTotal"), ("free", "MemAvailable"))}  # fmt: skip
    except (OSError, IndexError):
        return {}
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        limit = "max"
    return found | ({"allowed here": int(limit)} if limit.isdigit() and int(limit) < found["in all"] else {})


def _size(folder: Path) -> tuple[int, int]:
    """How many files a folder holds, and their bytes; links count once, where they lie."""
    files = [Path(at) / name for at, _, names in os.walk(folder) for name in names]
    return len(files), sum(file.lstat().st_size for file in files)
