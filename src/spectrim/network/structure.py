"""What a choice turns a site into: layers, and how they stand to each other.

A counted cost iterates over the layers and asks no more. A clock runs them: the layers of a :class:`Chain` feed each
other, the outputs of a :class:`Sum` are added, and what stands :class:`Apart` has nothing to do with each other.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from spectrim.network.layer import LayerSpec


class Structure(Sequence["LayerSpec"]):
    """Layers in the order they are called, which remember how they stand to each other."""

    @abstractmethod
    def chains(self) -> tuple[Chain, ...]:
        """What is run, one after the other; the sum of their times is the time of the whole."""

    def __iter__(self) -> Iterator[LayerSpec]:
        return itertools.chain.from_iterable(chain.specs for chain in self.chains())

    def __len__(self) -> int:
        return sum(len(chain.specs) for chain in self.chains())

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index]


@dataclass(frozen=True)
class Chain(Structure):
    """Layers each of which takes the output of the one before."""

    specs: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "specs", tuple(self.specs))

    def chains(self) -> tuple[Chain, ...]:
        return (self,)

    def at(self, inputs: Sequence[tuple[int, ...]]) -> Self:
        """The chain called once, with one input shape for each layer."""
        specs = (spec.at((shape,)) for spec, shape in zip(self.specs, inputs, strict=True))
        return dataclasses.replace(self, specs=tuple(specs))


@dataclass(frozen=True)
class Pair(Chain):
    """The two layers of a rank in place of one: a member of the family that ``LayerSpec.factor`` makes of it.

    Attributes
    ----------
    whole
        The layer that the pair stands for.
    """

    whole: LayerSpec

    @property
    def rank(self) -> int:
        """For each group."""
        return self.specs[0].out_channels // self.specs[0].groups

    def at(self, inputs: Sequence[tuple[int, ...]]) -> Self:
        return dataclasses.replace(super().at(inputs), whole=self.whole.at((inputs[0],)))

    def at_rank(self, rank: int) -> Self:
        """The pair of the same family with another rank (for each group)."""
        first, second = self.specs
        middle = rank * first.groups
        specs = dataclasses.replace(first, out_channels=middle), dataclasses.replace(second, in_channels=middle)
        return dataclasses.replace(self, specs=specs)


@dataclass(frozen=True)
class Addend(Chain):
    """A chain whose output is added to another one's."""


@dataclass(frozen=True)
class Sum(Structure):
    """Chains that see one input, and whose outputs are added to that of the first."""

    parts: tuple[Chain, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))

    def chains(self) -> tuple[Chain, ...]:
        return (*self.parts[:1], *(Addend(part.specs) for part in self.parts[1:]))


@dataclass(frozen=True)
class Apart(Structure):
    """Structures that do not feed each other, such as the layers of a group or those that hold coupled channels."""

    parts: tuple[Structure, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))

    def chains(self) -> tuple[Chain, ...]:
        return tuple(chain for part in self.parts for chain in part.chains())


def structure_of(layers: Sequence[LayerSpec]) -> Structure:
    """The structure of layers; a plain sequence is a chain."""
    return layers if isinstance(layers, Structure) else Chain(tuple(layers))
