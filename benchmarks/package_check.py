"""What is shipped: the wheel and the source archive are built, looked into, and installed in empty environments.

    python -m benchmarks.package_check [--work DIR]

Installs with ``constraints.txt`` from the package index that pip is set up with. An environment is made for it, with
torch, so it takes minutes; nothing is written into the repository.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import ROOT
from spectrim import __version__

# A model made small, saved and loaded again, with the package alone: no extra, no test data.
SMALL = """
import sys, torch
from torch import nn
import spectrim as st
make = lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
torch.manual_seed(0)
model, batches = make(), [torch.randn(32, 64) for _ in range(4)]
result = st.compress(model, batches, "macs=50%")
st.save(result.model, result.plan, "small.safetensors")
again = st.load(make(), "small.safetensors")
assert torch.equal(again(batches[0]), result.model(batches[0]))
assert result.plan.costs["macs"] <= 0.5 * result.plan.dense_costs["macs"]
assert "site-packages" in st.__file__, st.__file__
print(st.__version__)
"""
SHIPPED = ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "constraints.txt", "pyproject.toml")


@dataclass(frozen=True)
class Environment:
    """An environment of its own, which sees nothing of the one this runs in."""

    folder: Path

    @classmethod
    def empty(cls, folder: Path) -> Environment:
        shutil.rmtree(folder, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(folder)], folder.parent)
        return cls(folder)

    @property
    def bin(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    def pip(self, *words: str) -> str:
        """pip with the project's constraints."""
        flags = ["--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
        return run([str(self.bin / "python"), "-m", "pip", "install", *flags, *words], self.folder.parent)

    def python(self, *words: str, folder: Path | None = None) -> str:
        return run([str(self.bin / "python"), *words], folder or self.folder.parent)


def run(words: Sequence[str], folder: Path, more: Mapping[str, str] | None = None) -> str:
    """What a command says on standard output, without the caller's Python settings; RuntimeError if it fails."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(words, cwd=folder, env={**ours, **(more or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def build(work: Path) -> tuple[Path, Path]:
    """The source archive, and the wheel made from what is in it."""
    tools, dist = work / "tools", work / "dist"
    for folder in (dist, work / "unpacked"):
        shutil.rmtree(folder, ignore_errors=True)
    flags = ["--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    if not tools.exists():
        run([sys.executable, "-m", "pip", "install", *flags, "--target", str(tools), "hatchling"], work)
    hatchling = [sys.executable, "-m", "hatchling", "build", "-d", str(dist)]
    run([*hatchling, "-t", "sdist"], ROOT, {"PYTHONPATH": str(tools)})
    archive = dist / f"spectrim-{__version__}.tar.gz"
    with tarfile.open(archive) as file:
        file.extractall(work / "unpacked", filter="data")
    run([*hatchling, "-t", "wheel"], work / "unpacked" / f"spectrim-{__version__}", {"PYTHONPATH": str(tools)})
    return archive, dist / f"spectrim-{__version__}-py3-none-any.whl"


def look_into(archive: Path, wheel: Path) -> str:
    """Whether both hold what they should, and the wheel nothing else."""
    with zipfile.ZipFile(wheel) as file:
        inside = set(file.namelist())
        text = file.read(f"spectrim-{__version__}.dist-info/METADATA").decode()
    package = ROOT / "src" / "spectrim"
    here = {
        f"spectrim/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"spectrim/py.typed", "spectrim/__init__.pyi", "spectrim/report/page.html.jinja"} <= here
    ours = {name for name in inside if not name.startswith(f"spectrim-{__version__}.dist-info/")}
    assert ours == here, f"the wheel differs from src in {sorted(ours ^ here)}"
    assert f"spectrim-{__version__}.dist-info/licenses/LICENSE" in inside
    head = text.partition("\n\n")[0]
    assert f"\nVersion: {__version__}\n" in head
    assert "License-Expression: Apache-2.0" in head
    for extra in extras():
        assert f"\nProvides-Extra: {extra}\n" in head + "\n"
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert not {name for name in names if name.startswith((".venv", "site/", "data/", "runs/"))}
    missing = {*SHIPPED, *(f"src/{name}" for name in here), "tests/conftest.py", "examples/own_model.py"} - names
    assert not missing, f"the source archive lacks {sorted(missing)}"
    return f"wheel {len(inside)} files, {wheel.stat().st_size:,} bytes; source archive {len(names)} files"


def extras() -> list[str]:
    return sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def bare(environment: Environment, wheel: Path) -> str:
    """The wheel without extras: it works from Python, serves, and the program says what it lacks."""
    environment.pip(str(wheel))
    folder = environment.folder.parent / "bare"
    folder.mkdir(exist_ok=True)
    assert environment.python("-c", SMALL, folder=folder) == __version__
    served = environment.python(str(ROOT / "examples" / "service.py"), folder=folder)
    assert served.endswith("training parts loaded: False"), served
    program = subprocess.run(
        [str(environment.bin / "spectrim"), "--version"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert program.returncode == 1, f"typer is installed without the extra cli: {program.stdout}"
    assert program.stderr.startswith("spectrim: "), program.stderr
    assert "pip install 'spectrim[cli]'" in program.stderr, program.stderr
    return "compress, save, load and serve without extras"


def all_extras(environment: Environment, wheel: Path) -> str:
    """All extras can be installed together, within the constraints."""
    environment.pip("--dry-run", f"{wheel}[{','.join(extras())}]")
    return ", ".join(extras())


def command_line(environment: Environment, wheel: Path) -> str:
    environment.pip(f"{wheel}[cli]")
    return run([str(environment.bin / "spectrim"), "--version"], environment.folder.parent)


def from_source(environment: Environment, archive: Path) -> str:
    """The source archive builds where it is installed."""
    environment.pip("--force-reinstall", "--no-deps", str(archive))
    folder = environment.folder.parent / "source"
    folder.mkdir(exist_ok=True)
    assert environment.python("-c", SMALL, folder=folder) == __version__
    return run([str(environment.bin / "spectrim"), "--version"], folder)


def check(work: Path) -> None:
    """All of it, one line a step; raises at the first step that fails."""
    archive, wheel = build(work)
    steps: list[tuple[str, Callable[[], str]]] = [
        ("contents", lambda: look_into(archive, wheel)),
        ("without extras", lambda: bare(environment, wheel)),
        ("extras resolve", lambda: all_extras(environment, wheel)),
        ("command line", lambda: command_line(environment, wheel)),
        ("from source", lambda: from_source(environment, archive)),
    ]
    environment = Environment.empty(work / "environment")
    for name, step in steps:
        print(f"{name:15} {step()}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.package_check", description=__doc__)
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where to build; a folder that is removed, if not given"
    )
    work = parser.parse_args(arguments).work
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        check(work.resolve())
        return 0
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
