"""Find the channels that can be removed, through torch-pruning's dependency graph.

The graph says which entries of which modules belong to one channel. It is traced with one example and takes operations
it does not know for elementwise ones, so nothing is believed that has not been tried: with the weights zeroed that read
some of the channels, the model and its narrowed copy have to agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from spectrim.errors import called_as
from spectrim.network.coupling import IN, OUT, THROUGH, Axis, Coupling, Side
from spectrim.network.sites import Layer, Sites, Skipped, tied_to
from spectrim.nn.channels.experiments import Experiments, Mixed
from spectrim.nn.channels.heads import Heads
from spectrim.nn.channels.narrow import NORMS, beside_layers, held_at, length, pools_of
from spectrim.nn.channels.products import with_products
from spectrim.nn.channels.rules import layers_of, rule_of
from spectrim.nn.channels.tracing import comes_to, traced
from spectrim.nn.channels.trial import DRAWS, Trial, enlivened, first_line
from spectrim.nn.find import find
from spectrim.nn.layers import canonical, paths_of, tied_weights
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.layout import Where
from spectrim.nn.watch.state import ALONE

# Channels of a group that are tied to each other are looked for one by one up to this many.
_LOOKED_AT = 4096
# Ways by which the channels of one layer may reach one operation.
_VISITS = 16
# Or one channel may be named so often in one place: products of two parts of one tensor multiply indices.
_REPEATS = 64
_LOST = "they cannot be followed to all that reads them"
_UNSEEN = (
    "the way from them to the output cannot be seen: it leads past autograd (numpy, a copy of the data, a choice of "
    "the largest)"
)
_UNCALLED = "a copy of the model does not call it, so that what reads its channels is not known"
# Operations that mix channels or positions by what is in them.
_ATTENTION = re.compile(r"ScaledDot|Softmax|Bmm|Attention", re.IGNORECASE)


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
    try:
        import torch_pruning  # noqa: F401
    except ImportError as error:
        raise ImportError("removing filters needs torch-pruning: pip install 'spectrim[filters]'") from error
    _check_graph_library()
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
    small = run.few(lively, example, 2)
    graph = _Graph.traced(model, sites, small, run)
    # Other samples may go through layers that these two do not.
    left = graph.left() if isinstance(graph, _Graph) and small is not example else []
    if left and comes_to(model, left, example, run):
        small, graph = example, _Graph.traced(model, sites, example, run)
    if isinstance(graph, str):
        return dataclasses.replace(sites, skipped=(*sites.skipped, Skipped("", type(model).__name__, graph)))
    found, obstacles = graph.couplings()
    trial = Trial(lively, small, run)
    good, failed = trial.sort_out(found, graph.operations)
    good, left = graph.by_experiment(trial, good, [*obstacles, *failed])
    good, left = _with_heads(Heads(trial, frozenset(site.name for site in sites)), good, left)
    order = {site.name: number for number, site in enumerate(sites)}
    good = list(with_products(trial, good))
    good.sort(key=lambda c: order.get(c.sides[0].name, len(order)))
    touched = {side.name for coupling in good for side in coupling.sides}
    followers = []
    for spec in sites.untouched:
        if spec.name in touched:
            weight, bias = canonical(model.get_submodule(spec.name))
            followers.append(Layer(spec, weight, bias))
    norms = graph.norms()
    reading = {side.name for coupling in good for side in coupling.on(IN)}
    skipped = [Skipped(name, f"{count} channels", reason) for name, count, reason in left]
    return dataclasses.replace(
        sites,
        sites=tuple(_needing(site) if site.name in reading - norms.keys() else site for site in sites),
        couplings=tuple(good),
        followers=tuple(followers),
        norms=norms,
        skipped=(*sites.skipped, *skipped),
    )


def _with_heads(
    heads: Heads, good: Sequence[Coupling], left: Sequence[tuple[str, int, str]]
) -> tuple[list[Coupling], list[tuple[str, int, str]]]:
    """The couplings with those of attention's heads, and what is left: heads that stay say why."""
    found, reasons = heads.couplings(good)
    taken = {f"{side.name}:out" for coupling in found for side in coupling.on(OUT)}
    told = [(name, count, reasons.get(name, reason)) for name, count, reason in left if name not in taken]
    return [*good, *found], told


def _needing(site: Layer) -> Layer:
    """A layer that no normalisation follows: without a bias it gets one when it loses inputs."""
    return site if site.spec.bias else dataclasses.replace(site, spec=dataclasses.replace(site.spec, needs_bias=True))


@dataclass(eq=False)
class _Graph:
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
    def traced(cls, model: nn.Module, sites: Sites, example: Any, run: Callable[..., Any]) -> _Graph | str:
        import torch_pruning

        try:
            trace = traced(model, example, run, torch_pruning.DependencyGraph, _careful)
        except Exception as error:  # tracing runs foreign code, which may raise anything
            return f"channels are left alone: tracing failed with {type(error).__name__}: {first_line(error)}"
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
        first = [self.model.get_submodule(site.name) for site in self.sites]
        for module in [*first, *self.graph.module2node]:
            if (
                not isinstance(module, (_ConvNd, nn.Linear))
                or module in visited
                or module not in self.graph.module2node
                or module not in self.names  # made by the pass
            ):
                continue
            if isinstance(module, _ConvNd) and 1 < module.groups == module.out_channels:
                # A depthwise convolution writes the channels of the layer before it.
                continue
            name, count = f"{self.names[module][0]}:out", self.graph.get_out_channels(module)
            visited.add(module)
            try:
                group = self._group(module, range(count))
                for dep, _ in group:
                    if self.graph.is_out_channel_pruning_fn(dep.handler) and isinstance(dep.target.module, nn.Module):
                        visited.add(dep.target.module)
                        self.writers.setdefault(name, []).append(dep.target.module)
                self.operations[name] = _operations(group)
                if self._is_beyond_experiments(group, name):
                    self.settled.add(name)
                reason = self._obstacle(group, count)
                if reason is not None:
                    self.settled.add(name)
                else:
                    found.append(self._read(name, module, group, count))
            except _Blocked as error:
                reason = str(error)
                if error.lost:
                    self.lost.add(name)
            except Exception as error:
                self.lost.add(name)
                reason = f"{_LOST} (torch-pruning fails with {type(error).__name__}: {first_line(error)})"
            if reason is not None:
                obstacles.append((name, count, reason))
        return found, [*obstacles, *self._beyond()]

    def _beyond(self) -> Iterator[tuple[str, int, str]]:
        """The layers of sites that the graph does not know."""
        for site in self.sites:
            module = self.model.get_submodule(site.name)
            if module not in self.graph.module2node:
                reason = _UNSEEN if module in self.called else _UNCALLED
                yield f"{site.name}:out", site.spec.out_channels, reason

    def by_experiment(
        self, trial: Trial, good: list[Coupling], obstacles: Sequence[tuple[str, int, str]]
    ) -> tuple[list[Coupling], list[tuple[str, int, str]]]:
        """Look in another way for channels that the graph cannot follow: all couplings that work, and what is left."""
        experiments = Experiments(trial.model, trial.example, trial.run)
        taken = {side.name for coupling in good for side in coupling.on(OUT)}
        left = []
        for name, count, reason in obstacles:
            root = name.removesuffix(":out")
            # A group that was read wrong may hold layers that are of other groups.
            others = [self.names[m][0] for m in self.writers.get(name, []) if isinstance(m, (_ConvNd, nn.Linear))]
            for writer in dict.fromkeys([root, *others]) if name not in self.settled else ():
                coupling = None if writer in taken else self._tried(experiments, writer, trial, good)
                if coupling is not None:
                    good = [*good, coupling]
                    taken |= {side.name for side in coupling.on(OUT)}
            if root not in taken:
                left.append((name, count, self._holder(experiments, root, reason) if name in self.lost else reason))
        return good, left

    def _holder(self, experiments: Experiments, root: str, reason: str) -> str:
        """The reason as experiments see it: a module that loses no channels reads those of a layer, or nothing does."""
        try:
            name = experiments.holder(root)
            if name is not None:
                return _holding(name, self.model.get_submodule(name))
            experiments.sides(root)
        except Mixed as error:
            return str(error)
        except Exception:  # a pass with random numbers runs foreign code, which may raise anything
            return reason
        return reason

    def _is_beyond_experiments(self, group: Any, name: str) -> bool:
        """Whether channels pass attention, or are also those of tables and parameters that are added to them."""
        if any(_ATTENTION.search(operation) for operation in self.operations[name]):
            return True
        others = [dep.target.module for dep, _ in group if isinstance(dep.target.module, (nn.Parameter, nn.Embedding))]
        owners = (self.model.get_submodule(self.names[m][0].rpartition(".")[0]) for m in others)
        return any(
            isinstance(m, nn.Embedding) or rule_of(owner) is None for m, owner in zip(others, owners, strict=True)
        )

    def _tried(self, experiments: Experiments, root: str, trial: Trial, good: Sequence[Coupling]) -> Coupling | None:
        """The channels of a layer as experiments find them, if their removal does what it says."""
        known = {site.name for site in self.sites}
        if root not in known:
            return None
        try:
            sides, channels = experiments.sides(root)
            read = any(side.axis == IN for side in sides)
            plain = all(side.name in known for side in sides if side.axis in (IN, OUT))
            if channels < 2 or not read or not plain:
                return None
            numbers, size = beside_layers(self.model, sides)
            coupling = Coupling(f"{root}:out", tuple(sides), self._pools(sides, channels), numbers, size)
        except Exception:  # a pass with random numbers runs foreign code, which may raise anything
            return None
        ways = [coupling, *_halved(coupling)]
        for each in (*ways, *(other for way in ways for other in _with_attributes(self.model, way))):
            if all(trial.fault([each], draw) is None for draw in DRAWS):
                return each if not good or trial.fault([*good, each]) is None else None
        return None

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
        with _careful():
            return self.graph.get_pruning_group(module, pruner.prune_out_channels, list(channels))

    def _obstacle(self, group: Any, count: int) -> str | None:
        """Why the channels of a group have to stay, as far as the modules tell."""
        if count < 2:
            return "there is one channel only"
        known = {site.name for site in self.sites}
        reasons = {s.name: s.reason for s in self.sites.skipped}
        tied = tied_weights(self.model)
        followers = {spec.name for spec in self.sites.untouched if reasons.get(spec.name, "").startswith("depthwise")}
        for dep, _ in group:
            module = dep.target.module
            name = self.names.get(module, ("",))[0]
            kind = type(module).__name__
            if kind == "_OutputOp":
                return "its channels are an output of the network"
            if isinstance(module, (_ConvNd, nn.Linear)) and name not in known | followers:
                return f"{name}: {reasons.get(name, 'no plain layer')}"
            # Cut here it would be two tensors, and whole in the other module.
            own = module.parameters(recurse=False) if isinstance(module, nn.Module) else ()
            for holders in (tied[id(p)] for p in own if id(p) in tied):
                return f"{name}: {tied_to('weight', ', '.join(each for each in holders if each != name))}"
            if isinstance(module, nn.MultiheadAttention):
                return f"{name}: it keeps its heads and channels; those of spectrim.with_linear_layers(model) can go"
            if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
                return f"{name}: LayerNorm over {len(module.normalized_shape)} axes"
            holds = isinstance(module, nn.Module) and next(module.parameters(recurse=False), None) is not None
            if name and holds and not isinstance(module, (_ConvNd, nn.Linear, nn.Embedding, nn.PReLU, *NORMS)):
                return _holding(name, module)
        if not any(self._axis(dep) == IN for dep, _ in group):
            return "no layer reads its channels: they are an output of the network"
        return None

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
                raise _Blocked(f"{self.names[module][0]}: a depthwise convolution that joins channels")
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
                    raise _Blocked(f"{item.dep.target.name}: repeated heads of attention are left alone")
                place.setdefault(belongs[channel], []).append(position)
        found = []
        for (path, axis), place in sides.items():
            counts = {len(held) for held in place.values()}
            if len(place) != len(atoms) or len(counts) != 1:
                raise _Blocked(f"{path}: holds some of its channels only")
            positions = torch.tensor([sorted(place[number]) for number in range(len(atoms))])
            size = length(held_at(self.model, path), axis)
            assert size is not None
            if int(positions.max()) >= size or positions.unique().numel() != positions.numel():
                raise _Blocked(f"{path}: an operation before it makes its {size} channels of these")
            found.append(Side(path, axis, positions, size))
        numbers, size = beside_layers(self.model, found)
        found.sort(key=lambda side: side.name != self.names[root][0] or side.axis != OUT)
        return Coupling(name, tuple(found), self._pools(found, len(atoms)), numbers, size)

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
            raise _Blocked("its channels are tied to each other")
        atoms: list[list[int]] = []
        seen: set[int] = set()
        for channel in range(count):
            if channel not in seen:
                atoms.append(tied(channel))
                seen.update(atoms[-1])
        if sorted(c for atom in atoms for c in atom) != list(range(count)) or len(atoms) < 2:
            raise _Blocked("its channels are all tied to each other")
        return atoms

    def _pools(self, sides: Sequence[Side], channels: int) -> int:
        """Into how many equal runs the channels fall that all lose the same number."""
        pools = 1
        for side in sides:
            groups = pools_of(held_at(self.model, side.name), side.axis)
            if groups == 1:
                continue
            run = side.size // groups
            expected = torch.arange(side.size).reshape(channels, -1) if side.size % channels == 0 else None
            if expected is None or not torch.equal(side.positions, expected) or run < expected.shape[1]:
                raise _Blocked(f"{side.name}: its groups cut across the channels")
            pools = math.lcm(pools, groups)
        if channels % pools or (pools > 1 and channels // pools < 2):
            raise _Blocked(f"each of {pools} groups has one channel only")
        return pools


class _Blocked(Exception):
    """A group of channels that cannot be removed, and why."""

    lost = False


class _Lost(_Blocked):
    """A group of channels that the graph does not come to the end of."""

    lost = True


def _holding(name: str, module: nn.Module) -> str:
    return f"{name}: {type(module).__name__} holds parameters of its own that read or carry them"


def _mapping_names(index_mapping: Any) -> list[str]:
    return [name for name in vars(index_mapping) if re.fullmatch(r"update_\w+_index_mapping", name)]


def _check_graph_library() -> None:
    """Raise ImportError unless torch-pruning has what :func:`_careful` puts something else in place of."""
    from torch_pruning.dependency import graph, index_mapping

    if not hasattr(getattr(graph, "Group", None), "add_dep") or not _mapping_names(index_mapping):
        raise ImportError(
            f"torch-pruning {version('torch-pruning')} has no dependency.graph.Group.add_dep or no "
            "dependency.index_mapping.update_*_index_mapping, which reading its graph rests on: "
            "pip install 'torch-pruning>=1.6,<1.7'"
        )


@contextlib.contextmanager
def _careful() -> Iterator[None]:
    """Keep torch-pruning from failing altogether where it cannot follow one operation.

    It would go round in circles where parts of a split meet again, as in rotary embeddings: each time round moves the
    indices on, so that it does not notice having been there. And a reshape or concatenation whose sizes it takes for
    others would end the whole search; left as it is, what passes it fails the trial.
    """
    from torch_pruning.dependency import graph, index_mapping

    before, names = graph.Group, _mapping_names(index_mapping)
    mappings = {name: getattr(index_mapping, name) for name in names}

    def guarded(update: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            with contextlib.suppress(IndexError, ZeroDivisionError, TypeError):
                update(*arguments)

        return run

    class Bounded(before):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.visits: dict[tuple[int, Any], int] = {}

        def add_dep(self, dep: Any, idxs: Any) -> None:
            place = (id(dep.target), dep.handler)
            self.visits[place] = self.visits.get(place, 0) + 1
            if self.visits[place] > _VISITS or len(idxs) > _REPEATS * len({each.idx for each in idxs}):
                raise _Lost(f"{_LOST}: they come to one place again and again, as where parts of a split meet")
            super().add_dep(dep, idxs)

    graph.Group = Bounded
    for name, update in mappings.items():
        setattr(index_mapping, name, guarded(update))
    try:
        yield
    finally:
        graph.Group = before
        for name, update in mappings.items():
            setattr(index_mapping, name, update)


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
    """The coupling with an attribute that may be its number of channels, as in ``x.view(-1, self.channels, h, w)``."""
    sizes = {coupling.channels * entries for entries in (1, *(side.positions.shape[1] for side in coupling.sides))}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch."):
            continue
        for name, number in vars(module).items():
            if type(number) is int and number in sizes and not name.startswith("_"):
                positions = torch.arange(number).reshape(coupling.channels, -1)
                side = Side(path, f".{name}", positions, number)
                yield dataclasses.replace(coupling, sides=(*coupling.sides, side))


def _operations(group: Any) -> list[str]:
    """Names of the operations without parameters that the channels pass."""
    found = []
    for dep, _ in group:
        kind = type(dep.target.module).__name__
        if kind.startswith("_"):
            inner = getattr(dep.target.module, "_grad_fn", None) or type(dep.target.grad_fn).__name__
            found.append(re.sub(r"Backward\d*$", "", str(inner)))
    return list(dict.fromkeys(found))
