"""What may be done with a site: plain values without tensors, one frozen type a kind of choice.

The kind is the word that plans use. Types of other packages take part by declaring one::

    @dataclass(frozen=True)
    class Tucker2Choice(Choice, kind="tucker2"):
        ranks: tuple[int, int]

Plans, checkpoints and reports read, check, write and print it from its fields.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_type_hints

import msgspec

from spectrim.errors import PlanError

T = TypeVar("T")
Setting = str | int | float | bool | tuple[int, ...]
Rank = Annotated[int, msgspec.Meta(ge=1)]
"""A whole number from 1."""
RankOrNone = Annotated[int, msgspec.Meta(ge=0)]
"""A whole number from 0, which is for a part that is not there."""

_KINDS: dict[str, type[Choice]] = {}


def declare(kinds: dict[str, type[T]], kind: str, cls: type[T]) -> None:
    """Let a class be the one of a kind.

    Raises
    ------
    TypeError
        If another class is. The same class made again, as by a cell that runs twice, takes the place of the first.
    """
    known = kinds.get(kind, cls)
    names = [f"{each.__module__}.{each.__qualname__}" for each in (known, cls)]
    if names[0] != names[1]:
        raise TypeError(f"kind {kind!r} of {names[1]} is that of {names[0]} already; give it another")
    kinds[kind] = cls


class _ByKind(type):
    """Makes ``Choice(kind, method, settings)`` a choice of the type that the kind has."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is Choice:
            return _of_kind(*args, **kwargs)
        kind: Any = cls
        names = [f.name for f in _fields(kind)]
        choice = super().__call__(*args, **kwargs)
        for name in names:
            _checked(kind, name, getattr(choice, name))
        return choice


@dataclass(frozen=True, init=False)
class Choice(metaclass=_ByKind):
    """One option of one site. Selectors never look inside.

    Subclasses are frozen dataclasses declared with ``kind="..."``; their fields are what a method needs to carry the
    choice out. ``Choice(kind, method, settings)`` is the choice of a kind from values as a plan holds them.

    Attributes
    ----------
    kind
        The word for it in plans; the factor type that it leads to has the same.
    method
        The method that offered it; empty for ``dense``.
    is_parts
        Whether thinner layers come in place of the site's own, as a pair or a chain.

    Raises
    ------
    PlanError
        If no type of the kind has been declared, or the settings do not fit its fields.
    """

    kind: ClassVar[str] = ""
    is_dense: ClassVar[bool] = False
    is_parts: ClassVar[bool] = False

    method: str = field(default="", kw_only=True)

    def __init__(
        self, kind: str = "dense", method: str = "", settings: Mapping[str, Setting] = MappingProxyType({})
    ) -> None:
        raise NotImplementedError  # a choice has the type of its kind, which has its own

    def __init_subclass__(cls, *, kind: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind
        declare(_KINDS, kind, cls)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the choice needs beside its kind and method, as plans hold it; without fields left at their default."""
        values = {f.name: (getattr(self, f.name), f.default) for f in _fields(type(self))}
        return {name: value for name, (value, default) in values.items() if value != default}

    @classmethod
    def parsed(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Values for the fields from what a plan holds; they are checked against the types of the fields later."""
        return settings

    def biased(self, layer: bool) -> bool:
        """Whether what takes the place of a layer has a bias: by a field ``bias``, else as the layer."""
        bias = getattr(self, "bias", None)
        return layer if bias is None else bias

    @property
    def cut(self) -> tuple[str, int] | None:
        """The name of the spectrum that is cut, such as the unfolding, and how many of its components stay."""
        return None

    @property
    def others(self) -> tuple[str, ...]:
        """Layers that it changes beside its site's own."""
        return ()

    def renamed(self, names: Mapping[str, str | None]) -> Choice:
        """The same with new names for layers; None for those that a model does not have."""
        return self

    def record(self) -> dict[str, Any]:
        """Kind, method and settings, as plans hold them."""
        return {"kind": self.kind, "method": self.method, "settings": self.settings}

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def __str__(self) -> str:
        """In a few words, for people."""
        shown = (f"{name} {_brief(value)}" for name, value in self.settings.items() if name != "bias")
        return ", ".join(shown) or self.kind


def _fields(cls: type[Choice]) -> tuple[dataclasses.Field[Any], ...]:
    if "__dataclass_fields__" not in vars(cls):
        raise TypeError(f"{cls.__module__}.{cls.__qualname__} has to be a frozen dataclass")
    return tuple(f for f in dataclasses.fields(cls) if f.name != "method")


def _checked(cls: type[Choice], name: str, value: Any) -> Any:
    """A value of the type that a field has, from one that a plan may hold."""
    try:
        return msgspec.convert(value, _types(cls)[name])
    except (msgspec.ValidationError, RecursionError) as error:
        raise PlanError(f"{name} of a {cls.kind!r} choice is {value!r:.60}: {error}") from error


@functools.cache
def _types(cls: type[Choice]) -> Mapping[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _brief(value: object) -> str:
    """A value for people to read; long ones by their length or their beginning."""
    if isinstance(value, (tuple, list)) and len(value) > 8:
        return f"<{len(value)} numbers>"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Written(msgspec.Struct, forbid_unknown_fields=True):
    """A choice in a plan."""

    kind: str = "dense"
    method: str = ""
    settings: dict[str, Any] = {}


def read_choice(record: object) -> Choice:
    """The choice that :meth:`Choice.record` described.

    Raises
    ------
    PlanError
        If no type of the kind has been declared, or a field is unknown, missing or not of its type.
    """
    try:
        written = msgspec.convert(record, _Written)
    except msgspec.ValidationError as error:
        raise PlanError(f"a choice is written as kind, method and settings: {error}") from error
    return _of_kind(written.kind, written.method, written.settings)


def _of_kind(kind: str = "dense", method: str = "", settings: Mapping[str, Setting] = MappingProxyType({})) -> Choice:
    if kind not in _KINDS:
        raise PlanError(
            f"unknown kind of choice {kind!r}; known are {', '.join(_KINDS)}. Import the module that declares it"
        )
    cls = _KINDS[kind]
    fields = {f.name: f for f in _fields(cls)}
    unknown = [name for name in settings if name not in fields]
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in settings]
    if unknown:
        raise PlanError(f"a {kind!r} choice has no field {unknown[0]!r:.60}; it has {', '.join(fields) or 'none'}")
    if missing:
        raise PlanError(f"a {kind!r} choice lacks the field {missing[0]!r}")
    try:
        values = cls.parsed(settings)
    except ValueError as error:
        raise PlanError(f"a {kind!r} choice: {error}") from error
    values = {name: _checked(cls, name, value) for name, value in values.items()}
    try:
        return cls(method=method, **values)
    except ValueError as error:
        raise PlanError(f"a {kind!r} choice: {error}") from error


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
        return {**settings, "sides": tuple(map(Place.parse, sides.split()))}

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
