"""A place of a network where one choice is made, as numbers: a layer, a group, tied layers, or coupled channels."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spectrim.errors import MissingMomentsError
from spectrim.linalg.moments import Moments
from spectrim.network.coupling import Coupling
from spectrim.network.layer import LayerSpec
from spectrim.network.skipped import Skipped
from spectrim.network.statistics import Pooled, Statistics
from spectrim.network.structure import Chain


class Site(ABC):
    """A place where one choice is made: a :class:`Layer`, a :class:`Group`, or coupled :class:`Channels`.

    Attributes
    ----------
    name
        Unique; the module path of a single layer.
    parts
        The layers concerned, each with its statistics.
    """

    if TYPE_CHECKING:

        @property
        def name(self) -> str: ...

        @property
        def parts(self) -> tuple[Layer, ...]: ...

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers as numbers."""
        return tuple(part.spec for part in self.parts)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """One canonical weight ``[g, o, i, *k]`` a layer."""
        return tuple(part.weight for part in self.parts)

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        """One bias ``[o_total]`` or None a layer."""
        return tuple(part.bias for part in self.parts)

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the layers that it is on offer in place of; none for a layer, which is on offer itself."""
        return ()

    @property
    def calibrated(self) -> bool:
        """Whether there are statistics of any of the layers."""
        return any(part.statistics for part in self.parts)

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it is, for people."""

    def _required(self, held: Statistics | Pooled, statistic: str, why: str) -> Moments:
        moments = getattr(held, statistic)
        if moments is None:
            raise self.missing(statistic, why, held.names)
        return moments

    def __repr__(self) -> str:
        statistics = dict.fromkeys(name for part in self.parts for name in part.statistics.names)
        held = f"statistics of {', '.join(statistics)}" if statistics else "no statistics"
        return f"{type(self).__name__}({self.name!r}, {self.kind}, {held})"

    def missing(self, statistic: str, why: str, there: Sequence[str]) -> MissingMomentsError:
        """The error for a statistic that calibration has not collected."""
        return MissingMomentsError(
            f"site {self.name!r} ({self.kind}) holds no {statistic!r} moments (held: "
            f"{', '.join(sorted(there)) or 'none'}), which {why} needs. Run calibrate(model, sites, batches) first."
        )


@dataclass(frozen=True, repr=False)
class Layer(Site):
    """One layer.

    Attributes
    ----------
    spec
        The layer as numbers.
    weight
        Canonical, ``[g, o, i, *k]``, detached, in the model's dtype and on its device.
    bias
        ``[o_total]`` or None.
    statistics
        From :func:`spectrim.calibrate`.
    present
        The layers that an earlier compression has put in its place, one after the other, whose product the weight is;
        none for a layer as it was made.
    """

    spec: LayerSpec
    weight: Tensor
    bias: Tensor | None = None
    statistics: Statistics = Statistics()  # noqa: RUF009 (frozen)
    present: tuple[LayerSpec, ...] = ()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def parts(self) -> tuple[Layer, ...]:
        return (self,)

    @property
    def kind(self) -> str:
        return f"{self.spec.kind} in {len(self.present)} layers" if self.present else self.spec.kind

    @property
    def running(self) -> Sequence[LayerSpec]:
        """The layers that compute it now, with the input shapes they see: itself, or those at present in its place."""
        if not self.present:
            return (self.spec,)
        found, inputs = [], self.spec.inputs
        for part in self.present:
            found.append(part.at(inputs))
            inputs = tuple(part.output_shape(shape) for shape in inputs)
        return Chain(tuple(found))

    def with_layers(self, specs: Sequence[LayerSpec]) -> Layer:
        """The same with other numbers for its layer."""
        (spec,) = specs
        return dataclasses.replace(self, spec=spec)

    def require(self, statistic: str, why: str) -> Moments:
        """The statistic of this name.

        Raises
        ------
        MissingMomentsError
            If calibration did not collect it; the message names the layer.
        """
        return self._required(self.statistics, statistic, why)


class _Several(Site):
    """What layers together answer that are asked as one."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("spec", "weight", "bias", "statistics"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise AttributeError(
            f"site {self.name!r} is {len(self.parts)} layers ({', '.join(part.name for part in self.parts)}) and has "
            f"no {name} of its own: ask each of its parts"
        )


@dataclass(frozen=True, repr=False)
class Group(_Several):
    """Layers that may share factors.

    Attributes
    ----------
    same_input
        Whether all of them are called with one and the same tensor, as the queries, keys and values of attention are.
    """

    name: str
    parts: tuple[Layer, ...]
    same_input: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    def with_layers(self, specs: Sequence[LayerSpec]) -> Group:
        """The same with other numbers for its layers."""
        parts = zip(self.parts, specs, strict=True)
        return dataclasses.replace(self, parts=tuple(dataclasses.replace(part, spec=spec) for part, spec in parts))

    @property
    def kind(self) -> str:
        return f"{len(self.parts)} x {self.parts[0].kind}"


def tied_to(what: str, others: str) -> str:
    """Why a layer is left alone whose weight or bias others have, too."""
    return f"its {what} is tied to {others}: give one of them a copy of its own to compress it; a copy is counted, too"


@dataclass(frozen=True, repr=False)
class Tied(_Several):
    """A table and a linear layer that have one weight: looked up by rows, and multiplied as a matrix.

    They have one choice. A pair in place of one of them would leave the dense weight to the other.

    Attributes
    ----------
    table, head
        The layers. The head's spec counts the weight as the table's (``shared``).
    asked
        ``[entries]``: how often each row of the table is looked up, as shares; None before calibration.
    weights
        ``[entries]``: mean squares of the gradients that reach the head's outputs; None without a sensitivity.
    """

    table: Layer
    head: Layer
    asked: Tensor | None = None
    weights: Tensor | None = None

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def parts(self) -> tuple[Layer, ...]:
        return (self.table, self.head)

    @property
    def kind(self) -> str:
        return f"{self.table.kind} and {self.head.kind}"

    def with_layers(self, specs: Sequence[LayerSpec]) -> Tied:
        """The same with other numbers for its layers."""
        table, head = (dataclasses.replace(part, spec=spec) for part, spec in zip(self.parts, specs, strict=True))
        return dataclasses.replace(self, table=table, head=head)

    def untied(self) -> tuple[Skipped, ...]:
        """The layers as what is left alone, with the reason."""
        names = (self.head.name, self.table.name)
        return tuple(
            Skipped(part.name, part.kind, tied_to("weight", other))
            for part, other in zip(self.parts, names, strict=True)
        )


@dataclass(frozen=True, repr=False)
class Channels(_Several):
    """Channels of several layers that can only be removed together.

    Attributes
    ----------
    coupling
        Where they lie.
    parts
        All layers that hold them.
    pooled
        Their statistics, known after calibration.
    """

    coupling: Coupling
    parts: tuple[Layer, ...]
    pooled: Pooled = Pooled()  # noqa: RUF009 (frozen)

    @property
    def name(self) -> str:
        return self.coupling.name

    @property
    def kind(self) -> str:
        return self.coupling.kind

    def require(self, statistic: str, why: str) -> Moments:
        """The pooled statistic of this name.

        Raises
        ------
        MissingMomentsError
            If calibration did not collect it; the message names the channels.
        """
        return self._required(self.pooled, statistic, why)
