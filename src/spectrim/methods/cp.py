"""CP: a convolution as 1 x 1, depthwise and 1 x 1."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectrim.linalg import multilinear
from spectrim.linalg.bisection import last_integer
from spectrim.methods.base import pays
from spectrim.methods.chained_layer import (
    WORK,
    ChainedLayer,
    ChainMethod,
    OfResponses,
    OfWeight,
    biased,
    shifted_bias,
    typed,
)
from spectrim.network import chains
from spectrim.network.choices import Choice, CPChoice
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer
from spectrim.network.structure import Chain

log = logging.getLogger(__name__)

# Ranks of a curve, each so many times the next one, from nearly where nothing is saved.
_RANKS, _RATIO, _MOST = 10, 0.73, 0.9
# Evaluations of the error for a point of the curve, and the fewest with which one is offered.
_ENOUGH, _FEWEST = 40, 8
# Of numbers with a smaller step than this, rounding is not felt.
_FINE = 1e-5


@dataclass(frozen=True)
class _CP(ChainMethod):
    """See :class:`WeightCP` and :class:`ActivationCP`."""

    offers: ClassVar[type[Choice]] = CPChoice

    # With the 200 of a Tucker-2 layers lose a little less, and networks do not.
    evaluations: int = 100
    # ``whole`` for one depthwise layer, ``axes`` for one of every axis; by default both, the second where it has half
    # the numbers of the first or fewer.
    kernels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("whole", "axes")
        if self.kernels is None:
            return
        if (
            not isinstance(self.kernels, tuple | list)
            or not self.kernels
            or any(kernel not in known for kernel in self.kernels)
        ):
            raise ValueError(f"kernels is {self.kernels!r}; expected a tuple of names out of {', '.join(known)}")

    def offered(self, layer: ChainedLayer) -> Sequence[tuple[Choice, float]]:
        pairs: list[tuple[Choice, float]] = []
        kinds = self._kinds(layer.site.spec)
        for kernel in kinds:
            least = math.inf
            for rank in self._ranks(layer.site.spec, kernel):
                evaluations = self._evaluations(layer, rank, carried_out=False)
                if evaluations < min(_FEWEST, self.evaluations):
                    log.info(
                        "%s: CP from rank %d on is not offered at %r (%s): fitting it would take too long",
                        self.name, rank, layer.site.name, layer.site.spec.kind,
                    )  # fmt: skip
                    break
                choice = CPChoice(rank, kernel, biased(layer), method=self.name)
                modes, error = _fitted(layer, choice, evaluations)
                error = layer.lost(multilinear.columns_of(modes), error) + _rounded(layer, modes)
                # A fit that came to no less than one of fewer components is nothing to offer.
                if error < least:
                    pairs.append((choice, error))
                    least = error
        return pairs

    def leanest(self, site: Layer) -> Sequence[Choice]:
        spec, biased = site.spec, site.spec.bias or bool(site.statistics)
        if not chains.chains_fit(spec):
            return []
        least = ((kernel, rank) for kernel in self._kinds(spec) for rank in self._ranks(spec, kernel)[:1])
        return [CPChoice(rank, kernel, biased, method=self.name) for kernel, rank in least]

    def factorize(self, site: Layer, choice: CPChoice) -> chains.CP:
        layer, kernel = self.layer(site), site.spec.kernel
        modes, _ = _fitted(layer, choice, self._evaluations(layer, choice.rank, carried_out=True))
        inner, outer, shift = layer.ends(modes[0], multilinear.columns_of(modes))
        parts = zip(modes[1:], chains.parts_of(kernel, choice.kernel), strict=True)
        kernels = [chains.kernel_of(mode, kernel, part) for mode, part in parts]
        return chains.CP(*_balanced(inner, kernels, outer, site), shifted_bias(shift, choice.bias, site))

    def layers(self, site: Layer, choice: CPChoice) -> Chain:
        return chains.cp_layers(site.spec, choice)

    def _evaluations(self, layer: ChainedLayer, rank: int, *, carried_out: bool) -> int:
        """Evaluations of the error for a point of the curve, or for a choice that is carried out: no fewer."""
        work = multilinear.polyadic_work(layer.fitted, rank)
        most = int(WORK / (_RANKS * len(self._kinds(layer.site.spec))) / work)
        if layer.judge is not None:
            # What is better by the weight may be worse by the data: the curve is that of what is carried out.
            return min(most, self.evaluations)
        few = min(most, _ENOUGH)
        return min(max(few, int(WORK / work)) if carried_out else few, self.evaluations)

    def _kinds(self, spec: LayerSpec) -> tuple[str, ...]:
        parts = chains.parts_of(spec.kernel, "axes")
        if len(parts) < 2:
            return ("whole",) if self.kernels is None or "whole" in self.kernels else ()
        few = 2 * sum(spec.kernel[axis] for (axis,) in parts) <= math.prod(spec.kernel)
        return self.kernels or (("whole", "axes") if few else ("whole",))

    def _ranks(self, spec: LayerSpec, kernel: str) -> list[int]:
        """Ranks on offer, ascending."""
        full = chains.full_rank(spec.shape[1:])
        step = self.multiple(spec, min(spec.in_channels, spec.out_channels))
        end = last_integer(lambda rank: pays(chains.cp_layers(spec, CPChoice(rank, kernel)), (spec,)), 0, full + 1)
        wanted = (_MOST * end * _RATIO**number for number in range(_RANKS))
        ranks = {step * round(rank / step) for rank in wanted}
        return sorted(rank for rank in ranks if 1 <= rank <= end)


@dataclass(frozen=True)
class WeightCP(OfWeight, _CP):
    """Solve ``min ||W - W'||`` over sums of ``r`` products of one factor an axis, by the weight alone.

    A convolution becomes one of 1 x 1 to ``r`` channels, a depthwise one with the kernel (or one for each axis of the
    kernel), and one of 1 x 1. Offered for convolutions of one group whose kernel is larger than 1. With calibration the
    factors are the same, the error is what they lose of the layer's output energy, and the mean of what they leave out
    goes into the bias.

    Attributes
    ----------
    multiple_of, evaluations, kernels
        As for :class:`ActivationCP`.
    """


@dataclass(frozen=True)
class ActivationCP(OfResponses, _CP):
    """Solve ``min E ||(W - W') (x - m)||^2`` over the sums of :class:`WeightCP`, ``x`` the layer's input patches.

    The start are singular vectors of the weight in the layer's own units, and L-BFGS goes on from them
    (:mod:`spectrim.linalg.multilinear`). Where the site holds a sensitivity, the norm weighs the outputs by the
    gradients that reach them. There are many minima: another start would end elsewhere.

    Attributes
    ----------
    multiple_of
        Offer ranks that are multiples of this; what suits the device and the layer's width if None.
    evaluations
        Of the error, when a choice is carried out. A point of the curve is that of 40 from the same start, which more
        only improve. Where so many would take more than some seconds for one layer there are fewer, and ranks at which
        fewer than 8 are left are not offered.
    kernels
        ``whole`` for one depthwise layer, ``axes`` for one of every axis; by default both, the second where it has half
        the numbers of the first or fewer.

    Notes
    -----
    Lebedev et al. 2015 (CP of the weight, four layers). The error is that of :class:`~spectrim.ActivationSVD`, so that
    both compete in one table.
    """


def _fitted(layer: ChainedLayer, choice: CPChoice, evaluations: int) -> tuple[list[Tensor], float]:
    """Modes of a CP, and what they lose in the metric of the fit."""
    parts = chains.parts_of(layer.site.spec.kernel, choice.kernel)
    start = multilinear.polyadic_start(layer.fitted, parts, choice.rank)
    return multilinear.polyadic(layer.fitted, start, evaluations)


def _rounded(layer: ChainedLayer, modes: Sequence[Tensor]) -> float:
    """Share of the weight's energy that rounding to a layer of few bits loses: much where large components cancel."""
    step = torch.finfo(layer.site.spec.dtype).eps
    if step < _FINE:
        return 0.0
    inner, outer, _ = layer.ends(modes[0], multilinear.columns_of(modes))
    sizes = inner.norm(dim=0) * outer.norm(dim=0)
    for mode in modes[1:]:
        sizes = sizes * mode.norm(dim=0)
    return float((step * sizes).square().sum() / layer.site.weight.to(sizes.dtype).square().sum())


def _balanced(
    inner: Tensor, kernels: Sequence[Tensor], outer: Tensor, site: Layer
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """The same product with factors of one size in every component, in the layer's precision."""
    sizes = [inner.norm(dim=0), *(kernel.flatten(1).norm(dim=1) for kernel in kernels), outer.norm(dim=0)]
    whole = [torch.where(size > 0, size, torch.ones_like(size)) for size in sizes]
    mean = torch.stack([size.log() for size in whole]).mean(0).exp()
    gains = [mean / size for size in whole]
    axes = [gain.reshape(-1, *(1 for _ in kernel.shape[1:])) for gain, kernel in zip(gains[1:-1], kernels, strict=True)]
    balanced = [inner * gains[0], *(k * gain for k, gain in zip(kernels, axes, strict=True)), outer * gains[-1]]
    first, *middle, last = typed(balanced, site)
    return first, tuple(middle), last
