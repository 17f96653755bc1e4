"""What few samples tell, beside what is known from calibration."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg.moments import Moments


def pooled(now: Moments, known: Moments, share: float) -> Moments:
    """Moments of samples of which this share is as ``now``, and the others as they are ``known``."""
    if share >= 1 or not known.count:
        return now
    # So many observations that the ridge is that of what is known.
    total = max(known.count, 2)
    count = min(max(round(share * total), 1), total - 1)
    result = now.standing_for(count)
    result.merge(known.standing_for(total - count))
    return result


def larger(now: Moments, known: Moments) -> float:
    """How many times as large vectors are as those that are known, in their own directions; at least 1.

    ``tr(M M) / tr(M C)``, with ``M`` second moments about the known mean and ``C`` the known covariance, both in units
    of the known spread. It is 1 for vectors of one kind, a square for those times a number, and up to ``d`` for those
    that lie on one line. Entries that never changed tell nothing.
    """
    spread = known.variance.sqrt()
    units = torch.where(spread > 0, 1 / spread, 0.0).unsqueeze(1)
    away = (now.mean - known.mean).unsqueeze(1)
    moment = (now.covariance + away.mT * away) * units.mT * units
    beside = (moment * known.covariance * units.mT * units).sum()
    return max(float(moment.square().sum() / beside.clamp_min(1e-300)), 1.0)


def larger_apart(mean: Float[Tensor, "g n"], variance: Float[Tensor, "g n"], known: Moments) -> float:
    """The same of entries one by one, where nothing is known of their products."""
    spread = known.variance
    times = torch.where(spread > 0, (variance + (mean - known.mean).square()) / spread, 0.0)
    return max(float(times.square().sum() / times.sum().clamp_min(1e-300)), 1.0)


def discounted(share: float, times: float) -> float:
    """The share of samples that are so many times as large as the others.

    Errors of theirs are as much larger, and where they are of another kind they tell less of the others: each counts
    by the square.
    """
    return share / (share + (1 - share) * times * times)
