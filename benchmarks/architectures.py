"""Architectures that strangers bring: each is compressed and proven, or refused with the reason (N2).

The architectures of the zoo (own ones, and those of transformers from configurations) are small and their weights
random. Each is compressed in one call by every arm. What comes back has been run by the library itself, every layer
that was replaced included; here it is saved, loaded into a fresh model, merged and run again besides.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from benchmarks import resumed, zoo, zoo_reduced
from benchmarks.run import claim
from spectrim.nn.checkpoint import same_weights
from spectrim.nn.watch.batches import call
from spectrim.nn.watch.nesting import output_tensors

NETWORKS = {**zoo.NETWORKS, **zoo_reduced.NETWORKS}
ARMS: dict[str, tuple[str, list[st.Method] | None]] = {
    "default": ("macs", None),
    "filters": ("macs", [st.PrincipalFilters()]),
    "joint": ("parameters", None),
    "sparse": ("bytes", [st.LowRankPlusSparse()]),
}


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every network by every arm."""
    names = config.get("networks") or list(NETWORKS)
    keys = [{"network": name, "arm": arm} for name in names for arm in config["arms"]]
    threads = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    try:
        rows, mixed = resumed.rows(
            paths["work"] / "architectures.jsonl", keys, lambda network, arm: _row(network, arm, config, paths["work"])
        )
    finally:
        torch.set_num_threads(threads)
    count = {kind: sum(row["outcome"] == kind for row in rows) for kind in ("proven", "refused", "wrong")}
    note = f"{len(names)} networks, {', '.join(config['arms'])}: " + ", ".join(
        f"{n} {kind}" for kind, n in count.items()
    )
    return {
        "claims": {
            "N2": claim(
                count["wrong"], "networks wrong", "each compressed and proven, or refused", not count["wrong"], note
            )
        },
        "rows": rows,
        "seeds": [config["seed"]],
        "notes": [
            "Small networks with random weights on two batches of noise: outputs far from the dense ones are no fault.",
            *mixed,
        ],
    }


def _row(name: str, arm: str, config: dict[str, Any], work: Path) -> dict[str, Any]:
    cost, methods = ARMS[arm]
    start = time.perf_counter()
    row: dict[str, Any] = {}
    try:
        model, example = zoo.build(name, seed=config["seed"], networks=NETWORKS)
        result = st.compress(model, [example, example], st.Budget(**{cost: config["share"]}), methods=methods)
        agreed = result.report.agreement
        row |= {
            "outcome": "proven",
            "ratio": result.plan.ratio(cost),
            "differs": None if agreed is None else agreed.error,
            **_checked(
                result,
                example,
                zoo.build(name, seed=config["seed"] + 1, networks=NETWORKS)[0],
                work / f"{name}-{arm}.safetensors",
            ),
        }
        if not row["loaded"] or not row["merged"]:
            row["outcome"] = "wrong"
    except Exception as error:  # what is no refusal is what is looked for
        said = f"{type(error).__name__}: {error}".replace(f"{work}{os.sep}", "")
        row |= {"outcome": "refused" if isinstance(error, st.SpectrimError) else "wrong", "reason": said}
    return {**row, "seconds": time.perf_counter() - start}


@torch.no_grad()
def _checked(result: st.Result, example: Any, fresh: nn.Module, path: Path) -> dict[str, bool]:
    """Whether the file gives the same network, and whether the merged one computes the same."""
    st.save(result.model, result.plan, path)
    loaded = same_weights(st.load(fresh, path), result.model)
    path.unlink()
    wanted, given = (output_tensors(call(model.eval(), example)) for model in (result.model, st.merge(result.model)))
    return {"loaded": loaded, "merged": all(_close(a, b) for a, b in zip(wanted, given, strict=True))}


def _close(a: Tensor, b: Tensor) -> bool:
    gap = (a.double() - b.double()).abs()
    return (
        bool(gap[gap.isfinite()].max() <= 1e-2 * a[a.isfinite()].abs().max().clamp_min(1e-30)) if gap.numel() else True
    )
