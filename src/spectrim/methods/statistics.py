"""What calibration kept of a site, as what solvers take: metrics, weights of outputs, units and scales of errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import lowrank
from spectrim.linalg.metric import Full, SlicedMetric, Slices
from spectrim.linalg.moments import shrunk
from spectrim.linalg.unfold import Unfolding
from spectrim.methods.base import OUTPUT_ENERGY, WEIGHTED_ENERGY
from spectrim.network.sites import Layer


@dataclass(frozen=True, eq=False)
class Patches:
    """What a layer sees, for the slices of an unfolding.

    Attributes
    ----------
    metric
        Centred second moment of the patches.
    mean
        ``[g, n]``.
    """

    metric: SlicedMetric
    mean: Float[Tensor, "g n"]

    def shift(self, missing: Float[Tensor, "g p c"]) -> Float[Tensor, " o_total"]:
        """Mean response of a weight difference ``[g, p, (o, q)]``: what the bias must make up for."""
        mean = self.metric.unfold(self.mean.unsqueeze(1))
        return (self.metric.open(missing) * mean.unsqueeze(2)).sum(dim=(1, 3)).reshape(-1)


def patches(site: Layer, how: Unfolding) -> Patches | None:
    """What a site sees under an unfolding, or None if calibration kept neither patches nor these slices."""
    patch = site.spec.shape[2:]
    if (whole := site.statistics.input) is not None:
        return Patches(Full(shrunk(whole.covariance, whole.count), patch, how), whole.mean)
    if (slices := site.statistics.slices.get(how.name)) is not None:
        metric = Slices(shrunk(slices.covariance, slices.count), patch, how)
        return Patches(metric, metric.spread(slices.mean))
    return None


def outputs(site: Layer) -> Float[Tensor, "g o o"]:
    """Centred second moment of what a site answers."""
    moments = site.require("output", "the spectrum of a layer's outputs")
    return shrunk(moments.covariance, moments.count)


def unit(site: Layer) -> str:
    """Unit of the errors that a calibrated site reports."""
    return WEIGHTED_ENERGY if site.statistics.gradient is not None else OUTPUT_ENERGY


def output_weight(site: Layer) -> Float[Tensor, "g o o"] | None:
    """Square root of the second moment of the gradients that reach the layer's outputs, or None if it is not known.

    Multiplying responses by it measures errors by what they do to the network's output, to second order, instead of
    counting every output channel the same.
    """
    if site.statistics.gradient is None:
        return None
    held = site.statistics.gradient
    return lowrank.square_root(shrunk(held.second_moment, held.count))


def mixed_weight(site: Layer) -> Float[Tensor, "g o d"]:
    """The layer's weight over whole patches, its outputs weighed where the site holds a sensitivity."""
    g, o, *_ = site.spec.shape
    matrix = site.weight.double().reshape(g, o, -1)
    weight = output_weight(site)
    return matrix if weight is None else weight @ matrix


def outside(site: Layer, mean: Float[Tensor, "g o"], inwards: Tensor, outwards: Tensor) -> Float[Tensor, " o_total"]:
    """Mean response, without the bias, that a projection of the outputs loses.

    ``inwards`` ``[g, o, r]`` and ``outwards`` ``[g, r, o]`` are the two factors of the projection.
    """
    bias = site.bias
    centre = mean if bias is None else mean - bias.double().reshape(mean.shape)
    return (centre - torch.einsum("gor,grp,go->gp", inwards, outwards, centre)).reshape(-1)


def scale(site: Layer, total: float) -> float:
    """Loss of losing all energy: 1 without sensitivity, else half the weighted energy over all output positions."""
    if site.statistics.gradient is None:
        return 1.0
    spec = site.spec
    positions = sum(math.prod(spec.output_shape(shape)) for shape in spec.inputs)
    return 0.5 * positions * total
