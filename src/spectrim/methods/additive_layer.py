"""A layer that a low-rank and a sparse part shall stand for: target and metric, and what their factors are in it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.linalg import lowrank
from spectrim.linalg.additive import Additive
from spectrim.linalg.low_rank_steps import Alternating, Exact, Greedy, LowRankStep, Product
from spectrim.linalg.metric import Metric, Plain, Rows
from spectrim.linalg.patterns import Pattern
from spectrim.linalg.sketch import Sketch
from spectrim.linalg.sparse import Quadratic
from spectrim.linalg.unfold import Unfolding, fold, unfold, unfolding
from spectrim.methods import statistics
from spectrim.methods.statistics import Standard
from spectrim.network.sites import Layer

# Arrays that hold a layer's rows as they are.
_WHOLE = Unfolding("channel", ())


@dataclass(frozen=True, eq=False)
class AdditiveLayer:
    """A layer as target and metric, for one unfolding of the low-rank part.

    All of it is in the layer's own units (:class:`~spectrim.methods.statistics.Standard`): input channels have unit
    variance. What is found is turned back by :meth:`factors`, :meth:`sparse` and :meth:`shift`.
    """

    units: Standard  # the layer in its own units
    how: Unfolding
    # Unfolding of which the arrays are rows ``(o, k_rest)`` over ``(i, k_S)``. It is that of the low-rank part where
    # all slices have one moment: a split kernel is then one that projects its outputs, like any other. Else
    # ``channel``.
    held: Unfolding
    target: Tensor  # the weight as ``[g, (o, k_rest), (i, k_S)]``
    error: Quadratic  # what is minimised: lost responses, or lost weights without calibration
    step: LowRankStep  # how the low-rank part is found
    mean: Tensor | None  # mean patch ``[g, n]``, or None without calibration

    @classmethod
    def known(cls, site: Layer, how: Unfolding) -> bool:
        """Whether a calibrated site has a metric for an unfolding."""
        if site.statistics.input is not None or _known_slices(site, how) is not None:
            return True
        return isinstance(site.statistics.sketch, Sketch)

    @classmethod
    def of(cls, site: Layer, how: Unfolding, *, exact: bool = False) -> AdditiveLayer:
        units = Standard.of(site)
        metric, mean = _metric(units, how)
        root, whole = units.root, _WHOLE
        split = None if how.name == "channel" else metric.sliced(how)
        if split is not None and split.separates:
            metric, whole = split.averaged, how
            if root is not None:
                each = torch.eye(split.slices, dtype=root.dtype, device=root.device)
                root = torch.einsum("gab,qs->gaqbs", root, each).flatten(3).flatten(1, 2)
        elif split is not None:
            metric = split
        # Layers of millions of weights, whose metrics are rows, are fitted in float32: half the memory and time.
        dtype = metric.dtype
        root = None if root is None else root.to(dtype)
        step: LowRankStep
        step = (Exact if exact else Greedy)(metric, root) if split is None or whole is how else Alternating(split, root)
        return cls(
            units, how, whole, _rows(units.own_weight.to(dtype), whole), Quadratic(metric, step.outer), step, mean
        )

    def single(self) -> AdditiveLayer:
        """The same in float32, at half the time: exact enough to tell choices apart, since channels have unit variance.

        Of a split kernel, whose normal equations ask for more digits, and in float32 it is the layer as it is.
        """
        if not isinstance(self.step, Greedy | Exact) or self.target.dtype == torch.float32:
            return self
        metric, root = self.error.metric.single(), self.step.root
        root = None if root is None else root.float()
        step = type(self.step)(metric, root)
        error = Quadratic(metric, step.outer)
        return dataclasses.replace(self, target=self.target.float(), error=error, step=step)

    @property
    def site(self) -> Layer:
        return self.units.site

    @property
    def kernel(self) -> tuple[int, ...]:
        """``(i, *k)`` of what the arrays hold."""
        return self.site.spec.shape[2:] if self.held is _WHOLE else self.target.shape[2:]

    @property
    def total(self) -> float:
        """Error of leaving out everything."""
        return self.error.value(self.target)

    def arranged(self, pattern: Pattern) -> Pattern:
        """A pattern of the layer as one of the arrays."""
        return pattern if self.held is _WHOLE else pattern.unfolded(self.held, self.site.spec.shape)

    def whole(self, rows: Tensor) -> Tensor:
        """An array as a weight ``[g, o, i, *k]``."""
        shape = self.site.spec.shape
        return rows.reshape(shape) if self.held is _WHOLE else fold(rows.mT, self.held, shape[1:])

    def scores(self) -> Tensor:
        """What each entry ``[g, o, i, *k]`` contributes on its own."""
        return self.whole((self.target * self.error.scale(self.target.shape[1])).square())

    def energies(self) -> Tensor:
        """Spectrum ``[g, R]`` of the low-rank problem alone, descending; for splits that of the average slice."""
        if self.held is _WHOLE:
            return self.step.energies(self.target)
        metric = self.error.metric.sliced(_WHOLE)
        return lowrank.energies(self.units.mixed(self.how), metric.average)

    def factors(self, product: Product | None) -> tuple[Tensor, Tensor]:
        """Left ``[g, (i, k_S), r]`` and right ``[g, r, (o, k_rest)]`` of a product; of rank 0 without one."""
        if product is not None:
            left, right = self.step.unfolded(product)
            return self.units.left(left), self.units.right(right)
        g, o, i, *kernel = self.site.spec.shape
        first, second = self.how.sizes(kernel)
        return self.target.new_zeros(g, i * first, 0), self.target.new_zeros(g, 0, o * second)

    def sparse(self, fit: Additive) -> Tensor:
        """The sparse weight ``[g, o, i, *k]``."""
        return self.units.weight(self.whole(fit.sparse.weight))

    def shift(self, fit: Additive) -> Tensor:
        """Mean response ``[o_total]`` of what both parts leave out, for the bias."""
        if self.mean is None:
            return self.target.new_zeros(math.prod(self.site.spec.shape[:2]))
        rest = self.target - fit.sparse.weight
        if fit.product is not None:
            rest = rest - fit.product.weight
        lost = self.whole(rest).flatten(2)
        return self.units.shift(torch.einsum("gon,gn->go", lost, self.mean.to(rest.dtype)).reshape(-1))


def _rows(weight: Tensor, how: Unfolding) -> Tensor:
    """A weight ``[g, o, i, *k]`` as rows."""
    return weight.flatten(2) if how is _WHOLE else unfold(weight, how).mT.contiguous()


def _known_slices(site: Layer, how: Unfolding) -> Unfolding | None:
    """The unfolding whose slices stand for the patches under an unfolding; the smallest ones for the whole kernel."""
    slices = site.statistics.slices
    if how.name != "channel":
        return how if how.name in slices else None
    name = min(slices, key=lambda name: slices[name].mean.shape[-1], default=None)
    return None if name is None else unfolding(site.spec.kernel, name)


def _metric(units: Standard, how: Unfolding) -> tuple[Metric, Tensor | None]:
    """Metric and mean of the patches in the layer's units, by the best that calibration kept."""
    site = units.site
    g, _, *patch = site.spec.shape
    sketch = site.statistics.sketch
    if not site.statistics:
        return Plain(g, tuple(patch), site.weight.device, how), None
    if site.statistics.input is None and sketch is not None:
        each = 1 / statistics.channel_units(units.inputs, sketch.mean.shape[1])
        rows, level = sketch.shrunk()
        rows, level = ((rows * each.unsqueeze(1)).to(sketch.rows), (level * each.square()).to(sketch.rows))
        return Rows(rows, level, tuple(patch)), sketch.mean * each
    seen = units.patches(_known_slices(site, how) or how)
    assert seen is not None
    return seen.metric, seen.mean
