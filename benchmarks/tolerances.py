"""A tolerance in place of a budget (A6): five small networks, four tolerances each, against a fine sweep of budgets.

Networks are trained here on scikit-learn's digits. ``compress(max_drop=...)`` judges by accuracy on held-out digits,
and so does the sweep, which carries out a network at every budget of a fine grid; test digits are looked at for what
was returned. Finished networks are kept, so that a run that was stopped goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim as st
from benchmarks import resumed
from benchmarks.paper_resnets import PaperResNet
from benchmarks.run import claim

Digits = tuple[Tensor, Tensor]


class Separable(nn.Sequential):
    """Depthwise and 1 x 1 convolutions."""

    def __init__(self, width: int = 32) -> None:
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        for inputs, outputs, stride in ((width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 4 * width, 2)):
            layers += [nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs)]
            layers += [nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


class Rows(nn.Module):
    """A transformer over the eight rows of a digit."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.positions = nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.classes = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.blocks(self.embedding(x[:, 0]) + self.positions).mean(1))


class Grey(PaperResNet):
    """For one channel in place of three."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.expand(-1, 3, -1, -1))


def plain(width: int = 32) -> nn.Module:
    """Four convolutions with BatchNorm."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, width), (width, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def perceptron(width: int = 256) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "convolutions": plain,
    "ResNet-18, 8 channels": lambda: Grey("resnet18", width=8),
    "depthwise": Separable,
    "transformer": Rows,
}


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every tolerance of every network."""
    torch.set_num_threads(config["threads"])
    keys = [{"network": name} for name in config["networks"]]
    kept, mixed = resumed.rows(paths["work"] / "tolerances.jsonl", keys, lambda network: measured(network, config))
    rows = [row for each in kept for row in each["rows"]]
    return {
        "claims": {"A6": _claim(rows)}, "rows": rows, "seeds": [config["seed"]],
        "notes": [
            "Networks of 18 to 176 thousand parameters, trained here on 900 of scikit-learn's digits; 450 others are "
            "held out, on which compress and the sweep judge, and 447 are tested on. Accuracy comes in steps of 0.22 "
            "points there.",
            f"The sweep: a network at each of {config['budgets']} budgets of multiply-accumulates from "
            f"{config['least']:.0%} to 100 %, in equal ratios. over_sweep is the MACs of what was returned, over those "
            "of the smallest of the sweep that holds. test_drop is that on digits nobody judged by.",
            *mixed,
        ],
    }  # fmt: skip


def measured(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The rows of a network."""
    torch.manual_seed(config["seed"])
    train, held, test = digits()
    dense = trained(NETWORKS[name](), train, config["epochs"])
    before = {"held": accuracy(dense, held), "test": accuracy(dense, test)}
    batches = list(train[0].split(128))
    least, count = config["least"], config["budgets"]
    swept = []
    for number in range(count):
        share = least ** (1 - number / (count - 1))
        try:
            small = st.compress(dense, batches, st.Budget(macs=written(share)))
        except st.InfeasibleBudgetError:
            continue
        swept.append((small.plan.costs["macs"], before["held"] - accuracy(small.model, held)))
    rows = []
    for tolerance in config["max_drops"]:
        start = time.process_time()
        found = st.compress(dense, batches, max_drop=tolerance, evaluate=lambda model: accuracy(model, held))
        seconds = time.process_time() - start
        drop = before["held"] - accuracy(found.model, held)
        smallest = min(macs for macs, lost in [*swept, (found.plan.dense_costs["macs"], 0.0)] if lost <= tolerance)
        rows.append({
            "network": name, "max_drop": tolerance, "held_out_dense": before["held"], "drop": round(drop, 3),
            "test_drop": round(before["test"] - accuracy(found.model, test), 3), "holds": drop <= tolerance,
            "macs_dense": found.plan.dense_costs["macs"], "macs": found.plan.costs["macs"], "macs_sweep": smallest,
            "over_sweep": round(found.plan.costs["macs"] / smallest, 3), "cpu_s": round(seconds, 1),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return {"rows": rows}


def written(share: float) -> str:
    """A share of the dense network's cost, as a budget is written."""
    return f"{100 * share:.4f}%"


def digits() -> tuple[Digits, Digits, Digits]:
    """Training, held-out and test digits, ``[n, 1, 8, 8]`` from 0 to 1, drawn once."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    y = torch.tensor(labels)[order]
    return (x[:900], y[:900]), (x[900:1350], y[900:1350]), (x[1350:], y[1350:])


def trained(model: nn.Module, data: Digits, epochs: int) -> nn.Module:
    """After so many epochs of Adam; batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(data[1])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][index]), data[1][index]).backward()
            optimizer.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, data: Digits) -> float:
    """In percent."""
    return 100 * float((model(data[0]).argmax(1) == data[1]).double().mean())


def _claim(rows: list[dict[str, Any]]) -> dict[str, Any]:
    holds = sum(row["holds"] for row in rows)
    close = sum(row["over_sweep"] <= 1.1 for row in rows)
    worst = max(row["over_sweep"] for row in rows)
    unseen = sum(row["test_drop"] <= row["max_drop"] for row in rows)
    return claim(
        holds, f"of {len(rows)} hold on held-out data; {close} within 10 % of the smallest of the sweep",
        "20 of 20, within 10 % of the smallest network that a fine sweep finds", holds == close == len(rows),
        f"{holds} of {len(rows)} hold on held-out data; {close} within 10 % of the smallest network of the sweep, the "
        f"worst {worst:.2f} times it; {unseen} hold on test data as well",
    )  # fmt: skip
