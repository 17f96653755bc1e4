"""What calibration keeps of layers and of coupled channels: named moments, any of which may be absent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from spectrim.linalg.moments import Moments
from spectrim.linalg.sketch import Sketch


class Copied:
    """Pickle and deepcopy know nothing of read-only views: they are stored as what they show."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: dict(v) if isinstance(v, MappingProxyType) else v for k, v in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({k: MappingProxyType(v) if isinstance(v, dict) else v for k, v in state.items()})


@dataclass(frozen=True)
class Statistics(Copied):
    """What calibration keeps of one layer, as streamed moments ``[g, features]``; all of it may be absent.

    Attributes
    ----------
    input
        Of whole input patches ``(i, *k)``, or of a linear layer's inputs.
    output
        Of the outputs, where there is no room for ``input``.
    slices
        Of the slices of each unfolding's first factor, by its name (``height-first``), where there is none either.
    channels
        Of a convolution's input channels at single positions, where channels may be removed and there is no ``input``.
    sketch
        A few rows in place of ``input``, for linear layers with many inputs.
    gradient
        Of the gradients that reach the outputs (:func:`spectrim.sensitivity`).
    """

    input: Moments | None = None
    output: Moments | None = None
    slices: Mapping[str, Moments] = field(default_factory=lambda: MappingProxyType({}))
    channels: Moments | None = None
    sketch: Sketch | None = None
    gradient: Moments | None = None

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """What there is, for people."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name))

    @property
    def rows(self) -> float:
        """Rows of inputs or outputs that they rest on."""
        whole = (self.input, self.output, self.channels, self.sketch, *self.slices.values())
        return max((float(moments.count) for moments in whole if moments is not None), default=0.0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        whole = (self.input, self.output, self.channels, self.sketch, self.gradient, *self.slices.values())
        return sum(moments.nbytes for moments in whole if moments is not None)

    def of_inputs(self, channels: Tensor, of: int) -> Statistics:
        """The statistics once only some input channels ``[g, n]`` are left, of so many a group."""

        def taken(moments: Any) -> Any:
            return None if moments is None else moments.take(entries_of(channels, moments.mean.shape[1] // of))

        return dataclasses.replace(
            self,
            input=taken(self.input),
            channels=taken(self.channels),
            sketch=taken(self.sketch),
            slices=MappingProxyType({name: taken(moments) for name, moments in self.slices.items()}),
        )

    def of_outputs(self, rows: Tensor) -> Statistics:
        """The statistics once only some output channels ``[g, n]`` are left."""
        output, gradient = (moments and moments.take(rows) for moments in (self.output, self.gradient))
        return dataclasses.replace(self, output=output, gradient=gradient)


def entries_of(channels: Tensor, per: int) -> Tensor:
    """Entries ``[g, n * per]`` of channels ``[g, n]`` that have so many each, one after the other."""
    return (channels.unsqueeze(2) * per + torch.arange(per, device=channels.device)).flatten(1)


@dataclass(frozen=True)
class Pooled:
    """Moments of coupled channels as their readers see them, ``[1, channels]``.

    Attributes
    ----------
    max, mean
        Of the largest and of the mean response over the positions of a sample.
    unpooled
        Of single positions.
    """

    max: Moments | None = None
    mean: Moments | None = None
    unpooled: Moments | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What there is, for people."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)

    def take(self, channels: Tensor) -> Pooled:
        """Those of some channels ``[n]``."""
        parts = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return Pooled(**{name: moments and moments.take(channels.unsqueeze(0)) for name, moments in parts})
