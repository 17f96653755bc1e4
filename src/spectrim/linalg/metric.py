"""Second moments of what a layer sees, as operators: all that fitting a weight to responses asks of the data.

The error of a weight difference ``R [g, o, n]`` is ``tr(R C R^T)`` with the second moment ``C`` of the patches. Where
the patches are too long for ``C``, the average moment of their slices stands for it, and without data the identity.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


class Metric(ABC):
    """A symmetric positive semidefinite ``C`` over patches ``(i, *k)``, one a group."""

    @abstractmethod
    def times(self, rows: Float[Tensor, "g m n"]) -> Float[Tensor, "g m n"]:
        """``rows @ C``."""

    @abstractmethod
    def diagonal(self) -> Float[Tensor, "g n"]:
        """Mean square of every input of the patch."""

    def single(self) -> Metric:
        """The same in float32, where it holds numbers."""
        held = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return type(self)(**{name: v.float() if isinstance(v, Tensor) else v for name, v in held.items()})

    def energy(self, rows: Float[Tensor, "g m n"]) -> Tensor:
        """``tr(rows C rows^T)``, summed over the groups."""
        return (rows * self.times(rows)).sum()


@dataclass(frozen=True, eq=False)
class Full(Metric):
    """The moment of whole patches, ``[g, n, n]``."""

    moment: Float[Tensor, "g n n"]

    def times(self, rows: Float[Tensor, "g m n"]) -> Float[Tensor, "g m n"]:
        return rows @ self.moment

    def diagonal(self) -> Float[Tensor, "g n"]:
        return self.moment.diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True, eq=False)
class Slices(Metric):
    """One moment for every slice, and no correlation between slices.

    Attributes
    ----------
    moment
        ``[g, p, p]``, the average over the slices.
    patch
        ``(i, *k)``.
    axes
        Kernel axes that lie within a slice, beside the input channels.
    """

    moment: Float[Tensor, "g p p"]
    patch: tuple[int, ...]
    axes: tuple[int, ...]

    def times(self, rows: Float[Tensor, "g m n"]) -> Float[Tensor, "g m n"]:
        g, m, n = rows.shape
        rest = [a for a in range(len(self.patch) - 1) if a not in self.axes]
        order = [0, 1, *(3 + a for a in rest), 2, *(3 + a for a in self.axes)]
        opened = rows.reshape(g, m, *self.patch).permute(order)
        seen = opened.reshape(g, -1, self.moment.shape[-1]) @ self.moment
        back = [order.index(d) for d in range(len(order))]
        return seen.reshape(opened.shape).permute(back).reshape(g, m, n)

    def diagonal(self) -> Float[Tensor, "g n"]:
        g = self.moment.shape[0]
        channels, *kernel = self.patch
        inside = [channels, *(k if a in self.axes else 1 for a, k in enumerate(kernel))]
        diagonal = self.moment.diagonal(dim1=-2, dim2=-1).reshape(g, *inside)
        return diagonal.expand(g, *self.patch).reshape(g, math.prod(self.patch))


@dataclass(frozen=True, eq=False)
class Rows(Metric):
    """A moment given by rows: ``B^T B`` and the same ``level`` in every direction.

    Attributes
    ----------
    rows
        ``B [g, m, n]``.
    level
        ``[g]``.
    """

    rows: Float[Tensor, "g m n"]
    level: Float[Tensor, " g"]

    def times(self, rows: Float[Tensor, "g m n"]) -> Float[Tensor, "g m n"]:
        return (rows @ self.rows.mT) @ self.rows + rows * self.level.reshape(-1, 1, 1)

    def diagonal(self) -> Float[Tensor, "g n"]:
        return self.rows.square().sum(1) + self.level.unsqueeze(1)


@dataclass(frozen=True, eq=False)
class Plain(Metric):
    """The identity: errors of weights."""

    groups: int
    features: int
    device: torch.device

    def times(self, rows: Float[Tensor, "g m n"]) -> Float[Tensor, "g m n"]:
        return rows

    def diagonal(self) -> Float[Tensor, "g n"]:
        return torch.ones(self.groups, self.features, dtype=torch.float64, device=self.device)
