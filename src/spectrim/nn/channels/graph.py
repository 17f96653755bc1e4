"""Find the channels that can be removed, through torch-pruning's dependency graph.

The graph says which entries of which modules belong to one channel. It is traced with one example and takes operations
it does not know for elementwise ones, so nothing is believed that has not been tried: with the weights zeroed that read
some of the channels, the model and its narrowed copy have to agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from spectrim.errors import SpectrimError, called_as
from spectrim.network.coupling import IN, OUT, Coupling, Side, axes_left
from spectrim.network.sites import Layer, Sites, Skipped
from spectrim.nn.channels.experiments import Experiments, MixedChannels
from spectrim.nn.channels.heads import Heads
from spectrim.nn.channels.library import check_library
from spectrim.nn.channels.lively import as_is, enlivened
from spectrim.nn.channels.narrow import beside_layers, narrow
from spectrim.nn.channels.reading import Graph, holding
from spectrim.nn.channels.rules import layers_of
from spectrim.nn.channels.tracing import comes_to
from spectrim.nn.channels.trial import DRAWS, Trial, explained, half
from spectrim.nn.copying import copy_model
from spectrim.nn.find import find
from spectrim.nn.flops import WorkCounter
from spectrim.nn.layers import canonical
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.layout import Where
from spectrim.nn.watch.observe import observe, on_few
from spectrim.nn.watch.readers import reading
from spectrim.nn.watch.state import ALONE, evaluating


@called_as("Write couple(model, find(model), example)", model=nn.Module, sites=Sites)
def couple(
    model: nn.Module,
    sites: Sites,
    example: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    samples: Where = None,
) -> Sites:
    """Find which channels can be removed, and where each of them lies.

    Parameters
    ----------
    model
        Left untouched; a copy is traced.
    sites
        From :func:`spectrim.find` for the same model. Layers that were skipped on request keep their channels.
    example
        A batch; two samples of it are used, or all where they belong together, as the nodes of a graph do, or where
        others go through layers that these two do not.
    forward
        Runs a model on a batch in another way.
    samples
        Where a batch's samples are; see :func:`spectrim.calibrate`.

    Returns
    -------
    Sites
        With ``couplings`` and what belongs to them. Channels that cannot be removed are in ``skipped``, with the
        operation or module that stands in the way.

    Raises
    ------
    ImportError
        Without torch-pruning, which is in the extra ``filters``.

    Notes
    -----
    Layers whose outputs are added up lose the same channels. Grouped convolutions lose as many in every group. A head
    of attention is one channel of what writes its queries, keys and values and of what reads it; heads that share keys
    and values are one together unless all of them do, and layers that add one bias for each head lose the same heads.
    LayerNorm and GroupNorm are narrowed with their channels, which changes their
    statistics; fine-tuning makes up for that.
    """
    check_library()
    feed = Feed.of(forward, samples)
    if any(site.present for site in sites):
        # Channels lie in the layers of a pair one by one.
        names = {site.name for site in sites}
        sites = find(model, parts=True, only=lambda path, _: path in names or path.rpartition(".")[0] in names)
    with ALONE:
        # A weight that two layers have in common keeps its channels.
        alone = sites.untied()
        found = _coupled(model, alone, example, feed)
    if not sites.tied:
        return found
    told = {each.name for tied in sites.tied for each in tied.untied()}
    skipped = tuple(each for each in found.skipped if each.name not in told)
    return dataclasses.replace(found, tied=sites.tied, skipped=skipped, untouched=sites.untouched)


def _coupled(model: nn.Module, sites: Sites, example: Any, run: Feed) -> Sites:
    run.decide(model, example)
    # Not the traced copy: it may keep tensors of autograd, which cannot be copied.
    lively = enlivened(model)
    small = _two(lively, sites, example, run)
    graph = Graph.traced(model, sites, small, run)
    # Other samples may go through layers that these two do not.
    left = graph.left() if isinstance(graph, Graph) and small is not example else []
    if left and comes_to(model, left, example, run):
        small, graph = example, Graph.traced(model, sites, example, run)
    if isinstance(graph, str):
        return dataclasses.replace(sites, skipped=(*sites.skipped, Skipped("", type(model).__name__, graph)))
    found, obstacles = graph.couplings()
    trial = Trial(lively, small, run)
    good, failed = trial.sort_out(found, graph.operations)
    good, left = by_experiment(graph, trial, good, [*obstacles, *failed])
    order = {site.name: number for number, site in enumerate(sites)}
    good, left = _with_heads(Heads(trial, frozenset(order)), good, left)
    good, other = _as_it_goes(trial, model, example, good)
    left = [*left, *other]
    good = sorted(with_products(trial, good), key=lambda c: order.get(c.sides[0].name, len(order)))
    touched = {side.name for coupling in good for side in coupling.sides}
    follow = (spec for spec in sites.untouched if spec.name in touched)
    norms = graph.norms()
    reading = {side.name for coupling in good for side in coupling.on(IN)}
    skipped = [Skipped(name, f"{count} channels", reason) for name, count, reason in left]
    return dataclasses.replace(
        sites,
        sites=tuple(_needing(site) if site.name in reading - norms.keys() else site for site in sites),
        couplings=tuple(good),
        followers=tuple(Layer(spec, *canonical(model.get_submodule(spec.name))) for spec in follow),
        norms=norms,
        skipped=(*sites.skipped, *skipped),
    )


def _two(model: nn.Module, sites: Sites, batch: Any, run: Feed) -> Any:
    """Two samples of a batch; all for a model that does not run with two, as where edges name nodes.

    Raises CalibrationError where calibration would: for a model that calls its layers as they cannot be watched.
    """
    specs = [layer.spec for layer in sites.layers if not layer.present]

    def watched(part: Any) -> None:
        with observe(model, forward=run) as once, reading(model, specs):
            once(part)

    try:
        return on_few(watched, batch, run, 2)
    except SpectrimError:
        raise
    except Exception:  # the trace meets it too, and tells
        return batch


def _with_heads(
    heads: Heads, good: Sequence[Coupling], left: Sequence[tuple[str, int, str]]
) -> tuple[list[Coupling], list[tuple[str, int, str]]]:
    """The couplings with those of attention's heads, and what is left: heads that stay say why."""
    found, reasons = heads.couplings(good)
    taken = {f"{side.name}:out" for coupling in found for side in coupling.on(OUT)}
    told = [(name, count, reasons.get(name, reason)) for name, count, reason in left if name not in taken]
    return [*good, *found], told


def _as_it_goes(
    trial: Trial, model: nn.Module, batch: Any, good: list[Coupling]
) -> tuple[list[Coupling], list[tuple[str, int, str]]]:
    """The couplings whose removal is right the way that the model goes with the whole batch, and the others.

    With random weights and two samples, on which they were tried, it may have decided otherwise, or not at all.
    """
    real = Trial(as_is(model), batch, trial.run)
    if not good or real.ways() in (None, trial.ways()):
        return good, []
    right, faults = real.together(good)
    return right, [(c.name, c.channels, explained(faults[c.name])) for c in good if c.name in faults]


def _needing(site: Layer) -> Layer:
    """A layer that no normalisation follows: without a bias it gets one when it loses inputs."""
    return site if site.spec.bias else dataclasses.replace(site, spec=dataclasses.replace(site.spec, needs_bias=True))


def with_products(trial: Trial, couplings: Sequence[Coupling]) -> Iterator[Coupling]:
    """The couplings with the share that one of their channels has of such products."""
    counted = _own_macs(trial, trial.model) if couplings else {}
    for coupling in couplings:
        yield dataclasses.replace(coupling, products=_shares(trial, coupling, counted)) if counted else coupling


def _shares(trial: Trial, coupling: Coupling, counted: Mapping[str, float]) -> Mapping[str, float]:
    """What a channel takes of each module's products, by the module's path: seen without half of the channels."""
    kept = half(coupling)
    small = copy_model(trial.model)
    narrow(small, axes_left([coupling], {coupling.name: kept}))
    now = _own_macs(trial, small)
    gone = coupling.channels - len(kept)
    lost = {path: (1 - now.get(path, 0.0) / work) / gone for path, work in counted.items()}
    return MappingProxyType({path: share for path, share in lost.items() if share > 0})


def _own_macs(trial: Trial, model: nn.Module) -> dict[str, float]:
    with evaluating(model), WorkCounter() as counter:
        trial.run(model, trial.example)
    layers = {name for name, _ in layers_of(model)}
    return {path: work for path, work in counter.own_macs(model).items() if path not in layers}


def by_experiment(
    graph: Graph, trial: Trial, good: list[Coupling], obstacles: Sequence[tuple[str, int, str]]
) -> tuple[list[Coupling], list[tuple[str, int, str]]]:
    """Look in another way for channels that the graph cannot follow: all couplings that work, and what is left."""
    experiments = Experiments(trial.model, trial.example, trial.run)
    taken = {side.name for coupling in good for side in coupling.on(OUT)}
    left = []
    for name, count, reason in obstacles:
        root = name.removesuffix(":out")
        # A group that was read wrong may hold layers that are of other groups.
        others = [graph.names[m][0] for m in graph.writers.get(name, []) if isinstance(m, (_ConvNd, nn.Linear))]
        for writer in dict.fromkeys([root, *others]) if name not in graph.settled else ():
            coupling = None if writer in taken else _tried(graph, experiments, writer, trial, good)
            if coupling is not None:
                good = [*good, coupling]
                taken |= {side.name for side in coupling.on(OUT)}
        if root not in taken:
            left.append((name, count, _holder(graph, experiments, root, reason) if name in graph.lost else reason))
    return good, left


def _holder(graph: Graph, experiments: Experiments, root: str, reason: str) -> str:
    """The reason as experiments see it: a module that loses no channels reads those of a layer, or nothing does."""
    try:
        name = experiments.holder(root)
        if name is not None:
            return holding(name, graph.model.get_submodule(name))
        experiments.sides(root)
    except MixedChannels as error:
        return str(error)
    except Exception:  # a pass with random numbers runs foreign code, which may raise anything
        return reason
    return reason


def _tried(
    graph: Graph, experiments: Experiments, root: str, trial: Trial, good: Sequence[Coupling]
) -> Coupling | None:
    """The channels of a layer as experiments find them, if their removal does what it says."""
    known = {site.name for site in graph.sites}
    if root not in known:
        return None
    try:
        sides, channels = experiments.sides(root)
        read = any(side.axis == IN for side in sides)
        plain = all(side.name in known for side in sides if side.axis in (IN, OUT))
        if channels < 2 or not read or not plain:
            return None
        numbers, size = beside_layers(graph.model, sides)
        coupling = Coupling(f"{root}:out", tuple(sides), graph.pools(sides, channels), numbers, size)
    except Exception:  # a pass with random numbers runs foreign code, which may raise anything
        return None
    ways = [coupling, *_halved(coupling)]
    for each in (*ways, *(other for way in ways for other in _with_attributes(graph.model, way))):
        if all(trial.fault([each], draw) is None for draw in DRAWS):
            return each if not good or trial.fault([*good, each]) is None else None
    return None


def _halved(coupling: Coupling) -> Iterator[Coupling]:
    """The coupling with channels of both halves tied: a split or a shuffle wants as many of each."""
    half = coupling.channels // 2
    if coupling.pools == 1 and half > 1 and coupling.channels % 2 == 0:
        sides = (
            dataclasses.replace(side, positions=torch.cat([side.positions[:half], side.positions[half:]], 1))
            for side in coupling.sides
        )
        numbers, size = 2 * coupling.parameters, 2 * coupling.bytes
        yield dataclasses.replace(coupling, sides=tuple(sides), parameters=numbers, bytes=size)


def _with_attributes(model: nn.Module, coupling: Coupling) -> Iterator[Coupling]:
    """The coupling with an attribute that may be its number of channels, as in ``x.view(-1, graph.channels, h, w)``."""
    sizes = {coupling.channels * entries for entries in (1, *(side.positions.shape[1] for side in coupling.sides))}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch."):
            continue
        for name, number in vars(module).items():
            if type(number) is int and number in sizes and not name.startswith("_"):
                positions = torch.arange(number).reshape(coupling.channels, -1)
                side = Side(path, f".{name}", positions, number)
                yield dataclasses.replace(coupling, sides=(*coupling.sides, side))
