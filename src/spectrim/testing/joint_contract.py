"""The contract of a method for sites of several layers as a check, on small groups."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectrim.cost.counted import parameters
from spectrim.linalg.unfold import unfoldings
from spectrim.methods.base import Method
from spectrim.methods.joint_svd import JointSVD
from spectrim.network.choices import Choice
from spectrim.network.factors import Factors
from spectrim.network.sites import Group, Site
from spectrim.nn.build import build, skeleton
from spectrim.nn.modules import Factored, whole
from spectrim.nn.shared import Once
from spectrim.testing.contract import check_equal, check_offered, check_record, expect, offered
from spectrim.testing.layers import LAYERS, small_group
from spectrim.testing.measures import measured_error

# What groups are like: which channels the last layer has half of, whether all see one input, and the data given.
_GROUPS = (
    ("equal", None, False, ("none", "moments", "gradients")),
    ("narrow-input", "inputs", False, ("none", "moments")),
    ("narrow-output", "outputs", False, ("none", "gradients")),
    ("one-input", None, True, ("none", "moments", "gradients")),
)


def check_joint_method(
    method: Method,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 0.05,
    slack: float = 1.0,
) -> int:
    """Run a method for several layers on small groups of every layer kind and check that it keeps the contract.

    Groups are of three layers: equal ones, with a last one of half the inputs or outputs, and such that see one input.
    They are given without data, calibrated, and with gradients; where a method does not fit, its curve is empty. It
    is checked that

    - its curve is finite, within 0 and 1, and the same each time;
    - the factors of a choice lose no more than the curve says, and are the same each time;
    - the built pairs have the shapes that ``layers`` announces, and as many parameters, the shared ones once, as
      ``costs.parameters`` counts;
    - a choice alone, without weights, leads to modules of the same shapes, as a checkpoint needs;
    - a refit on what the layers have seen keeps the sizes and does not raise the error;
    - a :class:`~spectrim.methods.JointSVD` that shares one side loses nothing at full rank;
    - ``from_record`` makes the method again from its record, also through JSON.

    Parameters, returns and errors are as for :func:`check_method`. Methods may weigh the outputs of layers alike
    that share a factor, so that the tolerance is wider, and factors may be better than the curve says by any share.
    """
    check_record(method)
    checked = 0
    for kind in layers if layers is not None else LAYERS:
        for name, narrow, same_input, data in _GROUPS:
            for statistics in data:
                calibrated = statistics != "none"
                site, modules, inputs = small_group(
                    kind,
                    narrow=narrow,
                    same_input=same_input,
                    calibrated=calibrated,
                    weighted=statistics == "gradients",
                    dtype=dtype,
                )
                curve = offered(method, site, calibrated=calibrated)
                if curve is None:
                    continue
                where = f"{method.name} on {name} {kind} ({curve.unit})"
                check_built = functools.partial(_check_built, unit=curve.unit, tolerance=tolerance)
                checked += check_offered(method, site, curve, check_built, tolerance, slack, where)
                if isinstance(method, JointSVD) and method.share != "both" and curve.choices:
                    checked += _check_full_rank(method, site, modules, inputs, where)
    expect(checked > 0, f"{method.name} offers nothing for any of the groups")
    return checked


def _check_built(
    method: Method, site: Site, choice: Choice, factors: Factors, where: str, *, unit: str, tolerance: float
) -> None:
    """The pairs, and, of a calibrated group, what fitting the layers anew makes of them."""
    _check_pairs(method, site, choice, factors, where)
    if site.calibrated:
        _check_refit(method, site, choice, factors, unit, tolerance, where)


def _check_pairs(method: Method, site: Site, choice: Choice, factors: Factors, where: str) -> None:
    specs = method.layers(site, choice)
    pairs = build(factors, site.layers, site.biases)
    parts = [part for pair in pairs for part in (pair if isinstance(pair, Factored) else (pair,))]
    # What is computed once has one spec, and a module in every pair.
    once = [part for part in parts if isinstance(part, Once)]
    built = [_shape(part) for part in parts if part not in once[1:]]
    announced = [(spec.shape, spec.bias) for spec in specs]
    expect(built == announced, f"{where}: {choice} announces {announced} and builds {built}")
    stored = sum(p.numel() for p in nn.ModuleList(pairs).parameters())
    counted = parameters(specs)
    expect(stored == counted, f"{where}: {choice} has {stored} parameters, and costs count {counted}")
    bare = nn.ModuleList(skeleton(choice, site.layers))
    sizes = [
        {key: tuple(tensor.shape) for key, tensor in modules.state_dict().items()}
        for modules in (nn.ModuleList(pairs), bare)
    ]
    expect(sizes[0] == sizes[1], f"{where}: {choice} builds {sizes[0]}, and {sizes[1]} without weights")


def _shape(part: nn.Module) -> tuple[tuple[int, ...], bool]:
    weight, bias = whole(part)
    return tuple(weight.shape), bias is not None


def _check_refit(
    method: Method, site: Site, choice: Choice, factors: Factors, unit: str, tolerance: float, where: str
) -> None:
    before, size = measured_error(site, factors.dense(), unit), factors.numel()
    for number, part in enumerate(site.parts):
        factors = method.refit(part, factors, number)
    after = measured_error(site, factors.dense(), unit)
    expect(after <= before + tolerance, f"{where}: {choice} loses {before:.6f}, and {after:.6f} once refitted")
    expect(factors.numel() == size, f"{where}: {choice} has {size} numbers, and {factors.numel()} once refitted")


def _check_full_rank(
    method: JointSVD, site: Group, layers: Sequence[nn.Module], inputs: Sequence[Tensor], where: str
) -> int:
    # A fit to responses adds a jitter of 1e-12 to their moments.
    close = max(256 * torch.finfo(site.layers[0].dtype).eps, 1e-9)
    checked = 0
    with torch.no_grad():
        for how in unfoldings(site.layers[0].kernel):
            choice = method.choice(site, how, method.full_rank(site, how), bias=any(s.bias for s in site.layers))
            pairs = build(method.factorize(site, choice), site.layers, site.biases)
            for layer, pair, x in zip(layers, pairs, inputs, strict=True):
                check_equal(pair(x), layer(x), close, f"{where}: {choice} should equal the layers")
            checked += 1
    return checked
