"""D6: a user's script under mypy and pyright, both strict, and what completion of ``st.`` offers.

mypy is put into a folder of its own by pip, so that it need not stand in the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.run import claim

SCRIPT = ROOT / "tests" / "typed_script.py"
OFFERED = "import json, spectrim; print(json.dumps([dir(spectrim), list(spectrim.__all__)]))"


def run(config: dict[str, Any], paths: dict[str, Path]) -> dict[str, Any]:
    """Errors of either checker, and names of ``dir(spectrim)`` that are neither public nor Python's own."""
    work = paths["work"]
    script = work / "user.py"
    script.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    (work / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}', encoding="utf-8")
    found = {"mypy": mypy(script, work / "mypy"), "pyright": pyright(script), "names": offered()}
    faults = sum(map(len, found.values()))
    note = "; ".join(f"{name} {len(each)}" for name, each in found.items())
    value = claim(faults, "errors and names that are not public", "no error; only public names", faults == 0, note=note)
    return {"claims": {"D6": value}, "types": [found]}


def mypy(script: Path, tools: Path) -> list[str]:
    """Errors of ``mypy --strict``."""
    if not (tools / "mypy").exists():
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(tools), "mypy"]
        subprocess.run([sys.executable, *install], check=True)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", sys.executable, script.name]
    path = os.pathsep.join([str(tools), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=script.parent, env={**os.environ, "PYTHONPATH": path}, **TEXT)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"mypy ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return [line for line in done.stdout.splitlines() if ": error:" in line]


def pyright(script: Path) -> list[str]:
    """Errors of pyright in its strict mode."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", script.name]
    done = subprocess.run(command, cwd=script.parent, **TEXT)
    return [each["message"] for each in json.loads(done.stdout)["generalDiagnostics"] if each["severity"] == "error"]


def offered() -> list[str]:
    """Names that ``dir(spectrim)`` has beside the public ones and those of every module."""
    names, public = json.loads(subprocess.run([sys.executable, "-c", OFFERED], check=True, **TEXT).stdout)
    return [name for name in names if name not in public and not name.startswith("__")]


TEXT: dict[str, Any] = {"capture_output": True, "text": True, "encoding": "utf-8"}
