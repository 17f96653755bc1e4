"""What weights lose, from the definitions of the units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectrim.methods import statistics
from spectrim.methods.base import OUTPUT_ENERGY, WEIGHT_ENERGY, WEIGHTED_ENERGY
from spectrim.network.sites import Layer, Site


def measured_error(site: Site, weights: Sequence[Tensor], unit: str) -> float:
    """What replacing a site's weights loses, computed from the definition of the unit.

    Of several layers every one counts with the share of its energy that is lost; with a sensitivity by what losing
    all of it adds to the loss, as in :class:`~spectrim.methods.JointSVD`.

    Parameters
    ----------
    weights
        Canonical, one ``[g, o, i, *k]`` a layer, as :meth:`spectrim.Factors.dense` gives them.
    unit
        As reported by a method's curve.

    Raises
    ------
    ValueError
        For a unit that is not known.
    """
    if unit not in (WEIGHT_ENERGY, OUTPUT_ENERGY, WEIGHTED_ENERGY):
        raise ValueError(f"unit {unit!r} is none of {WEIGHT_ENERGY!r}, {OUTPUT_ENERGY!r}, {WEIGHTED_ENERGY!r}")
    parts = list(zip(site.parts, weights, strict=True))
    lost = [_lost(part, new, unit) for part, new in parts]
    scales = [1.0 for _ in parts]
    if unit == WEIGHTED_ENERGY:
        scales = [statistics.scale(part, whole) for (part, _), (_, whole) in zip(parts, lost, strict=True)]
    shares = [gone / whole if whole > 0 else 0.0 for gone, whole in lost]
    return sum(scale * share for scale, share in zip(scales, shares, strict=True)) / (sum(scales) or 1.0)


def _lost(part: Layer, new: Tensor, unit: str) -> tuple[float, float]:
    """Energy of what is missing in one layer, and of all of it."""
    g, o = part.weight.shape[:2]
    weight = part.weight.double().reshape(g, o, -1)
    missing = weight - new.double().reshape(g, o, -1)
    if unit == WEIGHT_ENERGY:
        return float(missing.square().sum()), float(weight.square().sum())
    covariance = part.require("input", "measured_error").covariance
    outer = part.require("gradient", "measured_error").second_moment if unit == WEIGHTED_ENERGY else None
    lost, whole = (
        torch.einsum("gad,gde,gbe->gab", matrix, covariance, matrix)
        if outer is None
        else outer @ torch.einsum("gad,gde,gbe->gab", matrix, covariance, matrix)
        for matrix in (missing, weight)
    )
    return float(_trace(lost)), float(_trace(whole))


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum()
