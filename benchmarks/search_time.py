"""How long sets of methods compete for a large network: claim A5."""

from __future__ import annotations

import time
from typing import Any

import torch

import spectrim as st
from benchmarks import nets
from benchmarks.one_pass import Passes
from benchmarks.run import claim


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """One call for every limit in seconds, None for none."""
    torch.manual_seed(config["seed"])
    torch.set_num_threads(config["threads"])
    dense = nets.network(config["network"], config["size"])
    batches = list(nets.images(config["images"], config["size"]).split(config["batch"]))
    rows = [row for seconds in config["seconds"] for row in searched(dense, batches, config["macs"], seconds)]
    longest = max(row["minutes"] for row in rows)
    return {
        "claims": {"A5": claim(longest, "minutes, whole search, ResNet-50 at 224", "<= 6", longest <= 6, _note(rows))},
        "rows": rows,
        "seeds": [config["seed"]],
        "notes": ["Weights are random: times are those of a trained network, which set is chosen is not."],
    }


def searched(
    dense: torch.nn.Module, batches: list[torch.Tensor], kept: float, seconds: float | None
) -> list[dict[str, Any]]:
    """What became of every set of one call."""
    clock = Passes(dense, batches)
    start = time.perf_counter()
    result = st.compress(dense, batches, st.Budget(macs=kept), methods="auto", seconds=seconds)
    minutes = (time.perf_counter() - start) / 60
    passes = minutes * 60 / clock.row()["pass_s"]
    return [
        {
            "network": "resnet50", "images": sum(map(len, batches)), "limit_s": seconds, "minutes": round(minutes, 2),
            "passes": round(passes, 1), **{name: arm.record()[name] for name in ("arm", "seconds", "chosen", "note")},
        }
        for arm in result.report.arms
    ]  # fmt: skip


def _note(rows: list[dict[str, Any]]) -> str:
    made = [f"{row['arm']}: {row['seconds']:.0f} s" + (f" ({row['note']})" if row["note"] else "") for row in rows]
    limits = {row["limit_s"] for row in rows}
    return f"limits in seconds {', '.join(map(str, limits))}; {'; '.join(made)}"
