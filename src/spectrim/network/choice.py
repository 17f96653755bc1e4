"""What a choice is: a plain value without tensors, of one frozen type a kind (:mod:`spectrim.network.choices`).

The kind is the word that plans use. Types of other packages take part by declaring one::

    @dataclass(frozen=True)
    class Tucker2Choice(Choice, kind="tucker2"):
        ranks: tuple[int, int]

Plans, checkpoints and reports read, check, write and print it from its fields.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, get_type_hints

import msgspec

from spectrim.errors import PlanError

T = TypeVar("T")
Setting = str | int | float | bool | tuple[int, ...]
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
