"""One row: a network, a budget and an arm, in a process of its own, so that memory is its own and a crash a reason."""

from __future__ import annotations

import multiprocessing
import resource
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as st
from benchmarks.environment import code_version, environment, today
from benchmarks.headline.arms import ARMS, Made, Task
from benchmarks.headline.network import Network, plugin
from benchmarks.headline.peers.layers import measured
from spectrim.nn.checkpoint import file_size

DENSE = "dense"


@dataclass(frozen=True)
class Key:
    """Which row."""

    network: str
    budget: str
    arm: str

    @property
    def stem(self) -> str:
        """Of the file that the network is kept in."""
        kept = "".join(c if c.isalnum() or c in ".=%" else "-" for c in f"{self.network} {self.budget} {self.arm}")
        return kept.replace("%", "pc").replace("=", "-")


def row(key: Key, config: Mapping[str, Any], paths: Mapping[str, Path], folder: Path, limit: float) -> dict[str, Any]:
    """What is measured of an arm, stopped after so many seconds; with ``failed``, why there is nothing."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_sent, args=(sender, key, dict(config), dict(paths), folder))
    process.start()
    sender.close()
    found: dict[str, Any]
    try:
        found = receiver.recv() if receiver.poll(limit) else {"failed": f"not ready after {limit:g} s"}
    except EOFError:
        process.join()
        found = {"failed": f"its process ended with {process.exitcode}"}
    process.kill()
    process.join()
    on, code = environment(), code_version()
    # An empty budget is the dense network's.
    return {
        "network": key.network, "budget": key.budget, "arm": key.arm, **found, "date": today(),
        "code": code["commit"][:12] + (" with changes" if code["changed"] else ""), "load": on["load_average"],
    }  # fmt: skip


def _sent(sender: Connection, key: Key, config: Mapping[str, Any], paths: Mapping[str, Path], folder: Path) -> None:
    try:
        found = made(key, config, paths, folder)
    except Exception as error:  # any reason is a row
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"[:300]}
    sender.send(found)


def made(key: Key, config: Mapping[str, Any], paths: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """The row, measured in this process; the network is written to the folder."""
    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    network = plugin(key.network)(paths)
    dense = network.build()
    if key.arm == DENSE:
        return {"kind": DENSE, **_costs(network, dense, file_size(dense)), **_judged(network, dense)}
    batches = network.calibration(config["samples"])
    before = _peak()
    wall, cpu = time.perf_counter(), time.process_time()
    arm = ARMS[key.arm]
    done = arm.make(Task(network, dense, batches, st.Budget.of(key.budget)))
    seconds = {
        "search_s": round(time.perf_counter() - wall, 1), "search_cpu_s": round(time.process_time() - cpu, 1),
        "peak_mb": round(_peak()), "peak_mb_before": round(before),
    }  # fmt: skip
    path = folder / f"{key.stem}.pt"
    torch.save(done.model, path)
    size = _file(done, path)
    said = {"note": done.note} if done.note else {}
    return {"kind": arm.kind, **_costs(network, done.model, size), **_judged(network, done.model), **seconds, **said}


def _costs(network: Network, model: nn.Module, size: int) -> dict[str, Any]:
    tensors = {t.data_ptr(): t.numel() for t in model.parameters()}
    return {
        "parameters": sum(tensors.values()),
        "macs": round(measured(model, network.example(1), "macs")),
        "file_bytes": size,
    }


def _file(done: Made, path: Path) -> int:
    if done.result is None:
        return file_size(done.model)
    file = path.with_suffix(".safetensors")
    st.save(done.model, done.result.plan, file)
    return file.stat().st_size


def _judged(network: Network, model: nn.Module) -> dict[str, Any]:
    held, figures = network.held_out(model), network.test(model)
    (name, first), *further = figures.items()
    assert name == network.metric.name
    return {
        "held_out": round(held, 4), "value": round(first.value, 4), "error": round(first.standard_error, 4),
        "n": first.n, **{other: round(figure.value, 4) for other, figure in further},
    }  # fmt: skip


def _peak() -> float:
    """Most memory that the process has had so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
