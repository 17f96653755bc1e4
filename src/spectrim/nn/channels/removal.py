"""Remove channels from a copy of a model, and keep what its layers deliver right in the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.network.coupling import OUT, Axis, axes_left
from spectrim.network.narrowing import narrowed
from spectrim.network.sites import Layer, Sites
from spectrim.nn.channels.narrow import add_bias, narrow
from spectrim.nn.copying import copy_model
from spectrim.nn.modules import make_layer
from spectrim.nn.surgery import replace_module

# On a model: what was left of its axes, removal by removal.
LEFT = "_spectrim_axes_left"


@dataclass(eq=False)
class Removal:
    """A model without some of its channels."""

    model: nn.Module  # a copy, which :meth:`cut` narrows, its layers corrected in closed form
    sites: Sites  # of the narrowed model (spectrim.network.narrowing.narrowed)
    axes: Mapping[Axis, Tensor]  # what is left of the dense model's axes
    changed: frozenset[str]  # layers that have lost something
    _means: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, sites: Sites, kept: Mapping[str, Sequence[int]]) -> Removal:
        """A removal from a copy, which has all channels yet; the model itself is left untouched."""
        axes = axes_left(sites.couplings, kept)
        return cls(copy_model(model), narrowed(sites, kept), axes, frozenset(name for name, _ in axes))

    def cut(self) -> None:
        """Carry out the removal on the copy."""
        small = self.model
        narrow(small, self.axes)
        if self.axes:
            vars(small)[LEFT] = (*vars(small).get(LEFT, ()), self.axes)
        for layer, norm in self.sites.norms.items():
            if layer in {site.name for site in self.sites}:
                mean = small.get_submodule(norm).running_mean
                assert isinstance(mean, Tensor)
                self._means[layer] = mean.detach().clone()
        for site in self.sites:
            if site.name in self.changed:
                self.write(site)

    def outputs(self, name: str) -> Tensor | None:
        """Output channels of the dense layer that are left, or None for all."""
        return self.axes.get((name, OUT))

    def corrects(self, name: str) -> bool:
        """Whether a layer that has no bias is read by a normalisation that can take one over."""
        return name in self._means

    def write(self, site: Layer) -> None:
        """Give a layer other weights. What it has no bias for goes to the normalisation behind it, if there is one."""
        spec, bias = site.spec, site.bias
        replace_module(self.model, spec.names, make_layer(spec, site.weight, bias if spec.bias else None))
        self.shift(site.name, bias, biased=spec.bias)

    @torch.no_grad()
    def shift(self, name: str, bias: Tensor | None, *, biased: bool) -> None:
        """See that the mean of a layer's responses is what it was, by ``bias``, whether the layer has one or not."""
        if biased or bias is None:
            return
        if name in self._means:
            self.settle(name, bias)
        elif bool((bias != 0).any()):
            layer: Any = self.model.get_submodule(name)
            add_bias(layer, name)
            layer.bias.copy_(bias)

    @torch.no_grad()
    def settle(self, name: str, bias: Tensor | None) -> None:
        """Have the normalisation behind a layer take over this bias, or none, if there is one."""
        if name in self._means:
            norm: Any = self.model.get_submodule(self.sites.norms[name])
            mean = self._means[name]
            norm.running_mean.copy_(mean if bias is None else mean - bias.to(mean))
