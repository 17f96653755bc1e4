"""Sets of methods that compete, ``methods="auto"``, beside each of them alone: what is lost, and what it takes.

Every arm has the same unlabelled training images and the same calibration. All are compared as ``compress`` judges
them, on calibration images that nothing was fitted to, and by accuracy on training images that were held out; test
images are looked at for what auto returns. Finished rows are kept, so that a run that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import time
from functools import cache
from typing import Any

import torch

from benchmarks import cifar, resumed
from benchmarks.run import claim
from spectrim.nn.find import find
from spectrim.nn.watch.batches import Feed
from spectrim.pipeline import Result
from spectrim.pipeline.making import Making
from spectrim.pipeline.shrinking import shrink_best
from spectrim.preparation import Prepared, locate, prepare
from spectrim.search.arms import Arm, usual
from spectrim.search.judge import Judge
from spectrim.selection.budget import Budget

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dense network, and what preparing it took, in CPU seconds."""

    model: cifar.ResNet
    prepared: Prepared
    forward: float  # of one pass over the calibration images
    coupling: float  # of finding the channels that can be removed
    calibrating: float  # of all that every arm needs

    @property
    def arms(self) -> list[Arm]:
        """The sets that compete."""
        return usual(["macs"], self.prepared.sites)

    def seconds(self, arms: list[Arm]) -> float:
        """CPU seconds of preparing for these arms."""
        return self.calibrating + (self.coupling if any(arm.removes_channels for arm in arms) else 0.0)


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every arm and all together, at every budget of every network."""
    torch.manual_seed(config["seed"])
    torch.set_num_threads(config["threads"])
    train, held, test = cifar.load(paths["cifar10"])
    batches = [cifar.normalise(part) for part in train.images[: config["images"]].split(128)]
    network = config["network"]

    @cache
    def dense() -> Dense:
        return _dense(cifar.network(network, paths["weights"][network]), batches)

    def row(kept: float, arm: str) -> dict[str, Any]:
        given = dense()
        arms = [each for each in given.arms if arm in (AUTO, each.name)]
        alone = dataclasses.replace(given.prepared, curves={})  # what is offered is found anew, as in a call of its own
        start = time.process_time()
        result = shrink_best(given.model, alone, Budget(macs=kept), arms, Judge(), Making())
        seconds = given.seconds(arms) + time.process_time() - start
        found = {
            "network": network, **_judged(result), "macs": result.plan.costs["macs"], "cpu_s": round(seconds, 1),
            "passes": round(seconds / given.forward, 1), "held_out_accuracy": cifar.accuracy(result.model, held),
        }  # fmt: skip
        return {**found, "test_accuracy": cifar.accuracy(result.model, test)} if arm == AUTO else found

    # Those of any network with convolutions.
    names = [arm.name for arm in usual(["macs"], find(cifar.ResNet(1)))]
    # The network of an arm is the same alone and among others, to the bit: what auto chooses need not be made again.
    keys = [
        {"kept": kept, "arm": arm} for kept in config["macs"] for arm in (AUTO, *names) if arm not in config["chosen"]
    ]
    rows, mixed = resumed.rows(paths["work"] / "auto.jsonl", keys, row)
    if others := {row["chosen"] for row in rows if row["arm"] == AUTO} - set(config["chosen"]):
        raise ValueError(f"auto chose {others}: leave these out of the arms that are made alone, as 'chosen'")
    return {
        "claims": _claims(config["network"], rows),
        "rows": rows,
        "seeds": [config["seed"]],
        "notes": [
            f"{config['images']:,} unlabelled training images; no gradient step on any weight. CPU seconds are those "
            "of the whole call, calibration included, on one thread; passes are how many forward passes of these "
            "images take as long.",
            *mixed,
        ],
    }


def _dense(model: cifar.ResNet, batches: list[torch.Tensor]) -> Dense:
    """The network, coupled and calibrated."""
    start = time.process_time()
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    passed = time.process_time()
    feed = Feed.of(None)
    sites = locate(model, batches, channels=True, forward=feed)
    coupled = time.process_time()
    prepared = prepare(model, sites, batches, forward=feed)
    return Dense(model, prepared, passed - start, coupled - passed, time.process_time() - coupled)


def _judged(result: Result) -> dict[str, Any]:
    """What was lost by the judge, which arm it was, and what became of the others."""
    chosen = next(each for each in result.report.arms if each.chosen)
    found = {
        "lost": chosen.loss, "standard_error": chosen.standard_error, "predicted": chosen.predicted,
        "chosen": chosen.name,
    }  # fmt: skip
    return {**found, "others": "; ".join(str(each) for each in result.report.arms if not each.chosen)}


def _claims(network: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    by = {(row["kept"], row["arm"]): row for row in rows}
    budgets = list(dict.fromkeys(kept for kept, _ in by))
    autos = [by[kept, AUTO] for kept in budgets]
    alone = [min(row["lost"] for (k, _), row in by.items() if k == kept) for kept in budgets]
    worse = [(auto["lost"] - least) / (auto["standard_error"] or 1.0) for auto, least in zip(autos, alone, strict=True)]
    dearer = [auto["cpu_s"] / by[kept, "low rank"]["cpu_s"] for kept, auto in zip(budgets, autos, strict=True)]
    told = "; ".join(f"{ratio:.1f} at {kept:.0%}" for kept, ratio in zip(budgets, dearer, strict=True))
    name = {"resnet20": "ResNet-20", "resnet56": "ResNet-56"}[network]
    return {
        f"A1 ({name})": claim(
            round(max(worse), 3), "standard errors that auto lost more than its best single arm, at the worst budget",
            "<= 1", max(worse) <= 1, "divergence from the dense network on held-out calibration images",
        ),
        f"A1 ({name}, time)": claim(
            round(max(dearer), 2), "times the CPU time of low rank alone, at the worst budget", "<= 3",
            max(dearer) <= 3, told,
        ),
    }  # fmt: skip
