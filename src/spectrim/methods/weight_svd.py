"""Truncated SVD of the weight: data-free low rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spectrim.linalg import lowrank, response
from spectrim.linalg.unfold import Unfolding, unfold, unfolding
from spectrim.methods import statistics
from spectrim.methods.base import LowRankMethod
from spectrim.methods.statistics import Standard
from spectrim.network.choices import LowRankChoice
from spectrim.network.factors import LowRank
from spectrim.network.sites import Layer


@dataclass(frozen=True)
class WeightSVD(LowRankMethod):
    """Solve ``min ||M - L R||_F`` for the unfolded weight by truncated SVD.

    Needs no data, and knows no units: inputs count alike, whatever they are measured in. The factors are the same with
    and without calibration; with it, the error is what they lose of the layer's centred output energy, so that the
    table may hold other methods beside this one, and the mean of what they leave out goes into the bias. Without it the
    error is the share of the weight's energy.

    Notes
    -----
    One eigendecomposition of the smaller Gram matrix an unfolding gives the error of every rank. Spatial unfoldings:
    Jaderberg et al. 2014, Tai et al. 2016; channel: Denton et al. 2014.
    """

    def lost(self, units: Standard, how: Unfolding, most: int) -> tuple[Tensor, Tensor, float] | None:
        site, seen = units.site, units.patches(how)
        matrix = unfold(site.weight, how)
        if not site.statistics:
            # The error of every rank takes the spectrum alone, without a basis.
            energies = lowrank.energies(matrix)
            return lowrank.tail_errors(energies), energies, float(energies.sum())
        spectrum = lowrank.spectrum(matrix, most=None if how.name == "channel" else most)
        energies, basis = spectrum.energies, spectrum.basis
        if seen is not None:
            left, right = lowrank.factors(matrix, basis, basis.shape[-1])
            left, right = units.own_left(left), response.mix(units.own_right(right), units.root)
            if left.shape[-1] < energies.shape[-1]:
                total = units.energy(how, seen.metric)
                errors = response.product_errors(left, right, seen.metric, total, units.mixed(how))
                return errors, energies, total
            pairs = seen.metric.pairs(left, right)
        elif how.name == "channel" and site.statistics.output is not None:
            # The pair projects the outputs onto the leading basis vectors; the rest is lost.
            mixed = response.mix(units.own_right(basis.mT), units.root)
            pairs = (basis.mT @ statistics.outputs(site) @ basis * (mixed @ mixed.mT)).sum(0)
        else:
            return None
        total = float(pairs.sum())
        return (response.trailing(pairs) / max(total, 1e-300)).clamp_min(0), energies, total

    def factorize(self, site: Layer, choice: LowRankChoice) -> LowRank:
        how = unfolding(site.spec.kernel, choice.unfolding)
        matrix = unfold(site.weight, how)
        basis = lowrank.spectrum(matrix, most=choice.rank).basis
        left, right = lowrank.factors(matrix, basis, choice.rank)
        dtype = site.spec.dtype
        shift = None
        if choice.bias and (site.statistics or not site.spec.bias):
            # The choice was offered for a calibrated site: its bias carries the mean of what is left out.
            shift = self._shift(site, how, matrix - left @ right, basis).to(dtype)
        left, right = lowrank.balance(left, right)
        return LowRank(left.to(dtype), right.to(dtype), shift, how, site.spec.shape[1:])

    def _shift(self, site: Layer, how: Unfolding, missing: Tensor, basis: Tensor) -> Tensor:
        seen = statistics.Patches.of(site, how)
        if seen is not None:
            return seen.shift(missing)
        mean = site.require("output" if how.name == "channel" else "input", f"the bias of WeightSVD ({how.name})").mean
        return statistics.lost_mean(site, mean, basis, basis.mT)
