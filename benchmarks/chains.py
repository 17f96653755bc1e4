"""Chains of three layers beside low rank: ResNet-20 without training, one arm and one budget a row.

All arms have the same 1,024 unlabelled training images and the same weights. They are compared on training images that
were held out; test images are looked at for the arms alone that the experiment names. Finished rows are kept, so that a
run that was stopped goes on.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

import spectrim as st
from benchmarks import cifar, resumed
from benchmarks.run import claim
from spectrim.methods import Method

LOW_RANK: list[Method] = [st.ActivationSVD(multiple_of=1), st.WeightSVD(multiple_of=1)]
CP = st.ActivationCP(multiple_of=1)
TUCKER = st.ActivationTucker2(multiple_of=1)
# Methods; whether layers are fitted to what the compressed ones before them deliver; whether errors are weighed.
ARMS: dict[str, tuple[list[Method], bool, bool]] = {
    "low rank": (LOW_RANK, True, True),
    "CP": ([CP], True, True),
    "low rank, CP and Tucker-2": ([*LOW_RANK, CP, TUCKER], True, True),
    "low rank of weights, no data": ([st.WeightSVD(multiple_of=1)], False, False),
    "CP of weights, no data": ([st.WeightCP(multiple_of=1)], False, False),
    "Tucker-2 of weights, no data": ([st.WeightTucker2(multiple_of=1)], False, False),
    "Tucker-2": ([TUCKER], True, True),
    "CP, layers apart": ([CP], False, True),
    "CP, errors not weighed": ([CP], True, False),
    "CP, 60 evaluations": ([st.ActivationCP(multiple_of=1, evaluations=60)], True, True),
    "CP, 500 evaluations": ([st.ActivationCP(multiple_of=1, evaluations=500)], True, True),
    "CP, kernel by axes": ([st.ActivationCP(multiple_of=1, kernels=("axes",))], True, True),
}


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every arm at every budget."""
    torch.manual_seed(config["seed"])
    torch.set_num_threads(config["threads"])
    dense = cifar.network(config["network"], paths["weights"][config["network"]])
    train, held, test = cifar.load(paths["cifar10"])
    batches = [cifar.normalise(part) for part in train.images[: config["images"]].split(128)]
    known: dict[str, st.Sites] = {}

    def sites(arm: str) -> st.Sites:
        _, _, weighed = ARMS[arm]
        kind = "nothing" if arm.endswith("no data") else "weighed" if weighed else "plain"
        if kind not in known:
            # Without data there are the shapes of the inputs alone.
            seen = st.calibrate(dense, st.find(dense), batches, statistics=kind != "nothing")
            known[kind] = st.sensitivity(dense, seen, batches) if kind == "weighed" else seen
        return known[kind]

    tables: dict[str, tuple[st.Candidates, float]] = {}

    def row(arm: str, kept: float) -> dict[str, Any]:
        methods, follows, _ = ARMS[arm]
        if arm not in tables:
            start = time.process_time()
            table = st.tabulate(sites(arm), methods)
            tables.clear()
            tables[arm] = table, time.process_time() - start
        table, tabulated = tables[arm]
        plan = st.select(table, st.Budget(macs=kept))
        start = time.process_time()
        small = st.apply(dense, sites(arm), plan, batches, reconstruct=follows)
        seconds = time.process_time() - start
        found = {
            "network": config["network"], "arm": arm, "kept": kept, "macs": plan.costs["macs"],
            "held_out_accuracy": cifar.accuracy(small, held), "tabulate_cpu_s": round(tabulated, 1),
            "apply_cpu_s": round(seconds, 1), "choices": _counted(plan),
        }  # fmt: skip
        if arm in config["tested"]:
            found["test_accuracy"] = cifar.accuracy(small, test)
        return found

    keys = [{"arm": arm, "kept": kept} for arm in ARMS for kept in config["macs"]]
    rows, mixed = resumed.rows(paths["work"] / "chains.jsonl", keys, row)
    return {
        "claims": {"A2 (ResNet-20)": _claim(config, rows)},
        "rows": rows,
        "seeds": [config["seed"]],
        "notes": [
            f"{config['images']:,} unlabelled training images; no gradient step on any weight. The dense network has "
            f"{cifar.accuracy(dense, held):.2f} % on the held-out training images, which it was trained on.",
            "BatchNorm is estimated anew on the images where layers are not fitted behind each other (layers apart, no "
            "data). No data: the choice and the factors see the weights alone.",
            *mixed,
        ],
    }


def _counted(plan: st.Plan) -> str:
    """How many layers have a choice of each kind."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(entry.choice.kind for entry in plan).most_common())


def _claim(config: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    arm = config["tested"][0]
    tested = [row for row in rows if row["arm"] == arm]
    margins = [row["test_accuracy"] - asked for row, asked in zip(tested, config["asked"], strict=True)]
    note = f"{arm}: " + "; ".join(
        f"{row['test_accuracy']:.2f} % at {row['macs'] / 1e6:.1f} MMAC (asked {asked:g})"
        for row, asked in zip(tested, config["asked"], strict=True)
    )
    return claim(round(min(margins), 2), "points of test accuracy above what is asked, at the worst budget", ">= 0",
                 min(margins) >= 0, note)  # fmt: skip
