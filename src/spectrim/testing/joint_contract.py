"""The contract of a method for sites of several layers as a check, on small groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from spectrim.cost.counted import parameters
from spectrim.linalg.unfold import Unfolding
from spectrim.methods.base import Method
from spectrim.methods.joint_svd import JointSVD
from spectrim.network.choices import Choice
from spectrim.network.factors import Factors
from spectrim.network.sites import Group
from spectrim.nn.build import build, skeleton
from spectrim.nn.modules import Factored, whole
from spectrim.nn.shared import Once
from spectrim.testing.contract import Tried, check_any, check_record
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
                site, modules, inputs = small_group(
                    kind, narrow=narrow, same_input=same_input, dtype=dtype, calibrated=statistics != "none",
                    weighted=statistics == "gradients",
                )  # fmt: skip
                tried = _OnGroup.of(method, site, f"{name} {kind}", tolerance, slack)
                if tried is not None:
                    checked += tried.checked() + tried.at_full_rank(modules, inputs)
    check_any(checked, method, "groups")
    return checked


class _OnGroup(Tried):
    def check_built(self, choice: Choice, factors: Factors) -> None:
        """The pairs, and, of a calibrated group, what fitting the layers anew makes of them."""
        self._check_pairs(choice, factors)
        if self.site.calibrated:
            self._check_refit(choice, factors)

    def full_rank(self, how: Unfolding) -> int | None:
        method, site = self.method, self.site
        if isinstance(method, JointSVD) and isinstance(site, Group) and method.share != "both" and self.curve.choices:
            return method.full_rank(site, how)
        return None

    def _check_pairs(self, choice: Choice, factors: Factors) -> None:
        specs, site = self.method.layers(self.site, choice), self.site
        pairs = build(factors, site.layers, site.biases)
        parts = [part for pair in pairs for part in (pair if isinstance(pair, Factored) else (pair,))]
        # What is computed once has one spec, and a module in every pair.
        once = [part for part in parts if isinstance(part, Once)]
        wholes = [whole(part) for part in parts if part not in once[1:]]
        built = [(tuple(weight.shape), bias is not None) for weight, bias in wholes]
        announced = [(spec.shape, spec.bias) for spec in specs]
        self.expect(built == announced, f"{choice} announces {announced} and builds {built}")
        stored, counted = sum(p.numel() for p in nn.ModuleList(pairs).parameters()), parameters(specs)
        self.expect(stored == counted, f"{choice} has {stored} parameters, and costs count {counted}")
        sizes, bare = (
            {key: tuple(tensor.shape) for key, tensor in nn.ModuleList(modules).state_dict().items()}
            for modules in (pairs, skeleton(choice, site.layers))
        )
        self.expect(sizes == bare, f"{choice} builds {sizes}, and {bare} without weights")

    def _check_refit(self, choice: Choice, factors: Factors) -> None:
        site, unit = self.site, self.curve.unit
        before, size = measured_error(site, factors.dense(), unit), factors.numel()
        for number, part in enumerate(site.parts):
            factors = self.method.refit(part, factors, number)
        after = measured_error(site, factors.dense(), unit)
        self.expect(after <= before + self.tolerance, f"{choice} loses {before:.6f}, and {after:.6f} once refitted")
        self.expect(factors.numel() == size, f"{choice} has {size} numbers, and {factors.numel()} once refitted")
