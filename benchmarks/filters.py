"""Filter removal before and after fine-tuning, beside magnitude, random and Torch-Pruning (P2, P3); VGG-16 (P4)."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from benchmarks import cifar, torch_pruning_baseline
from benchmarks.distilled import every_row, tuned
from benchmarks.run import claim
from spectrim.cost import counted as costs
from spectrim.cost.whole import Network
from spectrim.network.coupling import axes_left
from spectrim.nn.channels.narrow import narrow
from spectrim.nn.checkpoint import read_plan
from spectrim.nn.surgery import parameter_count
from spectrim.nn.watch.norms import reestimate_batchnorm

OURS = "reconstruction"
_RE_ESTIMATED = " + BatchNorm"


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every arm at every point of the experiment."""
    return every_row(config, paths, label=_label, row=_row, claims=_CLAIMS)


def _label(point: dict[str, Any], arm: str, seed: int) -> str:
    return f"{_stem(point, arm, seed)}-{point['epochs']}"


def _stem(point: dict[str, Any], arm: str, seed: int) -> str:
    """Without the epochs: the narrowed network is the same for all."""
    size = "-".join(f"{cost}-{share:g}" for cost, share in point["budget"].items())
    return f"{arm.replace(' ', '-')}-{size}-{seed}"


def ours(model: nn.Module, arm: str, batches: Sequence[Tensor], budget: dict[str, float]) -> tuple[nn.Module, st.Plan]:
    """Filters removed by principal filter analysis, and the plan."""
    if arm == "PFA-KL":
        sites = st.calibrate(model, st.couple(model, st.find(model), batches[0]), batches)
        plan = st.recommend(sites, st.KL())
        return st.apply(model, sites, plan, batches), plan
    rule = {OURS: "reconstruction", "L1Max": "l1-max", "AbsMax": "abs-max"}[arm]
    result = st.compress(model, batches, st.Budget(**budget), methods=[st.PrincipalFilters(rule=rule)])
    return result.model, result.plan


def by_rule(
    model: nn.Module, batches: Sequence[Tensor], budget: dict[str, float], score: Callable[[Tensor], Tensor]
) -> nn.Module:
    """The same share of every group of channels removed, those of least score, without any correction."""
    sites = st.couple(model, st.find(model), batches[0])
    sites = st.calibrate(model, sites, batches[:1], statistics=False)
    network = Network(sites, {"macs": costs.macs, "parameters": costs.parameters})
    (cost, share), *_ = budget.items()
    limit = share * network.cost()[cost]
    order = {}
    for coupling in sites.couplings:
        total = torch.zeros(coupling.channels)
        for side in coupling.on("out"):
            if side.name in sites:
                weight = sites[side.name].weight
                rows = weight.reshape(side.size, -1)[side.positions]
                total += score(rows.flatten(1))
        order[coupling.name] = total.argsort(descending=True).tolist()
    for gone in range(1, 1000):
        numbers = {c.name: max(1, round(c.channels * (1 - gone / 1000))) for c in sites.couplings}
        if network.cost(widths=numbers)[cost] <= limit:
            break
    small = copy.deepcopy(model)
    narrow(small, axes_left(sites.couplings, {name: sorted(order[name][:n]) for name, n in numbers.items()}))
    return small


def made(model: nn.Module, arm: str, batches: Sequence[Tensor], budget: dict[str, float], seed: int) -> nn.Module:
    """The narrowed network of an arm that is not ours, without training."""
    name = arm.removesuffix(_RE_ESTIMATED)
    if name == "Torch-Pruning":
        sites = st.calibrate(model, st.find(model), batches[:1], statistics=False)
        dense = Network(sites, {"macs": costs.macs}).cost()["macs"]
        small, _ = torch_pruning_baseline.pruned(model, budget["macs"] * dense)
    else:
        draw = torch.Generator().manual_seed(seed)
        scores = {
            "L1 magnitude": lambda rows: rows.abs().sum(1),
            "random": lambda rows: torch.rand(len(rows), generator=draw),
        }
        small = by_rule(model, batches, budget, scores[name])
    if arm != name:
        reestimate_batchnorm(small, batches)
    return small


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
    # Every seed has images of its own.
    images = train.images[seed * config["images"] : (seed + 1) * config["images"]]
    batches = [cifar.normalise(part) for part in images.split(250)]
    own: dict[str, Any] = {}
    if arm == "dense":
        model = copy.deepcopy(dense)
    elif arm in (OURS, "L1Max", "AbsMax", "PFA-KL"):
        path = work / f"{_stem(point, arm, seed)}.safetensors"
        if not path.exists():
            model, plan = ours(dense, arm, batches, point["budget"])
            st.save(model, plan, path)
        model, plan = st.load(copy.deepcopy(dense), path), read_plan(path)
        widths = [len(e.choice["kept"]) if not e.choice.is_dense else 0 for e in plan if ":" in e.site]
        own = {"widths": widths, "steps": plan.facts.get("steps")}
    else:
        model = made(dense, arm, batches, point["budget"], seed)
    counted = st.calibrate(model, st.find(model), batches[:1], statistics=False)
    row = {
        "network": config["network"],
        "arm": arm,
        "seed": seed,
        "budget": point["budget"],
        "macs": round(Network(counted, {"macs": costs.macs}).cost()["macs"]),
        "macs_dense": round(_macs(dense, batches)),
        "parameters": parameter_count(model),
        "parameters_dense": parameter_count(dense),
        **own,
        "held_out_before": cifar.accuracy(model, held),
        "accuracy_before": cifar.accuracy(model, test),
        "seconds_compress": round(time.perf_counter() - start, 1),
        "epochs": point["epochs"],
    }
    if point["epochs"]:
        checkpoint = work / f"{_label(point, arm, seed)}-trained.safetensors"
        row |= tuned(model, config, data, cache, checkpoint, epochs=point["epochs"], seed=seed)
    return row


def _macs(model: nn.Module, batches: Sequence[Tensor]) -> float:
    sites = st.calibrate(model, st.find(model), batches[:1], statistics=False)
    return Network(sites, {"macs": costs.macs}).cost()["macs"]


def _means(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if key in row:
            found.setdefault(row["arm"], []).append(row[key])
    return {arm: statistics.mean(values) for arm, values in found.items()}


def _lead(rows: list[dict[str, Any]], dense: float, asked: dict[str, Any]) -> dict[str, Any]:
    """Reconstruction less the best arm without a correction, before training."""
    means = _means(rows, "accuracy_before")
    plain = {arm: v for arm, v in means.items() if arm in ("L1 magnitude", "Torch-Pruning", "random")}
    lead = round(means[OURS] - max(plain.values()), 2)
    share = rows[0]["macs"] / rows[0]["macs_dense"]
    said = ", ".join(f"{arm} {value:.2f}" for arm, value in means.items())
    note = f"{rows[0]['network']} (dense {dense:.2f} %), {share:.0%} of the MACs, before training: {said}"
    return claim(lead, "points", f"ahead of all by >= {asked['at_least']}", lead >= asked["at_least"], note)


def _level(rows: list[dict[str, Any]], dense: float, asked: dict[str, Any]) -> dict[str, Any]:
    """Accuracy after training, and whether it is ahead of Torch-Pruning's after as many epochs."""
    means: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        means.setdefault((row["arm"], row["epochs"]), []).append(row["accuracy"])
    after = {key: statistics.mean(values) for key, values in means.items()}
    before = _means(rows, "accuracy_before")
    most = max(epochs for arm, epochs in after if arm == OURS)
    own = round(after[OURS, most], 2)
    row = next(row for row in rows if row["arm"] == OURS)
    said = ", ".join(f"{arm} {value:.2f} after {epochs} epochs" for (arm, epochs), value in after.items())
    first = ", ".join(f"{arm} {value:.2f}" for arm, value in before.items())
    ratio = row["macs_dense"] / row["macs"]
    note = f"{row['network']} (dense {dense:.2f} %), {ratio:.2f}x fewer MACs: {said}; before training: {first}"
    others = {epochs: value for (arm, epochs), value in after.items() if arm != OURS}
    ahead = all(after.get((OURS, epochs), 0.0) > value for epochs, value in others.items())
    target = f">= {asked['at_least']} %, ahead of Torch-Pruning"
    return claim(own, "%", target, own >= asked["at_least"] and ahead, note)


def _headline(rows: list[dict[str, Any]], dense: float, asked: dict[str, Any]) -> dict[str, Any]:
    """Accuracy gained over dense at the ratio of the paper's headline."""
    after, before = _means(rows, "accuracy"), _means(rows, "accuracy_before")
    gained = round(after[OURS] - dense, 2)
    ratios = {row["arm"]: row["parameters_dense"] / row["parameters"] for row in rows}
    epochs = max(row["epochs"] for row in rows)
    said = ", ".join(
        f"{arm} {ratios[arm]:.2f}x {after[arm]:.2f} (before training {value:.2f})"
        if arm in after
        else f"{arm} {ratios[arm]:.2f}x, before training {value:.2f}"
        for arm, value in before.items()
    )
    note = f"{rows[0]['network']} (dense {dense:.2f} %), {epochs} epochs: {said}"
    met = gained >= asked["at_least"] and ratios[OURS] >= asked["ratio"]
    return claim(gained, "points over dense", f"{asked['ratio']}x, >= +{asked['at_least']}", met, note)


_CLAIMS = {"lead": _lead, "level": _level, "headline": _headline}
