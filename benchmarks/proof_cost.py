"""What the proof of a compressed network costs: at most two forward passes of one batch (N5).

Everything the library runs to prove what it delivers is watched from outside: the samples that enter the network, the
operations by torch's own counter, and the time, beside that of forward passes of the dense network on the same batch,
which take turns with it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import spectrim as st
from benchmarks import zoo, zoo_reduced
from benchmarks.run import claim
from spectrim.nn.proof import Proof
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.nesting import tensors

NETWORKS = {**zoo_reduced.NETWORKS, **zoo.NETWORKS}


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every network, once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    try:
        rows = [row(name, config) for name in config["networks"]]
    finally:
        torch.set_num_threads(threads)
    work, seconds = (max(row[key] for row in rows) for key in ("passes_by_macs", "passes_by_time"))
    whole = max(row["whole_batches"] for row in rows)
    times = statistics.median(row["passes_by_time"] for row in rows)
    note = (
        f"{len(rows)} networks, batches of {config['samples']}: {whole} passes of the whole batch, and single samples; "
        f"by time {times:.2f} passes in the median, {seconds:.2f} at most"
    )
    return {
        "claims": {"N5": claim(work, "passes of one batch, by MACs", "<= 2", work <= 2 and whole <= 2, note)},
        "rows": rows,
        "seeds": [config["seed"]],
        "notes": [
            "A pass is one of the dense network on one batch of the calibration. The proof runs the dense and the "
            "compressed network once on it, and on single samples the copy that is worked on, the compressed network "
            "twice and the merged one. Times hold what counting every operation takes, and the making of the merged "
            "network, whatever the batch: many passes where a pass takes milliseconds.",
        ],
    }  # fmt: skip


@dataclass
class Spent:
    """What was spent in the proof: samples of every pass, MACs, seconds."""

    sizes: list[int] = field(default_factory=list)
    macs: float = 0.0
    seconds: float = 0.0


@contextlib.contextmanager
def watched(spent: Spent, *, counts: bool) -> Iterator[None]:
    """Add up what the proof does; operations only on request, since counting them takes time."""

    def watching(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counter = FlopCounterMode(display=False) if counts else contextlib.nullcontext()
            start = time.process_time()
            with counter:
                found = function(*args, **kwargs)
                found = list(found) if isinstance(found, Iterator) else found
            spent.seconds += time.process_time() - start
            spent.macs += counter.get_total_flops() / 2 if isinstance(counter, FlopCounterMode) else 0
            return found

        return call

    parts = {name: watching(getattr(Proof, name)) for name in ("check_copy", "__call__")}
    with mock.patch.multiple(Proof, **parts):
        yield


def row(name: str, config: dict[str, Any]) -> dict[str, Any]:
    dense, example = zoo.build(name, seed=config["seed"], networks=NETWORKS)
    feed = Feed().decide(dense, example)
    batch = feed.resized(example, config["samples"])
    sites = st.calibrate(dense, st.find(dense), [batch])
    plan = st.select(st.tabulate(sites), st.Budget(macs=config["share"]))

    def proof(*, counts: bool) -> Spent:
        spent = Spent()
        with watched(spent, counts=counts):
            st.apply(dense, sites, plan, [batch], reconstruct=False, batchnorm=False)
        return spent

    def sized(module: nn.Module, args: Any, kwargs: Any) -> None:
        counted.sizes.append(next(iter(tensors((args, kwargs)))).shape[0])

    counted = Spent()
    hook = dense.register_forward_pre_hook(sized, with_kwargs=True)
    with watched(Spent(), counts=False):
        st.apply(dense, sites, plan, [batch], reconstruct=False, batchnorm=False)
    hook.remove()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        feed(dense, batch)
    macs = counter.get_total_flops() / 2
    passes, proofs = [], []
    for _ in range(config["repeats"]):
        start = time.process_time()
        with torch.no_grad():
            feed(dense, batch)
        passes.append(time.process_time() - start)
        proofs.append(proof(counts=False).seconds)
    return {
        "network": name,
        "samples": config["samples"],
        "whole_batches": sum(size == config["samples"] for size in counted.sizes),
        "single_samples": sum(size == 1 for size in counted.sizes),
        "passes_by_macs": proof(counts=True).macs / macs,
        "passes_by_time": statistics.median(proofs) / statistics.median(passes),
        "pass_ms": 1000 * statistics.median(passes),
    }
