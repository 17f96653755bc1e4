"""torch-pruning's graph, read: which entries of which modules belong to one channel, and what stands in the way."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from spectrim.errors import in_short
from spectrim.network.coupling import IN, OUT, THROUGH, Axis, Coupling, Side
from spectrim.network.sites import Sites, tied_to
from spectrim.nn.channels.library import LOST, Blocked, careful, empty_graph
from spectrim.nn.channels.narrow import NORMS, axis_length, beside_layers, held_at, pools_of
from spectrim.nn.channels.rules import layers_of, rule_of
from spectrim.nn.channels.tracing import traced
from spectrim.nn.layers import paths_of, tied_weights

# Channels of a group that are tied to each other are looked for one by one up to this many.
_LOOKED_AT = 4096
_UNSEEN = (
    "the way from them to the output cannot be seen: it leads past autograd (numpy, a copy of the data, a choice of "
    "the largest)"
)
_UNCALLED = "a copy of the model does not call it, so that what reads its channels is not known"
# Operations that mix channels or positions by what is in them.
_ATTENTION = re.compile(r"ScaledDot|Softmax|Bmm|Attention", re.IGNORECASE)


@dataclass(eq=False)
class Graph:
    """torch-pruning's graph of a copy of the model, read."""

    model: nn.Module
    sites: Sites
    graph: Any
    names: dict[Any, tuple[str, ...]]
    called: frozenset[nn.Module] = frozenset()  # the layers that ran while it was traced
    operations: dict[str, list[str]] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    writers: dict[str, list[nn.Module]] = field(default_factory=dict)

    @classmethod
    def traced(cls, model: nn.Module, sites: Sites, example: Any, run: Callable[..., Any]) -> Graph | str:
        try:
            trace = traced(model, example, run, empty_graph, careful)
        except Exception as error:  # tracing runs foreign code, which may raise anything
            return f"channels are left alone: tracing failed with {type(error).__name__}: {in_short(error)}"
        names: dict[Any, tuple[str, ...]] = {**paths_of(trace.model)}
        for name, parameter in nn.Module.named_parameters(trace.model):
            names[parameter] = (name,)
        return cls(trace.model, sites, trace.graph, names, frozenset(trace.called))

    def left(self) -> list[str]:
        """Layers that did not run."""
        return [name for name, layer in layers_of(self.model) if layer not in self.called]

    def couplings(self) -> tuple[list[Coupling], list[tuple[str, int, str]]]:
        """All groups of channels, and those that stand no chance, as ``(name, channels, reason)``."""
        found: list[Coupling] = []
        obstacles: list[tuple[str, int, str]] = []
        visited: set[nn.Module] = set()
        for module in self._writers():
            if module in visited:
                continue
            name, count = f"{self.names[module][0]}:out", self.graph.get_out_channels(module)
            visited.add(module)
            try:
                coupling = self._coupled(name, module, count)
            except Blocked as error:
                coupling = str(error)
                if error.lost:
                    self.lost.add(name)
            except Exception as error:
                self.lost.add(name)
                coupling = f"{LOST} (torch-pruning fails with {type(error).__name__}: {in_short(error)})"
            visited.update(self.writers.get(name, ()))
            if isinstance(coupling, str):
                obstacles.append((name, count, coupling))
            else:
                found.append(coupling)
        return found, [*obstacles, *self._beyond()]

    def _writers(self) -> Iterator[nn.Module]:
        """Layers that write channels of their own, those of sites first."""
        for module in [*(self.model.get_submodule(site.name) for site in self.sites), *self.graph.module2node]:
            known = module in self.graph.module2node and module in self.names  # not made by the pass
            # A depthwise convolution writes the channels of the layer before it.
            depthwise = isinstance(module, _ConvNd) and 1 < module.groups == module.out_channels
            if isinstance(module, (_ConvNd, nn.Linear)) and known and not depthwise:
                yield module

    def _coupled(self, name: str, module: nn.Module, count: int) -> Coupling | str:
        """The channels that a layer writes, with all that hold them, or why they have to stay."""
        group = self._group(module, range(count))
        for dep, _ in group:
            if self.graph.is_out_channel_pruning_fn(dep.handler) and isinstance(dep.target.module, nn.Module):
                self.writers.setdefault(name, []).append(dep.target.module)
        self.operations[name] = _operations(group)
        if self._is_beyond_experiments(group, name):
            self.settled.add(name)
        obstacle = self._obstacle(group, count)
        if obstacle is None:
            return self._read(name, module, group, count)
        self.settled.add(name)
        return obstacle

    def _beyond(self) -> Iterator[tuple[str, int, str]]:
        """The layers of sites that the graph does not know."""
        for site in self.sites:
            module = self.model.get_submodule(site.name)
            if module not in self.graph.module2node:
                reason = _UNSEEN if module in self.called else _UNCALLED
                yield f"{site.name}:out", site.spec.out_channels, reason

    def _is_beyond_experiments(self, group: Any, name: str) -> bool:
        """Whether channels pass attention, or are also those of tables and parameters that are added to them."""
        if any(_ATTENTION.search(operation) for operation in self.operations[name]):
            return True
        others = [dep.target.module for dep, _ in group if isinstance(dep.target.module, (nn.Parameter, nn.Embedding))]
        owners = (self.model.get_submodule(self.names[m][0].rpartition(".")[0]) for m in others)
        return any(
            isinstance(m, nn.Embedding) or rule_of(owner) is None for m, owner in zip(others, owners, strict=True)
        )

    def norms(self) -> dict[str, str]:
        """BatchNorm that alone reads a layer, which can take over the mean of what the layer no longer delivers."""
        found = {}
        for module, node in self.graph.module2node.items():
            if isinstance(module, (_ConvNd, nn.Linear)) and len(node.outputs) == 1:
                after = node.outputs[0]
                if (
                    isinstance(after.module, _BatchNorm)
                    and len(after.inputs) == 1
                    and after.module.running_mean is not None
                    # Not the positions of a sequence that a linear layer answers.
                    and after.module.num_features == self.graph.get_out_channels(module)
                ):
                    found[self.names[module][0]] = self.names[after.module][0]
        return found

    def _group(self, module: nn.Module, channels: Any) -> Any:
        pruner = self.graph.get_pruner_of_module(module)
        with careful():
            return self.graph.get_pruning_group(module, pruner.prune_out_channels, list(channels))

    def _obstacle(self, group: Any, count: int) -> str | None:
        """Why the channels of a group have to stay, as far as the modules tell."""
        if count < 2:
            return "there is one channel only"
        for dep, _ in group:
            if reason := self._holds_back(dep.target.module):
                return reason
        if not any(self._axis(dep) == IN for dep, _ in group):
            return "no layer reads its channels: they are an output of the network"
        return None

    def _holds_back(self, module: Any) -> str | None:
        """Why the channels that a module holds have to stay."""
        name = self.names.get(module, ("",))[0]
        if type(module).__name__ == "_OutputOp":
            return "its channels are an output of the network"
        if not isinstance(module, nn.Module):
            return None
        cut = isinstance(module, (_ConvNd, nn.Linear))
        if cut and name not in self._cut:
            return f"{name}: {self._reasons.get(name, 'no plain layer')}"
        # Cut here it would be two tensors, and whole in the other module.
        own = dict(module.named_parameters(recurse=False))
        for what, holders in ((what, self._tied[id(p)]) for what, p in own.items() if id(p) in self._tied):
            return f"{name}: {tied_to(what, ', '.join(each for each in holders if each != name))}"
        if isinstance(module, nn.MultiheadAttention):
            return f"{name}: it keeps its heads and channels; those of spectrim.with_linear_layers(model) can go"
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            return f"{name}: LayerNorm over {len(module.normalized_shape)} axes"
        if name and own and not cut and not isinstance(module, (nn.Embedding, nn.PReLU, *NORMS)):
            return holding(name, module)
        return None

    @cached_property
    def _reasons(self) -> dict[str, str]:
        return {skipped.name: skipped.reason for skipped in self.sites.skipped}

    @cached_property
    def _cut(self) -> set[str]:
        """Layers that can be: those of sites, and depthwise ones, which follow."""
        depthwise = {s.name for s in self.sites.untouched if self._reasons.get(s.name, "").startswith("depthwise")}
        return {site.name for site in self.sites} | depthwise

    @cached_property
    def _tied(self) -> dict[int, list[str]]:
        return tied_weights(self.model)

    def _axis(self, dep: Any) -> str | None:
        """Which axis of its module a dependency is about; None for operations without parameters."""
        module = dep.target.module
        if isinstance(module, nn.Parameter):
            dim = dep.target.pruning_dim
            return str(dim % module.dim())
        if module not in self.names:
            return None
        if isinstance(module, _ConvNd) and 1 < module.groups == module.out_channels:
            if module.in_channels != module.groups:
                raise Blocked(f"{self.names[module][0]}: a depthwise convolution that joins channels")
            return THROUGH
        if isinstance(module, (_ConvNd, nn.Linear)):
            return OUT if self.graph.is_out_channel_pruning_fn(dep.handler) else IN
        if isinstance(module, nn.Embedding):
            return OUT
        if isinstance(module, NORMS) or (isinstance(module, nn.PReLU) and module.num_parameters > 1):
            return THROUGH
        return None

    def _read(self, name: str, root: nn.Module, group: Any, count: int) -> Coupling:
        atoms = self._atoms(root, group, count)
        belongs = {channel: number for number, atom in enumerate(atoms) for channel in atom}
        sides: dict[Axis, dict[int, list[int]]] = {}
        for item in group:
            axis = self._axis(item.dep)
            if axis is None:
                continue
            place = sides.setdefault((self.names[item.dep.target.module][0], axis), {})
            for position, channel in zip(item.idxs, item.root_idxs, strict=True):
                if channel is None:
                    raise Blocked(f"{item.dep.target.name}: repeated heads of attention are left alone")
                place.setdefault(belongs[channel], []).append(position)
        found = []
        for (path, axis), place in sides.items():
            counts = {len(held) for held in place.values()}
            if len(place) != len(atoms) or len(counts) != 1:
                raise Blocked(f"{path}: holds some of its channels only")
            positions = torch.tensor([sorted(place[number]) for number in range(len(atoms))])
            size = axis_length(held_at(self.model, path), axis)
            assert size is not None
            if int(positions.max()) >= size or positions.unique().numel() != positions.numel():
                raise Blocked(f"{path}: an operation before it makes its {size} channels of these")
            found.append(Side(path, axis, positions, size))
        numbers, size = beside_layers(self.model, found)
        found.sort(key=lambda side: side.name != self.names[root][0] or side.axis != OUT)
        return Coupling(name, tuple(found), self.pools(found, len(atoms)), numbers, size)

    def _atoms(self, root: nn.Module, group: Any, count: int) -> list[list[int]]:
        """Channels of the first layer that can only be removed together, such as the two halves of a gate."""

        def tied(channel: int) -> list[int]:
            for item in self._group(root, [channel]):
                if item.dep.target.module is root and self._axis(item.dep) == OUT:
                    return sorted(set(item.idxs))
            return [channel]

        if all(tied(channel) == [channel] for channel in {0, count // 2, count - 1}):
            return [[channel] for channel in range(count)]
        if count > _LOOKED_AT:
            raise Blocked("its channels are tied to each other")
        atoms: list[list[int]] = []
        seen: set[int] = set()
        for channel in range(count):
            if channel not in seen:
                atoms.append(tied(channel))
                seen.update(atoms[-1])
        if sorted(c for atom in atoms for c in atom) != list(range(count)) or len(atoms) < 2:
            raise Blocked("its channels are all tied to each other")
        return atoms

    def pools(self, sides: Sequence[Side], channels: int) -> int:
        """Into how many equal runs the channels fall that all lose the same number."""
        pools = 1
        for side in sides:
            groups = pools_of(held_at(self.model, side.name), side.axis)
            if groups == 1:
                continue
            run = side.size // groups
            expected = torch.arange(side.size).reshape(channels, -1) if side.size % channels == 0 else None
            if expected is None or not torch.equal(side.positions, expected) or run < expected.shape[1]:
                raise Blocked(f"{side.name}: its groups cut across the channels")
            pools = math.lcm(pools, groups)
        if channels % pools or (pools > 1 and channels // pools < 2):
            raise Blocked(f"each of {pools} groups has one channel only")
        return pools


def holding(name: str, module: nn.Module) -> str:
    return f"{name}: {type(module).__name__} holds parameters of its own that read or carry them"


def _operations(group: Any) -> list[str]:
    """Names of the operations without parameters that the channels pass."""
    found = []
    for dep, _ in group:
        kind = type(dep.target.module).__name__
        if kind.startswith("_"):
            inner = getattr(dep.target.module, "_grad_fn", None) or type(dep.target.grad_fn).__name__
            found.append(re.sub(r"Backward\d*$", "", str(inner)))
    return list(dict.fromkeys(found))
