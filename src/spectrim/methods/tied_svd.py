"""Low rank of a weight that a table and a linear layer have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from spectrim.cost.counted import rank_multiple
from spectrim.linalg import lowrank
from spectrim.linalg.moments import shrunk
from spectrim.linalg.two_metrics import TwiceRead, View
from spectrim.linalg.unfold import unfolding
from spectrim.methods.base import OUTPUT_ENERGY, WEIGHT_ENERGY, WEIGHTED_ENERGY, Curve, Method, check_least
from spectrim.network.choices import Choice, TiedChoice
from spectrim.network.factors import TiedPair
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Site, Tied
from spectrim.network.structure import Apart, Pair

# Ranks of a curve that are fitted.
_KNOTS = 6
_HOW = unfolding((), "channel")


@dataclass(frozen=True)
class TiedSVD(Method):
    """Solve ``min sum_i d_i (p_i A + q_i C) d_i^T`` over ``W - U V`` with rows ``d_i``: both readers of one weight.

    The table loses ``d_i`` where row ``i`` is looked up, ``p_i`` as often as the data ask for it, in the metric ``A``
    of the gradients that reach its answers (the identity without a sensitivity). The head loses ``d_i x`` at output
    ``i``: ``C`` is the second moment of its inputs and ``q_i`` the mean square of the gradients at that output. What
    each loses is told in the unit of other sites, and added up. Without calibration it is the truncated SVD of the
    weight.

    Attributes
    ----------
    multiple_of
        Offer ranks that are multiples of this; what suits the device and the width if None.
    to_full_rank
        Offer also ranks at which the factors have more parameters than the weight.
    sweeps
        Alternations of exact solutions for one factor when a choice is carried out.

    Notes
    -----
    Moments are about zero: what one mean could carry, the other reader would miss. No single decomposition is optimal
    in two metrics (:mod:`spectrim.linalg.two_metrics`), so that the curve is fitted at six ranks by one turn each,
    with errors in between by the logarithm. Choices that are carried out go on from there and lose no more.
    """

    takes: ClassVar[type[Site]] = Tied
    offers: ClassVar[type[Choice]] = TiedChoice

    multiple_of: int | None = None
    to_full_rank: bool = False
    sweeps: int = 2

    def __post_init__(self) -> None:
        check_least(self, 1, "multiple_of")
        check_least(self, 0, "sweeps")

    def ranks(self, site: Tied) -> range:
        """Ranks on offer: multiples, as long as the factors have fewer parameters than the weight."""
        spec = site.table.spec
        full = min(spec.in_channels, spec.out_channels)
        step = self.multiple_of or rank_multiple(spec.device, spec.dtype, full)
        pays = (spec.in_channels * spec.out_channels - 1) // (spec.in_channels + spec.out_channels)
        return range(step, (full if self.to_full_rank else min(full, pays)) + 1, step)

    def curve(self, site: Tied) -> Curve:
        ranks = self.ranks(site)
        problem, unit, total = posed(site)
        if not ranks:
            return Curve((), (), unit, total)
        start, whole = problem.start(), max(problem.energy(), 1e-300)
        knots = sorted({ranks[round(place)] for place in np.linspace(0, len(ranks) - 1, _KNOTS)})
        lost = [problem.lost(*problem.alternated(start[:rank], min(1, self.sweeps))) / whole for rank in knots]
        # More ranks lose no more, and an error of nothing has no logarithm.
        logs = np.log(np.maximum(np.minimum.accumulate(lost), 1e-15))
        errors = np.exp(np.interp(ranks, knots, logs))
        choices = tuple(TiedChoice(rank, site.head.name, method=self.name) for rank in ranks)
        return Curve(choices, tuple(errors.tolist()), unit, total)

    def leanest(self, site: Tied) -> Sequence[Choice]:
        return [TiedChoice(rank, site.head.name, method=self.name) for rank in self.ranks(site)[:1]]

    def factorize(self, site: Tied, choice: TiedChoice) -> TiedPair:
        problem, _, _ = posed(site)
        rows, columns = problem.alternated(problem.start()[: choice.rank], self.sweeps)
        left, right = lowrank.balance(rows[None], columns[None])
        dtype = site.table.spec.dtype
        return TiedPair(left[0].to(dtype), right[0].to(dtype))

    def layers(self, site: Tied, choice: TiedChoice) -> Sequence[LayerSpec]:
        table = site.table.spec.factor(_HOW, choice.rank)
        head = site.head.spec.factor(_HOW, choice.rank)
        # The table counts what both have.
        specs = tuple(dataclasses.replace(part, shared=part.stored) for part in head)
        return Apart((table, Pair(specs, site.head.spec)))


def posed(site: Tied) -> tuple[TwiceRead, str, float]:
    """The problem of a site, in the unit of other sites, with the loss of losing all of it."""
    weight = site.table.weight[0].mT.double()
    inputs, gradient = site.head.statistics.input, site.table.statistics.gradient
    entries, width = weight.shape
    even, plain = weight.new_ones(entries), torch.eye(width).to(weight)
    if site.asked is None or inputs is None:
        # One metric, in two halves.
        half = View(even, plain / 2)
        return TwiceRead(weight, (half, half)), WEIGHT_ENERGY, 1.0
    seen = shrunk(inputs.second_moment, inputs.count)[0].to(weight)
    asked = site.asked.to(weight)
    if gradient is None or site.weights is None:
        readings = View(asked, plain), View(even, seen)
        shares = tuple(_scaled(each, 1 / float(each.energy(weight).clamp_min(1e-300))) for each in readings)
        return TwiceRead(weight, (shares[0], shares[1])), OUTPUT_ENERGY, 2.0
    felt = shrunk(gradient.second_moment, gradient.count)[0].to(weight)
    looked_up = _scaled(View(asked, felt), 0.5 * site.table.spec.rows)
    multiplied = _scaled(View(site.weights.to(weight), seen), 0.5 * site.head.spec.rows)
    problem = TwiceRead(weight, (looked_up, multiplied))
    return problem, WEIGHTED_ENERGY, float(sum(each.energy(weight) for each in problem.readings))


def _scaled(reading: View, size: float) -> View:
    return dataclasses.replace(reading, metric=reading.metric * size)
