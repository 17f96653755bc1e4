"""Commands and calls that write, killed again and again: files are whole, runs go on to the same bits (N4).

Every action runs in children of this process. Half of the kills come at a moment drawn at random, half at the event of
the file system (a file opened for writing, renamed or removed, a folder made) that comes next in turn, so that each of
them is met. After a kill every file that is there must be readable; the next start goes on in the same folder. Every
so often, and at the end, one is left to end, which must leave the files of a run that was never disturbed, and nothing
beside them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import spectrim as st
from benchmarks import resumed
from benchmarks.run import claim
from spectrim.cost.latency import Latency
from spectrim.nn.checkpoint import read_plan
from spectrim.selection.trajectory import Trajectory
from spectrim.train import Recipe, Schedule, resume

EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "tempfile.mkdtemp", "tempfile.mkstemp")


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """All actions of the experiment, one after the other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        known = actions()
        rows, mixed = resumed.rows(
            paths["work"] / "killed_writes.jsonl",
            [{"action": name} for name in config["kills"]],
            lambda action: kill(known[action], config["kills"][action], config["whole_every"], config["seed"]),
        )
    finally:
        torch.set_num_threads(threads)
    wrong = sum(len(row["wrong"]) for row in rows)
    kills = sum(row["killed"] for row in rows)
    least = min(row["killed"] for row in rows)
    whole = sum(row["whole"] for row in rows)
    note = f"{kills} kills of {len(rows)} commands and calls, {least} or more of each, {whole} runs left to end"
    target = "200 kills each: files whole, resumed bit-equal, no orphan after the next run"
    met = not wrong and least >= 200
    return {
        "claims": {config["claim"]: claim(wrong, "kills after which something was wrong", target, met, note)},
        "rows": rows,
        "seeds": [config["seed"]],
        "notes": [
            "A run that is left to end starts in a folder that killed runs have left. Files are compared by what they "
            "hold: tensors bit for bit, plans and ranks but for measured seconds; pages and figures must be whole.",
            *mixed,
        ],
    }  # fmt: skip


@dataclass(frozen=True)
class Action:
    """Something that writes."""

    do: Callable[[], object]  # carries it out in the working directory
    files: tuple[str, ...]  # that it leaves, of which those of a run that was not disturbed are the model


def kill(action: Action, kills: int, whole_every: int, seed: int) -> dict[str, Any]:
    """Kill an action so many times, and say what was wrong afterwards."""
    draw, wrong = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        first, place, warm = (Path(folder) / name for name in ("undisturbed", "killed", "warm"))
        for each in (first, place, warm):
            each.mkdir()
        # What is imported here is not imported again in every child.
        with contextlib.chdir(warm):
            carry_out(action, warm)
        begin = time.perf_counter()
        events = start(action, first).ended()
        seconds = time.perf_counter() - begin
        wanted = state(first)
        if set(wanted) != set(action.files):
            raise RuntimeError(f"left {sorted(wanted)} in place of {sorted(action.files)}")
        killed = whole = turn = starts = 0
        while killed < kills:
            starts += 1
            if starts % 2:
                turn += 1
                child = start(action, place, at=turn % (events + 1))
                died = child.died()
            else:
                child = start(action, place)
                child.wait(draw.uniform(0, 0.9 * seconds))
                died = child.killed()
            killed += died
            wrong += [f"after kill {killed}: {problem}" for problem in damaged(place)]
            if killed % whole_every == 0 or killed >= kills or not died:
                start(action, place).ended()
                whole += 1
                found = state(place)
                wrong += [f"after run {starts}: {name} differs" for name in wanted if found.get(name) != wanted[name]]
                wrong += [f"after run {starts}: {name} is left" for name in found if name not in wanted]
                shutil.rmtree(place)
                place.mkdir()
    return {"killed": killed, "whole": whole, "events": events, "seconds": seconds, "wrong": wrong}


# --- children -------------------------------------------------------------------------------------------------------


class Child:
    """A process that carries an action out."""

    def __init__(self, number: int, told: int) -> None:
        self.number, self.told, self.status = number, told, None

    def wait(self, seconds: float) -> None:
        """Until it has ended, or so many seconds have gone."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until and self.status is None:
            number, status = os.waitpid(self.number, os.WNOHANG)
            self.status = status if number else None
            time.sleep(0.002)

    def killed(self) -> bool:
        """Kill it; whether it had not ended before."""
        if self.status is None:
            os.kill(self.number, signal.SIGKILL)
        return self.died()

    def died(self) -> bool:
        """Whether it was killed, when it has ended. What it did to end in another way must have gone well."""
        status = os.waitpid(self.number, 0)[1] if self.status is None else self.status
        os.close(self.told)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"an action ended with {code}")
        return code != 0

    def ended(self) -> int:
        """Let it end; how many events there were."""
        text = b""
        while part := os.read(self.told, 100):
            text += part
        if self.died():
            raise RuntimeError("an action was killed by somebody else")
        return int(text)


def carry_out(action: Action, folder: Path) -> None:
    before = os.environ.get("SPECTRIM_CACHE")
    os.environ["SPECTRIM_CACHE"] = str(folder / "cache")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            action.do()
    finally:
        del os.environ["SPECTRIM_CACHE"]
        if before is not None:
            os.environ["SPECTRIM_CACHE"] = before


def start(action: Action, folder: Path, at: int | None = None) -> Child:
    """A child that carries an action out in a folder, and kills itself before the event of that number if asked."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return Child(child, reading)
    code, seen = 1, 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        opened = event == "open" and isinstance(arguments[1], str) and not set("wax+").isdisjoint(arguments[1])
        place = arguments[0] if opened or event in EVENTS else None
        if isinstance(place, str | bytes) and str(folder) in os.path.abspath(os.fsdecode(place)):
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    try:
        os.chdir(folder)
        sys.addaudithook(hook)
        carry_out(action, folder)
        os.write(writing, str(seen).encode())
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


# --- what is there --------------------------------------------------------------------------------------------------


def files(folder: Path) -> Iterator[Path]:
    """All but what is being written or removed."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not _passing(path.relative_to(folder)):
            yield path


def _passing(path: Path) -> bool:
    """Whether a path is one of a writer at work, or the mark of a folder that is on its way out."""
    return path.name == ".writing" or any(part.endswith(".spectrim") for part in path.parts)


def damaged(folder: Path) -> list[str]:
    """Files that cannot be read."""
    found = []
    for path in files(folder):
        try:
            content(path)
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}: {str(error)[:200]}")
    return found


def state(folder: Path) -> dict[str, Any]:
    """What a folder holds, by the name; None for what is left of writing."""
    whole = {path.relative_to(folder).as_posix(): content(path) for path in files(folder)}
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return whole | {path.as_posix(): None for path in found if _passing(path)}


def content(path: Path) -> Any:
    """What a file holds, as far as two runs agree in it; raises if it is not whole."""
    name, data = path.name, path.read_bytes()
    if path.suffix == ".safetensors":
        tensors = {key: (str(t.dtype), tuple(t.shape), bytes(t.reshape(-1).view(torch.uint8).tolist()))
                   for key, t in load_file(path).items()}  # fmt: skip
        if name in ("tuning.safetensors", "learning.safetensors", "checkpoint.safetensors"):
            resume.read_checkpoint(path)
            # The course of learned ranks holds seconds.
            return {key: value for key, value in tensors.items() if not key.endswith("/trajectory")}
        return tensors, read_plan(path).to_json()
    if name == "plan.json":
        return _timeless(json.loads(st.Plan.read(path).to_json()))
    if name == "ranks.json":
        return _timeless(json.loads(Trajectory.read(path).to_json()))
    if path.suffix == ".json":
        return sorted(json.loads(data))
    ends = {".html": b"</html>", ".svg": b"</svg>", ".gif": b";", ".pdf": b"%%EOF", ".png": b"IEND\xaeB`\x82"}
    if path.suffix in ends:
        if not data.rstrip().endswith(ends[path.suffix]):
            raise ValueError("not whole")
        return path.suffix
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    if path.suffix == ".onnx":
        import onnx

        onnx.checker.check_model(onnx.load(path))
        return path.suffix
    raise ValueError("nobody knows this file")


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(each) for key, each in value.items() if key not in ("seconds", "latency")}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


# --- actions --------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    """A small convolutional network, the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10),
        ).eval()  # fmt: skip


def batches() -> list[tuple[Tensor, Tensor]]:
    """Noise of two sizes with labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(64, 1, 8, 8, generator=generator)
    return list(zip(images.split(16), torch.arange(64).remainder(10).split(16), strict=True))


def command(*words: str) -> Callable[[], object]:
    """A command line, as the program carries it out."""

    def do() -> None:
        from spectrim.cli.app import app

        app([*words, "--threads", "1"], standalone_mode=False)

    return do


def inside(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


HERE = "benchmarks.killed_writes"
MODEL, DATA = f"{HERE}:network", ("--data", f"{HERE}:batches")
TRAIN = ("--train", f"{HERE}:batches", "--test", f"{HERE}:batches")


def actions() -> dict[str, Action]:
    """Every command and call that writes; what they need is made, and imported, once."""
    import matplotlib.figure  # noqa: F401 (imported in children, it would be imported every time)
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    import spectrim.cli.learning
    import spectrim.cli.shrinking  # noqa: F401
    from spectrim.report import animate_ranks, write_report

    result = st.compress(network(), batches(), st.Budget(macs=0.5))

    def learn(place: str) -> Any:
        return st.learn_ranks(
            network(), batches(), st.Budget(macs=0.5), checkpoint=place, progress=False,
            learning=Recipe(epochs=2, checkpoint_every=2), tuning=Recipe(epochs=1, checkpoint_every=2),
            schedule=Schedule(steps=3),
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        trajectory = learn(folder).trajectory

    def fine_tune() -> None:
        model = network()
        st.fine_tune(
            model, batches(), epochs=3, checkpoint="checkpoint.safetensors", checkpoint_every=1, progress=False
        )
        st.save(model, st.Plan((), {}, {}), "tuned.safetensors")

    def learned() -> None:
        found = learn("run")
        st.save(found.model, found.plan, "learned.safetensors")

    def times() -> None:
        def timer(chains: Any, **options: Any) -> list[float]:
            return [0.1] * len(chains)

        for site in result.sites:
            Latency(cache=Path("cache"), threads=1, timer=timer).prepare([[site.spec]])

    clock = Latency(cache=Path("cache"), threads=1).path
    assert clock is not None
    small = ("model.safetensors", "plan.json")
    written = (*small, "result.json")
    checkpoints = ("learning.safetensors", "tuning.safetensors", "plan.json")
    points = ("00-macs-70pct", "01-macs-50pct")
    learning = ("--method", "learned-ranks:rank_epochs=2,c_steps=3", "--epochs", "1")
    return {
        "save": Action(lambda: st.save(result.model, result.plan, "model.safetensors"), ("model.safetensors",)),
        "Plan.write": Action(lambda: result.plan.write("plan.json"), ("plan.json",)),
        "Trajectory.write": Action(lambda: trajectory.write("ranks.json"), ("ranks.json",)),
        "write_report": Action(lambda: write_report("report.html", result), ("report.html",)),
        "animate_ranks": Action(lambda: animate_ranks(trajectory, "ranks.gif"), ("ranks.gif",)),
        "export_program": Action(
            lambda: st.export_program(result.model, batches()[0][0], "model.pt2"), ("model.pt2",)
        ),
        "export_onnx": Action(lambda: st.export_onnx(result.model, batches()[0][0], "model.onnx"), ("model.onnx",)),
        "Latency": Action(times, (f"cache/{clock.name}",)),
        "fine_tune": Action(fine_tune, ("checkpoint.safetensors", "tuned.safetensors")),
        "learn_ranks": Action(learned, ("learned.safetensors", *(f"run/{name}" for name in checkpoints))),
        "spectrim compress": Action(
            command("compress", MODEL, *DATA, "-b", "macs=50%", "--out", "out"), inside("out", *written, "report.html")
        ),
        "spectrim compress --train": Action(
            command("compress", MODEL, *DATA, *TRAIN, "-b", "macs=50%", "--epochs", "3", "--no-report", "--out", "out"),
            inside("out", *written),
        ),
        "spectrim compress, learned ranks": Action(
            command("compress", MODEL, *TRAIN, *learning, "-b", "macs=50%", "--no-report", "-o", "out"),
            inside("out", *written, "ranks.json"),
        ),
        "spectrim path": Action(
            command(
                "path", MODEL, *TRAIN, "-b", "macs=70%", "-b", "macs=50%", "--rank-epochs", "1", "--c-steps", "3",
                "--epochs", "1", "--out", "out",
            ),
            (
                *inside("out", "path.json", "path.svg", "checkpoint/run.json"),
                *inside("out/checkpoint/00", *checkpoints), *inside("out/checkpoint/01", *checkpoints),
                *(name for point in points for name in inside(f"out/{point}", *small, "ranks.json")),
            ),
        ),
        "spectrim export": Action(
            command("export", MODEL, "--input", "1x8x8", "--out", "out/model.pt2"), ("out/model.pt2",)
        ),
        "spectrim profile --figure": Action(
            command("profile", MODEL, *DATA, "--method", "principal-filters", "--figure", "out/widths.png"),
            ("out/widths.png",),
        ),
        "spectrim demo": Action(
            command("demo", "--epochs", "1", "--dense-epochs", "1", "-o", "out"), inside("out", *written, "report.html")
        ),
    }  # fmt: skip
