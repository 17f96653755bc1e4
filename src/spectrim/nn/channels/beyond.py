"""Channels that the graph cannot follow, looked for by experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from spectrim.network.coupling import IN, OUT, Coupling, Side
from spectrim.nn.channels.experiments import Experiments, MixedChannels
from spectrim.nn.channels.narrow import beside_layers
from spectrim.nn.channels.reading import Graph, holding
from spectrim.nn.channels.trial import DRAWS, Trial


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
