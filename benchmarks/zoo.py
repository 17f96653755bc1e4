"""Removal of filters on a zoo of architectures (P6): every network is pruned or said why not, and still right.

The networks are small and their weights random, but not as initialised: normalisations, biases and layer scales are
moved away from 0 and 1, or a channel of theirs that is cut in the wrong place would not be noticed. About 40 % of the
channels of every group are removed, chosen at random. Then

- the outputs have the shapes of the dense network's,
- the number of parameters is what the specs of the narrowed layers add up to,
- the outputs are those of the dense network with the weights zeroed that read the removed channels. LayerNorm and
  GroupNorm take their statistics over all channels and deliver something else for fewer, so this is asked of the groups
  of channels without them, which are then removed once more on their own.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import spectrim as st
from benchmarks import cifar, nets, vgg, zoo_nets, zoo_others
from benchmarks.run import claim
from benchmarks.zoo_transformers import TRANSFORMERS
from spectrim.network.coupling import IN, THROUGH, Axis, Coupling, axes_left
from spectrim.network.sites import Sites
from spectrim.nn.channels.graph import couple
from spectrim.nn.channels.narrow import narrow
from spectrim.nn.layers import canonical
from spectrim.nn.watch.batches import call, output_tensors

Made = tuple[nn.Module, Any]

_SHARE = 0.4
# Error of the outputs against the change that the removal makes, in float64; some networks work in float32 inside.
_TOLERANCE = 1e-4


def _images(make: Callable[[], nn.Module], side: int = 32) -> Callable[[], Made]:
    return lambda: (make(), torch.randn(2, 3, side, side))


def _compressed() -> nn.Module:
    """A network whose layers are already pairs: their ranks are channels too."""
    x = torch.randn(16, 3, 32, 32)
    model = nn.Sequential(zoo_nets.unit(3, 16), zoo_nets.unit(16, 32), zoo_nets.unit(32, 32), zoo_nets.head(32)).eval()
    sites = st.calibrate(model, st.find(model), [x])
    table = st.tabulate(sites)
    return st.apply(model, sites, st.select(table, st.Budget(macs=0.5)), batches=[x])


OWN: dict[str, Callable[[], Made]] = {
    "alexnet": _images(lambda: nets.network("alexnet", 64), 64),
    "vgg16": _images(lambda: nets.network("vgg16", 32)),
    "googlenet": _images(lambda: nets.network("googlenet", 32)),
    "resnet18": _images(lambda: nets.network("resnet18", 32, width=16)),
    "resnet50": _images(lambda: nets.network("resnet50", 32, width=16)),
    "resnet20-option-a": _images(lambda: cifar.ResNet(3)),
    "vgg16-batchnorm": _images(lambda: vgg.VGG16(8)),
    "densenet": _images(zoo_nets.Dense),
    "unet": _images(zoo_nets.UNet),
    "resnext": _images(lambda: zoo_nets.residual_net(groups=4)),
    "se-resnet": _images(lambda: zoo_nets.residual_net(gate=True)),
    "group-norm-resnet": _images(lambda: zoo_nets.residual_net(group_norm=True)),
    "shufflenet": _images(zoo_nets.Shuffle),
    "shufflenet-v2": _images(zoo_nets.Split),
    "squeezenet": _images(zoo_nets.squeeze_net),
    "inception": _images(lambda: nn.Sequential(zoo_nets.Inception(3), zoo_nets.Inception(32), zoo_nets.head(32))),
    "mobilenet-v3": _images(zoo_nets.mobile_net),
    "mlp-mixer": _images(zoo_others.Mixer),
    "wavenet": lambda: (zoo_others.Wave(), torch.randn(2, 1, 64)),
    "conv3d": lambda: (zoo_others.volume_net(), torch.randn(2, 1, 8, 8, 8)),
    "lenet": _images(zoo_others.le_net),
    "gated-conv": _images(zoo_others.Gated),
    "prelu": _images(zoo_others.slopes_net),
    "style-transfer": _images(zoo_others.Style),
    "autoencoder": _images(zoo_others.auto_encoder),
    "conv-lstm": _images(zoo_others.Recurrent),
    "tied-autoencoder": lambda: (zoo_others.Tied(), torch.randn(2, 64)),
    "shared-block": _images(zoo_others.Twice),
    "conv-transformer": _images(zoo_others.Attention),
    "pixel-shuffle": _images(zoo_others.PixelShuffle),
    "two-outputs": _images(zoo_others.Heads),
    "low-rank-cnn": _images(_compressed),
}

NETWORKS: dict[str, Callable[[], Made]] = {**OWN, **TRANSFORMERS}


def build(name: str, *, seed: int = 0, networks: Mapping[str, Callable[[], Made]] = NETWORKS) -> Made:
    """A network in evaluation mode and a batch for it: a tensor, or keyword arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, example = (networks if name in networks else _torchvision())[name]()
        enliven(model)
    return model.eval(), example


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Weights that keep the size of what passes, and different numbers in normalisations, biases and layer scales."""
    weights = {
        id(m.weight)
        for m in model.modules()
        if isinstance(getattr(m, "weight", None), nn.Parameter) and not isinstance(m, nn.PReLU) and m.weight.dim() > 1
    }
    for parameter in model.parameters():
        if id(parameter) in weights:
            parameter.normal_(std=math.sqrt(parameter.shape[0] / parameter.numel()))
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.running_mean.normal_(std=0.2)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]


def removed(name: str, *, seed: int = 0) -> dict[str, Any]:
    """Remove channels from one network and check what is left: a row of the result.

    Its ``outcome`` is ``pruned``, ``skipped`` (no group of channels can be pruned) or ``crashed``, ``passed`` says
    whether everything that was asked of it holds, ``fault`` what does not.
    """
    start = time.perf_counter()
    row: dict[str, Any] = {"network": name, "outcome": "crashed", "passed": False}
    try:
        row |= _removed(name, seed)
    except Exception as error:
        row["fault"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return {**row, "seconds": round(time.perf_counter() - start, 2)}


def _removed(name: str, seed: int) -> dict[str, Any]:
    dense, example = build(name, seed=seed)
    held = {key: value.clone() for key, value in dense.state_dict().items()}
    before = st.find(dense)
    sites = couple(dense, before, example)
    touched = any(not torch.equal(value, held[key]) for key, value in dense.state_dict().items())
    blocked = [s for s in sites.skipped if s not in before.skipped]
    reasons = list(dict.fromkeys(s.reason for s in blocked))
    kept = {c.name: keep(c, seed) for c in sites.couplings}
    pruned = {c.name for c in sites.couplings if len(kept[c.name]) < c.channels}
    row: dict[str, Any] = {
        "outcome": "pruned" if pruned else "skipped",
        "groups": len(sites.couplings) + len(blocked),
        "pruned": len(pruned),
        "skipped": len(blocked),
        "reasons": "; ".join(reasons),
        "parameters": _count(dense),
    }
    faults = ["the dense network was changed"] if touched else []
    if not pruned:
        faults += [] if reasons else ["nothing says why no group can be pruned"]
        return {**row, "parameters_after": row["parameters"], "passed": not faults, "fault": "; ".join(faults)}
    axes = axes_left(sites.couplings, kept)
    small = copy.deepcopy(dense)
    narrow(small, axes)
    shapes = [[tuple(t.shape) for t in _outputs(model, example)] for model in (dense, small)]
    if shapes[0] != shapes[1]:
        faults.append(f"outputs have shapes {shapes[1]}, expected {shapes[0]}")
    row["parameters_after"] = _count(small)
    if row["parameters_after"] != (expected := _expected(dense, sites, kept, axes)):
        faults.append(f"{row['parameters_after']} parameters are left, the specs say {expected}")
    exact = {c.name: kept[c.name] for c in sites.couplings if not _mixed(dense, c)}
    row["compared"] = len(exact)
    if exact:
        error, change = _difference(dense, sites, exact, example)
        row |= {"error": error, "change": change}
        if not (change > 0 and error <= _TOLERANCE * change):
            faults.append(f"outputs differ by {error:.1e} where the removal changes them by {change:.1e}")
    return {**row, "passed": not faults, "fault": "; ".join(faults)}


def keep(coupling: Coupling, seed: int) -> list[int]:
    """About 60 % of the channels, chosen at random, as many of every pool."""
    pool = coupling.channels // coupling.pools
    count = max(1, pool - round(_SHARE * pool))
    draw = torch.Generator().manual_seed(seed)
    found = [p * pool + torch.randperm(pool, generator=draw)[:count] for p in range(coupling.pools)]
    return sorted(torch.cat(found).tolist())


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(output_tensors(call(model, example)))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _expected(dense: nn.Module, sites: Sites, kept: Mapping[str, Sequence[int]], axes: Mapping[Axis, Tensor]) -> int:
    """Parameters of the network by the specs of its layers and what a channel has besides."""
    left: dict[str, dict[str, int]] = {}
    for (path, axis), positions in axes.items():
        left.setdefault(path, {})[axis] = len(positions)
    specs = [spec for site in sites for spec in site.layers] + list(sites.untouched)
    # Channels are only cut here; what a correction would add is left out.
    specs = [dataclasses.replace(spec, needs_bias=False) for spec in specs]
    lost = sum(st.parameters([spec]) - st.parameters([spec.narrowed(left.get(spec.name, {}))]) for spec in specs)
    lost += sum((c.channels - len(kept[c.name])) * c.parameters for c in sites.couplings)
    return round(_count(dense) - lost)


def _mixed(dense: nn.Module, coupling: Coupling) -> bool:
    """Whether a normalisation takes statistics over the channels."""
    owners = [dense.get_submodule(side.name) for side in coupling.on(THROUGH)]
    return any(isinstance(owner, (nn.LayerNorm, nn.GroupNorm)) for owner in owners)


def _difference(dense: nn.Module, sites: Sites, kept: Mapping[str, Sequence[int]], example: Any) -> tuple[float, float]:
    """Largest difference between the narrowed network and the silenced one, and what silencing changes."""
    axes = axes_left(sites.couplings, kept)
    whole, silenced = copy.deepcopy(dense).double(), copy.deepcopy(dense).double()
    small = copy.deepcopy(whole)
    narrow(small, axes)
    for (path, axis), left in axes.items():
        if axis == IN:
            silence(silenced.get_submodule(path), left)
    wide = {key: _double(value) for key, value in example.items()} if isinstance(example, dict) else _double(example)
    outputs = [_outputs(model, wide) for model in (whole, silenced, small)]
    pairs = [(float((b - c).abs().max()), float((a - b).abs().max())) for a, b, c in zip(*outputs, strict=True)]
    return max(error for error, _ in pairs), max(change for _, change in pairs)


@torch.no_grad()
def silence(module: nn.Module, left: Tensor) -> None:
    """Zero the weights of a layer that read channels other than ``left``."""
    assert isinstance(module, (nn.Linear, _ConvNd)), type(module).__name__
    weight, _ = canonical(module)
    g, _, i, *_ = weight.shape
    mask = torch.zeros(g * i, dtype=weight.dtype)
    mask[left] = 1
    weight.mul_(mask.reshape(g, 1, i, *(1,) * (weight.dim() - 3)))


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


_OPERATORS: list[Any] = []


def _torchvision() -> dict[str, Callable[[], Made]]:
    """torchvision's classifiers, where it is installed; a CPU build of torch lacks two operators it asks for."""
    if importlib.util.find_spec("torchvision") is None:
        return {}
    if not _OPERATORS and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)  # the definitions go with it
    try:
        from torchvision import models  # type: ignore[import-not-found]
    except (ImportError, RuntimeError, OSError):
        return {}

    names = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5"]
    return {f"tv-{n}": _images(lambda n=n: getattr(models, n)(weights=None), 64) for n in names}  # type: ignore[misc]


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Every network of the zoo, or those the experiment names."""
    names = config.get("networks") or list(NETWORKS)
    rows = []
    for name in names:
        rows.append(removed(name, seed=config["seed"]))
        print(rows[-1], flush=True)
    beside = [] if config.get("networks") else [removed(name, seed=config["seed"]) for name in _torchvision()]
    good = [row for row in rows if row["passed"]]
    outcomes = {kind: sum(row["outcome"] == kind for row in rows) for kind in ("pruned", "skipped", "crashed")}
    wrong = ", ".join(row["network"] for row in rows if not row["passed"])
    note = ", ".join(f"{count} {kind}" for kind, count in outcomes.items())
    note += f"; {sum(row.get('compared', 0) > 0 for row in rows)} compared with the dense network"
    claims = {
        "P6": claim(
            len(good),
            "architectures pruned or cleanly skipped",
            f">= {config['at_least']} architectures: pruned or cleanly skipped, forward runs, shapes right, no crash",
            len(good) >= config["at_least"] and len(good) == len(rows),
            note + (f"; wrong: {wrong}" if wrong else ""),
        )
    }
    notes = [
        "Small networks with random weights; of every group that can be pruned about 40 % of the channels are removed, "
        "chosen at random.",
        "error is the largest difference of the outputs between the narrowed network and the dense one with the "
        "weights zeroed that read the removed channels, change what that zeroing does to the outputs, both in float64, "
        "for the groups of channels (compared) that no LayerNorm or GroupNorm takes statistics over.",
    ]
    found = {"claims": claims, "rows": rows, "seeds": [config["seed"]], "notes": notes}
    return {**found, **({"torchvision": beside} if beside else {})}
