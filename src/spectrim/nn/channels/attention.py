"""Heads as they lie in the layers around attention, and what else may follow how many there are."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectrim.network.coupling import OUT, Coupling, Side
from spectrim.nn.channels.narrow import beside_layers
from spectrim.nn.channels.numbers import numbers_of

# How many numbers a set has at most besides those that say heads.
_MOST = 4
# Attributes with such a name are tried first. The trial decides.
_COUNTS_HEADS = re.compile(r"heads?$|\.all_head_size$", re.IGNORECASE)
# How many heads share keys and values: another way to run attention may read it than the one that is tried.
_COUNTS_SHARERS = re.compile(r"groups$|n_rep$", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """An attribute, or an axis of a table or parameter of no layer, that may follow the number of heads."""

    path: str  # below the module that attention is in
    axis: str
    places: tuple[tuple[str, int], ...]  # full paths, one for each attention whose heads go together, and the length


@dataclass(frozen=True, eq=False)
class Attention:
    """Heads as they lie in layers."""

    # Path of the innermost module that has all of the layers; several where the heads of several can only go
    # together.
    owners: tuple[str, ...]
    # What the layers write that attention reads, in order of execution, and what the layer behind it reads.
    sides: tuple[Side, ...]
    # Path of the list whose modules have them, where they are tried together: what holds the list may also hold what
    # the heads have in common, such as a bias by relative position.
    listed: str = ""
    # Whether what it reads has entries that are in all heads, as keys and values of multi-query attention.
    shares: bool = False

    @property
    def name(self) -> str:
        return f"{self.sides[0].name}:out"

    @property
    def heads(self) -> int:
        """How many can be removed one by one: groups of them where they share keys and values."""
        return self.sides[0].positions.shape[0]

    def coupled(self, model: nn.Module, numbers: Iterable[Number]) -> Coupling:
        """The channels that are these heads."""
        more = [
            Side(path, number.axis, torch.arange(size).reshape(self.heads, -1), size)
            for number in numbers
            for path, size in number.places
        ]
        sides = (*self.sides, *more)
        parameters, size = beside_layers(model, sides)
        return Coupling(self.name, sides, parameters=parameters, bytes=size)

    def alike(self, model: nn.Module) -> tuple[Any, ...]:
        """What attention of one kind has in common."""
        (owner,) = self.owners
        sides = ((s.name.removeprefix(owner), s.axis, s.size, s.positions.shape) for s in self.sides)
        numbers = ((number.path, number.axis, number.places[0][1]) for number in self.numbers(model))
        return type(model.get_submodule(owner)), self.shares, tuple(numbers), *sides

    def counts(self, number: Number) -> bool:
        """Whether a number says that it is that of the heads, or has an entry for each."""
        each_one = all(size == self.heads for _, size in number.places)
        if not number.axis.startswith("."):
            return each_one
        if "." in number.axis[1:]:
            return False  # a configuration says so of all modules, and most have read it when they were made
        sharers = self.shares and each_one and _COUNTS_SHARERS.search(number.axis)
        return bool(_COUNTS_HEADS.search(number.axis) or sharers)

    def numbers(self, model: nn.Module) -> list[Number]:
        """What may follow the number of heads: alike in every owner, and what counts heads beside a list."""
        places: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for owner in self.owners:
            for path, axis, size in self._numbers_in(model.get_submodule(owner)):
                places.setdefault((path, axis), []).append((joined(owner, path), size))
        found = [Number(path, axis, tuple(held)) for (path, axis), held in places.items()]
        if not self.listed:
            return found
        above, _, own = self.listed.rpartition(".")
        others = (
            Number(path, axis, ((joined(above, path), size),))
            for path, axis, size in self._numbers_in(model.get_submodule(above))
            if not f"{path}.".startswith(f"{own}.")
        )
        return [*found, *filter(self.counts, others)]

    def _numbers_in(self, owner: nn.Module) -> Iterator[tuple[str, str, int]]:
        heads, sizes = self.heads, {side.size for side in self.sides}

        def may_follow(number: int) -> bool:
            return number > 0 and number % heads == 0 and any(size % number == 0 for size in sizes)

        for path, module in owner.named_modules():
            if isinstance(module, nn.Embedding) and may_follow(module.embedding_dim):
                yield path, OUT, module.embedding_dim
            if type(module).__module__.startswith("torch."):
                continue
            for name, number in numbers_of(module):
                # Of all that a configuration says, what counts heads.
                if may_follow(number) and ("." not in name or _COUNTS_HEADS.search(name)):
                    yield path, f".{name}", number
            for name, parameter in module.named_parameters(recurse=False):
                for axis, size in enumerate(parameter.shape):
                    if may_follow(size):
                        yield joined(path, name), str(axis), size


def in_lists(attentions: Iterable[Attention]) -> list[Attention]:
    """Attentions at the same place of modules of one list, as one: layer by layer they may get one bias for each head.

    One that is in no list is left out.
    """
    lists: dict[tuple[Any, ...], list[Attention]] = {}
    for attention in attentions:
        (owner,) = attention.owners
        parts = owner.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
        if number:
            shapes = tuple((side.axis, side.size, tuple(side.positions.shape)) for side in attention.sides)
            key = ".".join(parts[:number]), tuple(parts[number + 1 :]), attention.shares, shapes
            lists.setdefault(key, []).append(attention)
    return [
        Attention(
            tuple(owner for each in several for owner in each.owners),
            tuple(side for each in several for side in each.sides),
            listed,
            several[0].shares,
        )
        for (listed, *_), several in lists.items()
    ]


def sets(attention: Attention, model: nn.Module) -> Iterator[tuple[Number, ...]]:
    """Sets of numbers that may follow together: those that count heads, then few more than those, then few."""
    numbers = attention.numbers(model)
    counting = [each for each in numbers if attention.counts(each)]
    others = [each for each in numbers if each not in counting]
    told: set[tuple[Number, ...]] = set()
    for start, rest in ((counting, others), ([], numbers)):
        for count in range(min(_MOST, len(rest)) + 1):
            for more in itertools.combinations(rest, count):
                chosen = tuple(each for each in numbers if each in start or each in more)
                if chosen not in told:
                    told.add(chosen)
                    yield chosen


def joined(*paths: str) -> str:
    """A path of paths, of which some may be empty."""
    return ".".join(filter(None, paths))
