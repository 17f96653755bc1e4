"""Low rank in the layer's responses on calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.errors import MissingMomentsError
from spectrim.linalg import lowrank, response
from spectrim.linalg.metric import SlicedMetric
from spectrim.linalg.unfold import Unfolding, unfold, unfolding
from spectrim.methods import statistics
from spectrim.methods.base import Curve, LowRankMethod
from spectrim.network.choices import LowRankChoice
from spectrim.network.factors import LowRank
from spectrim.network.sites import Layer


@dataclass(frozen=True)
class ActivationSVD(LowRankMethod):
    """Solve ``min E ||(W - W') (x - m)||^2`` over rank-``r`` pairs, ``x`` the layer's inputs, ``m`` their mean.

    For the channel unfolding and for linear layers this is principal component analysis of the layer's outputs and
    exact. For the others it starts from the eigenvectors in the average slice metric, takes the exact second factor
    and alternates (:mod:`spectrim.linalg.response`). The mean of what is left out goes into the bias. Where the site
    holds a sensitivity, the norm weighs the outputs by the gradients that reach them.

    Attributes
    ----------
    sweeps
        Alternations when a choice is carried out; the curve is that of the start, which they only improve.

    Notes
    -----
    The error is the share of the layer's centred output energy lost on the calibration samples. Unfoldings for which
    calibration kept no statistics are not offered.
    """

    sweeps: int = 4

    def curve(self, site: Layer) -> Curve:
        if not site.statistics:
            raise MissingMomentsError(
                f"ActivationSVD needs calibration statistics, and site {site.name!r} ({site.spec.kind}) holds none. "
                "Run calibrate(model, sites, batches) first, or use WeightSVD."
            )
        choices: list[LowRankChoice] = []
        errors: list[float] = []
        spectra: dict[str, tuple[float, ...]] = {}
        scale, whole = 1.0, 0.0
        weight = statistics.output_weight(site)
        for how in self.offered(site.spec):
            ranks = self.ranks(site.spec, how)
            if not ranks:
                continue
            seen = statistics.Patches.of(site, how)
            if seen is None and not _has_outputs(site, how):
                continue
            mixed = response.mix(unfold(site.weight, how), weight)
            if seen is not None and not seen.metric.separates:
                found = lowrank.spectrum(mixed, seen.metric.average, ranks[-1])
                energies = found.energies
                left, _ = lowrank.factors(mixed, found.basis, ranks[-1])
                lost = response.refit_errors(mixed, seen.metric, left)
                # The energy of the responses is the same in every unfolding.
                whole = whole or float(response.total_energy(mixed, seen.metric).sum())
                total = whole
            else:
                # With one slice, or the slice metric alone, the projection is optimal and the spectrum has its error.
                if seen is None:
                    energies = _start(site, how, seen, weight).energies
                else:
                    energies = lowrank.energies(mixed, seen.metric.average)
                lost, total = lowrank.tail_errors(energies), float(energies.sum())
            scale = statistics.scale(site, total)
            choices += [self.choice(site, how, rank, bias=True) for rank in ranks]
            errors += lost[list(ranks)].tolist()
            spectra[how.name] = lowrank.profile(energies)
        return Curve(tuple(choices), tuple(errors), statistics.unit(site), scale, spectra)

    def factorize(self, site: Layer, choice: LowRankChoice) -> LowRank:
        how = unfolding(site.spec.kernel, choice.unfolding)
        seen = statistics.Patches.of(site, how)
        if seen is None and not _has_outputs(site, how):
            site.require("input" if how.name != "channel" else "output", f"ActivationSVD ({how.name})")
        matrix = unfold(site.weight, how).double()
        weight = statistics.output_weight(site)
        found = _start(site, how, seen, weight)
        if seen is None:
            left, right, shift = _projected(site, matrix, found.basis[..., : choice.rank], weight)
        else:
            left, right = self._fitted(matrix, seen.metric, found, weight, choice.rank)
            shift = seen.shift(matrix - left @ right)
        left, right = lowrank.balance(left, right)
        dtype = site.spec.dtype
        moved = shift.to(dtype) if choice.bias else None
        return LowRank(left.to(dtype), right.to(dtype), moved, how, site.spec.shape[1:])

    def _fitted(
        self, matrix: Tensor, metric: SlicedMetric, found: lowrank.Spectrum, weight: Tensor | None, rank: int
    ) -> tuple[Tensor, Tensor]:
        if rank >= found.basis.shape[-1]:
            # Nothing is lost at full rank, so nothing needs fitting and the product is exact.
            return lowrank.factors(matrix, lowrank.spectrum(matrix).basis, rank)
        mixed = response.mix(matrix, weight)
        left, _ = lowrank.factors(mixed, found.basis, rank)
        if not metric.separates:
            left, _ = response.alternate(mixed, metric, left, sweeps=self.sweeps)
        # The best second factor for a given first one does not depend on the weight of the outputs.
        return left, response.refit(matrix, metric, left)


def _has_outputs(site: Layer, how: Unfolding) -> bool:
    return how.name == "channel" and site.statistics.output is not None


def _start(site: Layer, how: Unfolding, seen: statistics.Patches | None, weight: Tensor | None) -> lowrank.Spectrum:
    """Leading directions of every rank, by patches, slices or outputs, whichever the site holds."""
    if seen is not None:
        return lowrank.spectrum(response.mix(unfold(site.weight, how), weight), seen.metric.average)
    covariance = statistics.outputs(site)
    return lowrank.principal(covariance if weight is None else weight @ covariance @ weight.mT)


def _projected(site: Layer, matrix: Tensor, basis: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Factors and shift that project the (weighted) outputs onto a basis, from output moments alone."""
    if weight is None:
        inwards, outwards = basis, basis.mT
    else:
        inwards, outwards = weight.mT @ basis, torch.linalg.solve(weight, basis).mT
    shift = statistics.outside(site, site.require("output", "ActivationSVD").mean, inwards, outwards)
    return matrix @ inwards, outwards, shift
