"""ResNet-20 without training beside other one-shot ways, on the same images and the same weights: the README's picture.

Arms, each at the same budgets of multiply-accumulates, from the same unlabelled images:

- ``Spectrim``: the default call.
- ``BALF``: activation-aware low rank with ranks by a Lagrangian, written anew from the description in arXiv 2509.25136:
  each convolution becomes one of r channels and a 1 x 1, optimal for the uncentred responses; the sum over the layers
  of the share of the energy lost is minimised under the budget.
- ``CP``: the weight as a sum of r rank-one tensors (outputs x inputs x positions, TensorLy's alternating least
  squares), run as 1 x 1, depthwise and 1 x 1 convolutions; every layer keeps the same share of its MACs.
- ``Torch-Pruning``: channels removed by group magnitude over the whole network.

Arms other than the default call are measured as they are and with the statistics of BatchNorm estimated anew on the
images; the figure takes the better of the two.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from benchmarks import cifar
from benchmarks.headline.peers import layers
from benchmarks.headline.peers.decompositions import CP, Responses
from benchmarks.torch_pruning_baseline import pruned
from spectrim.nn.watch.norms import reestimate_batchnorm

Build = Callable[[cifar.ResNet, list[Tensor], float], nn.Module]


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every arm at every budget; the test images are looked at once for each row."""
    torch.manual_seed(config["seed"])
    name = config["network"]
    dense = cifar.network(name, paths["weights"][name])
    train, _, test = cifar.load(paths["cifar10"])
    batches = [cifar.normalise(part) for part in train.images[: config["images"]].split(128)]
    rows = [_row(name, "dense", "as it is", dense, test, 0.0)]
    for macs in config["macs"]:
        for arm, build in ARMS.items():
            start = time.perf_counter()
            small = build(dense, batches, macs)
            seconds = time.perf_counter() - start
            rows.append(_row(name, arm, "as it is", small, test, seconds))
            if arm != "Spectrim":
                rows.append(_row(name, arm, "estimated anew", normalised(small, batches), test, seconds))
            print(*rows[-2:], flush=True)
    notes = [
        f"{config['images']:,} unlabelled training images for every arm; no gradient step on any weight; one seed.",
        "BALF is written anew from its description and CP is TensorLy's; neither is the authors' own program.",
        "Multiply-accumulates of convolutions and the classifier, counted on the finished network.",
    ]
    return {"claims": {}, "rows": rows, "seeds": [config["seed"]], "notes": notes}


def _row(name: str, arm: str, norms: str, model: nn.Module, test: cifar.Images, seconds: float) -> dict[str, Any]:
    return {
        "network": name,
        "arm": arm,
        "batch_norm": norms,
        "macs": round(layers.measured(model, torch.zeros(1, 3, 32, 32), "macs")),
        "test_accuracy": cifar.accuracy(model, test),
        "seconds": round(seconds, 1),
    }


def normalised(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy with the statistics of BatchNorm of these images."""
    model = copy.deepcopy(model)
    reestimate_batchnorm(model, batches)
    return model


def spectrim(dense: cifar.ResNet, batches: list[Tensor], macs: float) -> nn.Module:
    return st.compress(dense, batches, st.Budget(macs=macs)).model


def torch_pruning(dense: cifar.ResNet, batches: list[Tensor], macs: float) -> nn.Module:
    return pruned(dense, macs)[0].eval()


def thin_layers(how: Callable[[], layers.Decomposition], ranks: layers.Allocation) -> Build:
    """A peer of the headline."""

    def build(dense: cifar.ResNet, batches: list[Tensor], macs: float) -> nn.Module:
        return layers.decomposed(dense, batches, batches[0][:1], "macs", macs, how=how(), ranks=ranks)

    return build


ARMS: dict[str, Build] = {
    "Spectrim": spectrim,
    "BALF": thin_layers(Responses, layers.lagrangian),
    "CP": thin_layers(CP, layers.uniform),
    "Torch-Pruning": torch_pruning,
}
