"""Ranks over C steps at a multiplier given by hand, as in the paper (L2): LeNet300 and ResNet-20.

Idelbayev and Carreira-Perpinan, CVPR 2020. The multiplier stays, ``mu`` grows, every L step is a training of its own
and a C step follows it. What differs from the released scripts is in the notes of the results.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as st
from benchmarks import cifar
from benchmarks.run import claim
from spectrim.cli.data import load_data
from spectrim.report import measures
from spectrim.selection.trajectory import Trajectory
from spectrim.train import PAPER_SCHEDULES, Recipe, Schedule


@dataclass
class _Case:
    """A trained dense network and what is needed to train it further.

    ``training(step)`` gives the batches of L step ``step``; ``error`` is the share of training images that a network
    has wrong, in percent, and ``test`` that of the test images.
    """

    model: nn.Module
    sites: st.Sites
    training: Callable[[int], Iterable[Any]]
    tuning: Iterable[Any]
    error: Callable[[nn.Module], float]
    test: Callable[[nn.Module], float]
    made: dict[str, Any] = field(default_factory=dict)


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Learn ranks at one multiplier, factor the network and fine-tune it; look at the test images once."""
    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    try:
        return _learned(config, {"lenet300": _lenet300, "resnet20": _resnet20}[config["network"]](config, paths))
    finally:
        torch.set_num_threads(before)


def _learned(config: dict[str, Any], case: _Case) -> dict[str, Any]:
    schedule = Schedule(**config["mu"]) if "mu" in config else PAPER_SCHEDULES[config["schedule"]]
    schedule = dataclasses.replace(schedule, steps=config.get("steps", schedule.steps))
    dense = {"error": case.error(case.model), "test_error": case.test(case.model)}
    options: dict[str, Any] = {"cost": "macs", "schedule": schedule, "normalize": config["normalize"], "dense": False}
    first = [
        {"alpha": alpha, "ranks": _joined(st.LearnedRanks(case.model, case.sites, multiplier=alpha, **options))}
        for alpha in config["alphas"]
    ]
    start = time.perf_counter()
    ranks = st.LearnedRanks(case.model, case.sites, multiplier=config["alpha"], evaluate=case.error, **options)
    recipe = config["l_step"]
    for step in range(1, schedule.steps):
        rate = recipe["lr"] * recipe["lr_decay"] ** step
        batches = case.training(step)
        st.fine_tune(
            case.model, batches, recipe=_recipe(recipe, lr=rate, seed=step), penalty=ranks, progress=False,
            accelerate=False,
        )  # fmt: skip
        ranks.c_step()
        record = ranks.trajectory.records[-1]
        print(step, f"mu {record.mu:.3g}, ranks {sum(record.ranks)}, wrong {record.metric:.2f} %", flush=True)
    learning = time.perf_counter() - start
    small, plan = ranks.finish()
    before = case.error(small)
    tuning = config["tuning"]
    st.fine_tune(small, case.tuning, recipe=_recipe(tuning, lr=tuning["lr"]), progress=False, accelerate=False)
    row = {
        "network": config["network"],
        "variant": "multiplier by hand",
        "alpha": config["alpha"],
        "c_steps": schedule.steps,
        "macs": plan.costs["macs"],
        "macs_dense": plan.dense_costs["macs"],
        "parameters": plan.costs["parameters"],
        "dense_train_error": round(dense["error"], 3),
        "nested_train_error": round(ranks.trajectory.records[-1].metric or 0.0, 3),
        "factored_train_error": round(before, 3),
        "tuned_train_error": round(case.error(small), 3),
        "dense_test_error": round(dense["test_error"], 3),
        "tuned_test_error": round(case.test(small), 3),
        "tuning_epochs": tuning["epochs"],
        "seconds_learning": round(learning, 1),
        **case.made,
    }
    print(row, flush=True)
    return {
        "claims": {"L2": _claim(config, ranks.trajectory)},
        "rows": [row],
        "c_steps": _said(ranks.trajectory),
        "first_c_step": first,
        "trajectory": json.loads(ranks.trajectory.to_json()),
        "seeds": [config["seed"]],
        "notes": config["notes"],
    }


def _recipe(given: dict[str, Any], **more: Any) -> Recipe:
    """A recipe without a teacher, from the fields that the experiment gives."""
    fields = {key: value for key, value in given.items() if key in Recipe.__dataclass_fields__}
    return Recipe(**{**fields, **more}, distillation=None)


def _joined(ranks: st.LearnedRanks) -> str:
    return " ".join(map(str, ranks.trajectory.records[-1].ranks))


def _said(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Every fifth C step and the last, for people to read; the whole is in the trajectory."""
    last = len(trajectory) - 1
    return [
        {
            "c_step": step + 1,
            "mu": record.mu,
            "ranks": " ".join(map(str, record.ranks)),
            "macs": record.costs["macs"],
            "distance": record.distance,
            "nested_train_error": None if record.metric is None else round(record.metric, 3),
        }
        for step, record in enumerate(trajectory.records)
        if step % 5 == 0 or step == last
    ]


def _claim(config: dict[str, Any], trajectory: Trajectory) -> dict[str, Any]:
    """Whether ranks begin near 0, grow, and have settled by the end."""
    totals = [sum(record.ranks) for record in trajectory.records]
    last, within = config["settled"]["c_steps"], config["settled"]["within"]
    late = totals[-last - 1 :]
    change = (max(late) - min(late)) / max(1, totals[-1])
    low = round(config["low"] * sum(trajectory.full))
    errors = [record.metric or 0.0 for record in trajectory.records]
    return claim(
        round(100 * change, 2),
        f"% change of the sum of ranks over the last {last} C steps; the path is in the figure",
        f"sum of ranks <= {low} at the first C step, grows, and changes by <= {100 * within:g} % over the last {last}",
        totals[0] <= low and totals[-1] > totals[0] and change <= within,
        f"{config['network']}: sum of ranks {totals[0]} at the first C step, {totals[-1]} of {sum(trajectory.full)} at "
        f"the last; the last {trajectory.settled} C steps changed no rank; wrong on training images at low rank "
        f"{errors[0]:.2f} % at first, {errors[-1]:.2f} % at last",
    )


# LeNet300 on Fashion-MNIST.


def lenet300() -> nn.Sequential:
    """784-300-100-10 with tanh, as in the released code."""
    layers: dict[str, nn.Module] = {"flat": nn.Flatten()}
    for number, (inputs, outputs) in enumerate(itertools.pairwise((784, 300, 100, 10)), 1):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers |= {f"fc{number}": linear, f"tanh{number}": nn.Tanh()}
    del layers["tanh3"]
    return nn.Sequential(OrderedDict(layers))


def _lenet300(config: dict[str, Any], paths: dict[str, Any]) -> _Case:
    folder, limit = paths["fashion-mnist"], config.get("images", 0)
    where = f"fashion-mnist:{folder}?normalise=fashion-mnist&limit={limit}"
    training: Any = load_data(
        f"{where}&split=train&augment=none&shuffle=true&batch={config['batch_size']}", purpose="training"
    )
    seen = load_data(f"{where}&split=train&batch=2000")
    test = load_data(f"{where}&split=test&batch=2000")
    torch.manual_seed(config["seed"])
    model = lenet300()
    reference = config["reference"]
    trained = st.fine_tune(
        model, training, recipe=_recipe(reference, lr=reference["lr"]), progress=False, accelerate=False
    )
    sites = st.calibrate(model, st.find(model), [torch.zeros(1, 784)], statistics=False)
    epochs = config["l_step"]["epochs"]
    return _Case(
        model,
        sites,
        training=lambda step: Part(training, step * epochs),
        tuning=training,
        error=lambda net: 100 - measures.accuracy(net, seen),
        test=lambda net: 100 - measures.accuracy(net, test),
        made={"reference_epochs": reference["epochs"], "seconds_reference": round(trained.seconds, 1)},
    )


# ResNet-20 on CIFAR-10.


def _resnet20(config: dict[str, Any], paths: dict[str, Any]) -> _Case:
    train, held, test = cifar.load(Path(paths["cifar10"]))
    model = cifar.network("resnet20", paths["weights"]["resnet20"])
    # The paper leaves the classifier of ResNets alone.
    sites = st.calibrate(model, st.find(model, skip="linear"), [torch.zeros(1, 3, 32, 32)], statistics=False)
    batches = cifar.Batches(train, batch_size=config["batch_size"], seed=config["seed"])
    few = held[: config["judged_images"]]
    return _Case(
        model,
        sites,
        training=lambda step: Part(batches, step, config["l_step"]["batches"]),
        tuning=batches,
        error=lambda net: 100 - cifar.accuracy(net, few),
        test=lambda net: 100 - cifar.accuracy(net, test),
    )


class Part:
    """The epochs of other batches from ``first`` on, and of each only the first ``count`` batches."""

    def __init__(self, batches: Any, first: int, count: int | None = None) -> None:
        self.batches, self.first, self.count = batches, first, count

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(self.first + epoch)

    def __len__(self) -> int:
        return len(self.batches) if self.count is None else min(self.count, len(self.batches))

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.batches), len(self))
