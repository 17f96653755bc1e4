"""What a decomposition returns: small frozen values that can be multiplied out and counted.

A factor type registers itself under a *kind*, the word that a plan uses for it, so that a checkpoint can be rebuilt
from its plan alone. :mod:`spectrim.nn.build` turns each type into plain modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.unfold import Unfolding, fold, unfolding

_KINDS: dict[str, type[Factors]] = {}


class Factors(ABC):
    """Base of the factor types. Subclasses are frozen dataclasses declared with ``kind="..."``."""

    kind: ClassVar[str]

    def __init_subclass__(cls, *, kind: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind
        _KINDS[kind] = cls

    @abstractmethod
    def dense(self) -> tuple[Tensor, ...]:
        """The weights these factors stand for, one ``[g, o, i, *k]`` for each layer of the site."""

    @abstractmethod
    def numel(self) -> int:
        """Numbers stored, shared factors counted once, without biases."""

    @classmethod
    @abstractmethod
    def empty(cls, shapes: Sequence[Sequence[int]], settings: Mapping[str, object]) -> Factors:
        """Factors of the right shapes and unspecified values.

        Parameters
        ----------
        shapes
            ``(g, o, i, *k)`` of each layer of the site.
        settings
            The settings of the choice.
        """


def kinds() -> Mapping[str, type[Factors]]:
    """The factor types known so far, by the word that plans use."""
    return dict(_KINDS)


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
    def empty(cls, shapes: Sequence[Sequence[int]], settings: Mapping[str, object]) -> LowRank:
        ((g, o, i, *kernel),) = shapes
        how = unfolding(kernel, str(settings["unfolding"]))
        rank = settings["rank"]
        rows, columns = how.sizes(kernel)
        full = min(i * rows, o * columns)
        # A plan may come from anyone: nothing is allocated for a rank that no decomposition has.
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= full:
            raise ValueError(f"rank {rank!r}; expected a whole number from 1 to the full rank {full}")
        return cls(torch.empty(g, i * rows, rank), torch.empty(g, rank, o * columns), None, how, (o, i, *kernel))
