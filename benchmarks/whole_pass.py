"""Time and memory of low rank + sparse on networks of ImageNet's shapes (S5): random weights, all steps.

Each network is compressed in a process of its own, whose peak resident memory is told beside that of one that only runs
the network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import spectrim as st
from benchmarks import nets
from benchmarks.analysis import MIB, peak
from benchmarks.run import claim

ROOT = Path(__file__).parents[1]


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Compress every network; seconds of each step and peak memory."""
    rows = []
    for network in config["networks"]:
        forward, found = (_process(what, {**config, "network": network}) for what in ("forward", "compress"))
        rows.append({"network": network, **found, "forward_peak_mib": forward["peak_mib"]})
        print(rows[-1], flush=True)
    worst = max(row["seconds"] for row in rows)
    said = "; ".join(
        f"{row['network']}: {row['seconds'] / 60:.1f} min, {row['peak_mib'] / 1024:.1f} GiB (forward passes alone "
        f"{row['forward_peak_mib'] / 1024:.1f}), {row['ratio']:g}x fewer bytes"
        for row in rows
    )
    target = f"minutes ({config['minutes']:g} at most), peak memory stated"
    met = worst <= 60 * config["minutes"]
    notes = [
        f"{config['images']} images of {config['size']} x {config['size']}, in batches of {config['batch']}; "
        f"{config['threads']} threads. Weights are random: time and memory are what this is about, not accuracy.",
        "seconds is the sum of the steps: calibrate (statistics of all layers), tabulate (all ranks and densities on "
        "offer), select, and apply (fit in order, to the inputs that compressed layers deliver).",
    ]
    claims = {"S5 (pass)": claim(round(worst / 60, 2), "minutes at the slowest network", target, met, said)}
    return {"claims": claims, "rows": rows, "seeds": [config["seed"]], "notes": notes}


def _process(what: str, config: dict[str, Any]) -> dict[str, Any]:
    """Run this module in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.whole_pass", what, json.dumps(config)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(config["threads"])}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the process that measures {what!r} of {config['network']} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(what: str, config: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    model = nets.network(config["network"], config["size"], seed=config["seed"])
    batches = list(nets.images(config["images"], config["size"], seed=config["seed"]).split(config["batch"]))
    if what == "forward":
        with torch.inference_mode():
            for batch in batches:
                model(batch)
        return {"peak_mib": round(peak() / MIB, 1)}
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return round(clock[-1] - clock[-2], 1)

    sites = st.calibrate(model, st.find(model), batches)
    found: dict[str, Any] = {"calibrate": lap()}
    table = st.tabulate(sites, [st.LowRankPlusSparse()])
    found["tabulate"] = lap()
    plan = st.select(table, st.Budget(bytes=config["bytes"]))
    found["select"] = lap()
    small = st.apply(model, sites, plan, batches)
    found["apply"] = lap()
    found["seconds"] = round(clock[-1] - clock[0], 1)
    found["peak_mib"] = round(peak() / MIB, 1)
    with torch.inference_mode():
        finite = bool(small(batches[0]).isfinite().all())
    if not finite:
        raise RuntimeError("the compressed network answers NaN or Inf")
    choices = [entry.choice.settings for entry in plan if not entry.choice.is_dense]
    return {
        "parameters": plan.dense_costs["parameters"],
        "ratio": round(plan.ratio("bytes"), 2),
        "layers": len(plan.entries),
        "layers_both": sum(bool(c["rank"] and c["density"]) for c in choices),
        "layers_sparse": sum(not c["rank"] for c in choices),
        **found,
    }


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], json.loads(sys.argv[2]))))
