"""Fine-tuning with the dense network as teacher: accuracy against MACs (F3, F4) and against Torch-Pruning (F5)."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import spectrim as st
from benchmarks import cifar
from benchmarks.oneshot import compressed
from benchmarks.run import claim
from benchmarks.torch_pruning_baseline import pruned
from spectrim.nn.checkpoint import read_plan
from spectrim.train import Distillation


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Train every student of the experiment with one loop; look at the test set once for each."""
    train, held, test = cifar.load(paths["cifar10"])
    name = config["network"]
    teacher = cifar.network(name, paths["weights"][name])
    dense_accuracy = cifar.accuracy(teacher, test)
    cache = cifar.TeacherCache(teacher, paths["shared"] / f"teacher-{name}")
    if "threads" in config:
        torch.set_num_threads(config["threads"])
    recipe = config["recipe"]
    distillation = Distillation(recipe["temperature"], recipe["teacher_weight"])
    rows: list[dict[str, Any]] = []
    for student in config["students"]:
        for seed in config["seeds"]:
            start = time.perf_counter()
            label = f"{student['method']}-{student['macs'] / 1e6:g}-{seed}"
            if student["method"] == "spectrim":
                model, macs = _compressed_once({**config, "seed": seed}, paths, student["macs"], label)
            else:
                model, macs = pruned(teacher, student["macs"])
            epochs, rate = student.get("epochs", recipe["epochs"]), student.get("lr", recipe["lr"])
            before = cifar.accuracy(model, held)
            made = time.perf_counter() - start
            batches = cifar.Batches(train, batch_size=recipe["batch_size"], seed=seed, teacher=cache)
            trained = st.fine_tune(
                model,
                batches,
                loss=distillation.loss_on_pairs,
                epochs=epochs,
                lr=rate,
                weight_decay=recipe["weight_decay"],
                schedule=recipe["schedule"],
                precision=recipe["precision"],
                memory_format="channels_last",
                evaluate=lambda m: cifar.accuracy(m, held),
                evaluate_every=epochs,
                checkpoint=paths["work"] / f"{label}.safetensors",
                seed=seed,
                accelerate=False,
            )
            rows.append(
                {
                    "network": name,
                    "method": student["method"],
                    "macs": macs,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "epochs": epochs,
                    "lr": rate,
                    "seed": seed,
                    "held_out_before": before,
                    "held_out": cifar.accuracy(model, held),
                    "accuracy": cifar.accuracy(model, test),
                    "seconds_compress": round(made, 1),
                    "seconds_train": round(trained.seconds, 1),
                }
            )
            print(rows[-1], flush=True)
    claims = {key: _claim(key, config, rows) for key in config["claims"]}
    notes = [f"Dense {name}: {dense_accuracy:.2f} % on the test images.", *config.get("notes", [])]
    return {"claims": claims, "rows": rows, "seeds": config["seeds"], "notes": notes}


def _compressed_once(config: dict[str, Any], paths: dict[str, Any], macs: float, label: str) -> tuple[nn.Module, float]:
    """The compressed network, from its checkpoint if an interrupted run has left one."""
    path = paths["work"] / f"{label}-compressed.safetensors"
    if not path.exists():
        _, result = compressed(config, paths, macs)
        st.save(result.model, result.plan, path)
    name = config["network"]
    return st.load(cifar.network(name, paths["weights"][name]), path), read_plan(path).costs["macs"]


def _mean(rows: list[dict[str, Any]], method: str, macs: float) -> float | None:
    """Mean test accuracy of a method's rows at a budget: those within it and close to it."""
    fitting = [r["accuracy"] for r in rows if r["method"] == method and 0.9 * macs <= r["macs"] <= 1.001 * macs]
    return sum(fitting) / len(fitting) if fitting else None


def _claim(key: str, config: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    asked = config["claims"][key]
    worst: list[float] = []
    said: list[str] = []
    for point in asked["points"]:
        mine = _mean(rows, "spectrim", point["macs"])
        label = f"{point['macs'] / 1e6:g} MMAC"
        if mine is None:
            said.append(f"{label}: not run")
            continue
        if asked["kind"] == "lead":
            theirs = _mean(rows, "torch-pruning", point["macs"])
            if theirs is None:
                said.append(f"{label}: not run")
                continue
            worst.append(mine - theirs - point["at_least"])
            said.append(f"{label}: {mine:.2f} against {theirs:.2f} % ({mine - theirs:+.2f})")
        else:
            worst.append(mine - point["at_least"])
            said.append(f"{label}: {mine:.2f} %")
    unit = "points ahead" if asked["kind"] == "lead" else "%"
    target = "; ".join(f"{p['macs'] / 1e6:g} MMAC >= {p['at_least']:g} {unit}" for p in asked["points"])
    complete = len(worst) == len(asked["points"])
    value = round(min(worst), 3) if worst else None
    return claim(
        value,
        "points above target, at the worst of the budgets run",
        target,
        complete and min(worst) >= 0,
        "; ".join(said),
    )
