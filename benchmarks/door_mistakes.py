"""D4: typical mistakes of newcomers, and whether each is answered by one sentence with the cure before any work.

Mistakes on the command line run as a program of their own each, in a folder with a model in a file, images, arrays and
a table. Mistakes in Python run in this process, so that their time is without the import of torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.run import claim

MOST = 1.0
"""Seconds that an answer may take."""

NET = """
from torch import nn


def build(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 16, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def of_size(width):
    return build(width)
"""
SCRIPT = """
import json, sys, time
from spectrim.cli.app import main
sys.argv = ["spectrim", *json.loads(sys.argv[1])]
code = 0
try:
    main()
except SystemExit as done:
    code = done.code
print(json.dumps({"code": code, "torch": "torch" in sys.modules}), file=sys.stderr)
"""
_NET = ("compress", "net.py:build")
_RUN = (*_NET, "--input", "3x8x8")
_GOAL = ("-b", "macs=50%")


@dataclass(frozen=True)
class Mistake:
    """Something that people write, and what the answer must say."""

    kind: str  # what it is in: arguments, references, budgets, folders, python
    what: str  # in words
    given: tuple[str, ...] | Callable[[], Any]  # arguments of the program, or a function that calls the library
    cure: str  # text that the answer holds
    needs_model: bool = False  # whether it can only be found with the model, and thus with torch


COMMAND_LINE = (
    Mistake("arguments", "a command misspelt", ("compres", "net.py:build"), "Did you mean 'compress'"),
    Mistake("arguments", "an option misspelt", (*_RUN, "--bugdet", "macs=50%"), "--budget"),
    Mistake("arguments", "no model", ("compress",), "'MODEL'"),
    Mistake("arguments", "no budget", _RUN, "--budget (as macs=50%)"),
    Mistake("arguments", "no data and no input", (*_NET, *_GOAL), "--input 3x224x224"),
    Mistake("arguments", "a word for a number", (*_RUN, *_GOAL, "--epochs", "ten"), "--epochs 'ten'"),
    Mistake("arguments", "a shape with commas", (*_NET, "--input", "3,8,8", *_GOAL), "Did you mean 3x8x8?"),
    Mistake("arguments", "a method misspelt", (*_RUN, *_GOAL, "--method", "wieght-svd"), "Did you mean 'weight-svd'?"),
    Mistake("arguments", "a method by its class", (*_RUN, *_GOAL, "--method", "WeightSVD"),
            "Did you mean 'weight-svd'?"),
    Mistake("arguments", "an option of a method misspelt", (*_RUN, *_GOAL, "--method", "weight-svd:multipel_of=8"),
            "Did you mean 'multiple_of'?"),
    Mistake("arguments", "a method that needs data", (*_RUN, *_GOAL, "--method", "activation-svd"), "give --data"),
    Mistake("arguments", "a selector misspelt", (*_RUN, *_GOAL, "--selector", "exakt"), "Did you mean 'exact'?"),
    Mistake("arguments", "a device misspelt", (*_RUN, *_GOAL, "--device", "cdua"), "Did you mean 'cuda'?"),
    Mistake("arguments", "a layer misspelt", (*_RUN, *_GOAL, "--skip", "01"), "layers are: 0, 2, 6", needs_model=True),
    Mistake("arguments", "ranks to learn, and nothing to train on",
            (*_RUN, *_GOAL, "--method", "learned-ranks"), "give --train"),
    Mistake("arguments", "export to an unknown format",
            ("export", "net.py:build", "--input", "3x8x8", "-o", "net.tflite"), ".onnx or .pt2"),
    Mistake("references", "a function misspelt", ("compress", "net.py:biuld", *_RUN[2:], *_GOAL),
            "Did you mean 'build'?"),
    Mistake("references", "a file misspelt", ("compress", "nte.py:build", *_RUN[2:], *_GOAL), "Did you mean 'net.py'?"),
    Mistake("references", "a file without a function", ("compress", "net.py", *_RUN[2:], *_GOAL), "net.py:build"),
    Mistake("references", "a module that is a file", ("compress", "models.net:build", *_RUN[2:], *_GOAL), "./file.py:"),
    Mistake("references", "an argument misspelt", ("compress", "net.py:build?widht=4", *_RUN[2:], *_GOAL),
            "Did you mean 'width'?"),
    Mistake("references", "an argument left out", ("compress", "net.py:of_size", *_RUN[2:], *_GOAL), "?width=VALUE"),
    Mistake("references", "a file that Python cannot read", ("compress", "broken.py:build", *_RUN[2:], *_GOAL),
            "line 1"),
    Mistake("references", "weights in place of a model", ("compress", "net.pt", *_RUN[2:], *_GOAL), "--weights net.pt"),
    Mistake("references", "weights that are not there", (*_RUN, *_GOAL, "-w", "nte.pt"), "Did you mean 'net.pt'?"),
    Mistake("references", "a library misspelt", ("compress", "torchvison:resnet18", *_RUN[2:], *_GOAL),
            "Did you mean 'torchvision'?"),
    Mistake("references", "a folder of transformers that is not there", ("compress", "hf:./bert", *_RUN[2:], *_GOAL),
            "there is no such folder"),
    Mistake("references", "data misspelt", (*_NET, "-d", "digit", *_GOAL), "Did you mean 'digits'?"),
    Mistake("references", "an option of data misspelt", (*_NET, "-d", "digits?limits=64", *_GOAL),
            "Did you mean 'limit'?"),
    Mistake("references", "an array that is not in the file", (*_NET, "-d", "images.npz?inputs=imgs", *_GOAL),
            "Did you mean 'images'?"),
    Mistake("references", "a column that is not in the table", (*_NET, "-d", "table.csv?labels=specis", *_GOAL),
            "Did you mean 'species'?"),
    Mistake("budgets", "FLOPs", (*_RUN, "-b", "flops=50%"), "Did you mean 'macs'?"),
    Mistake("budgets", "size", (*_RUN, "-b", "size=50%"), "Did you mean 'bytes'?"),
    Mistake("budgets", "params", (*_RUN, "-b", "params=50%"), "Did you mean 'parameters'?"),
    Mistake("budgets", "a share of nothing", (*_RUN, "-b", "50%"), "Did you mean macs=50%?"),
    Mistake("budgets", "a share without its sign", (*_RUN, "-b", "macs=50"), "macs=50%"),
    Mistake("budgets", "a colon", (*_RUN, "-b", "macs:50%"), "Did you mean macs=50%?"),
    Mistake("budgets", "an unknown unit", (*_RUN, "-b", "latency=3sec"), "us, ms, s"),
    Mistake("budgets", "less than nothing", (*_RUN, "-b", "macs=-5%"), "must be positive"),
    Mistake("folders", "a folder without images", (*_NET, "-d", "imagefolder:empty", *_GOAL), "no images in 'empty'"),
    Mistake("folders", "a folder misspelt", (*_NET, "-d", "imagefolder:phtos", *_GOAL), "Did you mean 'photos'?"),
    Mistake("folders", "a folder without its kind", (*_NET, "-d", "photos", *_GOAL), "imagefolder:photos"),
    Mistake("folders", "results in a file", (*_RUN, *_GOAL, "-o", "net.py"), "is a file, not a folder"),
    Mistake("folders", "the folder of a checkpoint", ("evaluate", "net.py:build", "-c", "small", "--input", "3x8x8"),
            "small/model.safetensors"),
)  # fmt: skip


def python() -> tuple[Mistake, ...]:
    """Mistakes in calls of the library."""
    import torch
    from torch import nn

    import spectrim

    layers = {
        "conv": nn.Conv2d(3, 8, 3),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "head": nn.Linear(8, 4),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    data = [torch.randn(8, 3, 8, 8)]

    def call(*args: Any, **named: Any) -> Callable[[], Any]:
        return lambda: spectrim.compress(*args, **named)

    return (
        Mistake("python", "FLOPs", call(model, data, "flops=50%"), "Did you mean 'macs'?"),
        Mistake("python", "a share of nothing", call(model, data, "50%"), "Did you mean macs=50%?"),
        Mistake("python", "a share without its sign", call(model, data, "macs=50"), "macs=50%"),
        Mistake("python", "a number for a budget", call(model, data, 0.5), "Budget(macs=0.5)"),
        Mistake("python", "a class for a model", call(type(model), data, "macs=50%"), "torch.nn.Module"),
        Mistake("python", "a state dict for a model", call(model.state_dict(), data, "macs=50%"), "torch.nn.Module"),
        Mistake("python", "a method by its name", call(model, data, "macs=50%", methods="weight-svd"), "WeightSVD()"),
        Mistake("python", "a method's class", call(model, data, "macs=50%", methods=spectrim.WeightSVD), "WeightSVD()"),
        Mistake("python", "a layer misspelt", call(model, data, "macs=50%", skip="haed"), "Did you mean 'head'?"),
        Mistake("python", "no batches", call(model, [], "macs=50%"), "pass a list"),
        Mistake("python", "one tensor in place of batches", call(model, data[0][0], "macs=50%"), "batch"),
        Mistake("python", "images of the wrong number of channels",
                call(model, [torch.randn(8, 1, 8, 8)], "macs=50%"), "3 channels"),
    )  # fmt: skip


def make_folder(folder: Path) -> None:
    """A newcomer's folder: a model in a file, its weights, images, arrays, a table, and what is broken."""
    import numpy as np
    import torch
    from PIL import Image

    for name in ("empty", "photos/cat", "small"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NET, encoding="utf-8")
    (folder / "broken.py").write_text("def build(:\n", encoding="utf-8")
    torch.save({}, folder / "net.pt")
    (folder / "small" / "model.safetensors").touch()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "photos" / "cat" / "0.png")
    np.savez(folder / "images.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4))
    (folder / "table.csv").write_text("length,width,species\n1,2,a\n", encoding="utf-8")


def answered(mistake: Mistake, said: list[str], seconds: float, torch_loaded: bool) -> dict[str, Any]:
    """One row: what was said, how fast, and whether that is one sentence with the cure, before any work."""
    one = len(said) == 1
    cured = one and mistake.cure in said[0]
    early = mistake.needs_model or not torch_loaded
    return {
        "kind": mistake.kind, "mistake": mistake.what, "said": " ".join(said), "seconds": round(seconds, 3),
        "before_torch": not torch_loaded, "one_sentence": one, "cure": cured,
        "met": one and cured and early and seconds <= MOST,
    }  # fmt: skip


def on_the_command_line(mistake: Mistake, folder: Path) -> dict[str, Any]:
    """Make a mistake on the command line; the time is without the import of torch where that is needed."""
    assert isinstance(mistake.given, tuple)
    done, used, wall = _program(SCRIPT, [json.dumps(mistake.given)], folder)
    *said, last = done.stderr.strip().splitlines()
    found = json.loads(last)
    if found["torch"]:
        used -= _program("import torch, spectrim.pipeline, spectrim.report, spectrim.train", [], folder)[1]
    row = answered(mistake, said, max(used, 0.0), found["torch"])
    clean = found["code"] == 2 and not (folder / "compressed").exists()
    return {"command": " ".join(("spectrim", *mistake.given)), **row, "code": found["code"],
            "wall_seconds": round(wall, 2),
            "met": row["met"] and clean}  # fmt: skip


def _program(script: str, arguments: list[str], folder: Path) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """Run Python; what it says, and seconds of the processor and of the clock that it took."""
    source = str(Path(__file__).parents[1] / "src")
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": source, "COLUMNS": "80"},
    )  # fmt: skip
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return done, used, time.perf_counter() - start


def in_python(mistake: Mistake) -> dict[str, Any]:
    """Make a mistake in a call."""
    assert callable(mistake.given)
    start, said = time.process_time(), []
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            mistake.given()
        except Exception as error:  # whatever comes is judged
            said = [f"{type(error).__name__}: {error}"]
    return answered(mistake, said, time.process_time() - start, torch_loaded=False)


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Make all mistakes."""
    folder = Path(paths["work"])
    make_folder(folder)
    rows = [on_the_command_line(mistake, folder) for mistake in COMMAND_LINE]
    for mistake in python():
        in_python(mistake)  # what torch imports when it is needed first is no part of an answer
        rows.append(in_python(mistake))
    missed = [f"{row['kind']}: {row['mistake']}" for row in rows if not row["met"]]
    slowest = max(row["seconds"] for row in rows)
    note = f"{len(rows)} mistakes, slowest {slowest:.2f} s" + (f"; not so: {', '.join(missed)}" if missed else "")
    met = len(rows) - len(missed)
    target = f"all {len(rows)}, each <= {MOST:g} s of the processor"
    return {
        "claims": {"D4": claim(met, f"of {len(rows)} mistakes answered in one sentence with the cure, before any work",
                               target, not missed, note)},
        "mistakes": rows,
        "notes": [
            "D4: times are those of the processor, since other programs ran beside it. On the command line they are of "
            "the whole program, from starting Python to its end; where the model is needed to see the mistake, without "
            "the import of torch and the library. In Python they are of the call made a second time: the first imports."
        ],
    }  # fmt: skip
