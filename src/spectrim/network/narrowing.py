"""What a removal of channels leaves of sites: specs, weights and moments, without a model.

The layers that read the channels are corrected in closed form from the moments that calibration kept
(:mod:`spectrim.linalg.subset`), so that a table can be made of the network as it would be, and of that the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from spectrim.linalg import subset
from spectrim.linalg.moments import Moments, shrunk
from spectrim.linalg.sketch import Sketch
from spectrim.network.coupling import IN, OUT, THROUGH, Axis, Coupling, axes_left
from spectrim.network.sites import Site, Sites
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

    def cut(site: Site) -> Site:
        return _cut(site, by_layer[site.name]) if site.name in by_layer else site

    everything = {c.name: range(c.channels) for c in sites.couplings} | dict(kept)
    couplings = tuple(c.after(list(everything[c.name]), axes) for c in sites.couplings)
    pooled = {
        name: {key: sliced(held, _rows(everything[name])) for key, held in group.items()}
        for name, group in sites.pooled.items()
    }
    gone = {c.name: c.channels - len(everything[c.name]) for c in sites.couplings}
    return dataclasses.replace(
        sites,
        sites=tuple(cut(site) for site in sites),
        followers=tuple(cut(site) for site in sites.followers),
        untouched=tuple(spec.narrowed(_counts(by_layer.get(spec.name, {}))) for spec in sites.untouched),
        couplings=couplings,
        pooled=MappingProxyType({name: MappingProxyType(group) for name, group in pooled.items()}),
        other_parameters=sites.other_parameters - round(sum(gone[c.name] * c.parameters for c in sites.couplings)),
        other_bytes=sites.other_bytes - round(sum(gone[c.name] * c.bytes for c in sites.couplings)),
    )


def layers_left(couplings: Iterable[Coupling], numbers: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Lengths of the axes that hold coupled channels, by module and axis, with so many channels of each coupling."""
    found: dict[str, dict[str, int]] = {}
    for coupling in couplings:
        gone = coupling.channels - numbers.get(coupling.name, coupling.channels)
        for side in coupling.sides:
            held = found.setdefault(side.name, {})
            held[side.axis] = held.get(side.axis, side.size) - gone * side.positions.shape[1]
    return found


def specs(site: Site, number: int) -> Apart:
    """The layers of a site of coupled channels with so many of them."""
    assert site.coupling is not None
    counts = layers_left([site.coupling], {site.name: number})
    return Apart(tuple(Chain((spec.narrowed(counts.get(spec.name, {})),)) for spec in site.layers))


def cut_layers(site: Site, kept: Sequence[int]) -> tuple[Site, ...]:
    """The layers of a site of coupled channels as they are with some of the channels, the readers corrected."""
    assert site.coupling is not None
    axes = _by_layer(axes_left([site.coupling], {site.coupling.name: kept}))
    return tuple(_cut(part, axes.get(part.name, {})) for part in site.parts)


def readers(site: Site, part: Site, gram: Tensor) -> list[subset.Reader]:
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
    assert site.coupling is not None
    (side,) = (side for side in site.coupling.on(IN) if side.name == part.name)
    spec = part.spec
    g, _, i, *_ = spec.shape
    taps = spec.features // i
    channels = torch.arange(site.coupling.channels)
    if "input" in part.moments or "channels" in part.moments:
        whole = "input" in part.moments
        held = part.moments["input" if whole else "channels"]
        covariance = shrunk(held.covariance, held.count)
        if not whole:
            gram, taps = _over_taps(gram, i), 1
        entries = (side.positions.unsqueeze(2) * taps + torch.arange(taps)).flatten(1)
        group, size = side.positions[:, 0] // i, i * taps
        return [
            subset.Reader(_positive(covariance[n]), gram[n], channels[group == n], entries[group == n] - n * size)
            for n in range(g)
            if bool((group == n).any())
        ]
    # A long row behind a flattened image: every position counts as a sample of the channels.
    held = site.require("unpooled", "what is lost without some channels")
    covariance = shrunk(held.covariance, held.count)[0]
    per_position = gram.reshape(g, i, taps, i, taps).diagonal(dim1=2, dim2=4).sum(-1)[0]
    mixed = torch.zeros_like(covariance)
    for column in side.positions.t():
        mixed += per_position[column][:, column]
    return [subset.Reader(_positive(covariance), mixed, channels, channels.unsqueeze(1))]


def _over_taps(gram: Tensor, i: int) -> Tensor:
    g, d, _ = gram.shape
    return gram.reshape(g, i, d // i, i, d // i).diagonal(dim1=2, dim2=4).sum(-1)


def _positive(covariance: Tensor) -> Tensor:
    """A layer that sees nothing but constants has no variance to divide by."""
    fixed = covariance.clone()
    fixed.diagonal().clamp_min_(1e-30)
    return fixed


def _by_layer(axes: Mapping[Axis, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for (name, axis), left in axes.items():
        found.setdefault(name, {})[axis] = left
    return found


def _counts(axes: Mapping[str, Tensor]) -> dict[str, int]:
    return {axis: len(left) for axis, left in axes.items()}


def _rows(kept: Sequence[int]) -> Tensor:
    return torch.tensor(list(kept), dtype=torch.int64)


def sliced(held: Moments, entries: Tensor) -> Moments:
    """The moments of some entries, ``[n]`` of the only group or ``[g, n]``."""
    index = entries.expand(held.mean.shape[0], -1).to(held.mean.device)
    if isinstance(held, Sketch):
        part: Moments = Sketch(held.mean.shape[0], index.shape[1], held.size, held.mean.device)
        part.rows = torch.take_along_dim(held.rows, index.unsqueeze(1), 2)
        part.lost = held.lost * (index.shape[1] / held.mean.shape[1])
    else:
        part = Moments(held.mean.shape[0], index.shape[1], held.mean.device)
        rows = torch.take_along_dim(held.scatter, index.unsqueeze(2), 1)
        part.scatter = torch.take_along_dim(rows, index.unsqueeze(1), 2)
    part.count = held.count
    part.mean = torch.take_along_dim(held.mean, index, 1)
    return part


def _cut(site: Site, axes: Mapping[str, Tensor]) -> Site:
    spec = site.spec
    if THROUGH in axes:
        left = axes[THROUGH]
        (bias,) = site.biases
        return dataclasses.replace(
            site,
            layers=(spec.narrowed(_counts(axes)),),
            weights=(site.weight[left.to(site.weight.device)],),
            biases=(None if bias is None else bias[left.to(bias.device)],),
            moments=MappingProxyType({}),
        )
    if IN in axes:
        site = _cut_inputs(site, axes[IN])
    if OUT in axes:
        site = _cut_outputs(site, axes[OUT])
    return site


def _cut_outputs(site: Site, left: Tensor) -> Site:
    spec = site.spec
    g, o, *_ = spec.shape
    rows = (left % o).reshape(g, -1).to(site.weight.device)
    weight = torch.take_along_dim(site.weight, rows.reshape(g, -1, *(1,) * (site.weight.dim() - 2)), 1)
    (bias,) = site.biases
    moments = dict(site.moments)
    for name in ("output", "gradient"):
        if name in moments:
            moments[name] = sliced(moments[name], rows)
    return dataclasses.replace(
        site,
        layers=(spec.narrowed({OUT: len(left)}),),
        weights=(weight,),
        biases=(None if bias is None else bias[left.to(bias.device)],),
        moments=MappingProxyType(moments),
    )


def _cut_inputs(site: Site, left: Tensor) -> Site:
    spec = site.spec
    g, o, i, *kernel = spec.shape
    taps = spec.features // i
    channels = (left % i).reshape(g, -1).to(site.weight.device)
    weight = site.weight.double().reshape(g, o, i, taps)
    entries = (channels.unsqueeze(2) * taps + torch.arange(taps, device=channels.device)).flatten(1)
    moments = dict(site.moments)
    (bias,) = site.biases
    shift = None
    if "input" in moments:
        held = moments["input"]
        covariance = torch.stack([_positive(c) for c in shrunk(held.covariance, held.count)])
        fitted = subset.restored(covariance, weight.flatten(2), entries)
        kept_mean = torch.take_along_dim(held.mean, entries, 1)
        shift = torch.einsum("god,gd->go", weight.flatten(2), held.mean)
        shift = shift - torch.einsum("god,gd->go", fitted, kept_mean)
        moments["input"] = sliced(held, entries)
        weight = fitted.reshape(g, o, -1, taps)
    elif "channels" in moments:
        held = moments["channels"]
        covariance = torch.stack([_positive(c) for c in shrunk(held.covariance, held.count)])
        by_tap = weight.movedim(3, 2).reshape(g, o * taps, i)
        fitted = subset.restored(covariance, by_tap, channels).reshape(g, o, taps, -1)
        kept_mean = torch.take_along_dim(held.mean, channels, 1)
        shift = torch.einsum("goit,gi->go", weight, held.mean) - torch.einsum("goti,gi->go", fitted, kept_mean)
        moments["channels"] = sliced(held, channels)
        weight = fitted.movedim(2, 3)
    elif isinstance(held := moments.get("sketch"), Sketch):
        fitted = _from_sketch(held, weight.flatten(2), entries)
        kept_mean = torch.take_along_dim(held.mean, entries, 1)
        shift = torch.einsum("god,gd->go", weight.flatten(2), held.mean)
        shift = shift - torch.einsum("god,gd->go", fitted, kept_mean)
        weight = fitted.reshape(g, o, -1, taps)
    else:
        weight = torch.take_along_dim(weight, channels.reshape(g, 1, -1, 1), 2)
    for name in list(moments):
        if name.startswith("input:"):
            per = moments[name].mean.shape[1] // i
            rows = (channels.unsqueeze(2) * per + torch.arange(per, device=channels.device)).flatten(1)
            moments[name] = sliced(moments[name], rows)
    if "sketch" in moments:
        moments["sketch"] = sliced(moments["sketch"], entries)
    if shift is not None:
        moved = shift.reshape(-1)
        bias = moved if bias is None else bias.double() + moved
    return dataclasses.replace(
        site,
        layers=(spec.narrowed({IN: len(left)}),),
        weights=(weight.to(site.weight.dtype).reshape(g, o, -1, *kernel),),
        biases=(bias,),
        moments=MappingProxyType(moments),
    )


def _from_sketch(held: Sketch, weight: Tensor, entries: Tensor) -> Tensor:
    """What :func:`subset.restored` gives, by the equations of a sketch's rows, fewer than its entries."""
    rows = held.rows.double()
    left = torch.take_along_dim(rows, entries.unsqueeze(1), 2)
    kept = torch.take_along_dim(weight, entries.unsqueeze(1), 2)
    gram = left @ left.mT
    gram.diagonal(dim1=-2, dim2=-1).add_((held.level() * held.count).clamp_min(1e-20).unsqueeze(-1))
    missing = rows @ weight.mT - left @ kept.mT
    return kept + torch.linalg.solve(gram, missing).mT @ left
