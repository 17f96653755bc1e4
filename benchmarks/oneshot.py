"""Accuracy of a compressed CIFAR ResNet before any training (claim F2), with what each ingredient adds."""

from __future__ import annotations

import time
from typing import Any

import torch

import spectrim as st
from benchmarks import cifar
from benchmarks.run import claim
from spectrim.pipeline import Result


def compressed(config: dict[str, Any], paths: dict[str, Any], macs: float, **options: Any) -> tuple[Any, Result]:
    """The dense network and its compression to a number of MACs, as every benchmark on CIFAR-10 makes it."""
    torch.manual_seed(config["seed"])
    dense = cifar.network(config["network"], paths["weights"][config["network"]])
    train, _, _ = cifar.load(paths["cifar10"])
    batches = [cifar.normalise(part) for part in train.images[: config["images"]].split(250)]
    methods = [st.ActivationSVD(multiple_of=1), st.WeightSVD(multiple_of=1)]
    return dense, st.compress(dense, batches, st.Budget(macs=macs), **{"methods": methods, **options})


VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "without sensitivity": {"sensitivity": False},
    "without reconstruction": {"reconstruct": False},
    "weight SVD": {
        "methods": [st.WeightSVD(multiple_of=1)],
        "sensitivity": False,
        "reconstruct": False,
    },
}


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Compress at every budget; look at the test set once for each row."""
    _, held, test = cifar.load(paths["cifar10"])
    rows: list[dict[str, Any]] = []
    for variant in config["variants"]:
        for target in config["targets"]:
            start = time.perf_counter()
            dense, result = compressed(config, paths, target["macs"], **VARIANTS[variant])
            row = {
                "network": config["network"],
                "variant": variant,
                "macs": result.plan.costs["macs"],
                "parameters": result.plan.costs["parameters"],
                "held_out": cifar.accuracy(result.model, held),
                "accuracy": cifar.accuracy(result.model, test),
                "seconds": round(time.perf_counter() - start, 1),
            }
            rows.append(row)
            print(row, flush=True)
    whole = {row["macs"]: row for row in rows if row["variant"] == "all"}
    pairs = list(zip(config["targets"], whole.values(), strict=True))
    claims = {
        "F2": claim(
            min(row["accuracy"] - target["accuracy"] for target, row in pairs),
            "points above target, at the worst of the budgets",
            "; ".join(f"{t['macs'] / 1e6:g} MMAC >= {t['accuracy']:g} %" for t in config["targets"]),
            all(row["accuracy"] >= target["accuracy"] for target, row in pairs),
            "; ".join(f"{row['macs'] / 1e6:.2f} MMAC: {row['accuracy']:.2f} %" for _, row in pairs),
        )
    }
    rows.insert(0, {"network": config["network"], "variant": "dense", "macs": result.plan.dense_costs["macs"],
                    "parameters": result.plan.dense_costs["parameters"], "held_out": cifar.accuracy(dense, held),
                    "accuracy": cifar.accuracy(dense, test), "seconds": 0.0})  # fmt: skip
    notes = [
        f"{config['images']:,} unlabelled training images; no gradient step on any weight.",
        "Nothing was chosen on the test images. The dense network was trained on the held-out images, so accuracy "
        "there is some 5 points higher than on test images.",
    ]
    return {"claims": claims, "rows": rows, "seeds": [config["seed"]], "notes": notes}
