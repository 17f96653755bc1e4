"""The rows of the README: what one default call does to networks that people know, measured in one run.

Every row is one call of :func:`spectrim.compress` with a budget and nothing else. Files are those of ``spectrim.save``
and of the dense network's tensors; times are taken in turns, dense and compressed, as the networks are returned
(BatchNorm not folded). Test images and held-out texts are looked at once, for the figure in the row.

Needs CIFAR-10, the weights of both CIFAR ResNets, the folder of a sentence encoder, a long English text, the folder in
which the two packages of EfficientNet-Lite0 lie, a folder of photographs, and the folder of a text detector's weights.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

import spectrim as st
from benchmarks import cifar, photographs
from benchmarks.headline.networks import craft
from benchmarks.joint_minilm import windows
from spectrim.nn.timing import Speed, measure_latency


@dataclass(frozen=True)
class Job:
    """A network with what it is calibrated on, timed on and judged by."""

    model: nn.Module
    batches: Sequence[Any]
    example: Any
    metric: str
    judge: Callable[[nn.Module], float]


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """All rows, one after the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    rows: list[dict[str, Any]] = []
    try:
        # Modules that a first call loads are no part of the times.
        st.compress(nn.Sequential(nn.Linear(8, 8)), [torch.randn(16, 8)], st.Budget(parameters=0.5))
        for item in config["rows"]:
            torch.manual_seed(config["seed"])
            rows.append(_row(item, JOBS[item["job"]](item, paths), config["repeats"], paths["work"]))
            print(rows[-1], flush=True)
    finally:
        torch.set_num_threads(before)
    notes = [
        "Each row is one call compress(model, batches, budget); no weight was trained. Minutes are those of this call.",
        "Times of whole networks at the batch of the row, dense and compressed in turns; medians, and the interval of "
        "their ratio. BatchNorm is not folded in either.",
        "Agreement is the share of held-out crops for which both networks name the same class: ten photographs were "
        "calibrated on, and ten others are judged. Its convolutions, which pad by themselves, are put as plain "
        "ones first; its outputs stay equal to the bit.",
    ]
    return {"claims": {}, "rows": rows, "seeds": [config["seed"]], "notes": notes}


def _row(item: dict[str, Any], job: Job, repeats: int, work: Path) -> dict[str, Any]:
    start = time.perf_counter()
    result = st.compress(job.model, job.batches, item["budget"])
    seconds = time.perf_counter() - start
    timings = measure_latency({"dense": job.model, "compressed": result.model}, job.example, repeats=repeats)
    speed = Speed.of(timings["dense"], timings["compressed"])
    plan = result.plan
    save_model(job.model, str(work / "dense.safetensors"))
    st.save(result.model, plan, work / "small.safetensors")
    dense_mb, small_mb = ((work / f"{name}.safetensors").stat().st_size / 1e6 for name in ("dense", "small"))
    return {
        "network": item["name"],
        "budget": item["budget"],
        "width": "full",
        "samples": result.report.samples,
        "metric": job.metric,
        "metric_before": job.judge(job.model),
        "metric_after": job.judge(result.model),
        "macs_before": plan.dense_costs["macs"],
        "macs_after": plan.costs["macs"],
        "file_mb_before": round(dense_mb, 3),
        "file_mb_after": round(small_mb, 3),
        "batch": item["batch"],
        "ms_before": round(timings["dense"].p50, 3),
        "ms_after": round(timings["compressed"].p50, 3),
        "faster": round(speed.ratio, 3),
        "faster_low": round(speed.low, 3),
        "faster_high": round(speed.high, 3),
        "minutes": round(seconds / 60, 2),
    }


def _cifar(item: dict[str, Any], paths: dict[str, Any]) -> Job:
    model = cifar.network(item["network"], paths["weights"][item["network"]])
    train, _, test = cifar.load(paths["cifar10"])
    batches = [cifar.normalise(part) for part in train.images[: item["images"]].split(128)]
    return Job(
        model, batches, batches[0][: item["batch"]].contiguous(), "test accuracy, %",
        lambda network: cifar.accuracy(network, test),
    )  # fmt: skip


def _encoder(item: dict[str, Any], paths: dict[str, Any]) -> Job:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(paths["minilm"]).eval()
    seen = windows(AutoTokenizer.from_pretrained(paths["minilm"]), paths["text"].read_text("utf-8"), item)
    dense = [_embedded(model, batch) for batch in seen["held_out"]]

    def cosine(network: nn.Module) -> float:
        pairs = zip(dense, seen["held_out"], strict=True)
        return statistics.mean(float((a * _embedded(network, batch)).sum(-1).mean()) for a, batch in pairs)

    example = {name: rows[: item["batch"]] for name, rows in seen["calibration"][0].items()}
    return Job(model, seen["calibration"], example, "cosine to dense, held-out text", cosine)


@torch.inference_mode()
def _embedded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.normalize(model(**batch).last_hidden_state.mean(1), dim=-1)


def _photographs(item: dict[str, Any], paths: dict[str, Any]) -> Job:
    model = photographs.efficientnet(paths["efficientnet"])
    pictures = sorted(paths["photographs"].glob("imagenet_*"))
    draw = np.random.default_rng(0)
    seen, held = (photographs.crops(part, item["crops"], draw) for part in (pictures[::2], pictures[1::2]))
    named = [_classes(model, batch) for batch in held]

    def agreement(network: nn.Module) -> float:
        same = [_classes(network, batch) == names for batch, names in zip(held, named, strict=True)]
        return 100 * float(torch.cat(same).float().mean())

    return Job(model, seen, seen[0][: item["batch"]], "agreement with dense, %", agreement)


def _detector(item: dict[str, Any], paths: dict[str, Any]) -> Job:
    network = craft.Plugin(paths)
    seen = network.calibration(item["pages"])

    def score(model: nn.Module) -> float:
        return network.test(model)[network.metric.name].value

    return Job(network.build(), seen, seen[0][: item["batch"]], "F-score of words, drawn pages, %", score)


@torch.inference_mode()
def _classes(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).argmax(1)


JOBS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Job]] = {
    "cifar": _cifar,
    "encoder": _encoder,
    "photographs": _photographs,
    "detector": _detector,
}
