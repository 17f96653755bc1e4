"""The problem of a joint site under one unfolding: what every layer sees, and how much its errors count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.linalg import lowrank, response
from spectrim.linalg.moments import shrunk
from spectrim.linalg.unfold import Unfolding, unfold
from spectrim.methods import metrics
from spectrim.methods.metrics import ResponseMetric
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Group, Layer


@dataclass(frozen=True, eq=False)
class Problem:
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
    metrics
        What every layer sees; one object for all that see the same. None without calibration.
    outputs
        Output channels a group of every layer.
    scale
        What losing all layers adds to the loss.
    """

    matrices: tuple[Tensor, ...]
    mixed: tuple[Tensor, ...]
    roots: tuple[float, ...]
    weights: tuple[Tensor | None, ...]
    metrics: tuple[ResponseMetric, ...] | None
    outputs: tuple[int, ...]
    scale: float

    @property
    def full(self) -> tuple[Tensor, ...] | None:
        """Second moments ``[g, p, q, p, q]``, or ``[g, p, p]`` where only the average slice is known."""
        return None if self.metrics is None else tuple(metric.moment for metric in self.metrics)

    @property
    def slices(self) -> tuple[Tensor, ...] | None:
        """Average slice metrics; one object for all where all have one metric."""
        if self.full is None:
            return None
        made = {id(moment): response.slice_metric(moment) for moment in self.full}
        return tuple(made[id(moment)] for moment in self.full)

    @property
    def separates(self) -> bool:
        """Whether the error of a product is that in the slice metric, so that projections are optimal."""
        return self.full is None or all(m.dim() == 3 or m.shape[2] == 1 for m in self.full)

    def own_left(self, left: Tensor, number: int) -> Tensor:
        """The first factor of one layer alone, fitted to its mixed matrix, for the matrix as it is."""
        return left / self.roots[number]

    def own_right(self, right: Tensor, number: int) -> Tensor:
        """The same of a second factor."""
        return self.shared_right(right, number) / self.roots[number]

    def shared_right(self, right: Tensor, number: int = 0) -> Tensor:
        """The same of the second factor that all layers share."""
        weight = self.weights[number]
        return right if weight is None else metrics.mix(right, torch.linalg.pinv(weight, hermitian=True))


def pose(site: Group, how: Unfolding, *, common: bool) -> Problem | None:
    """The problem of a site, or None if calibration kept too little for this unfolding.

    Parameters
    ----------
    common
        Weigh the outputs of all layers alike, as a shared second factor needs.
    """
    parts = site.parts
    matrices = tuple(unfold(part.weight, how).double() for part in parts)
    outputs = tuple(part.spec.shape[1] for part in parts)
    if site.calibrated:
        held = _metrics(site, parts, how)
        if held is None:
            return None
        weights = _output_weights(parts, common=common)
    else:
        held, weights = None, tuple(None for _ in parts)
    mixed = tuple(metrics.mix(m, weight) for m, weight in zip(matrices, weights, strict=True))
    totals = _energies(mixed, held, outputs)
    # Losing a layer counts as it does where the layer is chosen alone, by its own weight.
    own = totals
    if common and weights[0] is not None:
        alone = [metrics.mix(m, metrics.output_weight(part)) for m, part in zip(matrices, parts, strict=True)]
        own = _energies(alone, held, outputs)
    scales = [metrics.scale(part, total) for part, total in zip(parts, own, strict=True)]
    # A layer without energy loses nothing, whatever it is scaled by.
    roots = tuple((s / t) ** 0.5 if s > 0 and t > 0 else 1.0 for s, t in zip(scales, totals, strict=True))
    mixed = tuple(root * m for root, m in zip(roots, mixed, strict=True))
    return Problem(matrices, mixed, roots, weights, held, outputs, sum(scales))


def _energies(matrices: Sequence[Tensor], held: Sequence[ResponseMetric] | None, outputs: Sequence[int]) -> list[float]:
    if held is None:
        return [float(m.square().sum()) for m in matrices]
    seen = zip(matrices, held, outputs, strict=True)
    return [float(response.total_energy(m, metric.moment, o).sum()) for m, metric, o in seen]


def _metrics(site: Group, parts: Sequence[Layer], how: Unfolding) -> tuple[ResponseMetric, ...] | None:
    found = [metrics.response_metric(part, how) for part in parts]
    held = [metric for metric in found if metric is not None]
    if len(held) < len(found):
        return None
    if site.same_input and len({metric.moment.shape for metric in held}) == 1:
        # Samples of one and the same stream: together they are more, and one metric has a closed form.
        moment = torch.stack([metric.moment for metric in held]).mean(0)
        mean = torch.stack([metric.mean for metric in held]).mean(0)
        return (ResponseMetric(moment, mean),) * len(held)
    return tuple(held)


def _output_weights(parts: Sequence[Layer], *, common: bool) -> tuple[Tensor | None, ...]:
    own = tuple(metrics.output_weight(part) for part in parts)
    if not common or any(weight is None for weight in own):
        return own if all(weight is not None for weight in own) else tuple(None for _ in parts)
    moments = [part.statistics.gradient for part in parts]
    mean = torch.stack([shrunk(m.second_moment, m.count) for m in moments]).mean(0)
    return (lowrank.square_root(mean),) * len(parts)


def compatible(layers: Sequence[LayerSpec], side: str) -> bool:
    """Whether layers can share the factor on a side: ``"left"`` the first, ``"right"`` the second, ``"both"`` each.

    Strides, padding and dilations may differ; a factor is a weight.
    """
    first = layers[0]
    alike = {spec.family for spec in layers}
    inputs = {s.in_channels for s in layers} == {first.in_channels}
    outputs = {s.out_channels for s in layers} == {first.out_channels}
    return len(layers) > 1 and len(alike) == 1 and (inputs or side == "right") and (outputs or side == "left")
