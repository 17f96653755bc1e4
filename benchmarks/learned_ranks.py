"""Learned ranks on CIFAR-10: the accuracy-cost curve of one run (L3, L4), and against one-shot plans (L6)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import spectrim as st
from benchmarks import cifar
from benchmarks.run import HERE, claim
from spectrim.train import Distillation, LearnedResult, Recipe, Schedule


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Run the arms of the experiment; look at the test set once for each row."""
    train, held, test = cifar.load(paths["cifar10"])
    name = config["network"]
    dense = cifar.network(name, paths["weights"][name])
    before = cifar.accuracy(dense, test)
    cache = cifar.TeacherCache(dense, paths["shared"] / f"teacher-{name}")
    if "threads" in config:
        torch.set_num_threads(config["threads"])
    calibration = [cifar.normalise(part) for part in train.images[: config["images"]].split(250)]
    rows: list[dict[str, Any]] = []

    def add(arm: str, seed: int, model: nn.Module, plan: st.Plan, epochs: int, **more: Any) -> None:
        rows.append(
            {
                "network": name,
                "arm": arm,
                "macs": plan.costs["macs"],
                "parameters": sum(p.numel() for p in model.parameters()),
                "seed": seed,
                "epochs": epochs,
                "held_out": cifar.accuracy(model, held),
                "accuracy": cifar.accuracy(model, test),
                **more,
            }
        )
        print(rows[-1], flush=True)

    for seed in config["seeds"]:
        data = cifar.Batches(
            train, batch_size=config["recipe"]["batch_size"], seed=seed, teacher=cache, views=config.get("views")
        )
        for arm in config["arms"]:
            if arm["kind"] == "result":
                continue
            work = paths["work"] / f"{arm['name']}-{seed}"
            _ARMS[arm["kind"]](config, arm, dense, data, calibration, work, seed, add)
    for arm in config["arms"]:
        if arm["kind"] == "result":
            rows += _rows_of(arm)
    claims = {key: _claim(asked, rows) for key, asked in config["claims"].items()}
    notes = [f"Dense {name}: {before:.2f} % on the test images.", *config.get("notes", [])]
    return {"claims": claims, "rows": rows, "seeds": config["seeds"], "notes": notes}


def _recipe(config: dict[str, Any], epochs: int, lr: float, seed: int) -> Recipe:
    shared = config["recipe"]
    return Recipe(
        epochs=epochs,
        lr=lr,
        weight_decay=shared["weight_decay"],
        schedule=shared["schedule"],
        precision=shared["precision"],
        memory_format="channels_last",
        distillation=None,
        seed=seed,
    )


def _loss(config: dict[str, Any]) -> Callable[..., torch.Tensor]:
    recipe = config["recipe"]
    return Distillation(recipe["temperature"], recipe["teacher_weight"]).loss_on_pairs


def _methods() -> list[st.Method]:
    return [st.ActivationSVD(multiple_of=1), st.WeightSVD(multiple_of=1)]


def _path(config: Any, arm: Any, dense: Any, data: Any, calibration: Any, work: Any, seed: int, add: Any) -> None:
    """Several budgets from one run; the epochs of a point are those of all points up to it that led there."""
    learn, tune = arm["learning"], arm["tuning"]
    options = {key: arm[key] for key in ("energy", "augmented") if key in arm}
    started = [time.perf_counter()]

    def done(found: LearnedResult) -> None:
        learned = learn["epochs"] * points.pop(0)
        add(
            arm["name"],
            seed,
            found.model,
            found.plan,
            learned + tune["epochs"],
            epochs_learning=learned,
            epochs_tuning=tune["epochs"],
            ranks_moved=_moved(found),
            seconds=round(time.perf_counter() - started[0], 1),
        )
        started[0] = time.perf_counter()

    points = list(range(1, len(arm["macs"]) + 1))
    st.budget_path(
        dense,
        data,
        [st.Budget(macs=macs) for macs in arm["macs"]],
        calibration=calibration,
        learning=_recipe(config, learn["epochs"], learn["lr"], seed),
        tuning=_recipe(config, tune["epochs"], tune["lr"], seed),
        patience=None,
        loss=_loss(config),
        checkpoint=work,
        accelerate=False,
        schedule=Schedule(**arm["schedule"]),
        methods=[st.WeightSVD(multiple_of=1)],
        start=_methods(),
        done=done,
        **options,
    )


def _one_shot(config: Any, arm: Any, dense: Any, data: Any, calibration: Any, work: Any, seed: int, add: Any) -> None:
    """The plan of ``compress``, fine-tuned."""
    for macs in arm["macs"]:
        start = time.perf_counter()
        found = st.compress(dense, calibration, st.Budget(macs=macs), methods=_methods())
        data.set_epoch(0)
        tune = arm["tuning"]
        st.fine_tune(
            found.model,
            data,
            recipe=_recipe(config, tune["epochs"], tune["lr"], seed),
            loss=_loss(config),
            checkpoint=work / f"{macs:.0f}.safetensors",
            accelerate=False,
        )
        seconds = round(time.perf_counter() - start, 1)
        add(arm["name"], seed, found.model, found.plan, tune["epochs"], seconds=seconds)


def _learned(config: Any, arm: Any, dense: Any, data: Any, calibration: Any, work: Any, seed: int, add: Any) -> None:
    """Learned ranks, a run of its own for every budget."""
    for macs in arm["macs"]:
        _path(config, {**arm, "macs": [macs]}, dense, data, calibration, work / f"{macs:.0f}", seed, add)


_ARMS: dict[str, Callable[..., None]] = {"path": _path, "one-shot": _one_shot, "learned": _learned}


def _rows_of(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of another experiment, made with the same recipe, under the name of this arm."""
    rows = json.loads((HERE / "results" / f"{arm['result']}.json").read_text())["rows"]
    kept = [r for r in rows if all(r.get(key) == value for key, value in arm["where"].items())]
    names = ("network", "macs", "parameters", "seed", "epochs", "held_out", "accuracy")
    return [{"arm": arm["name"], **{name: r[name] for name in names}} for r in kept]


def _moved(found: LearnedResult) -> int:
    """Ranks given from one layer to another between the first and the last C step."""
    first, last = found.trajectory.records[0], found.trajectory.records[-1]
    return sum(abs(a - b) for a, b in zip(first.ranks, last.ranks, strict=True))


def _mean(rows: list[dict[str, Any]], arms: list[str], macs: float) -> tuple[float, list[float]] | None:
    found = [r["accuracy"] for r in rows if r["arm"] in arms and 0.97 * macs <= r["macs"] <= 1.0001 * macs]
    return (sum(found) / len(found), found) if found else None


def _claim(asked: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy against targets at budgets, or the gain of one arm over another."""
    said: list[str] = []
    margins: list[float] = []
    seeds: list[int] = []
    for point in asked["points"]:
        label = f"{point['macs'] / 1e6:g} MMAC"
        mine = _mean(rows, asked["arms"], point["macs"])
        theirs = _mean(rows, [asked["against"]], point["macs"]) if "against" in asked else (point["at_least"], [])
        if mine is None or theirs is None:
            said.append(f"{label}: not run")
            continue
        margins.append(mine[0] - theirs[0])
        if "against" in asked:
            seeds.append(min(len(mine[1]), len(theirs[1])))
            said.append(f"{label}: {mine[0]:.2f} against {theirs[0]:.2f} % ({margins[-1]:+.2f}, n = {len(mine[1])})")
        else:
            said.append(f"{label}: {mine[0]:.2f} %")
    complete = len(margins) == len(asked["points"])
    if "against" in asked:
        unit = "points gained over the one-shot plan, at the worst of the budgets run; each in turn"
        target = "reported at every budget, over at least two seeds"
        met = complete and min(seeds) > 1
        return claim(round(min(margins), 2) if margins else None, unit, target, met, "; ".join(said))
    target = "; ".join(f"{p['macs'] / 1e6:g} MMAC >= {p['at_least']:g} %" for p in asked["points"])
    value = round(min(margins), 2) if margins else None
    unit = "points above target, at the worst of the budgets run"
    return claim(value, unit, target, complete and min(margins) >= 0, "; ".join(said))
