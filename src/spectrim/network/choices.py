"""What may be done with a site: the kinds of choices that this package has.

What they have in common, and how other packages declare their own: :mod:`spectrim.network.choice`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec

from spectrim.network.choice import Choice as Choice
from spectrim.network.choice import Setting as Setting
from spectrim.network.choice import declare as declare
from spectrim.network.choice import read_choice as read_choice

Rank = Annotated[int, msgspec.Meta(ge=1)]
"""A whole number from 1."""
RankOrNone = Annotated[int, msgspec.Meta(ge=0)]
"""A whole number from 0, which is for a part that is not there."""


@dataclass(frozen=True)
class DenseChoice(Choice, kind="dense"):
    """The site is left alone."""

    is_dense: ClassVar[bool] = True


DENSE: Choice = DenseChoice()


@dataclass(frozen=True)
class LowRankChoice(Choice, kind="low_rank"):
    """A pair of layers in place of one."""

    is_parts: ClassVar[bool] = True

    unfolding: str
    rank: Rank
    bias: bool | None = None

    @property
    def cut(self) -> tuple[str, int]:
        return self.unfolding, self.rank

    def __str__(self) -> str:
        return f"{self.unfolding}, rank {self.rank}"


@dataclass(frozen=True)
class SharedChoice(Choice, kind="shared_basis"):
    """A pair of layers in place of each of several, with factors that are shared.

    Attributes
    ----------
    left_rank
        The part of the rank whose first factor is shared; of the rest the second is.
    once
        The first factor is shared whole and computed once, of one input.
    """

    is_parts: ClassVar[bool] = True

    unfolding: str
    rank: Rank
    left_rank: RankOrNone
    bias: bool | None = None
    once: bool = False

    def __post_init__(self) -> None:
        if self.left_rank > self.rank or (self.once and self.left_rank < self.rank):
            raise ValueError(
                f"left_rank is {self.left_rank}; expected at most the rank, {self.rank}"
                + (", and no less: what is computed once is a first factor that is shared whole" if self.once else "")
            )

    @property
    def right_rank(self) -> int:
        """The part of the rank whose second factor is shared."""
        return self.rank - self.left_rank

    @property
    def cut(self) -> tuple[str, int]:
        return self.unfolding, self.rank

    def __str__(self) -> str:
        if self.left_rank and self.right_rank:
            shared = f"both factors shared ({self.left_rank} + {self.right_rank})"
        else:
            shared = f"{'first' if self.left_rank else 'second'} factor shared"
        return f"{self.unfolding}, rank {self.rank}, {shared}" + (", computed once" if self.once else "")


@dataclass(frozen=True)
class TiedChoice(Choice, kind="tied"):
    """One pair of factors in place of a weight that a table and a linear layer have in common.

    Attributes
    ----------
    head
        Name of the linear layer.
    """

    is_parts: ClassVar[bool] = True

    rank: Rank
    head: str

    @property
    def others(self) -> tuple[str, ...]:
        return (self.head,)

    def renamed(self, names: Mapping[str, str | None]) -> Choice:
        """Of a model without the head, the table's pair alone."""
        head = names[self.head]
        alone = LowRankChoice("channel", self.rank, False, method=self.method)
        return alone if head is None else dataclasses.replace(self, head=head)

    @property
    def cut(self) -> tuple[str, int]:
        return "channel", self.rank

    def __str__(self) -> str:
        return f"rank {self.rank}, shared with {self.head}"


@dataclass(frozen=True)
class SumChoice(Choice, kind="low_rank_plus_sparse"):
    """A pair of layers and a sparse layer, added, in place of one; or one of the two.

    Attributes
    ----------
    density
        Share of the sparse weight that is stored.
    pattern
        The name of where it may be.
    """

    unfolding: str
    rank: RankOrNone
    density: Annotated[float, msgspec.Meta(ge=0, le=1)]
    pattern: str
    bias: bool | None = None

    @property
    def cut(self) -> tuple[str, int]:
        return self.unfolding, self.rank

    def __str__(self) -> str:
        pair = [f"{self.unfolding}, rank {self.rank}"] if self.rank else []
        sparse = [f"{100 * self.density:g} % {self.pattern}"] if self.density else []
        return " + ".join([*pair, *sparse])


@dataclass(frozen=True)
class TuckerChoice(Choice, kind="tucker"):
    """Three layers in place of one: ``inputs`` and ``outputs`` channels lie between them."""

    is_parts: ClassVar[bool] = True

    inputs: Rank
    outputs: Rank
    bias: bool | None = None

    def __str__(self) -> str:
        return f"Tucker-2, ranks {self.inputs} and {self.outputs}"


@dataclass(frozen=True)
class CPChoice(Choice, kind="cp"):
    """Two layers of 1 x 1 in place of one, and in between depthwise ones over ``rank`` channels.

    Attributes
    ----------
    kernel
        ``whole``: one depthwise layer with all of the kernel; ``axes``: one for every axis.
    """

    is_parts: ClassVar[bool] = True

    rank: Rank
    kernel: Literal["whole", "axes"] = "whole"
    bias: bool | None = None

    def __str__(self) -> str:
        return f"CP, {self.rank} components" + (", kernel by axes" if self.kernel == "axes" else "")


@dataclass(frozen=True)
class Place:
    """Where channels lie in one module: ``entries`` of an axis belong to each channel."""

    module: str
    axis: str
    entries: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what ``str`` gives, ``module:axis:entries``."""
        module, _, axis = text.rpartition(":")[0].rpartition(":")
        entries = text.rpartition(":")[2]
        # Numbers of channels may be attributes of the model itself.
        if not (module or axis.startswith(".")) or not entries.isdecimal():
            raise ValueError(f"side {text!r:.60} is not written as module:axis:entries of a channel")
        return cls(module, axis, int(entries))

    def __str__(self) -> str:
        return f"{self.module}:{self.axis}:{self.entries}"


# Places one after another, as text, whose names may hold spaces; what is none is the rest.
_PLACES = re.compile(r"(.*?:[^: ]+:\d+|.+)(?: |$)", re.DOTALL)


@dataclass(frozen=True)
class ChannelsChoice(Choice, kind="kept_channels"):
    """Some of coupled channels stay, the others go.

    Attributes
    ----------
    kept
        Numbers of the channels that stay, ascending.
    of
        How many there are.
    sides
        Where they lie; with it a plan needs no graph to be loaded.
    """

    kept: tuple[int, ...]
    of: Annotated[int, msgspec.Meta(ge=1)]
    sides: tuple[Place, ...]

    def __post_init__(self) -> None:
        check_kept(self.kept, self.of)

    @classmethod
    def parsed(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        sides = settings["sides"]
        if not isinstance(sides, str):
            raise ValueError(f"sides is {sides!r:.60}; expected text as module:axis:entries of a channel")
        return {**settings, "sides": tuple(map(Place.parse, _PLACES.findall(sides)))}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"kept": self.kept, "of": self.of, "sides": " ".join(map(str, self.sides))}

    @property
    def gone(self) -> int:
        """How many channels go."""
        return self.of - len(self.kept)

    @property
    def lost(self) -> tuple[Place, ...]:
        """How many entries go where."""
        return tuple(dataclasses.replace(place, entries=self.gone * place.entries) for place in self.sides)

    @property
    def cut(self) -> tuple[str, int]:
        return "responses", len(self.kept)

    @property
    def unit(self) -> str:
        """What one of them is, ``channel`` or ``head``."""
        return unit(self.sides)

    def __str__(self) -> str:
        return f"{len(self.kept)} of {self.of} {self.unit}s"


def unit(sides: Iterable[Place]) -> str:
    """What lies there: a head of attention has several entries where layers read it and where the first writes it.

    A table of biases has one for each head; a channel has one where it is written.
    """
    places = [place for place in sides if place.axis in {"in", "out"}]
    ends = [place.entries > 1 for place in places if place.axis == "in" or place is places[0]]
    return "head" if ends and all(ends) else "channel"


def check_kept(kept: Sequence[int], of: int) -> None:
    """Raise ValueError unless these can be the channels that stay of so many."""
    whole = all(type(channel) is int for channel in kept)
    if not whole or not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= of:
        raise ValueError(
            f"cannot keep {shortened(kept)}; expected different channels, ascending, from 0 to {of - 1}, at least one"
        )


def shortened(kept: Sequence[int]) -> str:
    """Channels for people to read."""
    return str(list(kept)) if len(kept) <= 12 else f"{list(kept[:10])} and {len(kept) - 10} more"


@dataclass(frozen=True)
class ZeroChoice(Choice, kind="zero"):
    """The weight is dropped, its sparse part as well, and the bias stays: an option within a run of learned ranks."""

    rank: Literal[0]

    @property
    def cut(self) -> tuple[str, int]:
        return "", self.rank

    def __str__(self) -> str:
        return self.kind
