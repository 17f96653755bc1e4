"""What a removal of channels leaves of sites: specs, weights and moments, without a model.

The layers that read the channels are corrected in closed form from the moments that calibration kept
(:mod:`spectrim.linalg.subset`), so that a table can be made of the network as it would be, and of that the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from spectrim.linalg import subset
from spectrim.linalg.moments import Moments, damped
from spectrim.linalg.sketch import Sketch
from spectrim.network.coupling import IN, OUT, THROUGH, Axis, Coupling, axes_left
from spectrim.network.sites import Channels, Layer, Sites, entries_of
from spectrim.network.structure import Apart, Chain

Kept = Mapping[str, Sequence[int]]


def narrowed(sites: Sites, kept: Kept) -> Sites:
    """The sites of the network without some of its coupled channels.

    Parameters
    ----------
    sites
        With couplings; calibrated, for the weights to be corrected.
    kept
        Channels that stay, by the name of the coupling; all of those that are not named.

    Returns
    -------
    Sites
        Layers that read the channels have the weights that come closest to their responses, and a bias moved by the
        mean of what is gone (also where the spec says that there is none: a normalisation may take it). Moments are
        those of the entries that are left. What is fitted to them later, in order of execution, is better still.

    Raises
    ------
    PlanError
        If ``kept`` names channels that there are not.
    """
    axes = axes_left(sites.couplings, kept)
    if not axes:
        return sites
    by_layer = _by_layer(axes)

    def cut(layer: Layer) -> Layer:
        return _cut(layer, by_layer[layer.name]) if layer.name in by_layer else layer

    everything = {c.name: range(c.channels) for c in sites.couplings} | dict(kept)
    couplings = tuple(c.after(list(everything[c.name]), axes) for c in sites.couplings)
    pooled = {name: group.take(torch.tensor(list(everything[name]))) for name, group in sites.pooled.items()}
    gone = {c.name: c.channels - len(everything[c.name]) for c in sites.couplings}
    work = _work_left(sites, gone)
    return dataclasses.replace(
        sites,
        sites=tuple(cut(site) for site in sites),
        followers=tuple(cut(site) for site in sites.followers),
        untouched=tuple(spec.narrowed(_counts(by_layer.get(spec.name, {}))) for spec in sites.untouched),
        couplings=tuple(_sharing(c, sites.work, work) for c in couplings),
        work=MappingProxyType(work),
        other_macs=sites.other_macs - sum(sites.work.values()) + sum(work.values()),
        pooled=MappingProxyType(pooled),
        other_parameters=sites.other_parameters - round(sum(gone[c.name] * c.parameters for c in sites.couplings)),
        other_bytes=sites.other_bytes - round(sum(gone[c.name] * c.bytes for c in sites.couplings)),
    )


def _work_left(sites: Sites, gone: Mapping[str, int]) -> dict[str, float]:
    """What modules multiply themselves without some channels, by their paths."""
    left = dict(sites.work)
    for coupling in sites.couplings:
        for path, share in coupling.products.items():
            if path in left:
                left[path] -= gone[coupling.name] * share * sites.work[path]
    return left


def _sharing(coupling: Coupling, before: Mapping[str, float], now: Mapping[str, float]) -> Coupling:
    """A coupling whose channels have their shares of what is left."""
    shares = {path: s * before[path] / now[path] if now.get(path) else s for path, s in coupling.products.items()}
    return dataclasses.replace(coupling, products=MappingProxyType(shares)) if shares else coupling


def layers_left(couplings: Iterable[Coupling], numbers: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Lengths of the axes that hold coupled channels, by module and axis, with so many channels of each coupling."""
    found: dict[str, dict[str, int]] = {}
    for coupling in couplings:
        gone = coupling.channels - numbers.get(coupling.name, coupling.channels)
        for side in coupling.sides:
            held = found.setdefault(side.name, {})
            held[side.axis] = held.get(side.axis, side.size) - gone * side.positions.shape[1]
    return found


def specs(site: Channels, number: int) -> Apart:
    """The layers of a site of coupled channels with so many of them."""
    counts = layers_left([site.coupling], {site.name: number})
    return Apart(tuple(Chain((spec.narrowed(counts.get(spec.name, {})),)) for spec in site.layers))


def cut_layers(site: Channels, kept: Sequence[int]) -> tuple[Layer, ...]:
    """The layers of a site of coupled channels as they are with some of the channels, the readers corrected."""
    axes = _by_layer(axes_left([site.coupling], {site.coupling.name: kept}))
    return tuple(_cut(part, axes.get(part.name, {})) for part in site.parts)


def readers(site: Channels, part: Layer, gram: Tensor) -> list[subset.Reader]:
    """What a layer loses without some of the channels that it reads; one reader for each of its groups.

    Parameters
    ----------
    site
        Of the coupled channels.
    part
        The layer.
    gram
        ``W^T G W`` ``[g, d, d]`` over whole patches.
    """
    (side,) = (side for side in site.coupling.on(IN) if side.name == part.name)
    spec = part.spec
    g, _, i, *_ = spec.shape
    taps = spec.features // i
    channels = torch.arange(site.coupling.channels)
    patches = part.statistics.input
    held = patches or part.statistics.channels
    if held is not None:
        covariance = damped(held.covariance, held.count)
        if patches is None:
            gram, taps = _over_taps(gram, i), 1
        entries = (side.positions.unsqueeze(2) * taps + torch.arange(taps)).flatten(1)
        group, size = side.positions[:, 0] // i, i * taps
        return [
            _reader(covariance[n], gram[n], channels[group == n], entries[group == n] - n * size)
            for n in range(g)
            if bool((group == n).any())
        ]
    # A long row behind a flattened image: every position counts as a sample of the channels.
    held = site.require("unpooled", "what is lost without some channels")
    covariance = damped(held.covariance, held.count)[0]
    per_position = _over_taps(gram, i)[0]
    mixed = torch.zeros_like(covariance)
    for column in side.positions.t():
        mixed += per_position[column][:, column]
    return [_reader(covariance, mixed, channels, channels.unsqueeze(1))]


def _over_taps(gram: Tensor, i: int) -> Tensor:
    g, d, _ = gram.shape
    return gram.reshape(g, i, d // i, i, d // i).diagonal(dim1=2, dim2=4).sum(-1)


def _reader(covariance: Tensor, gram: Tensor, channels: Tensor, entries: Tensor) -> subset.Reader:
    """A reader in units of its entries' own deviations; what never changes costs nothing to lose."""
    correlation, size = subset.standard(covariance)
    return subset.Reader(correlation, gram * size * size.unsqueeze(1), channels, entries)


def _by_layer(axes: Mapping[Axis, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for (name, axis), left in axes.items():
        found.setdefault(name, {})[axis] = left
    return found


def _counts(axes: Mapping[str, Tensor]) -> dict[str, int]:
    return {axis: len(left) for axis, left in axes.items()}


def _cut(layer: Layer, axes: Mapping[str, Tensor]) -> Layer:
    if THROUGH in axes:
        left = axes[THROUGH]
        return Layer(
            layer.spec.narrowed(_counts(axes)), layer.weight[left.to(layer.weight.device)], _entries(layer.bias, left)
        )
    if IN in axes:
        layer = _cut_inputs(layer, axes[IN])
    if OUT in axes:
        layer = _cut_outputs(layer, axes[OUT])
    return layer


def _entries(bias: Tensor | None, left: Tensor) -> Tensor | None:
    return None if bias is None else bias[left.to(bias.device)]


def _cut_outputs(layer: Layer, left: Tensor) -> Layer:
    g, o, *_ = layer.spec.shape
    rows = (left % o).reshape(g, -1).to(layer.weight.device)
    weight = torch.take_along_dim(layer.weight, rows.reshape(g, -1, *(1,) * (layer.weight.dim() - 2)), 1)
    statistics = layer.statistics.of_outputs(rows)
    return Layer(layer.spec.narrowed({OUT: len(left)}), weight, _entries(layer.bias, left), statistics)


def _cut_inputs(layer: Layer, left: Tensor) -> Layer:
    spec, statistics = layer.spec, layer.statistics
    g, o, i, *kernel = spec.shape
    channels = (left % i).reshape(g, -1).to(layer.weight.device)
    weight = layer.weight.double().reshape(g, o, i, -1)
    known = {_by_patches: statistics.input, _by_channels: statistics.channels, _by_sketch: statistics.sketch}
    way: Any = next((way for way, moments in known.items() if moments is not None), _as_they_are)
    weight, shift = way(known.get(way), weight, channels)
    bias = layer.bias
    if shift is not None:
        moved = shift.reshape(-1)
        bias = moved if bias is None else bias.double() + moved
    return Layer(
        spec.narrowed({IN: len(left)}),
        weight.to(layer.weight.dtype).reshape(g, o, -1, *kernel),
        bias,
        statistics.of_inputs(channels, i),
    )


# How a weight ``[g, o, i, taps]`` makes up for input channels that go, by what is known of the inputs: the weight of
# the channels that stay, and the mean response that it misses.


def _as_they_are(moments: None, weight: Tensor, channels: Tensor) -> tuple[Tensor, None]:
    return torch.take_along_dim(weight, channels.reshape(len(channels), 1, -1, 1), 2), None


def _by_patches(moments: Moments, weight: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    entries = entries_of(channels, weight.shape[3])
    fitted = subset.restored(damped(moments.covariance, moments.count), weight.flatten(2), entries)
    return _with_shift(moments, weight, fitted, entries)


def _by_sketch(moments: Sketch, weight: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    entries = entries_of(channels, weight.shape[3])
    return _with_shift(moments, weight, _from_sketch(moments, weight.flatten(2), entries), entries)


def _by_channels(moments: Moments, weight: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    g, o, i, taps = weight.shape
    by_tap = weight.movedim(3, 2).reshape(g, o * taps, i)
    fitted = subset.restored(damped(moments.covariance, moments.count), by_tap, channels).reshape(g, o, taps, -1)
    kept_mean = torch.take_along_dim(moments.mean, channels, 1)
    shift = torch.einsum("goit,gi->go", weight, moments.mean) - torch.einsum("goti,gi->go", fitted, kept_mean)
    return fitted.movedim(2, 3), shift


def _with_shift(moments: Moments, weight: Tensor, fitted: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    kept_mean = torch.take_along_dim(moments.mean, entries, 1)
    shift = torch.einsum("god,gd->go", weight.flatten(2), moments.mean)
    shift = shift - torch.einsum("god,gd->go", fitted, kept_mean)
    return fitted.reshape(*weight.shape[:2], -1, weight.shape[3]), shift


def _from_sketch(held: Sketch, weight: Tensor, entries: Tensor) -> Tensor:
    """What :func:`subset.restored` gives, by the equations of a sketch's rows, fewer than its entries."""
    rows = held.rows.double()
    left = torch.take_along_dim(rows, entries.unsqueeze(1), 2)
    kept = torch.take_along_dim(weight, entries.unsqueeze(1), 2)
    missing = rows @ weight.mT - left @ kept.mT
    return kept + held.take(entries).solve(missing)
