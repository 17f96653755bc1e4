"""D2: from nothing to a result, as a stranger goes: a fresh clone, and the wheel in an empty environment.

The second way ends in ``docs/first-ten-minutes.md``: what was typed and what it said, without the machine's paths.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.package_check import Environment, build
from benchmarks.package_check import run as execute
from benchmarks.run import claim

PAGE = ROOT / "docs" / "first-ten-minutes.md"
MINUTES = 10
NET = """\
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    model, train, test = build(), slice(400, None), slice(400)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(4):
        for part in torch.randperm(len(labels) - 400).add(400).split(50):
            loss = nn.functional.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save(model.state_dict(), "net.pt")
    for name, part in {"train": train, "test": test}.items():
        np.savez(f"{name}.npz", images=images[part].numpy(), labels=labels[part].numpy())
"""
STEPS = (
    (
        "What is in the network, and what could be chosen at each layer:",
        "spectrim profile net.py:build -w net.pt -d train.npz",
    ),
    (
        "Compress it to 40 % of its multiply-accumulates (MACs), train the result for two epochs with the dense "
        "network as teacher, and measure both on the test images:",
        "spectrim compress net.py:build -w net.pt -d train.npz --train train.npz --epochs 2 --test test.npz "
        "-b macs=40% -o small",
    ),
    (
        "Compare them again, with 32 images a call:",
        "spectrim evaluate net.py:build -w net.pt -c small/model.safetensors --compare -d test.npz --batch 32",
    ),
    (
        "Write it for ONNX Runtime; the file is run and compared before the command ends:",
        "spectrim export net.py:build -c small/model.safetensors -d test.npz -o small/net.onnx",
    ),
)


@dataclass(frozen=True)
class Step:
    """What was typed, why, and what it said."""

    text: str
    command: str
    said: str
    seconds: float


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    work = Path(paths["work"])
    cloned = fresh_clone(work)
    return found(cloned, *own_model(work))


def found(cloned: dict[str, Any], steps: list[Step], size: int) -> dict[str, Any]:
    """The claim and its rows; the page is written on the way."""
    PAGE.write_text(page(steps), encoding="utf-8")
    seconds = sum(step.seconds for step in steps)
    minutes = cloned["seconds"] / 60
    rows = [
        cloned,
        {
            "way": "wheel",
            "seconds": round(seconds, 1),
            "install_seconds": round(steps[0].seconds, 1),
            "onnx_bytes": size,
        },
    ]
    claims = {
        "D2": claim(
            round(seconds / 60, 2),
            "minutes from an empty environment to an exported model",
            f"clone, install and demo end; with the wheel <= {MINUTES} minutes",
            cloned["ended"] and size > 0 and seconds <= 60 * MINUTES,
            f"clone, install and demo took {minutes:.1f} minutes, the demo {cloned['demo_seconds']} s of it",
        )
    }
    notes = ["Packages came from a mirror near the machine; elsewhere the download of torch takes what it takes."]
    return {"claims": claims, "fresh": rows, "notes": notes}


def fresh_clone(work: Path) -> dict[str, Any]:
    """``git clone``, ``make install`` and ``make demo``, and the demo's own seconds."""
    clone = work / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    start = time.perf_counter()
    execute(["git", "clone", "--quiet", str(ROOT), str(clone)], work)
    execute(["make", "install"], clone)
    said = execute(["make", "demo"], clone)
    seconds = time.perf_counter() - start
    (own,) = re.findall(r"^took (\d+) s$", said, re.MULTILINE)
    verdict = re.findall(r"^(?:Faster|Slower on this machine|Time): .*", said, re.MULTILINE)
    return {
        "way": "clone", "seconds": round(seconds, 1), "demo_seconds": int(own), "said": verdict,
        "ended": bool(verdict) and (clone / "demo-out" / "model.safetensors").exists(),
    }  # fmt: skip


def own_model(work: Path) -> tuple[list[Step], int]:
    """A model of one's own by the command line alone; what was typed, and the bytes of the exported file."""
    _, wheel = build(work)
    folder = work / "mine"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start = time.perf_counter()
    environment = Environment.empty(work / "environment")
    environment.pip(f"{wheel}[cli,report,export]", "scikit-learn")
    return transcript(environment, wheel.name, time.perf_counter() - start, folder)


def transcript(environment: Environment, wheel: str, seconds: float, folder: Path) -> tuple[list[Step], int]:
    """What is typed once the wheel is installed, which took so many seconds."""
    steps = [Step("", f"pip install '{wheel}[cli,report,export]' scikit-learn", "", seconds)]
    (folder / "net.py").write_text(NET, encoding="utf-8")
    for text, command in (("", "python net.py"), *STEPS):
        start = time.perf_counter()
        said = typed(environment, command, folder)
        steps.append(Step(text, command, said, time.perf_counter() - start))
    return steps, (folder / "small" / "net.onnx").stat().st_size


def typed(environment: Environment, command: str, folder: Path) -> str:
    """What a command of the page says on standard output, run in that environment; RuntimeError if it fails."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    search = os.pathsep.join([str(environment.bin), ours.get("PATH", "")])
    more = {"PATH": search, "COLUMNS": "96", "SPECTRIM_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, shell=True, cwd=folder, env={**ours, **more}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return re.sub(r"[ \t]+$", "", done.stdout.replace(str(folder), "."), flags=re.MULTILINE).strip("\n")


def page(steps: list[Step]) -> str:
    """The transcript as a page of the documentation."""
    first, made, *others = steps
    whole = sum(step.seconds for step in steps)
    parts = [
        "# The first ten minutes",
        "From an empty environment to a model of your own that is smaller, compared and exported, by the command line "
        "alone. `benchmarks/door_fresh.py` (`make bench-door`, D2) types these commands and writes this page; "
        f"with the installation they took {whole / 60:.1f} minutes, on {os.cpu_count()} cores with "
        f"a load of {os.getloadavg()[0]:.0f}.",
        "The wheel comes from a clone of the repository, by `pip wheel . --no-deps`; "
        "`pip install '.[cli,report,export]'` there does as well:",
        f"```sh\n{first.command}\n```",
        "Your model is a function that makes it, and a file of its weights. Here both come from a small script, "
        "`net.py`, which stands for what you have; the images and labels lie in two `.npz` files:",
        f"```python\n{NET}```",
        f"```sh\n{made.command}\n```",
    ]
    for step in others:
        parts += [step.text, f"```sh\n{wrapped(step.command)}\n```", f"```text\n{step.said}\n```"]
    parts += [
        "The report, `small/report.html`, opens in a browser and loads nothing from elsewhere. "
        "Where to go from here: [Getting started](tutorials/getting-started.md) does the same in Python, and "
        "[Saving, merging, exporting](tutorials/shipping.md) says what becomes of the files."
    ]
    return "\n\n".join(parts) + "\n"


def wrapped(command: str) -> str:
    """A command on lines of at most 80 columns, broken before options."""
    lines = [""]
    for word in re.split(r" (?=-)", command):
        if lines[-1] and len(lines[-1]) + len(word) > 76:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)
