"""The time of a C step of learned ranks (L1)."""

from __future__ import annotations

from typing import Any

import torch

import spectrim as st
from benchmarks import cifar
from benchmarks.run import claim
from spectrim.cost.rounds import Rounds
from spectrim.train import Schedule


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Time C steps of every network in every arrangement."""
    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    try:
        rows = [_times(name, how, config) for name in config["networks"] for how in ("budget", "multiplier", "paper")]
    finally:
        torch.set_num_threads(before)
    claimed = [row for row in rows if row["network"] == config["claimed"]]
    worst = max(row["median_seconds"] for row in claimed)
    limit = config["at_most"]
    claims = {
        "L1": claim(
            worst,
            f"s, the slowest arrangement of a C step of {config['claimed']}",
            f"< {limit:g} s, threads: {config['threads']}",
            worst < limit,
            "; ".join(f"{r['network']}, {r['ranks_by']}, {r['unfoldings']}: {r['median_seconds']:.3f} s" for r in rows),
        )
    }
    notes = [
        f"Medians of {config['repeats']} C steps, every weight changed by noise of 1e-4 before each; quiet is the "
        "median of those in which the system took a core away least often.",
        "Weights are random: an eigendecomposition takes as long for trained ones.",
    ]
    return {"claims": claims, "rows": rows, "seeds": [config["seed"]], "notes": notes}


def _times(name: str, how: str, config: dict[str, Any]) -> dict[str, Any]:
    model = cifar.ResNet({"resnet20": 3, "resnet56": 9}[name])
    sites = st.calibrate(model, st.find(model), [torch.zeros(1, 3, 32, 32)], statistics=False)
    repeats, warmup = config["repeats"], 1
    schedule = Schedule(0.01, 1.2, repeats + warmup + 1)
    if how == "budget":
        ranks = st.LearnedRanks(model, sites, st.Budget(macs=0.4), schedule=schedule)
    else:
        ranks = st.LearnedRanks(model, sites, multiplier=4e-9, schedule=schedule, dense=how != "paper")
    turns = Rounds(repeats, warmup=warmup)
    for _ in turns:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-4 * torch.randn_like(parameter))
        turns.begin(name)
        ranks.c_step()
        turns.end(name)
    timing = turns[name]
    return {
        "network": name,
        "layers": len(sites),
        "ranks_by": "budget" if how == "budget" else "multiplier",
        "unfoldings": "the paper's, every rank" if how == "paper" else "all",
        "median_seconds": round(timing.p50 / 1e3, 4),
        "quiet_seconds": round(timing.quiet / 1e3, 4),
        "least_seconds": round(min(timing.samples) / 1e3, 4),
        "most_seconds": round(max(timing.samples) / 1e3, 4),
    }
