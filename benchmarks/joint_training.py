"""Training with shared factors (J3, J4): joint against separate decompositions, at equal parameters and epochs.

Three tables at one budget of parameters: ``separate`` has low rank for every layer alone; ``joint`` joins the layers of
every group of repeated ones, which have no choice of their own; ``mixed`` has both, and groups in parts.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as st
from benchmarks import cifar
from benchmarks.distilled import kept, network_name, trained, tuned
from benchmarks.paper_resnets import PaperResNet
from benchmarks.run import claim
from spectrim.nn.checkpoint import read_plan


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Train every arm from the same dense network; look at the test set once for each row.

    Rows that an interrupted run has finished are taken from its folder.
    """
    if "threads" in config:
        torch.set_num_threads(config["threads"])
    train, held, test = cifar.load(paths["cifar10"])
    dense = _dense(config, paths, train)
    before = cifar.accuracy(dense, test)
    cache = cifar.TeacherCache(dense, paths["shared"] / f"teacher-{network_name(config)}")
    rows: list[dict[str, Any]] = []
    for arm in config["arms"]:
        for share in arm["parameters"]:
            for seed in config["seeds"]:
                path = paths["work"] / f"{arm['name']}-{share:.4f}-{seed}.json"
                given = (config, arm["name"], share, seed, dense, (train, held, test), cache, paths["work"])
                rows.append(kept(path, functools.partial(_trained, *given)))
    claims = {key: _CLAIMS[asked["kind"]](asked, rows, before) for key, asked in config["claims"].items()}
    notes = [f"Dense: {before:.2f} % on the test images, {_count(dense):,} parameters.", *config.get("notes", [])]
    return {"claims": claims, "rows": rows, "seeds": config["seeds"], "notes": notes}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _dense(config: dict[str, Any], paths: dict[str, Any], train: cifar.Images) -> nn.Module:
    """The given network, or one trained here; continued if that was interrupted."""
    if "width" not in config:
        return cifar.network(config["network"], paths["weights"][config["network"]])
    torch.manual_seed(0)
    model = PaperResNet(config["network"], width=config["width"])
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return trained(model, config["dense"], train, paths["work"] / "dense.safetensors")


def planned(model: nn.Module, arm: str, calibration: list[torch.Tensor], share: float) -> tuple[st.Sites, st.Plan]:
    """Sites and plan of an arm, chosen on calibration images."""
    sites = st.calibrate(model, st.find(model), calibration)
    sites = st.sensitivity(model, sites, calibration)
    methods: list[st.Method] = [st.ActivationSVD(multiple_of=1), st.WeightSVD(multiple_of=1)]
    if arm != "separate":
        sites = st.group(sites, nested=arm == "mixed")
        methods += [st.JointSVD("left", multiple_of=1), st.JointSVD("right", multiple_of=1)]
    table = st.tabulate(sites, methods)
    if arm == "joint":
        members = {name for names in sites.groups.values() for name in names}
        rows = (dataclasses.replace(r, options=r.options[:1]) if r.site in members else r for r in table.rows)
        table = dataclasses.replace(table, rows=tuple(rows))
    return sites, st.select(table, st.Budget(parameters=share))


def _compressed(
    model: nn.Module, arm: str, share: float, images: cifar.Images, path: Path
) -> tuple[nn.Module, st.Plan]:
    """The compressed network before training, one for all seeds, from its file if there is one."""
    if not path.exists():
        calibration = [cifar.normalise(part) for part in images.images.split(250)]
        sites, plan = planned(model, arm, calibration, share)
        st.save(st.apply(model, sites, plan, calibration), plan, path)
    return st.load(copy.deepcopy(model), path), read_plan(path)


def _trained(
    config: dict[str, Any],
    arm: str,
    share: float,
    seed: int,
    dense: nn.Module,
    data: tuple[cifar.Images, cifar.Images, cifar.Images],
    cache: cifar.TeacherCache,
    work: Path,
) -> dict[str, Any]:
    train, held, _ = data
    start = time.perf_counter()
    model, plan = _compressed(dense, arm, share, train[: config["images"]], work / f"{arm}-{share:.4f}.safetensors")
    before, made = cifar.accuracy(model, held), time.perf_counter() - start
    epochs = config["recipe"]["epochs"]
    checkpoint = work / f"{arm}-{share:.4f}-{seed}.safetensors"
    return {
        "network": network_name(config),
        "arm": arm,
        "seed": seed,
        "parameters": _count(model),
        "ratio": round(_count(dense) / _count(model), 3),
        "macs": plan.costs["macs"],
        "layers_sharing": sum(len(entry.members) for entry in plan),
        "groups": sum(bool(entry.members) for entry in plan),
        "loss_planned": plan.loss,
        "epochs": epochs,
        "held_out_before": before,
        "seconds_compress": round(made, 1),
        **tuned(model, config, data, cache, checkpoint, epochs=epochs, seed=seed),
    }


def _of(rows: list[dict[str, Any]], arm: str, ratio: float) -> list[float]:
    """Test accuracies of an arm at a ratio: within 2 % of it."""
    return [row["accuracy"] for row in rows if row["arm"] == arm and abs(row["ratio"] / ratio - 1) < 0.02]


def _never_worse(asked: dict[str, Any], rows: list[dict[str, Any]], dense: float) -> dict[str, Any]:
    """Mean of the mixed table less the better of the two others."""
    leads, said = [], []
    for share in asked["parameters"]:
        found = {arm: _of(rows, arm, 1 / share) for arm in ("separate", "joint", "mixed")}
        means = {arm: statistics.mean(values) for arm, values in found.items()}
        leads.append(means["mixed"] - max(means["separate"], means["joint"]))
        spread = {arm: statistics.stdev(v) if len(v) > 1 else 0.0 for arm, v in found.items()}
        said.append(
            f"{100 * share:g} % of the parameters: "
            + ", ".join(f"{arm} {means[arm]:.2f} (sd {spread[arm]:.2f}, {len(found[arm])} seeds)" for arm in found)
        )
    value = round(min(leads), 3)
    said[0] = f"{rows[0]['network']}, epochs: {rows[0]['epochs']}; {said[0]}"
    unit, target = "points above target", "mixed >= the better of joint and separate"
    return claim(value, unit, target, value >= 0, "; ".join(said))


def _lost(asked: dict[str, Any], rows: list[dict[str, Any]], dense: float) -> dict[str, Any]:
    """Points lost against dense, at the worst of the points."""
    over, said = [], []
    for point in asked["points"]:
        mean = statistics.mean(_of(rows, asked["arm"], point["ratio"]))
        over.append(dense - mean - point["at_most"])
        said.append(f"{point['ratio']:g}x: {mean:.2f} %, {dense - mean:.2f} points lost (at most {point['at_most']:g})")
    said[0] = f"{rows[0]['network']} (first stage of {asked['width']} channels, dense {dense:.2f} %): {said[0]}"
    value = round(max(over), 3)
    target = "; ".join(f"{p['ratio']:g}x <= {p['at_most']:g} points" for p in asked["points"])
    return claim(value, "points lost above target, at the worst ratio", target, value <= 0, "; ".join(said))


_CLAIMS = {"never worse": _never_worse, "lost": _lost}
