"""Which calibration statistics measure what a site loses, and how much that matters to the network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import lowrank, response
from spectrim.linalg.moments import shrunk
from spectrim.linalg.unfold import Unfolding
from spectrim.methods.base import OUTPUT_ENERGY, WEIGHTED_ENERGY
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer


@dataclass(frozen=True, eq=False)
class ResponseMetric:
    """Second moment of what a layer sees, in the coordinates of one unfolding.

    Attributes
    ----------
    moment
        ``[g, p, q, p, q]``, or ``[g, p, p]`` where only the average slice is known (:mod:`spectrim.linalg.response`).
    mean
        ``[g, p, q]``, or ``[g, p, 1]``.
    """

    moment: Tensor
    mean: Float[Tensor, "g p q"]

    @property
    def is_full(self) -> bool:
        return self.moment.dim() == 5

    @property
    def slices(self) -> int:
        return self.moment.shape[2] if self.is_full else 1

    def shift(self, missing: Float[Tensor, "g p c"], outputs: int) -> Float[Tensor, " o_total"]:
        """Mean response of a weight difference ``[g, p, (o, q)]``: what the bias must make up for."""
        g, p, columns = missing.shape
        opened = missing.double().reshape(g, p, outputs, columns // outputs)
        return (opened * self.mean.unsqueeze(2)).sum(dim=(1, 3)).reshape(-1)


def response_metric(site: Layer, how: Unfolding) -> ResponseMetric | None:
    """The metric of a site under an unfolding, or None if calibration kept neither patches nor slices."""
    spec: LayerSpec = site.spec
    g, _, *patch = spec.shape
    if site.statistics.input is not None:
        held = site.statistics.input
        covariance = shrunk(held.covariance, held.count)
        axes = how.axes
        moment = response.arrange(covariance, axes, tuple(patch))
        order = [0, *(1 + a for a in axes), *(a + 1 for a in range(len(patch) - 1) if a not in axes)]
        mean = held.mean.reshape(g, *patch).permute(0, *(1 + d for d in order)).reshape(g, *moment.shape[1:3])
        return ResponseMetric(moment, mean)
    if how.name in site.statistics.slices:
        held = site.statistics.slices[how.name]
        return ResponseMetric(shrunk(held.covariance, held.count), held.mean.unsqueeze(-1))
    return None


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


def mix(matrix: Float[Tensor, "g p c"], weight: Float[Tensor, "g o o"] | None) -> Float[Tensor, "g p c"]:
    """Apply an output weight to the columns ``(o, q)`` of an unfolded matrix (or right factor)."""
    if weight is None:
        return matrix.double()
    g, p, columns = matrix.shape
    o = weight.shape[-1]
    opened = matrix.double().reshape(g, p, o, columns // o)
    return torch.einsum("gpoq,got->gptq", opened, weight).reshape(g, p, columns)


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
