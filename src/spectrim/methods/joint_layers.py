"""Layers that are to share factors, under one unfolding: what each sees, and how much its errors count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.linalg import lowrank, metric, response
from spectrim.linalg.metric import SlicedMetric
from spectrim.linalg.moments import shrunk
from spectrim.linalg.unfold import Unfolding, unfold
from spectrim.methods import statistics
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Group, Layer


@dataclass(frozen=True, eq=False)
class JointLayers:
    """Layers that are to share a factor, as matrices and metrics in which all their errors count in one unit.

    A layer's matrix is scaled so that all of its energy is what losing the layer adds to the loss: 1 without
    sensitivity. So the sum of what is lost is the loss that selectors minimise, as it is for separate layers.

    Attributes
    ----------
    matrices
        Unfolded weights ``[g, p_n, (o_n, q)]``, float64, as they are.
    mixed
        The same, scaled and with the output weight applied to the columns.
    roots
        What ``mixed`` was scaled by.
    weights
        Output weight of every layer, or None: its own for left sharing, that of all together otherwise.
    seen
        What every layer sees; one object for all that see the same. None without calibration.
    scale
        What losing all layers adds to the loss.
    """

    matrices: tuple[Tensor, ...]
    mixed: tuple[Tensor, ...]
    roots: tuple[float, ...]
    weights: tuple[Tensor | None, ...]
    seen: tuple[statistics.Patches, ...] | None
    scale: float

    @property
    def metrics(self) -> tuple[SlicedMetric, ...] | None:
        """One object for all layers that see the same."""
        return None if self.seen is None else tuple(patches.metric for patches in self.seen)

    @property
    def separates(self) -> bool:
        """Whether the error of a product is that in the average slice, so that projections are optimal."""
        return self.metrics is None or all(a.separates for a in self.metrics)

    def own_left(self, left: Tensor, number: int) -> Tensor:
        """The first factor of one layer alone, fitted to its mixed matrix, for the matrix as it is."""
        return left / self.roots[number]

    def own_right(self, right: Tensor, number: int) -> Tensor:
        """The same of a second factor."""
        return self.shared_right(right, number) / self.roots[number]

    def shared_right(self, right: Tensor, number: int = 0) -> Tensor:
        """The same of the second factor that all layers share."""
        weight = self.weights[number]
        return right if weight is None else response.mix(right, torch.linalg.pinv(weight))


def pose(site: Group, how: Unfolding, *, common: bool) -> JointLayers | None:
    """The layers of a site, or None if calibration kept too little for this unfolding.

    Parameters
    ----------
    common
        Weigh the outputs of all layers alike, as a shared second factor needs.
    """
    parts = site.parts
    matrices = tuple(unfold(part.weight, how).double() for part in parts)
    seen, weights = None, tuple(None for _ in parts)
    if site.calibrated:
        seen = _patches(site, parts, how)
        if seen is None:
            return None
        weights = _output_weights(parts, common=common)
    mixed = tuple(response.mix(m, weight) for m, weight in zip(matrices, weights, strict=True))
    totals = _energies(mixed, seen)
    # Losing a layer counts as it does where the layer is chosen alone, by its own weight.
    own = totals
    if common and weights[0] is not None:
        alone = [response.mix(m, statistics.output_weight(part)) for m, part in zip(matrices, parts, strict=True)]
        own = _energies(alone, seen)
    scales = [statistics.scale(part, total) for part, total in zip(parts, own, strict=True)]
    # A layer without energy loses nothing, whatever it is scaled by.
    roots = tuple((s / t) ** 0.5 if s > 0 and t > 0 else 1.0 for s, t in zip(scales, totals, strict=True))
    mixed = tuple(root * m for root, m in zip(roots, mixed, strict=True))
    return JointLayers(matrices, mixed, roots, weights, seen, sum(scales))


def _energies(matrices: Sequence[Tensor], seen: Sequence[statistics.Patches] | None) -> list[float]:
    if seen is None:
        return [float(m.square().sum()) for m in matrices]
    layers = zip(matrices, seen, strict=True)
    return [float(response.total_energy(m, patches.metric).sum()) for m, patches in layers]


def _patches(site: Group, parts: Sequence[Layer], how: Unfolding) -> tuple[statistics.Patches, ...] | None:
    seen = [patches for part in parts if (patches := statistics.Patches.of(part, how))]
    if len(seen) < len(parts):
        return None
    if not site.same_input:
        return tuple(seen)
    # Samples of one and the same stream: together they are more, and one metric has a closed form.
    mean = torch.stack([patches.mean for patches in seen]).mean(0)
    return (statistics.Patches(metric.mean([patches.metric for patches in seen]), mean),) * len(seen)


def _output_weights(parts: Sequence[Layer], *, common: bool) -> tuple[Tensor | None, ...]:
    own = tuple(statistics.output_weight(part) for part in parts)
    if not common or any(weight is None for weight in own):
        return own if all(weight is not None for weight in own) else tuple(None for _ in parts)
    moments = [part.require("gradient", "JointSVD") for part in parts]
    mean = torch.stack([shrunk(m.second_moment, m.count) for m in moments]).mean(0)
    return (lowrank.root(mean),) * len(parts)


def compatible(layers: Sequence[LayerSpec], side: str) -> bool:
    """Whether layers can share the factor on a side: ``"left"`` the first, ``"right"`` the second, ``"both"`` each.

    Strides, padding and dilations may differ; a factor is a weight.
    """
    first = layers[0]
    alike = {spec.family for spec in layers}
    inputs = {s.in_channels for s in layers} == {first.in_channels}
    outputs = {s.out_channels for s in layers} == {first.out_channels}
    return len(layers) > 1 and len(alike) == 1 and (inputs or side == "right") and (outputs or side == "left")
