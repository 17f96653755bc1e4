"""What calibration kept of a site, as what solvers take: metrics, weights of outputs, units and scales of errors."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import lowrank, response
from spectrim.linalg.metric import WHOLE, Full, SlicedMetric, Slices
from spectrim.linalg.moments import Moments, shrunk
from spectrim.linalg.unfold import Unfolding, unfold
from spectrim.network.sites import Layer

OUTPUT_ENERGY = "output energy"
WEIGHTED_ENERGY = "weighted output energy"
WEIGHT_ENERGY = "weight energy"


@dataclass(frozen=True, eq=False)
class Patches:
    """What a layer sees, for the slices of an unfolding."""

    metric: SlicedMetric  # centred second moment of the patches
    mean: Float[Tensor, "g n"]  # ``[g, n]``

    @classmethod
    def of(cls, site: Layer, how: Unfolding, units: Float[Tensor, "g i"] | None = None) -> Patches | None:
        """What a site sees under an unfolding, or None if calibration kept neither patches nor these slices.

        ``units`` are those in which its input channels are measured.
        """
        patch = site.spec.shape[2:]
        if (whole := site.statistics.input) is not None:
            return cls(
                Full(_measured(shrunk(whole.covariance, whole.count), units), patch, how), _in(whole.mean, units)
            )
        if (slices := site.statistics.slices.get(how.name)) is not None:
            metric = Slices(_measured(shrunk(slices.covariance, slices.count), units), patch, how)
            return cls(metric, metric.spread(_in(slices.mean, units)))
        return None

    def shift(self, missing: Float[Tensor, "g p c"]) -> Float[Tensor, " o_total"]:
        """Mean response of a weight difference ``[g, p, (o, q)]``: what the bias must make up for."""
        mean = self.metric.unfold(self.mean.unsqueeze(1))
        return (self.metric.open(missing) * mean.unsqueeze(2)).sum(dim=(1, 3)).reshape(-1)


def outputs(site: Layer) -> Float[Tensor, "g o o"]:
    """Centred second moment of what a site answers."""
    moments = site.require("output", "the spectrum of a layer's outputs")
    return shrunk(moments.covariance, moments.count)


def error_unit(site: Layer) -> str:
    """Unit of the errors that a site reports."""
    if not site.statistics:
        return WEIGHT_ENERGY
    return WEIGHTED_ENERGY if site.statistics.gradient is not None else OUTPUT_ENERGY


def output_weight(site: Layer) -> Float[Tensor, "g o o"] | None:
    """A root ``R`` of the second moment ``R^T R`` of the gradients that reach the outputs, or None if it is not known.

    Multiplying responses by it measures errors by what they do to the network's output, to second order, instead of
    counting every output channel the same.
    """
    gradient = site.statistics.gradient
    if gradient is None:
        return None
    size, root = _gradient_root(gradient)
    return root * size.unsqueeze(1)


# Of gradients, as long as they are there: how many they were, the size of every entry, and a root of the correlations.
_ROOTS: weakref.WeakKeyDictionary[Moments, tuple[int, Tensor, Tensor]] = weakref.WeakKeyDictionary()


def _gradient_root(gradient: Moments) -> tuple[Tensor, Tensor]:
    entry = _ROOTS.get(gradient)
    if entry is None or entry[0] != gradient.count:
        entry = _ROOTS[gradient] = gradient.count, *_sized(shrunk(gradient.second_moment, gradient.count))
    return entry[1:]


def _sized(moment: Float[Tensor, "g o o"]) -> tuple[Float[Tensor, "g o"], Float[Tensor, "g o o"]]:
    """Root of the diagonal, and a triangular root of what is left with ones there."""
    standard, size = lowrank.standard(moment)
    return size, lowrank.root(standard)


def mixed_weight(site: Layer) -> Float[Tensor, "g o d"]:
    """The layer's weight over whole patches, its outputs weighed where the site holds a sensitivity."""
    g, o, *_ = site.spec.shape
    matrix = site.weight.double().reshape(g, o, -1)
    weight = output_weight(site)
    return matrix if weight is None else weight @ matrix


# An output that the network seems to ignore counts with this share of the mean energy of an output.
_IGNORED = 1e-6


# Layers in their own units by the layer's identity, while several methods look at the same ones.
_STANDARDS: ContextVar[dict[int, Standard] | None] = ContextVar("held", default=None)


@contextmanager
def shared() -> Iterator[None]:
    """Have methods share what they compute of the layers that they are given inside the context."""
    token = _STANDARDS.set({})
    try:
        yield
    finally:
        _STANDARDS.reset(token)


@dataclass(frozen=True, eq=False)
class Standard:
    """A layer in its own units, in which methods fit: no unit of a channel decides, and no number is out of range.

    Every input channel has unit variance; every output channel is measured by the size of the gradients that reach it,
    where the site holds a sensitivity. Since ``W x = (W D^-1) (D x)``, a weight fitted in these units is one of the
    layer in others (:meth:`weight`, :meth:`left`, :meth:`right`). A channel has one unit at all kernel positions, so
    that every unfolding has it, and layers that share a factor have one for all of them.
    """

    site: Layer  # the layer as it is
    inputs: Float[Tensor, "g i"]  # ``[g, i]``: its own units of what it sees, 1 without statistics
    outputs: Float[Tensor, "g o"]  # ``[g, o]``: what its responses are multiplied by
    # Triangular ``R`` with ``R^T R`` the second moment of the gradients in these units, which has ones on its diagonal;
    # or None.
    root: Float[Tensor, "g o o"] | None

    @classmethod
    def of(cls, site: Layer) -> Standard:
        """The layer in its own units."""
        layers = _STANDARDS.get()
        if layers is not None and id(site) in layers:
            return layers[id(site)]
        inputs, gradient = input_units(site), site.statistics.gradient
        if gradient is None:
            standard = cls(site, inputs, *_no_outputs(site))
        else:
            size, root = _gradient_root(gradient)
            standard = cls(site, inputs, _output_units([(site, inputs)], size), root)
        if layers is not None:
            layers[id(site)] = standard
        return standard

    @classmethod
    def together(cls, parts: Sequence[Layer], *, inputs: bool, outputs: bool) -> tuple[Standard, ...]:
        """Layers in units that serve all of them, where they share a factor.

        Parameters
        ----------
        inputs
            One unit an input channel for all layers, as a shared first factor needs.
        outputs
            One weight of the outputs for all layers, as a shared second factor needs: the mean of theirs.
        """
        units = [input_units(part) for part in parts]
        if inputs:
            units = [torch.stack([each.log() for each in units]).mean(0).exp()] * len(parts)
        pairs = list(zip(parts, units, strict=True))
        gradients = [g for part in parts if (g := part.statistics.gradient) is not None]
        if len(gradients) < len(parts):
            return tuple(cls(part, input_size, *_no_outputs(part)) for part, input_size in pairs)
        if not outputs:
            return tuple(dataclasses.replace(cls.of(part), inputs=input_size) for part, input_size in pairs)
        mean = torch.stack([shrunk(g.second_moment, g.count) for g in gradients]).mean(0)
        size, root = _sized(mean)
        common = _output_units(pairs, size)
        return tuple(cls(part, input_size, common, root) for part, input_size in pairs)

    def matrix(self, how: Unfolding) -> Float[Tensor, "g p c"]:
        """The unfolded weight."""
        return unfold(self.own_weight, how)

    def mixed(self, how: Unfolding) -> Float[Tensor, "g p c"]:
        """The same with the root applied to the outputs."""
        return unfold(self.mixed_weight, how)

    @cached_property
    def mixed_weight(self) -> Float[Tensor, "g o i *k"]:
        """The weight in these units with the root applied to its outputs."""
        weight = self.own_weight
        return weight if self.root is None else (self.root @ weight.flatten(2)).reshape(weight.shape)

    def energy(self, how: Unfolding, metric: SlicedMetric) -> float:
        """Of the responses, by what the layer sees under an unfolding; of whole patches the same for all of them."""
        kind = "" if self._whole is not None else how.name
        if kind not in self._energies:
            self._energies[kind] = float(response.total_energy(self.mixed(how), metric).sum())
        return self._energies[kind]

    @cached_property
    def _energies(self) -> dict[str, float]:
        return {}

    @cached_property
    def own_weight(self) -> Float[Tensor, "g o i *k"]:
        """The weight in these units."""
        return self.site.weight.double() * _per_input(self.inputs, self.site) * _per_output(self.outputs, self.site)

    def patches(self, how: Unfolding) -> Patches | None:
        """What it sees under an unfolding."""
        if self._whole is None:
            return Patches.of(self.site, how, self.inputs)
        return Patches(self._whole.metric.sliced(how), self._whole.mean)

    @cached_property
    def _whole(self) -> Patches | None:
        """The same for whole patches, which every unfolding shares."""
        return Patches.of(self.site, WHOLE, self.inputs) if self.site.statistics.input is not None else None

    def covariance(self) -> Float[Tensor, "g o o"]:
        """Centred second moment of what it answers."""
        return outputs(self.site) * self.outputs.unsqueeze(1) * self.outputs.unsqueeze(2)

    def weight(self, weight: Float[Tensor, "g o i *k"]) -> Float[Tensor, "g o i *k"]:
        """A weight in these units, in those of the layer."""
        return weight.double() / _per_input(self.inputs, self.site) / _per_output(self.outputs, self.site)

    def left(self, left: Float[Tensor, "g p r"]) -> Float[Tensor, "g p r"]:
        """The same of a first factor."""
        return left / channel_units(self.inputs, left.shape[1]).unsqueeze(2)

    def right(self, right: Float[Tensor, "g r c"]) -> Float[Tensor, "g r c"]:
        """The same of a second factor."""
        return right / channel_units(self.outputs, right.shape[2]).unsqueeze(1)

    def own_left(self, left: Float[Tensor, "g p r"]) -> Float[Tensor, "g p r"]:
        """A first factor of the layer, in these units."""
        return left.double() * channel_units(self.inputs, left.shape[1]).unsqueeze(2)

    def own_right(self, right: Float[Tensor, "g r c"]) -> Float[Tensor, "g r c"]:
        """The same of a second factor."""
        return right.double() * channel_units(self.outputs, right.shape[2]).unsqueeze(1)

    def shift(self, shift: Float[Tensor, " o_total"]) -> Float[Tensor, " o_total"]:
        """The same of a bias."""
        return shift / self.outputs.reshape(-1)


def input_units(site: Layer) -> Float[Tensor, "g i"]:
    """Standard deviation of every input channel, over its kernel positions.

    Of a channel that never changes, the units in which its weights have unit size.
    """
    g, _, i, *_ = site.spec.shape
    weight = site.weight.double()
    if not site.statistics:
        return weight.new_ones(g, i)
    statistics = site.statistics
    moments = [statistics.input, statistics.sketch, *statistics.slices.values(), statistics.channels]
    known = next((m for m in moments if m is not None), None)
    variance = weight.new_zeros(g, i) if known is None else known.variance.reshape(g, i, -1).mean(2).to(weight.device)
    size = weight.movedim(2, 1).flatten(2).square().mean(2).sqrt()
    still = torch.where(size > 0, 1 / size, torch.ones_like(size))
    return torch.where(variance > 0, variance.sqrt(), still)


def _no_outputs(site: Layer) -> tuple[Tensor, None]:
    g, o, *_ = site.spec.shape
    return site.weight.new_ones(g, o, dtype=torch.float64), None


def _output_units(parts: Sequence[tuple[Layer, Tensor]], size: Float[Tensor, "g o"]) -> Float[Tensor, "g o"]:
    """Units of the outputs of layers.

    They are the sizes of the gradients; of outputs that no gradient reaches but that hold energy, what makes them count
    a little beside the others.
    """
    weights = [(part.weight.double() * _per_input(units, part)).flatten(2) for part, units in parts]
    energy = torch.stack([weight.square().mean(-1) for weight in weights]).mean(0)
    least = _IGNORED * (size.square() * energy).mean(1, keepdim=True) / energy
    floored = torch.maximum(size, torch.where(energy > 0, least, torch.zeros_like(least)).sqrt())
    return torch.where(floored > 0, floored, torch.ones_like(floored))


def _per_input(units: Tensor, site: Layer) -> Tensor:
    return units.reshape(*units.shape[:1], 1, -1, *(1 for _ in site.spec.kernel))


def _per_output(units: Tensor, site: Layer) -> Tensor:
    return units.reshape(*units.shape, 1, *(1 for _ in site.spec.kernel))


def channel_units(units: Float[Tensor, "g i"], entries: int) -> Float[Tensor, "g n"]:
    """Units of channels for all entries of a patch, a slice or a row, channel after channel."""
    return units.repeat_interleave(entries // units.shape[1], dim=1)


def _in(values: Float[Tensor, "g n"], units: Tensor | None) -> Float[Tensor, "g n"]:
    return values if units is None else values / channel_units(units, values.shape[1])


def _measured(moment: Float[Tensor, "g n n"], units: Tensor | None) -> Float[Tensor, "g n n"]:
    """A moment in units, in place."""
    if units is not None:
        each = 1 / channel_units(units, moment.shape[1])
        moment *= each.unsqueeze(2)
        moment *= each.unsqueeze(1)
    return moment


def lost_mean(site: Layer, mean: Float[Tensor, "g o"], inwards: Tensor, outwards: Tensor) -> Float[Tensor, " o_total"]:
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
    return 0.5 * site.spec.rows * total
