"""What layers are besides their numbers, kept where others take their place: trained or not, and their memory order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.nn.standing import LAYERS, StandIn


@dataclass(frozen=True)
class Traits:
    """What layers are besides their numbers: whether they are trained, and their order in memory."""

    trained: Mapping[str, tuple[bool, bool]]  # whether weight and bias get gradients, by the names of layers
    channels_last: frozenset[str]  # layers whose weight lies channels last

    @classmethod
    def of(cls, model: nn.Module) -> Traits:
        """Of all layers of a model, and of what stands for layers."""
        trained, last = {}, set()
        for name, layer in _layers(model):
            weights, bias = _parameters(layer)
            own = any(p.requires_grad for p in weights)
            trained[name] = own, own if bias is None else bias.requires_grad
            if any(_is_channels_last(p) for p in weights):
                last.add(name)
        return cls(trained, frozenset(last))

    def give(self, model: nn.Module) -> None:
        """Have the layers of those names in another model be the same. Shared parts are trained if one layer is."""
        wanted: dict[nn.Parameter, bool] = {}
        for name, layer in _layers(model):
            if name not in self.trained:
                continue
            weights, bias = _parameters(layer)
            for p in weights:
                wanted[p] = wanted.get(p, False) or self.trained[name][0]
                if name in self.channels_last and p.dim() in (4, 5):
                    order = torch.channels_last if p.dim() == 4 else torch.channels_last_3d
                    p.data = p.data.contiguous(memory_format=order)
            if bias is not None:
                wanted[bias] = self.trained[name][1]
        for p, trained in wanted.items():
            p.requires_grad_(trained)
        for module in model.modules():
            # What distributes a part of a model knows its parameters and buffers from when it was made.
            distributes = isinstance(module, nn.parallel.DistributedDataParallel)
            if distributes and any(p.requires_grad for p in module.parameters()):
                module.__setstate__(module.__getstate__())


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers, without the parts of those that are made of several."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, (*LAYERS, StandIn)) and module not in inside:
            inside.update(module.modules())
            yield name, module


def _parameters(layer: nn.Module) -> tuple[list[nn.Parameter], nn.Parameter | None]:
    """Those of a layer's weight, and its bias."""
    # What a parametrised layer has is computed when it is read, which may change what it is computed from.
    own = layer._parameters
    bias = layer.bias_parameter() if isinstance(layer, StandIn) else own.get("bias")
    parts = layer.parameters() if isinstance(layer, StandIn) else [own.get("weight")]
    return [p for p in parts if p is not None and p is not bias], bias


def _is_channels_last(weight: Tensor) -> bool:
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    return order is not None and weight.is_contiguous(memory_format=order) and not weight.is_contiguous()
