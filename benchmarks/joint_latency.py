"""CPU latency of factors shared on both sides against factors shared on one side, at the paper's ranks (J5)."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from torch import nn

import spectrim as st
from benchmarks.paper_resnets import PaperResNet
from benchmarks.run import claim
from spectrim.network.groups import residual
from spectrim.network.sites import Sites
from spectrim.nn.build import skeleton
from spectrim.nn.surgery import replace_module
from spectrim.nn.timing import Timing, measure_latency
from spectrim.search.published_ranks import choices_at_rate

_SCHEMES = [("SVD", "svd"), ("LJSVD", "ljsvd"), ("RJSVD-1", "rjsvd-1"), ("Bi-JSVD 0.5", "bi-jsvd")]
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Time the schemes in turns: every network, rate, number of threads and memory format."""
    before = torch.get_num_threads()
    torch.manual_seed(config["seed"])
    try:
        rows = [
            row
            for network in config["networks"]
            for rate in config["rates"]
            for row in _case(config, network, rate)
        ]  # fmt: skip
    finally:
        torch.set_num_threads(before)
    limit = config["at_most"]
    worst = max(row["paired"] for row in rows)
    above = [row for row in rows if row["paired"] > limit]
    claims = {
        "J5": claim(
            worst,
            "latency of Bi-JSVD 0.5 / latency of LJSVD, at the worst",
            f"<= {limit:g} in each of {len(rows)} cases (paper: up to 1.5)",
            not above,
            "; ".join(
                f"{r['network']} {r['rate']:g} {r['format']}, threads: {r['threads']}: {r['paired']:.2f}" for r in rows
            ),
        )
    }
    notes = [
        "Wall time of whole networks at batch 1 and 32 x 32, every one once in each repeat; medians of the repeats in "
        "which the system took a core away least often. both_to_left is the ratio of these medians; paired, which is "
        "claimed, the median of the ratios within a repeat.",
        "BatchNorm is not folded, in no network: a second factor that several layers share cannot take up what "
        "differs between them.",
        "Weights are random numbers; time does not depend on them.",
    ]
    return {"claims": claims, "rows": rows, "seeds": [config["seed"]], "notes": notes}


def _case(config: dict[str, Any], network: str, rate: float) -> list[dict[str, Any]]:
    dense = PaperResNet(network).eval()
    example = torch.randn(config["batch"], 3, 32, 32)
    sites = st.calibrate(dense, residual(st.find(dense)), [example[:1]], statistics=False)
    models = {"dense": dense, **{label: factored(dense, sites, rate, scheme) for label, scheme in _SCHEMES}}
    rows = []
    for layout in config["formats"]:
        laid = {name: copy.deepcopy(m).to(memory_format=_FORMATS[layout]) for name, m in models.items()}  # type: ignore[call-overload]
        for threads in config["threads"]:
            seen = example.to(memory_format=_FORMATS[layout])
            timings = measure_latency(
                laid, seen, repeats=config["repeats"], warmup=min(5, config["repeats"]), threads=threads
            )
            rows.append(
                {
                    "network": network,
                    "rate": rate,
                    "format": layout,
                    "threads": threads,
                    **{f"{name} ms": float(f"{timing.quiet:.4g}") for name, timing in timings.items()},
                    "both_to_left": round(timings["Bi-JSVD 0.5"].quiet / timings["LJSVD"].quiet, 3),
                    "paired": round(_paired(timings["Bi-JSVD 0.5"], timings["LJSVD"]), 3),
                    "both_to_svd": round(timings["Bi-JSVD 0.5"].quiet / timings["SVD"].quiet, 3),
                    "spread": round(timings["LJSVD"].p90 / timings["LJSVD"].p50 - 1, 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


def factored(dense: nn.Module, sites: Sites, rate: float, scheme: str) -> nn.Module:
    """A copy of a network with factors of random numbers in the shapes that a scheme has at a rate."""
    model = copy.deepcopy(dense)
    for assigned in choices_at_rate(sites, rate, scheme):
        layers = assigned.site.layers
        for spec, module in zip(layers, skeleton(assigned.choice, layers), strict=True):
            for weight in module.parameters():
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
            replace_module(model, spec.names, module)
    return model.eval()


def _paired(ours: Timing, theirs: Timing) -> float:
    return statistics.median(a / b for a, b in zip(ours.samples, theirs.samples, strict=True))
