"""Networks made slower by a plan under ``guard``: claim A4, over architectures, batches and runtimes.

Every network is compressed with ``guard=True`` to the first of several shares of its multiply-accumulates that it can
be had at without being slower. What comes back is then timed anew beside the dense network, in turns, by the runtime
and at the batch that it was made for. It counts as slower if it is so beyond noise, twice.

One row a case, each kept as soon as it is there: the same command goes on after a stop.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as st
from benchmarks import resumed, zoo
from benchmarks.run import claim
from spectrim.nn.timing import Speed, measure_latency


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every network at every batch in every runtime."""
    keys = [
        {"network": network, "batch": batch, "runtime": runtime}
        for runtime in config["runtimes"]
        for network in config["networks"]
        for batch in config["batches"]
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    try:
        rows, mixed = resumed.rows(
            paths["work"] / "never_slower.jsonl", keys, lambda **key: _row(**key, config=config, work=paths["work"])
        )
    finally:
        torch.set_num_threads(threads)
    slower = [row for row in rows if row["slower"]]
    made = [row for row in rows if row["outcome"] == "compressed"]
    failed = [row for row in rows if row["outcome"] == "failed"]
    faster = sum(row["low"] > 1 for row in made)
    note = (
        f"{len(rows)} cases: {len(made)} compressed, of which {faster} surely faster; "
        f"{len(rows) - len(made) - len(failed)} refused with the reason, {len(failed)} failed"
    )
    return {
        "claims": {
            "A4": claim(len(slower), "networks slower than dense under guard", "none", not slower and not failed, note)
        },
        "rows": rows,
        "seeds": [config["seed"]],
        "notes": [
            "faster: dense time over the finished network's, median of rounds in turns; low and high: between which "
            "that median lies in 99 of 100 cases. slower: high < 1 and more than 3 % apart, twice.",
            "share: of the multiply-accumulates, the first of those tried at which the network is not refused. "
            "said: layers that lost time in the finished network, and MACs that disagree with milliseconds.",
            "Small networks with random weights; what is claimed is about time. load: processes that ran or waited, of "
            "the last minute, at the end of the row.",
            *mixed,
        ],
    }


def _row(network: str, batch: int, runtime: str, *, config: dict[str, Any], work: Path) -> dict[str, Any]:
    """One network at one batch in one runtime."""
    start = time.perf_counter()
    row: dict[str, Any] = {"outcome": "refused", "slower": False}
    try:
        model, example = zoo.build(network, seed=config["seed"])
        clock = st.Latency(
            threads=config["threads"], batch=batch, runtime=runtime, cache=work / "cache", rounds=config["rounds"]
        )
        data = [torch.randn(config["samples"], *example.shape[1:], generator=torch.Generator().manual_seed(1))]
        for share in config["shares"]:
            try:
                found = st.compress(model, data, st.Budget(macs=share), latency=clock, guard=True)
            except st.InfeasibleBudgetError as error:
                row["reason"] = f"{type(error).__name__}: {str(error).split(': the lowest')[0]}"
                continue
            row |= {
                "outcome": "compressed", "reason": "", "share": share,
                "said": "; ".join(note for note in found.report.notes if "time" in note or "milliseconds" in note),
                **_timed(model, found.model, data[0][:1].repeat(batch, *[1] * (data[0].dim() - 1)), clock, config),
            }  # fmt: skip
            break
    except Exception as error:  # one case that fails is a row
        row |= {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    return {**row, "seconds": round(time.perf_counter() - start, 1), "load": round(os.getloadavg()[0], 1)}


def _timed(
    model: nn.Module, small: nn.Module, example: torch.Tensor, clock: st.Latency, config: dict[str, Any]
) -> dict[str, Any]:
    """Both networks in turns; once more where the second seems slower."""
    found: dict[str, Any] = {}
    for _ in range(2):
        times = measure_latency(
            {"dense": model, "compressed": small}, example, repeats=config["repeats"], threads=clock.threads,
            runtime=clock.runtime, seconds=config["seconds"],
        )  # fmt: skip
        speed = Speed.of(times["dense"], times["compressed"])
        found = {
            "dense_ms": times["dense"].quiet, "ms": times["compressed"].quiet, "faster": speed.ratio,
            "low": speed.low, "high": speed.high, "slower": speed.differs and speed.ratio < 1,
        }  # fmt: skip
        if not found["slower"]:
            break
    return found
