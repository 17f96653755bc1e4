"""Stated budgets against what the networks that learned ranks end in really have (L7)."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from benchmarks import cifar
from benchmarks.rank_paths import Part
from benchmarks.run import claim
from spectrim.cli.data import load_data
from spectrim.cli.digits_net import DigitsNet
from spectrim.nn.timing import measure_latency
from spectrim.pipeline import Result
from spectrim.report import measures
from spectrim.train import Recipe, Schedule

_UNITS = {"parameters": "", "macs": " MAC", "bytes": " B", "latency": " ms"}
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Learn ranks under every budget with a few training batches, and measure the finished networks."""
    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    try:
        model, batches = {"digits": _digits, "resnet20": _resnet20}[config["network"]](config, paths)
        rows = [_met(model, batches, asked, config) for asked in config["budgets"]]
    finally:
        torch.set_num_threads(before)
    worst = max((row["of_budget"] for row in rows), key=lambda ratio: abs(ratio - 1))
    least = 1 - config["within"]
    said = [
        f"{r['stated']}: {r['has']:.6g} of {r['limit']:.6g}{_UNITS[r['cost']]} ({r['of_budget']:.4f})" for r in rows
    ]
    claims = {
        "L7": claim(
            worst,
            "of the stated budget, farthest from 1; each in turn",
            f"{least:g} to 1 of the stated figure, for parameters, MACs, bytes and milliseconds",
            all(least <= row["of_budget"] <= 1 for row in rows),
            "; ".join(said),
        )
    }
    timing = config["timing"]
    notes = [
        f"{config['network']}, {config['l_step']['batches']} training batches and {config['c_steps']} C steps for each "
        "budget, no fine-tuning: only the budget is looked at, not what the network is good for.",
        "Parameters are counted on the finished module; MACs by torch's counter of floating-point operations; bytes "
        "are those of the file that save writes, header and plan included.",
        f"Milliseconds at batch {timing['batch']}: dense and finished network in turns, {timing['repeats']} repeats, "
        f"{timing['again']} times over; of_budget is the median over these of quiet, the median of the repeats in "
        "which the system took a core away least often. A share is one of the dense time measured beside it; a time "
        "stated in milliseconds is a share of the dense time measured before.",
    ]
    return {"claims": claims, "rows": rows, "seeds": [config["seed"]], "notes": notes}


def _met(model: nn.Module, batches: Iterable[Any], asked: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    ((cost, stated),) = asked.items()
    timing, clock = config["timing"], None
    images = next(iter(batches))[0]
    if cost == "milliseconds":
        cost, stated = "latency", f"{stated * _dense_time(model, images, config):.4g}ms"
    if cost == "latency":
        clock = st.Latency(
            threads=config["threads"], batch=timing["batch"], memory_format=timing["format"], cache=None,
            rounds=timing["rounds"], budget=timing["seconds"],
        )  # fmt: skip
    learning = {key: value for key, value in config["l_step"].items() if key != "batches"}
    found = st.learn_ranks(
        model, batches, st.Budget(**{cost: stated}), learning=Recipe(**learning, seed=config["seed"]),
        tuning=Recipe(epochs=0), schedule=Schedule(steps=config["c_steps"]), latency=clock, progress=False,
        accelerate=False,
    )  # fmt: skip
    row: dict[str, Any] = {"network": config["network"], "cost": cost, "stated": f"{cost} {stated}"}
    if cost == "latency":
        row |= _milliseconds(model, found.model, images, stated, config)
    else:
        limit = found.plan.budget[cost]
        has = _COUNTED[cost](found, images)
        row |= {"limit": limit, "has": has, "planned": found.plan.costs[cost], "of_budget": round(has / limit, 5)}
    row |= {
        "ratio": round(found.plan.ratio(cost), 3),
        "c_steps": len(found.trajectory),
        "layers_dense": sum(entry.choice.is_dense for entry in found.plan),
        "layers": len(found.plan.entries),
    }
    print(row, flush=True)
    return row


def _bytes(found: Result, images: Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "small.safetensors")
        st.save(found.model, found.plan, path)
        return path.stat().st_size


_COUNTED: dict[str, Callable[[Result, Tensor], float]] = {
    "parameters": lambda found, images: sum(p.numel() for p in found.model.parameters()),
    "macs": lambda found, images: measures.counted_macs(found.model, images[:1]),
    "bytes": _bytes,
}


def _laid_out(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=_FORMATS[config["timing"]["format"]])  # type: ignore[call-overload]


def _dense_time(model: nn.Module, images: Tensor, config: dict[str, Any]) -> float:
    """Milliseconds of the dense network, measured before anything is asked for in milliseconds."""
    timing = config["timing"]
    example = images[:1].repeat(timing["batch"], 1, 1, 1)
    models = {"dense": _laid_out(model, config)}
    return measure_latency(models, example, repeats=timing["repeats"], threads=config["threads"])["dense"].quiet


def _milliseconds(
    model: nn.Module, small: nn.Module, images: Tensor, stated: float | str, config: dict[str, Any]
) -> dict[str, Any]:
    """The finished network's time as a share of the budget, several times over."""
    timing = config["timing"]
    example = images[:1].repeat(timing["batch"], 1, 1, 1)
    models = {"dense": _laid_out(model, config), "small": _laid_out(small, config)}
    quiet, median, dense, taken = [], [], [], []
    for _ in range(timing["again"]):
        found = measure_latency(models, example, repeats=timing["repeats"], threads=config["threads"])
        here = st.Budget(latency=stated)
        quiet.append(found["small"].quiet / here.limits({"latency": found["dense"].quiet})["latency"])
        median.append(found["small"].p50 / here.limits({"latency": found["dense"].p50})["latency"])
        dense.append(found["dense"].quiet)
        taken.append(found["small"].quiet)
    limit = st.Budget(latency=stated).limits({"latency": statistics.median(dense)})["latency"]
    return {
        "limit": round(limit, 4),
        "has": round(statistics.median(taken), 4),
        "of_budget": round(statistics.median(quiet), 4),
        "of_budget_least": round(min(quiet), 4),
        "of_budget_most": round(max(quiet), 4),
        "of_budget_by_medians": round(statistics.median(median), 4),
        "dense_ms": round(statistics.median(dense), 4),
    }


def _digits(config: dict[str, Any], paths: dict[str, Any]) -> tuple[nn.Module, Iterable[Any]]:
    training: Any = load_data(f"digits?batch={config['batch_size']}", purpose="training")
    torch.manual_seed(config["seed"])
    model = DigitsNet(config.get("width", 32))
    st.fine_tune(model, training, **config["reference"], seed=config["seed"], progress=False, accelerate=False)
    return model.eval(), Part(training, 0, config["l_step"]["batches"])


def _resnet20(config: dict[str, Any], paths: dict[str, Any]) -> tuple[nn.Module, Iterable[Any]]:
    train, _, _ = cifar.load(Path(paths["cifar10"]))
    batches = cifar.Batches(train, batch_size=config["batch_size"], seed=config["seed"])
    return cifar.network("resnet20", paths["weights"]["resnet20"]), Part(batches, 0, config["l_step"]["batches"])
