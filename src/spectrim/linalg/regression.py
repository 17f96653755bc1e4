"""Least squares that start from a known weight and go only as far as samples that were not fitted agree.

A layer with weight ``W`` is to answer ``y`` where it is now given ``x``. Least squares on samples would give

    W* = W + (D - W C) C^{-1},        C = cov(x),  D = cov(y, x)

but what is seen too seldom is fitted to noise. Three things keep it from that:

- Every input is held at its weight by a ridge in units of its own variance, in proportion to ``d / n_j``: inputs to be
  told apart, over the number of rows that really tell of this one, ``n_j = (sum x^2)^2 / sum x^4``. It is ``n / 3`` for
  a normal input and 1 for one that is active in a single row. Neither ``n_j`` nor the ridge depends on units.
- How strong the ridge is, and what share of the step is taken, is decided on samples that are not fitted: the step that
  gains most by one standard error below the mean over samples (the rule of Breiman et al. 1984), or none.
- No input's weights change by more than a few times their own size.

What is gained over all outputs, and how large an input's weights are, is told in units of the outputs that are given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spectrim.linalg.moments import Paired, ridge
from spectrim.linalg.sketch import Sketch, damped_solution

# Strengths of the ridge that are tried, and shares of the step.
STRENGTHS = (1.0, 10.0)
SHARES = (1.0, 0.5, 0.25)
# Size of the step of an input's weights, at most, in sizes of these weights.
MOST = 4.0


class Regression(ABC):
    """Inputs ``x [g, d]`` and wanted answers ``y [g, o]``, around their means, of ``count`` rows."""

    count: int

    @abstractmethod
    def missing(self, weight: Float[Tensor, "g o d"]) -> Tensor:
        """What a weight misses of the answers, as far as it depends on the inputs."""

    @abstractmethod
    def step(self, missing: Tensor, damping: Float[Tensor, "g d"]) -> Float[Tensor, "g o d"]:
        """The change of a weight that makes up for it, each input damped by a share of its own variance."""


@dataclass(frozen=True, eq=False)
class Covariances(Regression):
    """By second moments."""

    inputs: Float[Tensor, "g d d"]  # ``C [g, d, d]``
    cross: Float[Tensor, "g o d"]  # ``D [g, o, d]``
    count: int

    @classmethod
    def of(cls, joint: Paired) -> Covariances:
        """From moments of ``[x, y]``."""
        covariance = joint.covariance
        return cls(covariance[:, : joint.inner], covariance[:, joint.inner :], joint.count)

    def missing(self, weight: Float[Tensor, "g o d"]) -> Float[Tensor, "g o d"]:
        return self.cross - weight.double() @ self.inputs

    def step(self, missing: Tensor, damping: Float[Tensor, "g d"]) -> Float[Tensor, "g o d"]:
        # In units of each input's own spread the matrix is a correlation.
        spread = self.inputs.diagonal(dim1=-2, dim2=-1).sqrt()
        spread = torch.where(spread > 0, spread, 1.0).unsqueeze(1)
        damped = self.inputs / (spread * spread.mT)
        damped.diagonal(dim1=-2, dim2=-1).add_(damping)
        return torch.cholesky_solve((missing / spread).mT, torch.linalg.cholesky(damped)).mT / spread


@dataclass(frozen=True, eq=False)
class Equations(Regression):
    """By a few rows, for inputs too many for their second moment; there are fewer equations than inputs."""

    inputs: Float[Tensor, "g m d"]  # ``[g, m, d]``, with ``inputs^T inputs`` about the covariance
    answers: Float[Tensor, "g m o"]  # ``[g, m, o]``
    level: Float[Tensor, "g d"]  # what every input's variance has beside the rows
    count: int

    @classmethod
    def of(cls, joint: Sketch, features: int) -> Equations:
        """From a sketch of ``[x, y]``."""
        rows = joint.rows / max(joint.count, 1) ** 0.5
        return cls(rows[..., :features], rows[..., features:], joint.level()[:, :features], joint.count)

    def missing(self, weight: Float[Tensor, "g o d"]) -> Float[Tensor, "g m o"]:
        return self.answers - self.inputs.double() @ weight.double().mT

    def step(self, missing: Tensor, damping: Float[Tensor, "g d"]) -> Float[Tensor, "g o d"]:
        variance = self.inputs.double().square().sum(1) + self.level
        return damped_solution(self.inputs, missing, variance * damping)


@dataclass(frozen=True, eq=False)
class Unseen:
    """Rows of samples that were held out, around the means of the fitted ones."""

    # ``[g, n, d]`` and ``[g, n, o]``.
    inputs: Float[Tensor, "g n d"]
    answers: Float[Tensor, "g n o"]
    sample: Int64[Tensor, " n"]  # ``[n]``, the sample that each row belongs to

    def gains(self, missing: Float[Tensor, "g n o"], step: Float[Tensor, "g o d"]) -> Float[Tensor, " shares"]:
        """What each of the shares of a step gains a sample, one standard error below the mean; 0 if that is unknown."""
        moved = self.inputs @ step.mT
        _, place = self.sample.unique(return_inverse=True)
        samples = int(place.max()) + 1
        if samples < 2:
            return torch.zeros(len(SHARES))
        agreeing, size = (
            moved.new_zeros(samples).index_add(0, place.to(moved.device), rows.sum(dim=(0, 2)))
            for rows in (moved * missing, moved.square())
        )
        shares = torch.tensor(SHARES, dtype=moved.dtype, device=moved.device).unsqueeze(1)
        each = 2 * shares * agreeing - shares.square() * size
        return each.mean(1) - each.std(1) / samples**0.5


def scarcity(count: int, squares: Float[Tensor, "g d"], fourths: Float[Tensor, "g d"]) -> Float[Tensor, "g d"]:
    """``d / n_j``: how few rows tell of an input, from its sums of squares and fourth powers around the mean."""
    telling = torch.where(fourths > 0, squares.square() / fourths.clamp_min(1e-300), torch.full_like(squares, count))
    return squares.shape[1] / telling.clamp_min(1.0)


def towards(
    weight: Float[Tensor, "g o d"],
    fitted: Regression,
    scarce: Float[Tensor, "g d"],
    unseen: Unseen | None,
    units: Float[Tensor, "g o"],
) -> Float[Tensor, "g o d"]:
    """The weight that answers best for the inputs it is given, as far as samples that were held out agree.

    Parameters
    ----------
    weight
        To start from.
    fitted
        What is fitted.
    scarce
        From :func:`scarcity`.
    unseen
        Samples that were held out; None if there are none: then the whole step is taken, with a little ridge.
    units
        What answers are multiplied by where outputs are added up.

    Returns
    -------
    Tensor
        In float64. On the samples that were held out it is never worse than ``weight``.
    """
    missing = fitted.missing(weight)
    if unseen is None:
        return weight.double() + fitted.step(missing, torch.full_like(scarce, ridge(fitted.count, weight.shape[2])))
    each = units.to(unseen.inputs).unsqueeze(1)
    left = (unseen.answers - unseen.inputs @ weight.to(unseen.inputs.dtype).mT) * each
    best, most = torch.zeros_like(weight, dtype=torch.float64), 0.0
    for strength in STRENGTHS:
        step = _bounded(fitted.step(missing, strength * scarce + 1e-6), weight, units)
        gains = unseen.gains(left, (step * units.unsqueeze(2)).to(unseen.inputs.dtype))
        gain, place = (value.item() for value in gains.max(0))
        if gain > most:
            best, most = SHARES[int(place)] * step, gain
    return weight.double() + best


def _bounded(
    step: Float[Tensor, "g o d"], weight: Float[Tensor, "g o d"], units: Float[Tensor, "g o"]
) -> Float[Tensor, "g o d"]:
    """A step that changes no input's weights by more than :data:`MOST` times their own size.

    So what an input does beyond all that was seen of it has a bound.
    """
    most, size = ((each * units.unsqueeze(2)).norm(dim=1, keepdim=True) for each in (weight.double(), step))
    return step * (MOST * most / size.clamp_min(1e-300)).clamp_max(1.0)
