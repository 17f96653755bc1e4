"""What the analysis of a network costs: seconds (F8) and memory (F9).

Memory is measured in processes of their own, by the most that each ever held: once for plain forward passes, once for
calibration and tabulation of the same batches.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import spectrim as st
from benchmarks import nets
from benchmarks.environment import ROOT
from benchmarks.run import claim
from spectrim.network.sites import Sites
from spectrim.nn.watch.batches import evaluating
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan

MIB = 2**20


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Claim F8 or F9, as the experiment says."""
    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    try:
        return (_seconds if config["claim"] == "F8" else _memory)(config)
    finally:
        torch.set_num_threads(before)


def _seconds(config: dict[str, Any]) -> dict[str, Any]:
    model = nets.network(config["network"], config["size"], seed=config["seed"], width=config.get("width", 64))
    drawn = nets.images(config["images"], config["size"], seed=config["seed"])
    batches = list(drawn.split(config["batch"]))
    found = st.find(model)
    st.calibrate(model, found, [drawn[:1]], statistics=False)  # the first call imports what counts operations

    def plain() -> None:
        with evaluating(model):
            for batch in batches:
                model(batch)

    plain()
    forward, calibration = [], []
    sites = found
    for _ in range(config["repeats"]):
        forward.append(_clock(plain)[0])
        seconds, sites = _clock(lambda: st.calibrate(model, found, batches))
        calibration.append(seconds)
    tabulation, table = _clock(lambda: st.tabulate(sites))
    rows: list[dict[str, Any]] = []
    slowest = 0.0
    plans = {}
    for share in config["shares"]:
        seconds, plans[share] = _clock(lambda share=share: st.select(table, st.Budget(macs=share)))
        slowest = max(slowest, seconds)
        rows.append({"step": f"exact selection at {100 * share:g} % of the MACs", "seconds": round(seconds, 3)})
    ratios = [c / f for c, f in zip(calibration, forward, strict=True)]
    options = sum(len(row.options) for row in table)
    rows = [
        {"step": f"plain forward passes, {config['images']} images", "seconds": round(statistics.median(forward), 3)},
        {"step": "calibration, positions sampled", "seconds": round(statistics.median(calibration), 3)},
        {"step": f"tabulation of {len(table)} sites, {options} options", "seconds": round(tabulation, 3)},
        *rows,
    ]
    seconds, everywhere = _clock(lambda: st.calibrate(model, found, batches, rows=None))
    rows.append({"step": "calibration, all positions", "seconds": round(seconds, 3)})
    agreement = _agreement(table, plans, everywhere)
    ratio = statistics.median(ratios)
    limits = config["limits"]
    claims = {
        "F8": claim(
            round(tabulation, 2),
            "s to tabulate; s to select; calibration / forward",
            f"<= {limits['tabulate']:g} s; <= {limits['select']:g} s; <= {limits['calibrate']:g} x",
            tabulation <= limits["tabulate"] and slowest <= limits["select"] and ratio <= limits["calibrate"],
            f"tabulate {tabulation:.2f} s; select {slowest:.2f} s; calibration {ratio:.2f} x the forward passes; "
            f"sampled positions lose at most {max(r['excess_loss_percent'] for r in agreement):.2g} % more than all",
        )
    }
    notes = [
        f"{config['network']} at {config['size']} x {config['size']}, {config['threads']} threads, batches of "
        f"{config['batch']}; random weights, crops of two photographs.",
        f"Calibration and forward passes in turns, {config['repeats']} times each; ratios of neighbours, their median.",
        "Excess loss: the plan from sampled positions in the table from all positions, against that table's own best "
        "plan at the same budget.",
    ]
    return {"claims": claims, "rows": rows, "sampling": agreement, "seeds": [config["seed"]], "notes": notes}


def _agreement(table: Candidates, plans: dict[float, Plan], everywhere: Sites) -> list[dict[str, Any]]:
    """How far plans from sampled positions are from those made with all positions."""
    whole = st.tabulate(everywhere)
    rows = []
    for share, plan in plans.items():
        best = st.select(whole, st.Budget(macs=share))
        loss = 0.0
        for entry in plan:
            row = whole[entry.site]
            loss += row.loss(next(option for option in row.options if option.choice == entry.choice))
        same = sum(entry.choice == best[entry.site].choice for entry in plan)
        rows.append(
            {
                "budget": f"{100 * share:g} % of the MACs",
                "sites": len(table),
                "same_choice": same,
                "same_unfolding": sum(_unfolding(entry) == _unfolding(best[entry.site]) for entry in plan),
                "loss_of_best": float(f"{best.loss:.6g}"),
                "loss_of_sampled": float(f"{loss:.6g}"),
                "excess_loss_percent": float(f"{100 * (loss / best.loss - 1):.3g}") if best.loss else 0.0,
            }
        )
    return rows


def _unfolding(entry: Any) -> str:
    return str(entry.choice.settings.get("unfolding", entry.choice.kind))


def _clock(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def _memory(config: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for count in config["images"]:
        forward = _process("forward", config, count)
        analysed = _process("analyse", config, count)
        above = analysed["peak"] - forward["peak"]
        limit = analysed["moments"] + 2 * analysed["largest"]
        rows.append(
            {
                "network": config["network"],
                "size": config["size"],
                "batch": config["batch"],
                "images": count,
                "forward_peak_mib": round(forward["peak"] / MIB, 1),
                "calibrate_peak_mib": round(analysed["calibrated"] / MIB, 1),
                "analysis_peak_mib": round(analysed["peak"] / MIB, 1),
                "above_forward_mib": round(above / MIB, 1),
                "moments_mib": round(analysed["moments"] / MIB, 1),
                "largest_weight_mib": round(analysed["largest"] / MIB, 1),
                "limit_mib": round(limit / MIB, 1),
            }
        )
        print(rows[-1], flush=True)
    worst = max(rows, key=lambda row: row["above_forward_mib"] - row["limit_mib"])
    above = [row["above_forward_mib"] for row in rows]
    drift = max(above) - min(above)
    allowed = config["drift"] * worst["limit_mib"]
    claims = {
        "F9": claim(
            worst["above_forward_mib"],
            "MiB above the forward passes' peak",
            f"<= {worst['limit_mib']:g} MiB (moments + 2 x largest weight); the same for any number of samples",
            all(row["above_forward_mib"] <= row["limit_mib"] for row in rows) and drift <= allowed,
            f"{drift:.1f} MiB between {min(config['images'])} and {max(config['images'])} images",
        )
    }
    notes = [
        "Peak resident memory of fresh processes; batches are made one at a time. The forward passes' own peak (model, "
        "activations, libraries) is subtracted.",
        f"Independent of the number of samples: within {100 * config['drift']:g} % of the limit.",
    ]
    return {"claims": claims, "rows": rows, "seeds": [config["seed"]], "notes": notes}


def _process(what: str, config: dict[str, Any], count: int) -> dict[str, int]:
    """Run this module in a process of its own."""
    keys = ("network", "size", "width", "batch", "threads", "seed")
    told = json.dumps({key: config[key] for key in keys if key in config} | {"count": count})
    # Threads of the pool keep memory of their own for each arena; one arena shows what is really held.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.analysis", what, told],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the process that measures {what!r} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(what: str, config: dict[str, Any]) -> None:
    torch.set_num_threads(config["threads"])
    model = nets.network(config["network"], config["size"], seed=config["seed"], width=config.get("width", 64))

    def batches() -> Iterator[Tensor]:
        draw = torch.Generator().manual_seed(config["seed"])
        for _ in range(config["count"] // config["batch"]):
            yield torch.randn(config["batch"], 3, config["size"], config["size"], generator=draw)

    if what == "forward":
        # The counter is imported here too, so that its code is no part of the difference.
        st.calibrate(model, st.find(model), batches(), statistics=False)
        with evaluating(model):
            for batch in batches():
                model(batch)
        found = {"peak": peak()}
    else:
        sites = st.calibrate(model, st.find(model), batches())
        found = {"calibrated": peak()}
        st.tabulate(sites)
        found["moments"] = sum(site.statistics.nbytes for site in sites)
        found["largest"] = max(w.numel() * w.element_size() for w in (site.weight for site in sites))
        found["peak"] = peak()
    print(json.dumps(found))


def peak() -> int:
    """Most bytes this process ever held in memory."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its figure outlives exec, so a large parent would hide what the child does.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


if __name__ == "__main__":
    _child(sys.argv[1], json.loads(sys.argv[2]))
