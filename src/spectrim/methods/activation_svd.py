"""Low rank in the layer's responses on calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.errors import MissingMomentsError
from spectrim.linalg import lowrank, response
from spectrim.linalg.metric import SlicedMetric
from spectrim.linalg.unfold import Unfolding, unfolding
from spectrim.methods import statistics
from spectrim.methods.base import Curve, LowRankMethod
from spectrim.methods.statistics import Standard
from spectrim.network.choices import LowRankChoice
from spectrim.network.factors import LowRank
from spectrim.network.sites import Layer


@dataclass(frozen=True)
class ActivationSVD(LowRankMethod):
    """Solve ``min E ||(W - W') (x - m)||^2`` over rank-``r`` pairs, ``x`` the layer's inputs, ``m`` their mean.

    For the channel unfolding and for linear layers this is principal component analysis of the layer's outputs and
    exact. For the others it starts from the eigenvectors in the average slice metric, takes the exact second factor
    and alternates (:mod:`spectrim.linalg.response`). The mean of what is left out goes into the bias. Where the site
    holds a sensitivity, the norm weighs the outputs by the gradients that reach them. All of it happens in the layer's
    own units (:class:`~spectrim.methods.statistics.Standard`): rescaling input channels changes nothing.

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
        return super().curve(site)

    def lost(self, units: Standard, how: Unfolding, most: int) -> tuple[Tensor, Tensor, float] | None:
        seen = units.patches(how)
        if seen is None and not _has_outputs(units.site, how):
            return None
        if seen is not None and not seen.metric.separates:
            mixed = units.mixed(how)
            spectrum = lowrank.spectrum(mixed, seen.metric.average, most)
            left, _ = lowrank.factors(mixed, spectrum.basis, most)
            return response.refit_errors(mixed, seen.metric, left), spectrum.energies, units.energy(how, seen.metric)
        # With one slice, or the slice metric alone, the projection is optimal and the spectrum has its error.
        if seen is None:
            energies = lowrank.variances(_weighed(units))
        else:
            energies = lowrank.energies(units.mixed(how), seen.metric.average)
        return lowrank.tail_errors(energies), energies, float(energies.sum())

    def factorize(self, site: Layer, choice: LowRankChoice) -> LowRank:
        how = unfolding(site.spec.kernel, choice.unfolding)
        units = Standard.of(site)
        seen = units.patches(how)
        if seen is None and not _has_outputs(site, how):
            site.require("input" if how.name != "channel" else "output", f"ActivationSVD ({how.name})")
        matrix = units.matrix(how)
        spectrum = _start(units, how, seen, choice.rank)
        if seen is None:
            left, right, shift = _projected(units, matrix, spectrum.basis)
        else:
            left, right = self._fitted(matrix, seen.metric, spectrum, units.root, choice.rank)
            shift = units.shift(seen.shift(matrix - left @ right))
        left, right = lowrank.balance(units.left(left), units.right(right))
        dtype = site.spec.dtype
        moved = shift.to(dtype) if choice.bias else None
        return LowRank(left.to(dtype), right.to(dtype), moved, how, site.spec.shape[1:])

    def _fitted(
        self, matrix: Tensor, metric: SlicedMetric, spectrum: lowrank.Spectrum, weight: Tensor | None, rank: int
    ) -> tuple[Tensor, Tensor]:
        if rank >= spectrum.energies.shape[-1]:
            # Nothing is lost at full rank, so nothing needs fitting and the product is exact.
            return lowrank.factors(matrix, lowrank.spectrum(matrix).basis, rank)
        mixed = response.mix(matrix, weight)
        left, _ = lowrank.factors(mixed, spectrum.basis, rank)
        if not metric.separates:
            left = response.alternate(mixed, metric, left, sweeps=self.sweeps)
        # The best second factor for a given first one does not depend on the weight of the outputs.
        return left, response.refit(matrix, metric, left)


def _has_outputs(site: Layer, how: Unfolding) -> bool:
    return how.name == "channel" and site.statistics.output is not None


def _start(units: Standard, how: Unfolding, seen: statistics.Patches | None, most: int) -> lowrank.Spectrum:
    """So many leading directions, by patches, slices or outputs, whichever the site holds."""
    if seen is not None:
        return lowrank.spectrum(units.mixed(how), seen.metric.average, most)
    spectrum = lowrank.principal(_weighed(units))
    return lowrank.Spectrum(spectrum.energies, spectrum.basis[..., :most])


def _weighed(units: Standard) -> Tensor:
    """Covariance of the outputs, weighed by their sensitivity."""
    covariance = units.covariance()
    return covariance if units.root is None else units.root @ covariance @ units.root.mT


def _projected(units: Standard, matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors and shift that project the (weighted) outputs onto a basis, from output moments alone."""
    if units.root is None:
        inwards, outwards = basis, basis.mT
    else:
        inwards, outwards = units.root.mT @ basis, torch.linalg.solve_triangular(units.root, basis, upper=True).mT
    mean = units.site.require("output", "ActivationSVD").mean
    size = units.outputs.unsqueeze(2)
    shift = statistics.lost_mean(units.site, mean, size * inwards, outwards / size.mT)
    return matrix @ inwards, outwards, shift
