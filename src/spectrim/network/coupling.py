"""Coupled channels: which entries of which modules belong to one channel, and what is left after a removal.

A channel cannot be removed from one layer alone. Whatever writes it and whatever reads it has to lose it too: the
normalisation behind a convolution, all layers whose outputs are added up, the columns of the next layers' weights. A
:class:`Coupling` lists these places once; everything else (costs, moments, modules) is cut along the same lists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Int64
from torch import Tensor

from spectrim.errors import PlanError
from spectrim.network.choices import Place, check_kept, shortened, unit

OUT, IN, THROUGH = "out", "in", "through"

Axis = tuple[str, str]
"""Path of a module and the name of one of its axes."""


@dataclass(frozen=True, eq=False)
class Side:
    """Where the channels of a group lie in one module.

    Attributes
    ----------
    name
        Path of the module, or of a parameter that belongs to no layer.
    axis
        ``out``: what a layer writes. ``in``: what it reads. ``through``: both at once, as in a depthwise convolution or
        a normalisation. Of a parameter the number of its axis. ``.name``: an attribute of a module that is the number.
    positions
        ``[channels, k]``: entries of the axis that belong to each channel. A linear layer behind a flattened image has
        one for every pixel.
    size
        Length of the axis.
    """

    name: str
    axis: str
    positions: Int64[Tensor, "n k"]
    size: int


@dataclass(frozen=True, eq=False)
class Coupling:
    """Channels of several modules that can only be removed together.

    Attributes
    ----------
    name
        The first layer that writes them, and ``:out``.
    sides
        Where they lie; those of the first layer first.
    pools
        Equal runs of channels that all have to lose the same number: the groups of a grouped convolution.
    parameters, bytes
        What a channel has in modules that are no layers: normalisation, embeddings.
    products
        The share that a channel has of what modules multiply themselves, by their paths: a head's of attention, a
        channel's of what is spread along the edges of a graph.
    """

    name: str
    sides: tuple[Side, ...]
    pools: int = 1
    parameters: float = 0.0
    bytes: float = 0.0
    products: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def channels(self) -> int:
        return self.sides[0].positions.shape[0]

    def on(self, axis: str) -> tuple[Side, ...]:
        """The sides of one kind."""
        return tuple(side for side in self.sides if side.axis == axis)

    @property
    def places(self) -> tuple[Place, ...]:
        """The sides as a choice holds them."""
        return tuple(Place(side.name, side.axis, side.positions.shape[1]) for side in self.sides)

    @property
    def unit(self) -> str:
        """What one of them is, ``channel`` or ``head``."""
        return unit(self.places)

    @property
    def kind(self) -> str:
        """How many of what: ``64 channels``, ``12 heads``."""
        return f"{self.channels} {self.unit}s"

    def check(self, kept: Sequence[int]) -> None:
        """Raise PlanError unless these channels can be what is kept."""
        pool = self.channels // self.pools
        try:
            check_kept(kept, self.channels)
        except ValueError as error:
            raise PlanError(f"channels {self.name!r}: {error}") from error
        counts = torch.bincount(torch.tensor(list(kept)) // pool, minlength=self.pools)
        if bool((counts != counts[0]).any()):
            raise PlanError(
                f"channels {self.name!r}: of each {pool} channels the same number has to be kept, in all {self.pools} "
                f"groups; {shortened(kept)} leaves {counts.tolist()}"
            )

    def after(self, kept: Sequence[int], axes: Mapping[Axis, Tensor]) -> Coupling:
        """The same channels once a removal has renumbered the axes they lie on."""
        rows = torch.tensor(list(kept), dtype=torch.int64)
        sides = []
        for side in self.sides:
            left = axes.get((side.name, side.axis))
            positions = side.positions[rows]
            if left is None:
                sides.append(dataclasses.replace(side, positions=positions))
                continue
            number = torch.full((side.size,), -1, dtype=torch.int64)
            number[left] = torch.arange(len(left))
            sides.append(Side(side.name, side.axis, number[positions], len(left)))
        return dataclasses.replace(self, sides=tuple(sides))


def axes_left(couplings: Iterable[Coupling], kept: Mapping[str, Sequence[int]]) -> dict[Axis, Tensor]:
    """What is left of every axis that loses something, ascending positions.

    Parameters
    ----------
    kept
        Channels kept by the name of the coupling; a coupling that is not named keeps all.

    Raises
    ------
    PlanError
        If channels are named that do not exist, or a coupling that does not.
    """
    known = {coupling.name: coupling for coupling in couplings}
    unknown = [name for name in kept if name not in known]
    if unknown:
        raise PlanError(
            f"there are no coupled channels {unknown[0]!r}; there are {', '.join(map(repr, known)) or 'none'}"
        )
    masks: dict[Axis, Tensor] = {}
    for name, channels in kept.items():
        coupling = known[name]
        coupling.check(channels)
        gone = torch.ones(coupling.channels, dtype=torch.bool)
        gone[list(channels)] = False
        if not bool(gone.any()):
            continue
        for side in coupling.sides:
            mask = masks.setdefault((side.name, side.axis), torch.ones(side.size, dtype=torch.bool))
            mask[side.positions[gone].flatten()] = False
    return {axis: mask.nonzero().flatten() for axis, mask in masks.items()}
