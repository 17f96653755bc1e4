"""Low rank of one matrix that is read twice: its rows count in two metrics, each with weights of the rows of its own.

The problem is ``min sum_i d_i (p_i A + q_i C) d_i^T`` over the rank-``r`` products ``U V``, ``d_i`` the rows of
``W - U V``. A table that is looked up counts its rows as often as they are asked for (``p``), in the metric of what
reads them (``A``); the same table as the weight of a linear layer counts them as outputs (``q``), in the second moment
``C`` of its inputs. One metric alone has a closed solution (:mod:`spectrim.linalg.lowrank`). With two, each factor has
one for the other: both metrics are made diagonal at once, and what is left is a division.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import lowrank, symmetric

# Of its mean diagonal, added to a sum of metrics, which may have directions that nothing reads.
_RIDGE = 1e-9


@dataclass(frozen=True, eq=False)
class View:
    """How one reader sees the matrix."""

    rows: Float[Tensor, " v"]  # weights of the rows
    metric: Float[Tensor, "n n"]  # symmetric positive semidefinite, of the columns

    def energy(self, matrix: Float[Tensor, "v n"]) -> Tensor:
        """``sum_i w_i m_i M m_i^T``."""
        return ((matrix.mT * self.rows) @ matrix * self.metric).sum()


@dataclass(frozen=True, eq=False)
class TwiceRead:
    """A matrix with two readers."""

    matrix: Float[Tensor, "v n"]  # ``W`` in float64
    readings: tuple[View, View]  # two

    def energy(self) -> float:
        """What both readers read together."""
        return float(sum(each.energy(self.matrix) for each in self.readings))

    def lost(self, rows: Float[Tensor, "v r"], columns: Float[Tensor, "r n"]) -> float:
        """What both readers lose by a product."""
        missing = self.matrix - rows @ columns
        return float(sum(each.energy(missing) for each in self.readings))

    def start(self) -> Float[Tensor, "n n"]:
        """Second factors to begin with, the first ``r`` rows for a rank ``r``.

        Those of the closed solution of a third metric: both added up, each with the mean weight of its rows. Rows are
        weighed by both readers, each by its part of that metric.
        """
        one, two = self.readings
        metric = one.rows.mean() * one.metric + two.rows.mean() * two.metric
        root = lowrank.root(_firm(metric)[None])[0]
        sizes = [each.metric.diagonal().sum() for each in self.readings]
        weights = sum(size * each.rows for size, each in zip(sizes, self.readings, strict=True))
        whitened = self.matrix @ root.mT
        gram = (whitened.mT * weights) @ whitened
        _, basis = symmetric.eigh((gram + gram.mT) / 2)
        return basis.flip(-1).mT @ root

    def rows(self, columns: Float[Tensor, "r n"]) -> Float[Tensor, "v r"]:
        """The best first factor for a second one: each row by itself."""
        one, two = self.readings
        turn, share = _diagonal(columns @ one.metric @ columns.mT, columns @ two.metric @ columns.mT)
        parts = [self.matrix @ (each.metric @ columns.mT @ turn) for each in self.readings]
        weighed = one.rows.unsqueeze(1) * parts[0] + two.rows.unsqueeze(1) * parts[1]
        size = one.rows.unsqueeze(1) * share + two.rows.unsqueeze(1) * (1 - share)
        # Nobody reads a row without weight, which stays as near as those that are read.
        read = size > _RIDGE * size.mean()
        return torch.where(read, weighed / size.clamp_min(1e-300), parts[0] + parts[1]) @ turn.mT

    def columns(self, rows: Float[Tensor, "v r"]) -> Float[Tensor, "r n"]:
        """The best second factor for a first one."""
        one, two = self.readings
        kept = [(rows.mT * each.rows) @ rows for each in self.readings]
        wanted = sum((rows.mT * each.rows) @ self.matrix @ each.metric for each in self.readings)
        left, mine = _diagonal(*kept)
        right, theirs = _diagonal(one.metric, two.metric)
        size = mine.unsqueeze(1) * theirs + (1 - mine).unsqueeze(1) * (1 - theirs)
        solved = (left.mT @ wanted @ right) / size.clamp_min(_RIDGE)
        return left @ solved @ right.mT

    def alternated(self, columns: Float[Tensor, "r n"], sweeps: int) -> tuple[Tensor, Tensor]:
        """Both factors, from a second one, each solved for the other by turns."""
        rows = self.rows(columns)
        for _ in range(sweeps):
            columns = self.columns(rows)
            rows = self.rows(columns)
        return rows, columns


def _diagonal(one: Float[Tensor, "n n"], two: Float[Tensor, "n n"]) -> tuple[Tensor, Float[Tensor, " n"]]:
    """``X`` and ``s`` with ``X^T one X = diag(s)`` and ``X^T two X = diag(1 - s)``: both are diagonal at once."""
    root = lowrank.root(_firm(one + two)[None])[0]
    inner = torch.linalg.solve_triangular(root.mT, one, upper=False)
    inner = torch.linalg.solve_triangular(root.mT, inner.mT, upper=False)
    values, vectors = symmetric.eigh((inner + inner.mT) / 2)
    return torch.linalg.solve_triangular(root, vectors, upper=True), values.clamp(0, 1)


def _firm(metric: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """With a little in every direction."""
    size = metric.diagonal().mean().clamp_min(1e-300)
    return metric + _RIDGE * size * torch.eye(len(metric)).to(metric)
