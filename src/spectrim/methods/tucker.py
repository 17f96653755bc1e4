"""Tucker-2: a convolution as 1 x 1, k x k between fewer channels, and 1 x 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from spectrim.linalg import multilinear
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
from spectrim.network.choices import Choice, TuckerChoice
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer
from spectrim.network.structure import Chain

# Shares of the channels that stay on either side.
_SHARES = tuple(0.9 * 0.72**number for number in range(9))
# Evaluations of the error for a fit to the weight that is judged by data.
_JUDGED = 10


@dataclass(frozen=True)
class _Tucker2(ChainMethod):
    """See :class:`WeightTucker2` and :class:`ActivationTucker2`."""

    offers: ClassVar[type[Choice]] = TuckerChoice

    def offered(self, layer: ChainedLayer) -> Sequence[tuple[Choice, float]]:
        spec = layer.site.spec
        inputs = [n for n in self._numbers(spec, spec.in_channels) if _affordable(layer, n) > 0]
        if not inputs:
            return []
        inner = multilinear.tucker_start(layer.fitted, inputs[-1])
        errors = multilinear.tucker_errors(layer.fitted, inner, inputs)
        pairs: list[tuple[Choice, float]] = []
        for number, lost in zip(inputs, errors, strict=True):
            for outputs in self._numbers(spec, spec.out_channels):
                choice = TuckerChoice(number, outputs, biased(layer), method=self.name)
                if pays(chains.tucker_layers(spec, choice), (spec,)):
                    error = float(lost[outputs])
                    if layer.judge is not None:
                        # What is better by the weight may be worse by the data: it is carried out for the curve.
                        few = self._evaluations(layer, number)
                        kept, core = multilinear.tucker(layer.fitted, inner[:, :number], outputs, few)
                        error = layer.lost(_columns(kept, core), error)
                    pairs.append((choice, error))
        return pairs

    def leanest(self, site: Layer) -> Sequence[Choice]:
        spec = site.spec
        if not chains.chains_fit(spec):
            return []
        inputs, outputs = (self._numbers(spec, channels)[:1] for channels in (spec.in_channels, spec.out_channels))
        biased = spec.bias or bool(site.statistics)
        return [TuckerChoice(p, q, biased, method=self.name) for p in inputs for q in outputs]

    def factorize(self, site: Layer, choice: TuckerChoice) -> chains.Tucker2:
        layer = self.layer(site)
        start = multilinear.tucker_start(layer.fitted, choice.inputs)
        evaluations = self._evaluations(layer, choice.inputs)
        inner, core = multilinear.tucker(layer.fitted, start, choice.outputs, evaluations)
        inner, outer, shift = layer.ends(inner, _columns(inner, core))
        inner, core, outer = typed(_balanced(inner, core, outer), site)
        return chains.Tucker2(inner, core, outer, shifted_bias(shift, choice.bias, site))

    def layers(self, site: Layer, choice: TuckerChoice) -> Chain:
        return chains.tucker_layers(site.spec, choice)

    def _evaluations(self, layer: ChainedLayer, inputs: int) -> int:
        most = _affordable(layer, inputs)
        return min(self.evaluations, most if layer.judge is None else min(_JUDGED, most // len(_SHARES) ** 2))

    def _numbers(self, spec: LayerSpec, channels: int) -> list[int]:
        step = self.multiple(spec, channels)
        numbers = {step * max(1, round(share * channels / step)) for share in _SHARES}
        return sorted(number for number in numbers if number <= channels)


@dataclass(frozen=True)
class WeightTucker2(OfWeight, _Tucker2):
    """Solve ``min ||W - W'||`` over weights that see ``p`` combinations of the inputs and give ``q`` of the outputs.

    A convolution becomes one of 1 x 1 to ``p`` channels, one with the kernel from ``p`` to ``q``, and one of 1 x 1.
    Offered for convolutions of one group whose kernel is larger than 1. With calibration the factors are the same, the
    error is what they lose of the layer's output energy, and the mean of what they leave out goes into the bias.

    Attributes
    ----------
    multiple_of, evaluations
        As for :class:`ActivationTucker2`.
    """


@dataclass(frozen=True)
class ActivationTucker2(OfResponses, _Tucker2):
    """Solve ``min E ||(W - W') (x - m)||^2`` over the weights of :class:`WeightTucker2`, ``x`` the input patches.

    For given combinations of the inputs core and last factor are exact: principal components of what least squares
    answers from them. The combinations start as the leading ones in the average slice of the patch, and L-BFGS goes on
    from there (:mod:`spectrim.linalg.multilinear`). Where the site holds a sensitivity, the norm weighs the outputs by
    the gradients that reach them.

    Attributes
    ----------
    multiple_of
        Offer ranks that are multiples of this; what suits the device and the layer's width if None.
    evaluations
        Of the error, when a choice is carried out. The curve is that of the start, which they only improve; layers that
        would take more than some seconds have fewer, and ranks that would take so long at the start are not offered.

    Notes
    -----
    Kim et al. 2016 (Tucker-2 of the weight). The error is that of :class:`~spectrim.ActivationSVD`, so that both
    compete in one table.
    """


def _affordable(layer: ChainedLayer, inputs: int) -> int:
    return int(WORK / multilinear.tucker_work(layer.fitted, inputs))


def _columns(inner: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """What each output of the core sees of a patch, ``[n, q]``."""
    return torch.einsum("ip,qp...->i...q", inner, core).flatten(0, -2)


def _balanced(inner: torch.Tensor, core: torch.Tensor, outer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same product with columns of ``inner`` and ``outer`` of unit length, times the root of their mean size."""
    first, last = (torch.where((size := f.norm(dim=0)) > 0, size, torch.ones_like(size)) for f in (inner, outer))
    core = core * first.reshape(1, -1, *(1 for _ in core.shape[2:])) * last.reshape(-1, *(1 for _ in core.shape[1:]))
    size = core.square().mean().sqrt().clamp_min(1e-30).pow(1 / 3)
    return inner / first * size, core / size.square(), outer / last * size
