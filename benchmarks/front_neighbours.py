"""ResNet-20 without training beside other one-shot ways, on the same images and the same weights: the README's picture.

Arms, each at the same budgets of multiply-accumulates, from the same unlabelled images:

- ``Spectrim``: the default call.
- ``BALF``: activation-aware low rank with ranks by a Lagrangian, written anew from the description in arXiv 2509.25136:
  each convolution becomes one of r channels and a 1 x 1, optimal for the uncentred responses; the sum over the layers
  of the share of the energy lost is minimised under the budget.
- ``CP``: the weight as a sum of r rank-one tensors (outputs x inputs x positions, TensorLy's alternating least
  squares), run as 1 x 1, depthwise and 1 x 1 convolutions; every layer keeps the same share of its MACs.
- ``Torch-Pruning``: channels removed by group magnitude over the whole network.

Arms other than the default call are measured as they are and with the statistics of BatchNorm estimated anew on the
images; the figure takes the better of the two.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from benchmarks import cifar
from benchmarks.torch_pruning_baseline import pruned

Build = Callable[[cifar.ResNet, list[Tensor], float], nn.Module]


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every arm at every budget; the test images are looked at once for each row."""
    torch.manual_seed(config["seed"])
    name = config["network"]
    dense = cifar.network(name, paths["weights"][name])
    train, _, test = cifar.load(paths["cifar10"])
    batches = [cifar.normalise(part) for part in train.images[: config["images"]].split(128)]
    rows = [_row(name, "dense", "as it is", dense, test, 0.0)]
    for macs in config["macs"]:
        for arm, build in ARMS.items():
            start = time.perf_counter()
            small = build(dense, batches, macs)
            seconds = time.perf_counter() - start
            rows.append(_row(name, arm, "as it is", small, test, seconds))
            if arm != "Spectrim":
                rows.append(_row(name, arm, "estimated anew", normalised(small, batches), test, seconds))
            print(*rows[-2:], flush=True)
    notes = [
        f"{config['images']:,} unlabelled training images for every arm; no gradient step on any weight; one seed.",
        "BALF is written anew from its description and CP is TensorLy's; neither is the authors' own program.",
        "Multiply-accumulates of convolutions and the classifier, counted on the finished network.",
    ]
    return {"claims": {}, "rows": rows, "seeds": [config["seed"]], "notes": notes}


def _row(name: str, arm: str, norms: str, model: nn.Module, test: cifar.Images, seconds: float) -> dict[str, Any]:
    return {
        "network": name,
        "arm": arm,
        "batch_norm": norms,
        "macs": macs_of(model),
        "test_accuracy": cifar.accuracy(model, test),
        "seconds": round(seconds, 1),
    }


@torch.inference_mode()
def macs_of(model: nn.Module) -> int:
    """Multiply-accumulates of the convolutions and linear layers for one image."""
    count = 0

    def add(module: Any, _: Any, output: Tensor) -> None:
        nonlocal count
        count += module.weight[0].numel() * output.numel()

    # What stands for a compressed layer is of its type, and holds the layers that run.
    leaves = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and not any(m.children())]
    hooks = [m.register_forward_hook(add) for m in leaves]
    model(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return count


@torch.no_grad()
def normalised(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy with the statistics of BatchNorm of these images."""
    model = copy.deepcopy(model).train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    for batch in batches:
        model(batch)
    return model.eval()


def spectrim(dense: cifar.ResNet, batches: list[Tensor], macs: float) -> nn.Module:
    return st.compress(dense, batches, st.Budget(macs=macs)).model


def torch_pruning(dense: cifar.ResNet, batches: list[Tensor], macs: float) -> nn.Module:
    return pruned(dense, macs)[0].eval()


def convolutions(model: cifar.ResNet) -> Iterator[tuple[str, nn.Conv2d]]:
    """All but the first, which has three input channels and next to no share of the work."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 3:
            yield name, module


# BALF, from its description.


def balf(dense: cifar.ResNet, batches: list[Tensor], macs: float) -> nn.Module:
    """Optimal channel-wise low rank of the uncentred responses; ranks by a Lagrangian."""
    spectra = {name: torch.linalg.eigh(second) for name, second in _responses(dense, batches).items()}
    sizes, layers = _outputs(dense), dict(convolutions(dense))
    options = {}
    for name, (values, _) in spectra.items():
        layer = layers[name]
        lost = values.flip(0).clamp_min(0).cumsum(0) / values.clamp_min(0).sum()
        unit = (layer.weight[0].numel() + layer.out_channels) * sizes[name]
        whole = layer.weight.numel() * sizes[name]
        ranks = [(r, float(1 - lost[r - 1]), r * unit) for r in range(1, layer.out_channels) if r * unit < whole]
        options[name] = [*ranks, (layer.out_channels, 0.0, whole)]
    fixed = macs_of(dense) - sum(each[-1][2] for each in options.values())
    model = copy.deepcopy(dense)
    for name, rank in _lagrangian(options, macs - fixed).items():
        layer = layers[name]
        if rank < layer.out_channels:
            put(model, name, _pair(layer, spectra[name][1][:, -rank:].to(layer.weight.dtype)))
    return model


def _lagrangian(options: dict[str, list[tuple[int, float, int]]], limit: float) -> dict[str, int]:
    """Of every layer the option with the least ``error + price x cost``, for the lowest price that keeps the limit."""

    def best(price: float) -> dict[str, tuple[int, float, int]]:
        return {name: min(some, key=lambda o: o[1] + price * o[2]) for name, some in options.items()}

    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(o[2] for o in best(middle).values()) > limit else (low, middle)
    return {name: option[0] for name, option in best(high).items()}


def _pair(layer: nn.Conv2d, basis: Tensor) -> nn.Module:
    outputs, rank = basis.shape
    first = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)  # type: ignore[arg-type]
    second = nn.Conv2d(rank, outputs, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_((basis.T @ layer.weight.flatten(1)).view_as(first.weight))
        second.weight.copy_(basis.view_as(second.weight))
    return nn.Sequential(first, second)


def _responses(dense: cifar.ResNet, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Uncentred second moment of every convolution's responses, in float64."""
    found: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        def add(_: Any, __: Any, output: Tensor) -> None:
            rows = output.movedim(1, -1).flatten(0, -2).double()
            found[name] = found.get(name, 0) + rows.T @ rows

        return add

    _watched(dense, batches, see)
    return found


def _outputs(dense: cifar.ResNet) -> dict[str, int]:
    """Positions of every convolution's output."""
    found: dict[str, int] = {}

    def see(name: str) -> Any:
        return lambda _, __, output: found.update({name: output[0, 0].numel()})

    _watched(dense, [torch.zeros(1, 3, 32, 32)], see)
    return found


@torch.inference_mode()
def _watched(model: cifar.ResNet, batches: Sequence[Tensor], see: Callable[[str], Any]) -> None:
    hooks = [module.register_forward_hook(see(name)) for name, module in convolutions(model)]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()


# CP.


def cp(dense: cifar.ResNet, batches: list[Tensor], macs: float) -> nn.Module:
    """Every convolution as a sum of rank-one tensors, with the same share of its MACs."""
    sizes = _outputs(dense)
    whole = {name: layer.weight.numel() * sizes[name] for name, layer in convolutions(dense)}
    share = 1 - (macs_of(dense) - macs) / sum(whole.values())
    model = copy.deepcopy(dense)
    for name, layer in convolutions(dense):
        stride = layer.stride[0]
        # The first 1 x 1 runs on all positions of the input.
        unit = layer.in_channels * sizes[name] * stride**2 + (9 + layer.out_channels) * sizes[name]
        put(model, name, _rank_ones(layer, int(share * whole[name] / unit)))
    return model


def _rank_ones(layer: nn.Conv2d, rank: int) -> nn.Module:
    import tensorly
    from tensorly.decomposition import parafac

    outputs, inputs, *kernel = layer.weight.shape
    weight = layer.weight.detach().double().flatten(2).numpy()
    found = parafac(tensorly.tensor(weight), rank, n_iter_max=200, init="random", random_state=0, tol=1e-7)
    a, b, c = (torch.from_numpy(each).float() for each in found.factors)
    first = nn.Conv2d(inputs, rank, 1, bias=False)
    middle = nn.Conv2d(rank, rank, tuple(kernel), layer.stride, layer.padding, groups=rank, bias=False)  # type: ignore[arg-type]
    last = nn.Conv2d(rank, outputs, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(b.T.reshape(first.weight.shape))
        middle.weight.copy_(c.T.reshape(middle.weight.shape))
        last.weight.copy_((a * torch.from_numpy(found.weights).float()).reshape(last.weight.shape))
    return nn.Sequential(first, middle, last)


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a module in another's place."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


ARMS: dict[str, Build] = {"Spectrim": spectrim, "BALF": balf, "CP": cp, "Torch-Pruning": torch_pruning}
