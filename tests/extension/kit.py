"""What a user's own package adds: a method, a cost, a selector and a training trick, without a line in ``src``.

The method is Tucker-2 by truncated higher-order SVD (De Lathauwer, De Moor, Vandewalle 2000; Kim et al. 2016): a k x k
convolution becomes 1 x 1, k x k and 1 x 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.methods.base import WEIGHT_ENERGY, Curve, Method
from spectrim.network.choices import Choice, Rank
from spectrim.network.factors import Factors
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer
from spectrim.network.structure import Chain
from spectrim.nn.build import build
from spectrim.nn.modules import make_layer
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import make_plan

# Picojoules of a multiply-accumulate and of fetching a number from memory.
_PER_MAC, _PER_NUMBER = 4.6, 640.0


@dataclass(frozen=True)
class Tucker2Choice(Choice, kind="tucker2"):
    """Three layers in place of one: ``inputs`` and ``outputs`` channels lie between them."""

    inputs: Rank
    outputs: Rank

    def __str__(self) -> str:
        return f"Tucker-2, ranks {self.inputs} and {self.outputs}"


@dataclass(frozen=True, eq=False)
class Tucker2Factors(Factors, kind="tucker2"):
    """``W = sum_pq core[q, p] outer[:, q] inner[:, p]``.

    Attributes
    ----------
    inner, core, outer
        ``[i, p]``, ``[q, p, *k]`` and ``[o, q]``.
    """

    inner: Tensor
    core: Tensor
    outer: Tensor

    def dense(self) -> tuple[Tensor, ...]:
        return (torch.einsum("oq,qp...,ip->oi...", self.outer, self.core, self.inner).unsqueeze(0),)

    def numel(self) -> int:
        return self.inner.numel() + self.core.numel() + self.outer.numel()

    @classmethod
    def empty(cls, shapes: Sequence[Sequence[int]], choice: Tucker2Choice) -> Tucker2Factors:
        ((_, o, i, *kernel),) = shapes
        if choice.inputs > i or choice.outputs > o:
            raise ValueError(f"ranks {choice.inputs} and {choice.outputs} of a layer with {i} inputs and {o} outputs")
        p, q = choice.inputs, choice.outputs
        return cls(torch.empty(i, p), torch.empty(q, p, *kernel), torch.empty(o, q))


def three(spec: LayerSpec, inputs: int, outputs: int, *, bias: bool) -> Chain:
    """The layers of a Tucker-2 in place of one."""
    ones, none = (1,) * len(spec.kernel), (0,) * len(spec.kernel)
    thin = {"kernel": ones, "stride": ones, "padding": none, "dilation": ones, "padding_mode": "zeros"}
    after = tuple(spec.output_shape(shape) for shape in spec.inputs)
    return Chain(
        (
            dataclasses.replace(spec, out_channels=inputs, bias=False, **thin),
            dataclasses.replace(spec, in_channels=inputs, out_channels=outputs, bias=False),
            dataclasses.replace(spec, in_channels=outputs, bias=bias, inputs=after, **thin),
        )
    )


@build.register
def _(factors: Tucker2Factors, layers: Sequence[LayerSpec], biases: Sequence[Tensor | None]) -> tuple[nn.Module, ...]:
    (spec,), (bias,) = layers, biases
    p, q = factors.inner.shape[1], factors.outer.shape[1]
    first, second, third = three(spec, p, q, bias=bias is not None)
    ones = (1,) * len(spec.kernel)
    return (
        nn.Sequential(
            make_layer(first, factors.inner.t().reshape(1, p, -1, *ones)),
            make_layer(second, factors.core.unsqueeze(0)),
            make_layer(third, factors.outer.reshape(1, -1, q, *ones), bias),
        ),
    )


@dataclass(frozen=True)
class Tucker2(Method):
    """Tucker-2 of the weight, without data.

    Attributes
    ----------
    shares
        Parts of the channels that stay on either side.
    """

    shares: tuple[float, ...] = (0.25, 0.5, 0.75)

    def curve(self, site: Layer) -> Curve:
        spec, weight = site.spec, site.weight
        if len(spec.kernel) != 2 or spec.groups > 1 or spec.transposed or max(spec.kernel) == 1:
            return Curve((), (), WEIGHT_ENERGY)
        choices = [
            Tucker2Choice(math.ceil(a * spec.in_channels), math.ceil(b * spec.out_channels), method=self.name)
            for a in self.shares
            for b in self.shares
        ]
        whole = float(weight.double().square().sum())
        # The bases are orthonormal, so that the core has the energy that is kept.
        errors = [1 - float(self.factorize(site, c).core.double().square().sum()) / whole for c in choices]
        return Curve(tuple(choices), tuple(errors), WEIGHT_ENERGY)

    def factorize(self, site: Layer, choice: Tucker2Choice) -> Tucker2Factors:
        cube = site.weight[0].double()
        outer = torch.linalg.svd(cube.flatten(1), full_matrices=False).U[:, : choice.outputs]
        inner = torch.linalg.svd(cube.transpose(0, 1).flatten(1), full_matrices=False).U[:, : choice.inputs]
        core = torch.einsum("oi...,oq,ip->qp...", cube, outer, inner)
        return Tucker2Factors(*(part.to(site.weight.dtype).contiguous() for part in (inner, core, outer)))

    def layers(self, site: Layer, choice: Tucker2Choice) -> Chain:
        return three(site.spec, choice.inputs, choice.outputs, bias=site.spec.bias)


def joules(specs: Sequence[LayerSpec]) -> float:
    """Millijoules of one sample: multiplying, and fetching every number once."""
    return (_PER_MAC * st.macs(specs) + _PER_NUMBER * st.parameters(specs)) * 1e-9


def first_fit(candidates: Candidates, budget: st.Budget) -> st.Plan:
    """Site by site the option that saves most, until the network is within the budget."""
    limits = budget.limits(candidates.dense)
    picks = [0] * len(candidates)
    for number, row in enumerate(candidates):
        plan = make_plan(candidates, picks, budget=limits, selector="first_fit")
        if all(plan.costs[cost] <= limit for cost, limit in limits.items()):
            break
        saved = [sum(row.dense.costs[c] - option.costs[c] for c in limits) for option in row.options]
        picks[number] = saved.index(max(saved))
    return make_plan(candidates, picks, budget=limits, selector="first_fit")


class Shrink:
    """A training trick: weights above a bound are clipped after every step, and counted."""

    def __init__(self, bound: float) -> None:
        self.bound, self.steps = bound, 0

    def __call__(self, model: nn.Module) -> None:
        self.steps += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-self.bound, self.bound)


def energy_of_cores(model: nn.Module) -> Tensor:
    """A penalty: the energy of the middle layers."""
    return 1e-3 * sum(
        m[1].weight.square().sum() for m in model.modules() if isinstance(m, nn.Sequential) and len(m) == 3
    )


def network() -> nn.Module:
    """A small network of three convolutions."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(
        *body, nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )
