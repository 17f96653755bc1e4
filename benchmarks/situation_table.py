"""The table of situations that strangers' networks are in: what each is, its data, and what is right."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Make = TypeVar("Make", bound=Callable[..., nn.Module])

COMPRESSED, REFUSED, EITHER = "compressed", "refused", "either"


@dataclass(frozen=True)
class Situation:
    """A network as somebody writes it.

    Attributes
    ----------
    name, kind
        ``kind`` is the number of issue 15's list of kinds; 0 for neighbours of them.
    right
        What is right, in words.
    build
        Makes the network.
    data
        Makes the calibration batches.
    outcome
        What the default method has to do; other methods may refuse.
    options
        Further arguments of ``compress``.
    exact
        Whether two runs of the network on the same batch give the same.
    counted
        Whether torch's own counter of operations knows all the network computes.
    varies
        Whether other weights may give outputs of other shapes, or take other ways.
    rounding
        The share of the outputs that rounding explains.
    budget
        Share of the cost that is left.
    fault
        Says of a dense network and a result what is wrong, if anything; for what the common checks cannot know.
    architecture
        Makes the network that files are loaded into, where that is not what ``build`` makes.
    around
        What has to be there while the situation lasts.
    """

    name: str
    kind: int
    right: str
    build: Callable[[], nn.Module]
    data: Callable[[], Any]
    outcome: str = COMPRESSED
    options: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True
    counted: bool = True
    varies: bool = False
    rounding: float = 1e-3
    budget: float = 0.8
    fault: Callable[[nn.Module, Any], str | None] | None = None
    architecture: Callable[[], nn.Module] | None = None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


SITUATIONS: dict[str, Situation] = {}


def situation(
    kind: int, right: str, data: Callable[[], Any] | None = None, name: str = "", **more: Any
) -> Callable[[Make], Make]:
    """Put a class or function that makes a network into the table; its name in words is the situation's."""

    def put(build: Make) -> Make:
        words = name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", build.__name__).lower()
        if words in SITUATIONS:
            raise ValueError(f"there are two situations {words!r}")
        SITUATIONS[words] = Situation(words, kind, right, build, data or vectors, **more)
        return build

    return put


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Noise, whose last axis fades so that something can be left out."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return noise * torch.linspace(1.5, 0.5, shape[-1])


def vectors() -> list[Tensor]:
    return [drawn(48, 32, seed=n) for n in range(3)]


def images() -> list[Tensor]:
    return [drawn(8, 3, 12, 12, seed=n) for n in range(3)]


def sequences() -> list[Tensor]:
    return [drawn(8, 10, 32, seed=n) for n in range(3)]


def tokens() -> list[Tensor]:
    return [torch.randint(0, 40, (8, 10), generator=torch.Generator().manual_seed(n)) for n in range(3)]


class Two(nn.Module):
    """Two linear layers, one after the other: what the situations of vectors vary."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)
        self.begin()

    def begin(self) -> None:
        """Hold the layers in another way."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class TwoConvolutions(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)
        self.begin()

    def begin(self) -> None:
        """Hold the layers in another way."""

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))
