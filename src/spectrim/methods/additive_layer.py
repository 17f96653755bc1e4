"""The problem of a low-rank and a sparse part at one site: its target, its metric, and how to read its factors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.linalg import lowrank, response
from spectrim.linalg.additive import Additive
from spectrim.linalg.low_rank_steps import Exact, Greedy, LowRankStep, Product, Split
from spectrim.linalg.metric import Full, Metric, Plain, Rows, Slices
from spectrim.linalg.moments import shrunk
from spectrim.linalg.sketch import Sketch
from spectrim.linalg.sparse import Quadratic
from spectrim.linalg.unfold import Unfolding, slice_rows, unfold, unfolding
from spectrim.methods import metrics
from spectrim.network.sites import Layer


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer as target and metric, for one unfolding of the low-rank part.

    Attributes
    ----------
    target
        The weight as ``[g, o, (i, *k)]``, float64.
    error
        What is minimised: lost responses, or lost weights without calibration.
    step
        How the low-rank part is found.
    mean
        Mean patch ``[g, n]``, or None without calibration.
    """

    site: Layer
    how: Unfolding
    target: Tensor
    error: Quadratic
    step: LowRankStep
    mean: Tensor | None

    @classmethod
    def known(cls, site: Layer, how: Unfolding) -> bool:
        """Whether a calibrated site has a metric for an unfolding."""
        if site.statistics.input is not None or _window(site, how) is not None:
            return True
        return isinstance(site.statistics.sketch, Sketch)

    @classmethod
    def of(cls, site: Layer, how: Unfolding, *, exact: bool = False) -> Problem:
        spec = site.spec
        g, o, *patch = spec.shape
        weight = metrics.output_weight(site)
        metric, mean = _metric(site, how)
        # Layers of millions of weights are fitted in float32: half the memory and time, and accuracy to spare.
        dtype = torch.float32 if isinstance(metric, Rows) else torch.float64
        target = site.weight.to(dtype).reshape(g, o, -1)
        weight = None if weight is None else weight.to(dtype)
        outer = None if weight is None else weight @ weight
        if how.name == "channel":
            step: LowRankStep = (Exact if exact else Greedy)(metric, weight)
        else:
            step = Split(metric, weight, tuple(patch), how.axes)
        return cls(site, how, target, Quadratic(metric, outer), step, mean)

    @property
    def kernel(self) -> tuple[int, ...]:
        """``(i, *k)``."""
        return self.site.spec.shape[2:]

    @property
    def total(self) -> float:
        """Error of leaving out everything."""
        return self.error.value(self.target)

    def scores(self) -> Tensor:
        """What each entry ``[g, o, n]`` contributes on its own."""
        return (self.target * self.error.scale(self.target.shape[1])).square()

    def energies(self) -> Tensor:
        """Spectrum ``[g, R]`` of the low-rank problem alone, descending; for splits that of the average slice."""
        if isinstance(self.step, Split):
            matrix = metrics.mix(unfold(self.site.weight, self.how), self.step.root)
            return lowrank.energies(matrix, response.slice_metric(self.step.moment))
        mixed = self.target if self.step.root is None else self.step.root @ self.target
        gram = (self.error.metric.times(mixed) @ mixed.mT).double()
        return torch.linalg.eigvalsh((gram + gram.mT) / 2).flip(-1).clamp_min(0)

    def factors(self, product: Product | None) -> tuple[Tensor, Tensor]:
        """Left ``[g, (i, k_S), r]`` and right ``[g, r, (o, k_rest)]`` of a product; of rank 0 without one."""
        if product is None:
            spec = self.site.spec
            g, o, i, *kernel = spec.shape
            first, second = self.how.sizes(kernel)
            return self.target.new_zeros(g, i * first, 0), self.target.new_zeros(g, 0, o * second)
        left, right = product.factors
        return (left, right) if isinstance(self.step, Split) else (right.mT, left.mT)

    def shift(self, found: Additive) -> Tensor:
        """Mean response ``[o_total]`` of what both parts leave out, for the bias."""
        if self.mean is None:
            return self.target.new_zeros(self.target.shape[0] * self.target.shape[1])
        rest = self.target - found.sparse.weight
        if found.product is not None:
            rest = rest - found.product.weight
        return torch.einsum("gon,gn->go", rest, self.mean.to(rest.dtype)).reshape(-1)


def _window(site: Layer, how: Unfolding) -> str | None:
    """The unfolding whose slices stand for the metric under another; the smallest one for the whole kernel."""
    slices = site.statistics.slices
    if how.name != "channel":
        return how.name if how.name in slices else None
    return min(slices, key=lambda name: slices[name].mean.shape[-1], default=None)


def _metric(site: Layer, how: Unfolding) -> tuple[Metric, Tensor | None]:
    spec = site.spec
    g, _, *patch = spec.shape
    if not site.statistics:
        return Plain(g, spec.features, site.weight.device), None
    if site.statistics.input is not None:
        held = site.statistics.input
        return Full(shrunk(held.covariance, held.count)), held.mean
    sketch = site.statistics.sketch
    if isinstance(sketch, Sketch):
        rows = sketch.rows / max(sketch.count, 1) ** 0.5
        metric = Rows(rows, sketch.level().to(rows.dtype))
        return (metric if how.name == "channel" else _sliced(metric, tuple(patch), how)), sketch.mean
    name = _window(site, how)
    assert name is not None
    held = site.statistics.slices[name]
    axes = unfolding(spec.kernel, name).axes
    moment = shrunk(held.covariance, held.count)
    inside = [patch[0], *(k if a in axes else 1 for a, k in enumerate(patch[1:]))]
    mean = held.mean.reshape(g, *inside).expand(g, *patch).reshape(g, math.prod(patch))
    return Slices(moment, tuple(patch), axes), mean


def _sliced(metric: Rows, patch: tuple[int, ...], how: Unfolding) -> Slices:
    """The average moment of the slices of an unfolding, from that of whole patches ``(i, *k)``."""
    g, m, _ = metric.rows.shape
    rows = slice_rows(metric.rows.reshape(g, m, *patch), how).double()
    slices = rows.shape[1] // m
    moment = rows.mT @ rows / slices
    moment.diagonal(dim1=-2, dim2=-1).add_(metric.level.double().unsqueeze(-1))
    return Slices(moment, patch, how.axes)
