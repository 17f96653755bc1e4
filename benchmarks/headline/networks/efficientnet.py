"""EfficientNet-Lite0 with ImageNet weights, a depthwise network: agreement with the dense one on photographs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import photographs
from benchmarks.headline.network import Figure, Metric, Network, run_on

# Of 20 photographs eight are calibrated on, four are for choosing, eight for the test; each is cropped at random.
PARTS = {"calibration": (slice(0, 8), 16, 0), "held out": (slice(8, 12), 16, 1), "test": (slice(12, 20), 25, 2)}


class Plugin(Network):
    """Paths: ``efficientnet``, a folder with both packages; ``photographs``, foolbox's folder ``data``."""

    name = "efficientnet"
    title = "EfficientNet-Lite0, photographs of 224 x 224"
    metric = Metric("agreement with dense", "%")
    needs = ("efficientnet", "photographs")
    budgets = ("macs=80%", "macs=50%")
    arms = ("auto", "low rank", "filters", "Torch-Pruning, magnitude", "Torch-Pruning, Taylor")

    def build(self) -> nn.Module:
        return photographs.efficientnet(self.paths["efficientnet"])

    @cached_property
    def dense(self) -> nn.Module:
        return self.build()

    def crops(self, part: str) -> list[Tensor]:
        chosen, count, seed = PARTS[part]
        pictures = sorted(self.paths["photographs"].glob("imagenet_*"))[chosen]
        return photographs.crops(pictures, count, np.random.default_rng(seed))

    def calibration(self, count: int) -> list[Tensor]:
        return self.crops("calibration")

    def agreement(self, model: nn.Module, part: str) -> Figure:
        same = [run_on(model, batch).argmax(1) == run_on(self.dense, batch).argmax(1) for batch in self.crops(part)]
        return Figure.mean(100.0 * torch.cat(same))

    def held_out(self, model: nn.Module) -> float:
        return self.agreement(model, "held out").value

    def test(self, model: nn.Module) -> Mapping[str, Figure]:
        return {self.metric.name: self.agreement(model, "test")}
