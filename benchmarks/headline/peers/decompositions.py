"""Thin layers of the peers: spatial SVD, Tucker-2 and CP of weights alone, and low rank of the responses.

Spatial SVD is what AIMET and Jaderberg et al. (BMVC 2014) do; Tucker-2 that of Kim et al. (ICLR 2016) with equal shares
of both ranks; CP that of Lebedev et al. (ICLR 2015) by TensorLy. Low rank of the responses projects a layer's outputs
onto their leading principal directions, uncentred: with a Lagrangian it is BALF (arXiv 2509.25136), with equal shares
the whitened SVD of SVD-LLM (ICLR 2025), which has the same optimum. All are written from descriptions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.headline.network import run_on
from benchmarks.headline.peers.layers import Decomposition, Layer, Option


def thin(weight: Tensor, *, like: Any = None, bias: Tensor | None = None, **options: Any) -> nn.Module:
    """A layer of a weight; of ``[o, i]`` a linear one if ``like`` is, else a convolution of 1 x 1."""
    if isinstance(like, nn.Linear):
        layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    else:
        weight = weight if weight.dim() == 4 else weight[:, :, None, None]
        groups = options.get("groups", 1)
        shape = weight.shape[2:]
        layer = nn.Conv2d(weight.shape[1] * groups, len(weight), shape, bias=bias is not None, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def moving(layer: Any, axes: Sequence[int] = (0, 1)) -> dict[str, Any]:
    """Stride, padding and dilation of a convolution along some axes, and none along the others."""
    plain = {"stride": 1, "padding": 0, "dilation": 1}
    return {
        key: tuple(getattr(layer, key)[axis] if axis in axes else still for axis in (0, 1))
        for key, still in plain.items()
    }


class SpatialSVD(Decomposition):
    """A column of a kernel, then a row; of a linear layer the plain SVD."""

    @functools.cached_property
    def _known(self) -> dict[str, Any]:
        return {}

    def _svd(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        if layer.name not in self._known:
            weight = layer.module.weight.detach().double()
            if weight.dim() == 4:  # (inputs x height) by (outputs x width)
                weight = weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
            self._known[layer.name] = torch.linalg.svd(weight, full_matrices=False)
        return self._known[layer.name]

    def options(self, layer: Layer) -> list[Option]:
        left, values, right = self._svd(layer)
        energy = values.square()
        lost = 1 - energy.cumsum(0) / energy.sum()
        middle = layer.pixels if layer.module.weight.dim() == 2 else layer.leaving[0] * layer.entering[1]
        return [
            Option(r, float(lost[r - 1]), ((r * len(left), middle), (r * right.shape[1], layer.pixels)))
            for r in range(1, len(values) + 1)
        ]

    def made(self, layer: Layer, rank: int) -> nn.Module:
        left, values, right = self._svd(layer)
        root = values[:rank].sqrt()
        first, second = left[:, :rank] * root, root[:, None] * right[:rank]
        module = layer.module
        if module.weight.dim() == 2:
            return nn.Sequential(thin(second, like=module), thin(first, like=module, bias=module.bias))
        outputs, inputs, height, width = module.weight.shape
        column = first.T.reshape(rank, inputs, height, 1)
        row = second.reshape(rank, outputs, width).permute(1, 0, 2)[:, :, None]
        return nn.Sequential(thin(column, **moving(module, (0,))), thin(row, bias=module.bias, **moving(module, (1,))))


class Tucker2(Decomposition):
    """Fewer inputs, a small kernel, and the outputs again; by higher-order orthogonal iteration."""

    def options(self, layer: Layer) -> list[Option]:
        outputs, inputs, *kernel = layer.module.weight.shape
        if not kernel:
            return []
        positions = layer.entering[0] * layer.entering[1]
        found = []
        for rank in range(1, max(outputs, inputs) + 1):
            o, i = self._ranks(layer, rank)
            parts = (inputs * i, positions), (i * o * kernel[0] * kernel[1], layer.pixels), (o * outputs, layer.pixels)
            found.append(Option(rank, 0.0, parts))
        return found

    @staticmethod
    def _ranks(layer: Layer, rank: int) -> tuple[int, int]:
        outputs, inputs = layer.module.weight.shape[:2]
        share = rank / max(outputs, inputs)
        return max(1, round(share * outputs)), max(1, round(share * inputs))

    def made(self, layer: Layer, rank: int) -> nn.Module:
        import tensorly
        from tensorly.decomposition import partial_tucker

        weight = tensorly.tensor(layer.module.weight.detach().double().numpy())
        (core, (left, right)), _ = partial_tucker(weight, self._ranks(layer, rank), modes=[0, 1])
        a, b, c = (torch.from_numpy(each.copy()) for each in (right.T, core, left))
        return nn.Sequential(thin(a), thin(b, **moving(layer.module)), thin(c, bias=layer.module.bias))


class CP(Decomposition):
    """A sum of rank-one tensors (outputs x inputs x positions): 1 x 1, depthwise and 1 x 1."""

    def options(self, layer: Layer) -> list[Option]:
        outputs, inputs, *kernel = layer.module.weight.shape
        if not kernel:
            return []
        positions = layer.entering[0] * layer.entering[1]
        size = kernel[0] * kernel[1]
        return [
            Option(r, 0.0, ((inputs * r, positions), (size * r, layer.pixels), (outputs * r, layer.pixels)))
            for r in range(1, inputs * min(outputs, size) + 1)
        ]

    def made(self, layer: Layer, rank: int) -> nn.Module:
        import tensorly
        from tensorly.decomposition import parafac

        kernel = layer.module.weight.shape[2:]
        weight = tensorly.tensor(layer.module.weight.detach().double().flatten(2).numpy())
        found = parafac(weight, rank, n_iter_max=200, init="random", random_state=0, tol=1e-7)
        a, b, c = (torch.from_numpy(each) for each in found.factors)
        return nn.Sequential(
            thin(b.T),
            thin(c.T.reshape(rank, 1, *kernel), groups=rank, **moving(layer.module)),
            thin(a * torch.from_numpy(found.weights), bias=layer.module.bias),
        )


class Responses(Decomposition):
    """The leading principal directions of a layer's outputs without bias, uncentred."""

    def watch(self, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any]) -> None:
        moments: dict[str, Any] = {layer.name: 0.0 for layer in layers}

        def watcher(name: str) -> Any:
            def see(module: Any, _: Any, output: Tensor) -> None:
                rows = (output if isinstance(module, nn.Linear) else output.movedim(1, -1)).flatten(0, -2).double()
                rows = rows if module.bias is None else rows - module.bias.detach().double()
                moments[name] += rows.T @ rows

            return see

        hooks = [layer.module.register_forward_hook(watcher(layer.name)) for layer in layers]
        for batch in batches:
            run_on(model, batch)
        for hook in hooks:
            hook.remove()
        self._spectra = {name: torch.linalg.eigh(moment) for name, moment in moments.items()}

    def options(self, layer: Layer) -> list[Option]:
        values = self._spectra[layer.name][0].flip(0).clamp_min(0)
        lost = 1 - values.cumsum(0) / values.sum()
        outputs, inputs = layer.module.weight.shape[0], layer.module.weight[0].numel()
        return [
            Option(r, float(lost[r - 1]), ((r * inputs, layer.pixels), (r * outputs, layer.pixels)))
            for r in range(1, outputs)
        ]

    def made(self, layer: Layer, rank: int) -> nn.Module:
        module = layer.module
        basis = self._spectra[layer.name][1][:, -rank:]
        first = (basis.T @ module.weight.detach().double().flatten(1)).reshape(rank, *module.weight.shape[1:])
        options = {} if isinstance(module, nn.Linear) else moving(module)
        return nn.Sequential(thin(first, like=module, **options), thin(basis, like=module, bias=module.bias))
