"""The problem of a low-rank and a sparse part at one site: its target, its metric, and how to read its factors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.linalg import response
from spectrim.linalg.additive import Additive, Exact, Greedy, LowRankStep, Product, Split
from spectrim.linalg.metric import Full, Metric, Plain, Slices
from spectrim.linalg.moments import shrunk
from spectrim.linalg.sparse import Quadratic
from spectrim.methods import metrics
from spectrim.sites import Site
from spectrim.unfold import Unfolding, unfold, unfolding


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

    site: Site
    how: Unfolding
    target: Tensor
    error: Quadratic
    step: LowRankStep
    mean: Tensor | None

    @classmethod
    def known(cls, site: Site, how: Unfolding) -> bool:
        """Whether a calibrated site has a metric for an unfolding."""
        return "input" in site.moments or _window(site, how) is not None

    @classmethod
    def of(cls, site: Site, how: Unfolding, *, exact: bool = False) -> Problem:
        spec = site.spec
        g, o, *patch = spec.shape
        target = site.weight.double().reshape(g, o, -1)
        weight = metrics.output_weight(site)
        outer = None if weight is None else weight @ weight
        metric, mean = _metric(site, how)
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

    def matrix_and_slices(self) -> tuple[Tensor, Tensor | None]:
        """The unfolded weight with the outputs weighted, and the average slice metric: a spectrum to look at."""
        matrix = metrics.mix(unfold(self.site.weight, self.how), metrics.output_weight(self.site))
        if isinstance(self.step, Split):
            return matrix, response.slice_metric(self.step.moment)
        metric = self.error.metric
        if isinstance(metric, Plain):
            return matrix, None
        if isinstance(metric, Full):
            return matrix, metric.moment
        eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        return matrix, metric.times(eye.expand(matrix.shape[0], -1, -1))

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
        return torch.einsum("gon,gn->go", rest, self.mean).reshape(-1)


def _window(site: Site, how: Unfolding) -> str | None:
    """The slice statistic that stands for the metric under an unfolding; the smallest one for the whole kernel."""
    if how.name != "channel":
        return metrics.window(how) if metrics.window(how) in site.moments else None
    held = {name: moments.mean.shape[-1] for name, moments in site.moments.items() if name.startswith("input:")}
    return min(held, key=lambda name: held[name], default=None)


def _metric(site: Site, how: Unfolding) -> tuple[Metric, Tensor | None]:
    spec = site.spec
    g, _, *patch = spec.shape
    if not site.moments:
        return Plain(g, spec.features, site.weight.device), None
    if "input" in site.moments:
        held = site.moments["input"]
        return Full(shrunk(held.covariance, held.count)), held.mean
    name = _window(site, how)
    assert name is not None
    held = site.moments[name]
    axes = unfolding(spec.kernel, name.removeprefix("input:")).axes
    moment = shrunk(held.covariance, held.count)
    metric = Slices(moment, tuple(patch), axes)
    inside = [patch[0], *(k if a in axes else 1 for a, k in enumerate(patch[1:]))]
    mean = held.mean.reshape(g, *inside).expand(g, *patch).reshape(g, math.prod(patch))
    return metric, mean
