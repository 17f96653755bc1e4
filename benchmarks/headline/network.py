"""What a network of the headline is: a file in ``networks`` that defines one class ``Plugin``.

A plug-in needs data from outside, which it names in ``needs`` and gets by path. Everything else has a default but four
methods. It is made anew in the process of every row, so that it may keep what it has read.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent / "networks"


@dataclass(frozen=True)
class Metric:
    """What a network is judged by: the name, as in the figures of ``test``, the unit, and which numbers are good."""

    name: str
    unit: str
    better: Literal["higher", "lower"] = "higher"

    def gain(self, value: float, other: float) -> float:
        """How much better a value is than another; below zero if it is worse."""
        return value - other if self.better == "higher" else other - value


@dataclass(frozen=True)
class Figure:
    """A value measured on ``n`` samples, and its standard error."""

    value: float
    n: int
    standard_error: float

    @classmethod
    def mean(cls, scores: Tensor) -> Figure:
        """Of one score a sample."""
        spread = float(scores.double().std()) if len(scores) > 1 else math.inf
        return cls(float(scores.double().mean()), len(scores), spread / math.sqrt(len(scores)))

    @classmethod
    def correlation(cls, first: Any, second: Any) -> Figure:
        """Of two rows of numbers, after Pearson; of their ranks it is that of Spearman."""
        value = float(np.corrcoef(first, second)[0, 1])
        return cls(value, len(first), (1 - value**2) / math.sqrt(len(first) - 1))


class Network(ABC):
    """A trained network with its data.

    Attributes
    ----------
    name, title
        The name of the file, and what people call it.
    metric
        The first of those that ``test`` returns.
    budgets
        As ``compress`` takes them, of multiply-accumulates or bytes; each a row an arm.
    needs
        Names of paths from outside, given as ``--path NAME=PATH``.
    arms
        Names of arms (:data:`benchmarks.headline.arms.ARMS`); None for all that fit.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[Metric]
    budgets: ClassVar[Sequence[str]]
    needs: ClassVar[Sequence[str]] = ()
    arms: ClassVar[Sequence[str] | None] = None

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = paths

    @abstractmethod
    def build(self) -> nn.Module:
        """The dense network with trained weights, in evaluation mode."""

    @abstractmethod
    def calibration(self, count: int) -> list[Any]:
        """Batches of that many training inputs in all, without labels."""

    @abstractmethod
    def held_out(self, model: nn.Module) -> float:
        """The metric on data for choosing, which are neither calibrated on nor tested on."""

    @abstractmethod
    def test(self, model: nn.Module) -> Mapping[str, Figure]:
        """The metric, then further ones, on test data. It is called once a finished row, after every choice."""

    def example(self, batch: int) -> Any:
        """A batch of so many inputs, as the network is timed on: those of calibration by default."""
        found = self.calibration(batch)[0]
        return {name: rows[:batch] for name, rows in found.items()} if isinstance(found, dict) else found[:batch]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """What Torch-Pruning's Taylor importance takes the gradient of: here against the classes it finds itself."""
        scores = model(batch)
        return nn.functional.cross_entropy(scores, scores.argmax(1))

    def kept_whole(self, model: nn.Module) -> list[nn.Module]:
        """Layers whose outputs Torch-Pruning must leave alone: what comes out of the network, at least."""
        return [[m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]]


def names() -> list[str]:
    """Networks that there are."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem != "__init__")


def plugin(name: str) -> type[Network]:
    """The class of a network; ValueError if there is no such network."""
    if name not in names():
        raise ValueError(f"no network {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"benchmarks.headline.networks.{name}").Plugin


def run_on(model: nn.Module, batch: Any) -> Any:
    """The outputs for a batch: a mapping is given by keyword."""
    with torch.inference_mode():
        return model(**batch) if isinstance(batch, Mapping) else model(batch)
