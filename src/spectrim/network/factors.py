"""What a decomposition returns: small frozen values that can be multiplied out and counted.

A factor type registers itself under the *kind* of the choices that lead to it (:mod:`spectrim.network.choices`), so
that a checkpoint can be rebuilt from its plan alone. :mod:`spectrim.nn.build` turns each type into plain modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectrim.linalg.patterns import Pattern, pattern
from spectrim.linalg.unfold import Unfolding, fold, unfolding
from spectrim.network.choices import ChannelsChoice, LowRankChoice, SharedChoice, SumChoice, TiedChoice, declare
from spectrim.network.coupling import IN, OUT, THROUGH, Coupling

_KINDS: dict[str, type[Factors]] = {}


class Factors(ABC):
    """Base of the factor types. Subclasses are frozen dataclasses declared with the ``kind="..."`` of their choices."""

    kind: ClassVar[str]

    def __init_subclass__(cls, *, kind: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind
        declare(_KINDS, kind, cls)

    @abstractmethod
    def dense(self) -> tuple[Tensor, ...]:
        """The weights these factors stand for, one ``[g, o, i, *k]`` for each layer of the site."""

    @abstractmethod
    def numel(self) -> int:
        """Numbers stored, shared factors counted once, without biases."""

    @classmethod
    @abstractmethod
    def empty(cls, shapes: Sequence[Sequence[int]], choice: Any) -> Factors:
        """Factors of the right shapes and unspecified values.

        Parameters
        ----------
        shapes
            ``(g, o, i, *k)`` of each layer of the site.
        choice
            Of the same kind.

        Raises
        ------
        ValueError
            If the layers cannot have them. A plan may come from anyone: nothing is allocated before that is known.
        """


def kinds() -> Mapping[str, type[Factors]]:
    """The factor types known so far, by the kind of choice that leads to them."""
    return dict(_KINDS)


def alone(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape of the one layer that a choice for one layer is for."""
    if len(shapes) != 1:
        raise ValueError(f"it is for one layer, not for {len(shapes)}")
    return tuple(shapes[0])


def _check_rank(rank: int, least: int, full: int) -> None:
    if not least <= rank <= full:
        raise ValueError(f"rank {rank}; expected a whole number from {least} to the full rank {full}")


def _pair(shape: Sequence[int], how: Unfolding, rank: int, least: int) -> tuple[Tensor, Tensor]:
    """The two factors of an unfolded weight ``(g, o, i, *k)``."""
    g, o, i, *kernel = shape
    first, second = how.sizes(kernel)
    rows, columns = i * first, o * second
    _check_rank(rank, least, min(rows, columns))
    return torch.empty(g, rows, rank), torch.empty(g, rank, columns)


@dataclass(frozen=True, eq=False)
class LowRank(Factors, kind="low_rank"):
    """A matrix product in place of one layer's weight: ``M = left @ right`` in the given unfolding.

    Attributes
    ----------
    left
        ``[g, (i, k_S), r]``, the first, thinner convolution.
    right
        ``[g, r, (o, k_rest)]``, the second.
    shift
        ``[o_total]``, added to the layer's bias, or None. It carries the mean of what the factors leave out.
    how
        The unfolding.
    shape
        ``(o, i, *k)`` of one group's weight.
    """

    left: Float[Tensor, "g rows r"]
    right: Float[Tensor, "g r columns"]
    shift: Float[Tensor, " o_total"] | None
    how: Unfolding
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.left.shape[-1]

    def dense(self) -> tuple[Tensor, ...]:
        return (fold(self.left @ self.right, self.how, self.shape),)

    def numel(self) -> int:
        return self.left.numel() + self.right.numel()

    @classmethod
    def empty(cls, shapes: Sequence[Sequence[int]], choice: LowRankChoice) -> LowRank:
        shape = alone(shapes)
        how = unfolding(shape[3:], choice.unfolding)
        return cls(*_pair(shape, how, choice.rank, 1), None, how, shape[1:])


@dataclass(frozen=True, eq=False)
class SharedBasis(Factors, kind="shared_basis"):
    """Factors of several layers, with shared ones among them.

    Layer ``n`` stands for ``own_lefts[n] @ shared_right + shared_left @ own_rights[n]``. With a rank of 0 for one of
    the two products the factors are left-shared or right-shared alone.

    Attributes
    ----------
    own_lefts, shared_right
        ``[g, (i_n, k_S), r_r]`` a layer, and ``[g, r_r, (o, k_rest)]`` of all.
    shared_left, own_rights
        ``[g, (i, k_S), r_l]`` of all, and ``[g, r_l, (o_n, k_rest)]`` a layer.
    shifts
        ``[o_total]`` a layer, added to its bias, or None.
    how
        The unfolding.
    shapes
        ``(o, i, *k)`` of one group's weight, a layer.
    once
        The first factor is shared whole and all layers see one input, so that it is computed once.
    """

    own_lefts: tuple[Float[Tensor, "g _ r"], ...]
    shared_right: Float[Tensor, "g r columns"]
    shared_left: Float[Tensor, "g rows l"]
    own_rights: tuple[Float[Tensor, "g l _"], ...]
    shifts: tuple[Float[Tensor, " _"] | None, ...]
    how: Unfolding
    shapes: tuple[tuple[int, ...], ...]
    once: bool = False

    @property
    def ranks(self) -> tuple[int, int]:
        """Ranks of the left-shared and of the right-shared product."""
        return self.shared_left.shape[-1], self.shared_right.shape[-2]

    def dense(self) -> tuple[Tensor, ...]:
        return tuple(fold(left @ right, self.how, shape) for left, right, shape in self.pairs())

    def pairs(self) -> tuple[tuple[Tensor, Tensor, tuple[int, ...]], ...]:
        """``(left, right, shape)`` of every layer, both products side by side along the rank, the left-shared first."""
        left_rank, right_rank = self.ranks
        found = []
        for u, v, shape in zip(self.own_lefts, self.own_rights, self.shapes, strict=True):
            left = [part for part, rank in ((self.shared_left, left_rank), (u, right_rank)) if rank]
            right = [part for part, rank in ((v, left_rank), (self.shared_right, right_rank)) if rank]
            found.append((torch.cat(left, dim=-1), torch.cat(right, dim=-2), shape))
        return tuple(found)

    def numel(self) -> int:
        held = [*self.own_lefts, self.shared_right, self.shared_left, *self.own_rights]
        return sum(tensor.numel() for tensor in held if tensor.shape[-1] and tensor.shape[-2])

    @classmethod
    def empty(cls, shapes: Sequence[Sequence[int]], choice: SharedChoice) -> SharedBasis:
        left_rank, right_rank = choice.left_rank, choice.right_rank
        if len({(g, *kernel) for g, _, _, *kernel in shapes}) > 1 or len(shapes) < 2:
            raise ValueError("layers that share a factor have equal groups and kernels")
        how = unfolding(tuple(shapes[0][3:]), choice.unfolding)
        first, second = how.sizes(tuple(shapes[0][3:]))
        g, rows, columns = shapes[0][0], [i * first for _, _, i, *_ in shapes], [o * second for _, o, *_ in shapes]
        if (left_rank and len(set(rows)) > 1) or (right_rank and len(set(columns)) > 1):
            raise ValueError(f"unfolded weights of {rows} rows and {columns} columns cannot share these factors")
        most = min(rows[0], sum(columns)), min(sum(rows), columns[0])
        if left_rank > most[0] or right_rank > most[1]:
            raise ValueError(
                f"rank {choice.rank}, of which {left_rank} left-shared; expected at most {most[0]} left-shared and "
                f"{most[1]} right-shared"
            )
        return cls(
            tuple(torch.empty(g, r, right_rank) for r in rows),
            torch.empty(g, right_rank, columns[0]),
            torch.empty(g, rows[0], left_rank),
            tuple(torch.empty(g, left_rank, c) for c in columns),
            (None,) * len(shapes),
            how,
            tuple(tuple(shape[1:]) for shape in shapes),
            choice.once,
        )


@dataclass(frozen=True, eq=False)
class TiedPair(Factors, kind="tied"):
    """A matrix product in place of a weight that two layers have in common: a table, and a linear layer behind it."""

    rows: Float[Tensor, "entries r"]  # ``[entries, r]``: the narrower table, and the last layer of the head
    # ``[r, width]``: what makes a row of the table wide again, and the head's first layer.
    columns: Float[Tensor, "r width"]

    @property
    def rank(self) -> int:
        return self.rows.shape[1]

    def dense(self) -> tuple[Tensor, ...]:
        weight = self.rows @ self.columns
        return weight.mT[None], weight[None]

    def numel(self) -> int:
        return self.rows.numel() + self.columns.numel()

    @classmethod
    def empty(cls, shapes: Sequence[Sequence[int]], choice: TiedChoice) -> TiedPair:
        table, *heads = (tuple(shape) for shape in shapes)
        if len(table) != 3 or heads != [(table[0], table[2], table[1])] or table[0] != 1:
            raise ValueError(f"a table and a head of the same weight, turned; these have {[table, *heads]}")
        _, width, entries = table
        _check_rank(choice.rank, 1, min(width, entries))
        return cls(torch.empty(entries, choice.rank), torch.empty(choice.rank, width))


@dataclass(frozen=True, eq=False)
class AdditiveFactors(Factors, kind="low_rank_plus_sparse"):
    """A matrix product and a sparse weight, added, in place of one layer's weight."""

    # The product, as in :class:`LowRank`; with a rank of 0 there is none.
    left: Float[Tensor, "g rows r"]
    right: Float[Tensor, "g r columns"]
    sparse: Float[Tensor, "g o i *k"]  # ``[g, o, i, *k]``, zero outside ``mask``
    mask: Bool[Tensor, "g o i *k"]  # what is stored of ``sparse``; nothing at a density of 0
    pattern: Pattern  # that the mask has
    shift: Float[Tensor, " o_total"] | None  # ``[o_total]``, added to the layer's bias, or None
    how: Unfolding  # the unfolding of the product

    @property
    def rank(self) -> int:
        return self.left.shape[-1]

    @property
    def density(self) -> float:
        """Share of the sparse weight that is stored."""
        return int(self.mask.sum()) / self.mask.numel()

    def dense(self) -> tuple[Tensor, ...]:
        return (fold(self.left @ self.right, self.how, tuple(self.sparse.shape[1:])) + self.sparse,)

    def numel(self) -> int:
        return self.left.numel() + self.right.numel() + int(self.mask.sum())

    @classmethod
    def empty(cls, shapes: Sequence[Sequence[int]], choice: SumChoice) -> AdditiveFactors:
        shape, rank, density = alone(shapes), choice.rank, choice.density
        how = unfolding(shape[3:], choice.unfolding)
        left, right = _pair(shape, how, rank, 0)
        kind = pattern(choice.pattern)
        if not kind.fits(shape):
            raise ValueError(f"pattern {choice.pattern!r} does not fit a weight of shape {shape}")
        if not rank and not kind.kept(shape, density):
            raise ValueError(f"rank 0 and a density of {density!r} leave nothing of the layer")
        weight = torch.zeros(shape)
        mask = kind.keep(weight, density)
        return cls(left, right, weight, mask, kind, None, how)


@dataclass(frozen=True, eq=False)
class KeptChannels(Factors, kind="kept_channels"):
    """Layers without some of their coupled channels."""

    kept: tuple[int, ...]  # channels that stay, ascending
    # ``[g, o, i, *k]`` a layer, of the channels that stay; those of layers that read them make up for the others.
    weights: tuple[Tensor, ...]
    coupling: Coupling  # where the channels lie
    layers: tuple[str, ...]  # names of the layers, in the order of the weights

    def dense(self) -> tuple[Tensor, ...]:
        """The weights in the dense layers' shapes, with zeros where channels are gone."""
        return tuple(self._spread(weight, name) for weight, name in zip(self.weights, self.layers, strict=True))

    def _spread(self, weight: Tensor, name: str) -> Tensor:
        gone = torch.ones(self.coupling.channels, dtype=torch.bool)
        gone[list(self.kept)] = False
        for side in self.coupling.sides:
            if side.name != name:
                continue
            left = torch.ones(side.size, dtype=torch.bool)
            left[side.positions[gone].flatten()] = False
            # A depthwise layer's groups are its channels.
            dim = {IN: 2, OUT: 1, THROUGH: 0}[side.axis]
            groups = weight.shape[0] if dim else 1
            size = side.size // groups
            rows = left.nonzero().reshape(groups, -1) % size
            view = [1] * weight.dim()
            view[0], view[dim] = groups, rows.shape[1]
            shape = [*weight.shape[:dim], size, *weight.shape[dim + 1 :]]
            weight = weight.new_zeros(shape).scatter(
                dim, rows.reshape(view).to(weight.device).expand(weight.shape), weight
            )
        return weight

    def numel(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    @classmethod
    def empty(cls, shapes: Sequence[Sequence[int]], choice: ChannelsChoice) -> KeptChannels:
        raise ValueError("channels are removed from the modules that a plan gives widths for, not from single layers")


# Its name in 0.1, until 0.3.
LowRankPlusSparse = AdditiveFactors
