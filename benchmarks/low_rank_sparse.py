"""Low rank + sparse against its parts, at equal stored bytes, before and after fine-tuning (S4); VGG-16 (S5).

Every arm is a way to choose and fit the weights: the full method, its two parts alone, a fixed split between them, a
fit without data (GoDec), and a fit to the dense network's own inputs (a symmetric target) in place of those that
compressed layers deliver.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import spectrim as st
from benchmarks import cifar
from benchmarks.distilled import every_row, tuned
from benchmarks.run import claim
from spectrim.nn.checkpoint import read_plan


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every arm at every point of the experiment."""
    return every_row(config, paths, label=_label, row=_row, claims=_CLAIMS)


def _label(point: dict[str, Any], arm: str, seed: int) -> str:
    return f"{arm.replace(' ', '-')}-{point['bytes']:g}-{seed}-{point['epochs']}"


def made(model: nn.Module, arm: str, batches: Sequence[Tensor], share: float) -> tuple[nn.Module, st.Plan]:
    """The compressed network of an arm, without training, and its plan; ``share`` is of the dense stored bytes.

    ``GoDec sparse`` is sparse alone, without data: magnitude pruning.
    """
    both: list[st.Method] = [st.LowRankPlusSparse()]
    methods: list[st.Method] = {
        "fixed split": [st.LowRankPlusSparse(share=0.3)],
        "low rank": [st.ActivationSVD(multiple_of=1), st.WeightSVD(multiple_of=1)],
        "sparse": [st.LowRankPlusSparse(ranks=0)],
        "GoDec sparse": [st.LowRankPlusSparse(ranks=0)],
    }.get(arm, both)
    sites = st.find(model)
    if arm.startswith("GoDec"):
        sites = st.calibrate(model, sites, batches, statistics=False)
    else:
        sites = st.sensitivity(model, st.calibrate(model, sites, batches), batches)
    plan = st.select(st.tabulate(sites, methods), st.Budget(bytes=share))
    # Without reconstruction BatchNorm is estimated anew.
    reconstruct = not arm.startswith("GoDec") and arm != "symmetric target"
    return st.apply(model, sites, plan, batches, reconstruct=reconstruct), plan


def _row(
    config: dict[str, Any],
    arm: str,
    point: dict[str, Any],
    seed: int,
    dense: nn.Module,
    data: tuple[cifar.Images, cifar.Images, cifar.Images],
    cache: cifar.TeacherCache,
    work: Path,
) -> dict[str, Any]:
    train, held, test = data
    start = time.perf_counter()
    path = work / f"{arm.replace(' ', '-')}-{point['bytes']:g}-{seed}.safetensors"
    if not path.exists():
        # Every seed has images of its own.
        images = train.images[seed * config["images"] : (seed + 1) * config["images"]]
        model, plan = made(dense, arm, [cifar.normalise(part) for part in images.split(250)], point["bytes"])
        st.save(model, plan, path)
    model, plan = st.load(copy.deepcopy(dense), path), read_plan(path)
    choices = [entry.choice.settings for entry in plan if not entry.choice.is_dense]
    row = {
        "network": config["network"],
        "arm": arm,
        "seed": seed,
        "bytes": plan.costs["bytes"],
        "ratio": round(plan.ratio("bytes"), 3),
        "file_over_counted": round(_payload(path) / plan.costs["bytes"], 4),
        "parameters": plan.costs["parameters"],
        "macs": plan.costs["macs"],
        "layers_both": sum(bool(c["rank"] and c.get("density")) for c in choices),
        "layers_low_rank": sum(bool(c["rank"] and not c.get("density")) for c in choices),
        "layers_sparse": sum(not c["rank"] for c in choices),
        "held_out_before": cifar.accuracy(model, held),
        "accuracy_before": cifar.accuracy(model, test),
        "seconds_compress": round(time.perf_counter() - start, 1),
        "epochs": point["epochs"],
    }
    if point["epochs"]:
        checkpoint = work / f"{path.stem}-trained.safetensors"
        row |= tuned(model, config, data, cache, checkpoint, epochs=point["epochs"], seed=seed)
    return row


def _payload(path: Path) -> int:
    """Bytes of a checkpoint without its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _lead(rows: list[dict[str, Any]], dense: float, asked: dict[str, Any]) -> dict[str, Any]:
    """Low rank + sparse less the best of the other arms, at the worst of the points; means over the seeds."""
    leads, said = [], []
    points = sorted({(round(1 / row["ratio"], 2), row["epochs"]) for row in rows}, reverse=True)
    for share, epochs in points:
        for when in ("accuracy_before", "accuracy"):
            found: dict[str, list[float]] = {}
            for row in rows:
                if (round(1 / row["ratio"], 2), row["epochs"]) == (share, epochs) and when in row:
                    found.setdefault(row["arm"], []).append(row[when])
            means = {arm: statistics.mean(values) for arm, values in found.items()}
            if "low rank + sparse" not in means or len(means) < 2:
                continue
            leads.append(means["low rank + sparse"] - max(v for arm, v in means.items() if arm != "low rank + sparse"))
            after = f"after {epochs} epochs" if when == "accuracy" else "before training"
            seeds = len(found["low rank + sparse"])
            said.append(
                f"{share:.0%} of the bytes, {after} ({seeds} seed{'s' if seeds > 1 else ''}): "
                + ", ".join(f"{arm} {value:.2f}" for arm, value in means.items())
            )
    said.insert(0, f"{rows[0]['network']} (dense {dense:.2f} %)")
    value = round(min(leads), 2) if leads else None
    unit = "points of low rank + sparse ahead of the best other arm, at the worst of the points"
    return claim(value, unit, "a table; >= 0", value is not None and value >= 0, "; ".join(said))


def _no_loss(rows: list[dict[str, Any]], dense: float, asked: dict[str, Any]) -> dict[str, Any]:
    """Points lost after training by the full method at a ratio of stored bytes."""
    fitting = [row for row in rows if row["arm"] == "low rank + sparse" and row["ratio"] >= asked["ratio"]]
    found = [row.get("accuracy", row["accuracy_before"]) for row in fitting]
    lost = round(dense - statistics.mean(found), 2) if found else None
    said = f"{asked['what']}, dense {dense:.2f} %; " + "; ".join(
        f"{row['arm']} {row['ratio']:g}x: {row['accuracy_before']:.2f} % before training"
        + (f", {row['accuracy']:.2f} after {row['epochs']} epochs" if "accuracy" in row else "")
        for row in rows
    )
    target = f"{asked['ratio']:g}x at no loss"
    return claim(lost, "points lost", target, lost is not None and lost <= 0, said)


_CLAIMS = {"lead": _lead, "no loss": _no_loss}
