"""Second moments of what a layer sees, as operators: all that fitting a weight to responses asks of the data.

The error of a weight difference ``R [g, o, n]`` is ``tr(R C R^T)`` with the second moment ``C`` of the patches
``(i, *k)``. Where the patches are too long for ``C``, the average moment of their slices or a few rows stand for it,
and without data the identity.

Low rank in a split kernel (:mod:`spectrim.linalg.response`) sees a patch in coordinates ``(p, q)``: ``p`` is what the
first factor sees together, ``q`` counts the slices. It asks a :class:`SlicedMetric`, which has an unfolding, about
matrices ``M [g, p, (o, q)]``; any metric gives one (:meth:`Metric.sliced`). So no solver knows what it is fitted in.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import eigen
from spectrim.linalg.eigen import Eigen
from spectrim.linalg.unfold import Unfolding, fold, slice_rows, unfold

_M = TypeVar("_M", bound="Metric")

# Of a kernel that is not split.
WHOLE = Unfolding("channel", ())


class Metric(ABC):
    """A symmetric positive semidefinite ``C`` over patches ``(i, *k)``, one a group."""

    @abstractmethod
    def times(self, rows: Float[Tensor, "g m n"]) -> Float[Tensor, "g m n"]:
        """``rows @ C``."""

    @abstractmethod
    def diagonal(self) -> Float[Tensor, "g n"]:
        """Mean square of every input of the patch."""

    @abstractmethod
    def eigen(self, units: Float[Tensor, "g n"]) -> Eigen:
        """The metric, or what comes closest to it, by its eigenvectors, with inputs measured in these units."""

    @abstractmethod
    def sliced(self, how: Unfolding) -> SlicedMetric:
        """The metric, or what comes closest to it, for the slices of an unfolding."""

    @property
    def dtype(self) -> torch.dtype:
        """In which it is exact enough to fit weights."""
        return self.diagonal().dtype

    def single(self) -> Metric:
        """The same in float32, where it holds numbers."""
        return dataclasses.replace(self, **{name: value.float() for name, value in _tensors(self).items()})  # type: ignore[type-var]

    def energy(self, rows: Float[Tensor, "g m n"]) -> Tensor:
        """``tr(rows C rows^T)``, summed over the groups."""
        return (rows * self.times(rows)).sum()


class SlicedMetric(Metric):
    """A metric that knows how an unfolding shares the patch out, as ``(p, q)``.

    A first factor ``left [g, p, r]`` maps every slice alike: it stands for ``G = left (x) I`` with columns ``(r, q)``.

    Attributes
    ----------
    patch
        ``(i, *k)``; empty for a kernel that is not split.
    how
        The unfolding.
    """

    patch: tuple[int, ...]
    how: Unfolding

    @property
    @abstractmethod
    def average(self) -> Float[Tensor, "g p p"]:
        """Mean over the slices, ``mean_q C[(., q), (., q)]``."""

    @property
    @abstractmethod
    def separates(self) -> bool:
        """Whether the error of a product is that in the average slice, so that projections are optimal."""

    @abstractmethod
    def weigh(self, rows: Float[Tensor, "g p m"]) -> Float[Tensor, "g p m"]:
        """The average slice times ``rows``."""

    @abstractmethod
    def seen(self, matrix: Float[Tensor, "g p c"]) -> Float[Tensor, "g p q o"]:
        """``C M``: moment between what the layer sees and what it answers."""

    @abstractmethod
    def normal(
        self,
        matrix: Float[Tensor, "g p c"],
        left: Float[Tensor, "g p r"],
        seen: Float[Tensor, "g p q o"] | None = None,
    ) -> tuple[Full, Tensor]:
        """Normal equations of a second factor: ``G^T C G`` over ``(r, q)`` and ``G^T C M`` ``[g, (r, q), o]``.

        Where it is the same for every ``q``, and nothing between two of them, the first is over ``r`` alone. Of many
        first factors the second of the two is cheap where ``C M`` (:meth:`seen`) is known.
        """

    def second_target(self, seen: Float[Tensor, "g p q o"], left: Float[Tensor, "g p r"]) -> Float[Tensor, "g rq o"]:
        """``G^T C M`` from :meth:`seen`."""
        return torch.einsum("gpa,gpqo->gaqo", left, seen).flatten(1, 2)

    def first_seen(self, seen: Float[Tensor, "g p q o"]) -> Callable[[Tensor], Float[Tensor, "g p r"]]:
        """:meth:`first_target` from :meth:`seen`."""
        return lambda right: torch.einsum("gpqo,gaoq->gpa", seen, self.open(right))

    @abstractmethod
    def pairs(self, left: Float[Tensor, "g p r"], right: Float[Tensor, "g r c"]) -> Float[Tensor, "r r"]:
        """Inner products of the components of a product ``left @ right``, summed over the groups."""

    @abstractmethod
    def first_target(self, matrix: Float[Tensor, "g p c"]) -> Callable[[Tensor], Float[Tensor, "g p r"]]:
        """``C M`` on the side of the first factor, as a function of the second one ``[g, r, c]``."""

    @abstractmethod
    def first_operator(self, right: Float[Tensor, "g r c"]) -> Callable[[Tensor], Float[Tensor, "g p r"]]:
        """``C (left @ right)`` on the side of the first factor, as a function of it, ``[g, p, r]``."""

    @abstractmethod
    def beside(self, left: Float[Tensor, "g p r"]) -> Metric:
        """The moment of what cannot be predicted from what a first factor lets through."""

    @property
    def slices(self) -> int:
        """Values of ``q``."""
        return self.how.sizes(self.patch[1:])[1]

    @property
    def averaged(self) -> Slices:
        """The average slice as a metric of its own, of one slice."""
        return Slices(self.average, self.average.shape[1:2])

    def open(self, matrix: Float[Tensor, "g p c"]) -> Float[Tensor, "g p o q"]:
        """A matrix with its columns ``(o, q)`` apart, in float64."""
        g, p, columns = matrix.shape
        return matrix.double().reshape(g, p, columns // self.slices, self.slices)

    def unfold(self, weight: Float[Tensor, "g o n"]) -> Float[Tensor, "g p c"]:
        """A weight over whole patches as a matrix."""
        return unfold(weight.reshape(*weight.shape[:2], *self.patch), self.how)

    def fold(self, matrix: Float[Tensor, "g p c"]) -> Float[Tensor, "g o n"]:
        """Inverse of :meth:`unfold`."""
        outputs = matrix.shape[2] // self.slices
        return fold(matrix, self.how, (outputs, *self.patch)).flatten(2)

    def spread(self, values: Float[Tensor, "g p"]) -> Float[Tensor, "g n"]:
        """What every slice has, over the whole patch."""
        return self.fold(values.unsqueeze(2).expand(-1, -1, self.slices)).squeeze(1)


@dataclass(frozen=True, eq=False)
class Full(SlicedMetric):
    """The moment of whole patches, ``[g, n, n]``."""

    moment: Float[Tensor, "g n n"]
    patch: tuple[int, ...] = ()
    how: Unfolding = WHOLE

    def times(self, rows: Float[Tensor, "g m n"]) -> Float[Tensor, "g m n"]:
        return rows @ self.moment

    def diagonal(self) -> Float[Tensor, "g n"]:
        return self.moment.diagonal(dim1=-2, dim2=-1)

    def eigen(self, units: Float[Tensor, "g n"]) -> Eigen:
        return Eigen(*eigen.of_moment(self.moment / units.unsqueeze(1) / units.unsqueeze(2)))

    def sliced(self, how: Unfolding) -> Full:
        return dataclasses.replace(self, how=how)

    def solve(self, vectors: Float[Tensor, "g n m"]) -> Float[Tensor, "g n m"]:
        """``C^{-1} vectors``."""
        return torch.cholesky_solve(vectors, cholesky(self.moment))

    @cached_property
    def opened(self) -> Float[Tensor, "g p q p q"]:
        """The moment in the coordinates ``(p, q)``."""
        g, n, _ = self.moment.shape
        shape = self.patch or (n,)
        rest = [a for a in range(len(shape) - 1) if a not in self.how.axes]
        order = [0, *(1 + a for a in self.how.axes), *(1 + a for a in rest)]
        moved = self.moment.reshape(g, *shape, *shape)
        moved = moved.permute(0, *(1 + d for d in order), *(1 + len(shape) + d for d in order))
        return moved.reshape(g, *(n // self.slices, self.slices) * 2)

    @cached_property
    def average(self) -> Float[Tensor, "g p p"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.opened.diagonal(dim1=2, dim2=4).mean(-1)

    @property
    def separates(self) -> bool:
        return self.slices == 1

    def weigh(self, rows: Float[Tensor, "g p m"]) -> Float[Tensor, "g p m"]:
        return self.average @ rows

    def seen(self, matrix: Float[Tensor, "g p c"]) -> Float[Tensor, "g p q o"]:
        return torch.einsum("gpqts,gtos->gpqo", self.opened, self.open(matrix))

    def normal(
        self, matrix: Float[Tensor, "g p c"], left: Float[Tensor, "g p r"], seen: Tensor | None = None
    ) -> tuple[Full, Tensor]:
        # The metric is contracted over its first axis, as it lies in memory; the other order would copy it.
        half = torch.einsum("gpa,gpqts->gaqts", left, self.opened)
        gram = torch.einsum("gaqts,gtb->gaqbs", half, left)
        width = gram.shape[1] * self.slices
        if seen is None:
            cross = torch.einsum("gaqts,gtos->gaqo", half, self.open(matrix)).flatten(1, 2)
        else:
            cross = self.second_target(seen, left)
        return Full(gram.reshape(-1, width, width)), cross

    def pairs(self, left: Float[Tensor, "g p r"], right: Float[Tensor, "g r c"]) -> Float[Tensor, "r r"]:
        # Both moments of a block of components at a time: all at once they would take more room than the metric.
        rank, slices = left.shape[2], self.slices
        rows = self.open(right).transpose(2, 3).flatten(1, 2)
        result = left.new_zeros(rank, rank)
        for block in torch.arange(rank, device=left.device).split(max(1, -(-rank // 4))):
            a, b = int(block[0]), int(block[-1]) + 1
            half = torch.einsum("gpa,gpqts->gaqts", left[..., a:b], self.opened)
            first = torch.einsum("gaqts,gtb->gaqbs", half, left)
            other = (rows[:, a * slices : b * slices] @ rows.mT).reshape(first.shape)
            result[a:b] = first.mul_(other).sum(dim=(0, 2, 4))
        return result

    def first_target(self, matrix: Float[Tensor, "g p c"]) -> Callable[[Tensor], Float[Tensor, "g p r"]]:
        return self.first_seen(self.seen(matrix))

    def first_operator(self, right: Float[Tensor, "g r c"]) -> Callable[[Tensor], Float[Tensor, "g p r"]]:
        second = self.open(right)
        outer = torch.einsum("gaoq,gbos->gaqbs", second, second)

        def image(left: Tensor) -> Tensor:
            # The metric is symmetric: as in :meth:`normal`, over its first axis.
            half = torch.einsum("gtspq,gtb->gbspq", self.opened, left)
            return torch.einsum("gbspq,gaqbs->gpa", half, outer)

        return image

    def beside(self, left: Float[Tensor, "g p r"]) -> Full:
        g, p, _ = left.shape
        eye = torch.eye(self.slices, dtype=left.dtype, device=left.device)
        # All that the second factor can see, as a map from patches.
        views = torch.einsum("gpa,qs->gpasq", left, eye).reshape(g, p, -1)
        return dataclasses.replace(self, moment=_unpredicted(self.moment, self.fold(views).mT.contiguous()))


class _Alike(SlicedMetric):
    """One moment for every slice, and no correlation between slices."""

    @property
    def separates(self) -> bool:
        return True

    def seen(self, matrix: Float[Tensor, "g p c"]) -> Float[Tensor, "g p q o"]:
        return self.open(self.weigh(matrix.double())).transpose(2, 3)

    def normal(
        self, matrix: Float[Tensor, "g p c"], left: Float[Tensor, "g p r"], seen: Tensor | None = None
    ) -> tuple[Full, Tensor]:
        half = self.weigh(left)
        if seen is None:
            cross = torch.einsum("gpa,gpoq->gaqo", half, self.open(matrix)).flatten(1, 2)
        else:
            cross = self.second_target(seen, left)
        return Full(left.mT @ half), cross

    def pairs(self, left: Float[Tensor, "g p r"], right: Float[Tensor, "g r c"]) -> Float[Tensor, "r r"]:
        return ((self.weigh(left).mT @ left) * (right.double() @ right.double().mT)).sum(0)

    def first_target(self, matrix: Float[Tensor, "g p c"]) -> Callable[[Tensor], Float[Tensor, "g p r"]]:
        return lambda right: self.weigh(matrix.double() @ right.mT)

    def first_operator(self, right: Float[Tensor, "g r c"]) -> Callable[[Tensor], Float[Tensor, "g p r"]]:
        outer = right @ right.mT
        return lambda left: self.weigh(left) @ outer


@dataclass(frozen=True, eq=False)
class Slices(_Alike):
    """One moment for every slice, and no correlation between slices.

    Attributes
    ----------
    moment
        ``[g, p, p]``, the average over the slices.
    """

    moment: Float[Tensor, "g p p"]
    patch: tuple[int, ...]
    how: Unfolding = WHOLE

    def times(self, rows: Float[Tensor, "g m n"]) -> Float[Tensor, "g m n"]:
        opened = self._cut(rows)
        return self._joined((opened.flatten(1, 2) @ self.moment).reshape(opened.shape))

    def _order(self) -> list[int]:
        """Axes ``(g, m, *rest, i, *seen)`` of rows ``(g, m, i, *k)``."""
        rest = [a for a in range(len(self.patch) - 1) if a not in self.how.axes]
        return [0, 1, *(3 + a for a in rest), 2, *(3 + a for a in self.how.axes)]

    def _cut(self, rows: Float[Tensor, "g m n"]) -> Float[Tensor, "g m q p"]:
        g, m, _ = rows.shape
        return rows.reshape(g, m, *self.patch).permute(self._order()).reshape(g, m, -1, self.moment.shape[-1])

    def _joined(self, opened: Float[Tensor, "g m q p"]) -> Float[Tensor, "g m n"]:
        g, m, _, _ = opened.shape
        order = self._order()
        back = [order.index(d) for d in range(len(order))]
        sizes = (g, m, *self.patch)
        return opened.reshape([sizes[d] for d in order]).permute(back).reshape(g, m, -1)

    def eigen(self, units: Float[Tensor, "g n"]) -> Eigen:
        # One unit for all slices, which the mean of theirs is.
        each = self._cut(units.unsqueeze(1)).mean((1, 2))
        return Eigen(*eigen.of_moment(self.moment / each.unsqueeze(1) / each.unsqueeze(2)), self._cut, self._joined)

    def diagonal(self) -> Float[Tensor, "g n"]:
        return self.spread(self.moment.diagonal(dim1=-2, dim2=-1))

    def sliced(self, how: Unfolding) -> Slices:
        if how.axes != self.how.axes:
            raise ValueError(f"the moment of slices of {self.how.name!r} says nothing of those of {how.name!r}")
        return self

    @property
    def average(self) -> Float[Tensor, "g p p"]:
        return self.moment

    def weigh(self, rows: Float[Tensor, "g p m"]) -> Float[Tensor, "g p m"]:
        return self.moment @ rows

    def beside(self, left: Float[Tensor, "g p r"]) -> Slices:
        return dataclasses.replace(self, moment=_unpredicted(self.moment, left))


@dataclass(frozen=True, eq=False)
class Rows(Metric):
    """A moment given by rows: ``B^T B`` and a ``level`` of each entry of the patch.

    Attributes
    ----------
    rows
        ``B [g, m, n]``.
    level
        ``[g, n]``, added to the diagonal.
    patch
        ``(i, *k)``.
    """

    rows: Float[Tensor, "g m n"]
    level: Float[Tensor, "g n"]
    patch: tuple[int, ...] = ()

    def times(self, rows: Float[Tensor, "g m n"]) -> Float[Tensor, "g m n"]:
        return ((rows @ self.rows.mT) @ self.rows).addcmul_(rows, self.level.unsqueeze(1))

    def diagonal(self) -> Float[Tensor, "g n"]:
        return self.rows.square().sum(1) + self.level

    def eigen(self, units: Float[Tensor, "g n"]) -> Eigen:
        return Eigen(*eigen.of_rows(self.rows / units.unsqueeze(1), self.level / units.square()))

    def sliced(self, how: Unfolding) -> Slices:
        g, m, _ = self.rows.shape
        rows = slice_rows(self.rows.reshape(g, m, *self.patch), how).double()
        moment = rows.mT @ rows / (rows.shape[1] // m)
        level = slice_rows(self.level.double().reshape(g, 1, *self.patch), how).mean(1)
        moment.diagonal(dim1=-2, dim2=-1).add_(level)
        return Slices(moment, self.patch, how)


@dataclass(frozen=True, eq=False)
class Plain(_Alike):
    """The identity: errors of weights."""

    groups: int
    patch: tuple[int, ...]
    device: torch.device
    how: Unfolding = WHOLE

    def times(self, rows: Float[Tensor, "g m n"]) -> Float[Tensor, "g m n"]:
        return rows

    def diagonal(self) -> Float[Tensor, "g n"]:
        return torch.ones(self.groups, math.prod(self.patch), dtype=torch.float64, device=self.device)

    def eigen(self, units: Float[Tensor, "g n"]) -> Eigen:
        none = units.new_zeros(self.groups, 0)
        return Eigen(none, units.unsqueeze(2)[:, :, :0], units.square().mean(1).reciprocal())

    def sliced(self, how: Unfolding) -> Plain:
        return dataclasses.replace(self, how=how)

    @property
    def average(self) -> Float[Tensor, "g p p"]:
        rows = self.patch[0] * self.how.sizes(self.patch[1:])[0]
        return torch.eye(rows, dtype=torch.float64, device=self.device).expand(self.groups, -1, -1)

    def weigh(self, rows: Float[Tensor, "g p m"]) -> Float[Tensor, "g p m"]:
        return rows

    def beside(self, left: Float[Tensor, "g p r"]) -> Slices:
        return Slices(self.average, self.patch, self.how).beside(left)


def mean(metrics: Sequence[_M]) -> _M:
    """The average of metrics of one kind and shape."""
    first = metrics[0]
    names = _tensors(first)
    return dataclasses.replace(first, **{n: torch.stack([getattr(m, n) for m in metrics]).mean(0) for n in names})  # type: ignore[type-var]


def _tensors(metric: Metric) -> dict[str, Tensor]:
    values = {field.name: getattr(metric, field.name) for field in dataclasses.fields(metric)}  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def cholesky(matrix: Float[Tensor, "g n n"]) -> Float[Tensor, "g n n"]:
    """Cholesky factor of a positive semidefinite matrix, with the smallest jitter that succeeds.

    The jitter is a share of every entry's own diagonal, so that their units do not matter. Entries that are nothing but
    rounding, whose products with others are larger than both allow, count as uncorrelated; where all of it is rounding,
    the diagonal is raised until it outweighs the rest.

    Raises
    ------
    ValueError
        If the matrix holds NaN or Inf.
    """
    for mend in (torch.clone, _without_rounding, _dominant):
        whole = mend(matrix)
        scale = whole.diagonal(dim1=-2, dim2=-1)
        # Where there is nothing, anything may be divided by.
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        for jitter in (1e-12, 1e-10, 1e-8, 1e-6, 1e-4):
            raised = whole.clone()
            raised.diagonal(dim1=-2, dim2=-1).add_(scale, alpha=jitter)
            factor, info = torch.linalg.cholesky_ex(raised)
            if not bool(info.any()):
                return factor
    raise ValueError("the second moment of a layer's responses is not positive semidefinite; it holds NaN or Inf")


def _without_rounding(matrix: Float[Tensor, "g n n"]) -> Float[Tensor, "g n n"]:
    """The matrix with zeros for the products of entries that cannot be what they say."""
    variance = matrix.diagonal(dim1=-2, dim2=-1)
    most = variance.unsqueeze(-1) * variance.unsqueeze(-2)
    wrong = matrix.square() > most * (1 + 1e-3)
    # Of two entries whose product is too large the smaller one is rounding.
    smaller = (variance.unsqueeze(-1) <= variance.unsqueeze(-2)) & wrong
    noise = smaller.any(-1)
    kept = ~(noise.unsqueeze(-1) | noise.unsqueeze(-2))
    return torch.where(kept, matrix, torch.diag_embed(variance))


def _dominant(matrix: Float[Tensor, "g n n"]) -> Float[Tensor, "g n n"]:
    """The matrix with a diagonal that is at least the sum of what is beside it, in units of the entries."""
    clean = _without_rounding(matrix)
    spread = clean.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    beside = (clean.abs() / (spread.unsqueeze(-1) * spread.unsqueeze(-2))).sum(-1)
    raised = clean.clone()
    raised.diagonal(dim1=-2, dim2=-1).add_(beside * spread.square())
    return raised


def _unpredicted(moment: Float[Tensor, "g n n"], views: Float[Tensor, "g n m"]) -> Float[Tensor, "g n n"]:
    """The moment of what cannot be predicted from ``views^T x``."""
    seen = moment @ views
    half = torch.linalg.solve_triangular(cholesky(views.mT @ seen), seen.mT, upper=False)
    return moment - half.mT @ half
