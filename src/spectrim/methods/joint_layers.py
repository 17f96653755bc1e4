"""Layers that are to share factors, under one unfolding: what each sees, and how much its errors count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.linalg import metric, response
from spectrim.linalg.metric import SlicedMetric
from spectrim.linalg.unfold import Unfolding
from spectrim.methods import statistics
from spectrim.methods.statistics import Standard
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Group


@dataclass(frozen=True, eq=False)
class JointLayers:
    """Layers that are to share a factor, as matrices and metrics in which all their errors count in one unit.

    A layer's matrix is scaled so that all of its energy is what losing the layer adds to the loss: 1 without
    sensitivity. So the sum of what is lost is the loss that selectors minimise, as it is for separate layers. Plain
    ones are not scaled, and what is minimised is the sum of their squared norms.
    """

    matrices: tuple[Tensor, ...]  # unfolded weights ``[g, p_n, (o_n, q)]``, float64, in their own units
    mixed: tuple[Tensor, ...]  # the same, scaled and with the root of the output weight applied to the columns
    roots: tuple[float, ...]  # what ``mixed`` was scaled by
    # What a unit of the energy of each mixed matrix adds to the loss; 1 unless they are plain.
    counts: tuple[float, ...]
    units: tuple[Standard, ...]  # the layers in their own units, common ones on a side that is shared
    # What every layer sees; one object for all that see the same. None without calibration.
    seen: tuple[statistics.Patches, ...] | None
    scale: float  # what losing all layers adds to the loss
    # Each layer's own weight of the outputs, as a root in the units above, where one is shared and it has one; with it
    # the energy of the layer's matrix is what losing the layer adds to the loss.
    own_roots: tuple[Tensor, ...] = ()

    @property
    def metrics(self) -> tuple[SlicedMetric, ...] | None:
        """One object for all layers that see the same."""
        return None if self.seen is None else tuple(patches.metric for patches in self.seen)

    @property
    def separates(self) -> bool:
        """Whether the error of a product is that in the average slice, so that projections are optimal."""
        return self.metrics is None or all(a.separates for a in self.metrics)

    def lost(self, products: Sequence[Tensor]) -> float:
        """What products in place of the mixed matrices add to the loss."""
        missing = [m - product for m, product in zip(self.mixed, products, strict=True)]
        if self.own_roots:
            return sum(_energies([self.by_own(m, number) for number, m in enumerate(missing)], self.seen))
        return sum(c * energy for c, energy in zip(self.counts, _energies(missing, self.seen), strict=True))

    def by_own(self, mixed: Tensor, number: int) -> Tensor:
        """Columns beside those of a mixed matrix, weighed as the layer's own outputs are."""
        columns = response.unmix(mixed, self.units[number].root) / self.roots[number]
        return response.mix(columns, self.own_roots[number])

    def own_left(self, left: Tensor, number: int) -> Tensor:
        """The first factor of one layer alone, fitted to its mixed matrix, for the layer as it is."""
        return self.units[number].left(left / self.roots[number])

    def own_right(self, right: Tensor, number: int) -> Tensor:
        """The same of a second factor."""
        return self.shared_right(right, number) / self.roots[number]

    def shared_left(self, left: Tensor) -> Tensor:
        """The same of the first factor that all layers share."""
        return self.units[0].left(left)

    def shared_right(self, right: Tensor, number: int = 0) -> Tensor:
        """The same of the second factor that all layers share."""
        units = self.units[number]
        return units.right(response.unmix(right, units.root))

    def shift(self, made: Tensor, number: int) -> Tensor:
        """Mean response of what a product, as it is, leaves out of a layer."""
        units = self.units[number]
        assert self.seen is not None
        missing = self.matrices[number] - units.own_right(units.own_left(made))
        return units.shift(self.seen[number].shift(missing))


def pose(site: Group, how: Unfolding, *, left: bool, right: bool, plain: bool = False) -> JointLayers | None:
    """The layers of a site, or None if calibration kept too little for this unfolding.

    Parameters
    ----------
    left, right
        Whether the layers share a first or a second factor. A shared first factor needs one unit an input channel, a
        shared second factor one weight of the outputs.
    plain
        Whether squared norms add up as they are.
    """
    parts = site.parts
    units = Standard.together(parts, inputs=left or site.same_input, outputs=right)
    matrices = tuple(each.matrix(how) for each in units)
    seen = None
    if site.calibrated:
        seen = _patches(site, units, how)
        if seen is None:
            return None
    mixed = tuple(response.mix(m, each.root) for m, each in zip(matrices, units, strict=True))
    totals = _energies(mixed, seen)
    # Losing a layer counts as it does where the layer is chosen alone, by its own weight.
    own_roots = _own_roots(units) if right else ()
    alone = _energies(list(map(response.mix, matrices, own_roots)), seen) if own_roots else totals
    scales = [statistics.scale(part, total) for part, total in zip(parts, alone, strict=True)]
    roots = _sized(scales, totals)
    own_roots = tuple(size * own for size, own in zip(_sized(scales, alone), own_roots, strict=False))
    ones = (1.0,) * len(parts)
    if plain:
        return JointLayers(matrices, mixed, ones, tuple(root**2 for root in roots), units, seen, sum(scales), own_roots)
    mixed = tuple(root * m for root, m in zip(roots, mixed, strict=True))
    return JointLayers(matrices, mixed, roots, ones, units, seen, sum(scales), own_roots)


def _sized(scales: Sequence[float], energies: Sequence[float]) -> tuple[float, ...]:
    """What makes of matrices of these energies such of the others."""
    # A layer without energy loses nothing, whatever it is scaled by.
    return tuple((s / e) ** 0.5 if s > 0 and e > 0 else 1.0 for s, e in zip(scales, energies, strict=True))


def _own_roots(units: Sequence[Standard]) -> tuple[Tensor, ...]:
    own = ((each, statistics.output_weight(each.site)) for each in units)
    return tuple(weight / each.outputs.unsqueeze(1) for each, weight in own if weight is not None)


def _energies(matrices: Sequence[Tensor], seen: Sequence[statistics.Patches] | None) -> list[float]:
    if seen is None:
        return [float(m.square().sum()) for m in matrices]
    layers = zip(matrices, seen, strict=True)
    return [float(response.total_energy(m, patches.metric).sum()) for m, patches in layers]


def _patches(site: Group, units: Sequence[Standard], how: Unfolding) -> tuple[statistics.Patches, ...] | None:
    seen = [patches for each in units if (patches := each.patches(how))]
    if len(seen) < len(units):
        return None
    if not site.same_input:
        return tuple(seen)
    # Samples of one and the same stream: together they are more, and one metric has a closed form.
    mean = torch.stack([patches.mean for patches in seen]).mean(0)
    return (statistics.Patches(metric.mean([patches.metric for patches in seen]), mean),) * len(seen)


def compatible(layers: Sequence[LayerSpec], side: str) -> bool:
    """Whether layers can share the factor on a side: ``"left"`` the first, ``"right"`` the second, ``"both"`` each.

    Strides, padding and dilations may differ; a factor is a weight.
    """
    first = layers[0]
    alike = {spec.family for spec in layers}
    inputs = {s.in_channels for s in layers} == {first.in_channels}
    outputs = {s.out_channels for s in layers} == {first.out_channels}
    return len(layers) > 1 and len(alike) == 1 and (inputs or side == "right") and (outputs or side == "left")
