"""Find the channels that can be removed, through torch-pruning's dependency graph.

The graph says which entries of which modules belong to one channel. It is traced with one example and takes operations
it does not know for elementwise ones, so nothing is believed that has not been tried: with the weights zeroed that read
some of the channels, the model and its narrowed copy have to agree.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from spectrim.coupling import IN, OUT, THROUGH, Axis, Coupling, Side, axes_left
from spectrim.nn.batches import call, output_tensors, resized
from spectrim.nn.find import canonical, describe
from spectrim.nn.narrow import NORMS, narrow
from spectrim.sites import Site, Sites, Skipped

# Share of the outputs' magnitude by which a narrowed model may differ from one with zeroed weights.
_TOLERANCE = 1e-4
# Channels of a group that are tied to each other are looked for one by one up to this many.
_LOOKED_AT = 4096
# Operations that keep channels apart; others are named when a group cannot be pruned.
_HARMLESS = re.compile(
    r"(add|sub|mul|div|relu|silu|gelu|sigmoid|tanh|hardswish|hardsigmoid|hardtanh|clamp|elu|leaky|mish|pow|sqrt|mean|"
    r"sum|pool|dropout|identity|unsafeview|clone|contiguous|tobackward|tocopy|alias|upsample|interpolate|neg|exp|"
    r"abs|convolution|norm|addmm|view|reshape|permute|transpose|squeeze|^t$|concat|cat)",
    re.IGNORECASE,
)


def couple(
    model: nn.Module,
    sites: Sites,
    example: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Sites:
    """Find which channels can be removed, and where each of them lies.

    Parameters
    ----------
    model
        Left untouched; a copy is traced.
    sites
        From :func:`spectrim.find` for the same model. Layers that were skipped on request keep their channels.
    example
        A batch; two samples of it are used.
    forward
        Runs a model on a batch in another way.

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
    Layers whose outputs are added up lose the same channels. Grouped convolutions lose as many in every group. The
    heads of attention are left alone. LayerNorm and GroupNorm are narrowed with their channels, which changes their
    statistics; fine-tuning makes up for that.
    """
    try:
        import torch_pruning  # noqa: F401
    except ImportError as error:
        raise ImportError("removing filters needs torch-pruning: pip install 'spectrim[filters]'") from error
    run = forward or call
    small = resized(example, 2) if isinstance(example, (Tensor, Mapping, list, tuple)) else example
    graph = _Graph.traced(model, sites, small, run)
    if isinstance(graph, str):
        return dataclasses.replace(sites, skipped=(*sites.skipped, Skipped("", type(model).__name__, graph)))
    found, obstacles = graph.couplings()
    good, failed = _Trial(graph.model, small, run).sort_out(found, graph)
    order = {site.name: number for number, site in enumerate(sites)}
    good.sort(key=lambda c: order.get(c.sides[0].name, len(order)))
    touched = {side.name for coupling in good for side in coupling.sides}
    followers = []
    for spec in sites.untouched:
        if spec.name in touched:
            weight, bias = canonical(model.get_submodule(spec.name))
            followers.append(Site(spec.name, (spec,), (weight,), (bias,)))
    skipped = [Skipped(name, f"{count} channels", reason) for name, count, reason in [*obstacles, *failed]]
    return dataclasses.replace(
        sites,
        couplings=tuple(good),
        followers=tuple(followers),
        norms=graph.norms(),
        skipped=(*sites.skipped, *skipped),
    )


@dataclass(eq=False)
class _Graph:
    """torch-pruning's graph of a copy of the model, read."""

    model: nn.Module
    sites: Sites
    graph: Any
    names: dict[Any, tuple[str, ...]]
    operations: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def traced(cls, model: nn.Module, sites: Sites, example: Any, run: Callable[..., Any]) -> _Graph | str:
        import torch_pruning

        copied = copy.deepcopy(model).eval()
        for parameter in copied.parameters():
            # The graph is read off autograd.
            parameter.requires_grad_(parameter.is_floating_point())
        graph = torch_pruning.DependencyGraph()
        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                graph.build_dependency(
                    copied,
                    example,
                    forward_fn=lambda m, x: _traceable(run(m, x)),
                    verbose=False,
                )
        except Exception as error:  # tracing runs foreign code, which may raise anything
            return f"channels are left alone: tracing failed with {type(error).__name__}: {_first_line(error)}"
        names: dict[Any, tuple[str, ...]] = {}
        for name, module in copied.named_modules(remove_duplicate=False):
            names[module] = (*names.get(module, ()), name)
        for name, parameter in copied.named_parameters():
            names[parameter] = (name,)
        return cls(copied, sites, graph, names)

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
                self.operations[name] = _operations(group)
                reason = self._obstacle(group, count)
                if reason is None:
                    found.append(self._read(name, module, group, count))
            except _Blocked as error:
                reason = str(error)
            except Exception as error:
                reason = f"the dependency graph fails with {type(error).__name__}: {_first_line(error)}"
            if reason is not None:
                obstacles.append((name, count, reason))
        return found, obstacles

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
                ):
                    found[self.names[module][0]] = self.names[after.module][0]
        return found

    def _group(self, module: nn.Module, channels: Any) -> Any:
        pruner = self.graph.get_pruner_of_module(module)
        return self.graph.get_pruning_group(module, pruner.prune_out_channels, list(channels))

    def _obstacle(self, group: Any, count: int) -> str | None:
        """Why the channels of a group have to stay, as far as the modules tell."""
        if count < 2:
            return "there is one channel only"
        known = {site.name for site in self.sites}
        reasons = {s.name: s.reason for s in self.sites.skipped}
        followers = {spec.name for spec in self.sites.untouched if reasons.get(spec.name, "").startswith("depthwise")}
        for dep, _ in group:
            module = dep.target.module
            name = self.names.get(module, ("",))[0]
            kind = type(module).__name__
            if kind == "_OutputOp":
                return "its channels are an output of the network"
            if isinstance(module, (_ConvNd, nn.Linear)) and name not in known | followers:
                return f"{name}: {reasons.get(name, 'no plain layer')}"
            if isinstance(module, nn.MultiheadAttention):
                return f"{name}: the heads of attention are left alone"
            if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
                return f"{name}: LayerNorm over {len(module.normalized_shape)} axes"
            holds = isinstance(module, nn.Module) and next(module.parameters(recurse=False), None) is not None
            if name and holds and not isinstance(module, (_ConvNd, nn.Linear, nn.Embedding, nn.PReLU, *NORMS)):
                return f"{name}: a {kind} holds parameters of its own"
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
        numbers = size = 0.0
        for (path, axis), place in sides.items():
            counts = {len(held) for held in place.values()}
            if len(place) != len(atoms) or len(counts) != 1:
                raise _Blocked(f"{path}: holds some of its channels only")
            positions = torch.tensor([sorted(place[number]) for number in range(len(atoms))])
            owner = _get(self.model, path)
            length = _length(owner, axis)
            found.append(Side(path, axis, positions, length))
            if not isinstance(owner, (_ConvNd, nn.Linear)):
                held = [owner] if isinstance(owner, Tensor) else [*owner.parameters(), *owner.buffers()]
                per = [t for t in held if t.numel() >= length]
                share = positions.shape[1] / length
                numbers += sum(t.numel() * share for t in per if isinstance(t, nn.Parameter))
                size += sum(t.numel() * t.element_size() * share for t in per)
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
            module = _get(self.model, side.name)
            groups = 1
            if isinstance(module, nn.GroupNorm):
                groups = module.num_groups
            elif isinstance(module, _ConvNd) and side.axis != THROUGH:
                groups = module.groups
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


def _traceable(output: Any) -> Any:
    """The outputs that autograd knows."""
    return [tensor for tensor in output_tensors(output) if tensor.requires_grad]


class _Blocked(Exception):
    """A group of channels that cannot be removed, and why."""


def _get(model: nn.Module, path: str) -> Any:
    parent, _, leaf = path.rpartition(".")
    return getattr(model.get_submodule(parent), leaf) if leaf else model


def _length(module: Any, axis: str) -> int:
    if isinstance(module, nn.Parameter):
        return module.shape[int(axis)]
    if isinstance(module, (_ConvNd, nn.Linear)):
        spec = describe(module, ("",))
        return spec.in_channels if axis == IN else spec.out_channels
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    return module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features


def _operations(group: Any) -> list[str]:
    """Names of the operations without parameters that the channels pass."""
    found = []
    for dep, _ in group:
        kind = type(dep.target.module).__name__
        if kind.startswith("_"):
            inner = getattr(dep.target.module, "_grad_fn", None) or type(dep.target.grad_fn).__name__
            found.append(re.sub(r"Backward\d*$", "", str(inner)))
    return list(dict.fromkeys(found))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


@dataclass(eq=False)
class _Trial:
    """Removes channels from copies and compares."""

    model: nn.Module
    example: Any
    run: Callable[..., Any]

    def sort_out(
        self, couplings: Sequence[Coupling], graph: _Graph
    ) -> tuple[list[Coupling], list[tuple[str, int, str]]]:
        """The couplings whose removal does what it says, and the others with the reason."""
        if not couplings or self.fault(couplings) is None:
            return list(couplings), []
        good: list[Coupling] = []
        failed = []
        for coupling in couplings:
            fault = self.fault([coupling])
            if fault is None:
                good.append(coupling)
            else:
                failed.append((coupling.name, coupling.channels, self._named(fault, graph.operations[coupling.name])))
        # What works alone may not work together, such as two groups that one module keeps equal.
        if good and self.fault(good) is not None:
            together: list[Coupling] = []
            for coupling in good:
                fault = self.fault([*together, coupling])
                if fault is None:
                    together.append(coupling)
                else:
                    failed.append((coupling.name, coupling.channels, f"together with the others: {fault}"))
            good = together
        return good, failed

    def fault(self, couplings: Sequence[Coupling]) -> str | None:
        """What goes wrong when half of the channels are removed, or None."""
        kept = {c.name: _half(c) for c in couplings}
        axes = axes_left(couplings, kept)
        reference, small = copy.deepcopy(self.model), copy.deepcopy(self.model)
        with torch.no_grad():
            for (name, axis), left in axes.items():
                if axis == IN:
                    _silence(reference.get_submodule(name), left)
        try:
            narrow(small, axes)
            with torch.no_grad(), _without_statistics() as steps:
                wanted = output_tensors(self.run(reference, self.example))
                steps.again()
                given = output_tensors(self.run(small, self.example))
        except Exception as error:
            return f"the narrowed model fails with {type(error).__name__}: {_first_line(error)}"
        for a, b in zip(wanted, given, strict=True):
            if a.shape != b.shape:
                return f"the output would have the shape {tuple(b.shape)} in place of {tuple(a.shape)}"
            if a.is_floating_point() and not _close(a, b):
                return "the narrowed model computes something else"
        return None

    @staticmethod
    def _named(fault: str, operations: Sequence[str]) -> str:
        unusual = [name for name in operations if not _HARMLESS.search(name)]
        return f"{', '.join(unusual[:3])}: {fault}" if unusual else fault


def _half(coupling: Coupling) -> list[int]:
    pool = coupling.channels // coupling.pools
    chosen = torch.randperm(pool, generator=torch.Generator().manual_seed(0))[: max(1, pool // 2)].sort().values
    return [p * pool + c for p in range(coupling.pools) for c in chosen.tolist()]


def _silence(module: nn.Module, left: Tensor) -> None:
    """Zero the weights that read what is not left."""
    weight, _ = canonical(module)
    g, _, i, *_ = weight.shape
    gone = torch.ones(g * i, dtype=torch.bool)
    gone[left] = False
    gone = gone.to(weight.device).reshape(g, i)
    weight.mul_((~gone).reshape(g, 1, i, *(1,) * (weight.dim() - 3)).to(weight.dtype))


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.double(), b.double()
    scale = a.abs().max().clamp_min(1e-30) if a.numel() else a.new_ones(())
    return bool(torch.isfinite(a).all()) and bool(((a - b).abs() <= _TOLERANCE * scale).all())


class _Scales:
    """Scales by which normalisations divide in the first run, for the second."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self.next: Iterator[Tensor] | None = None

    def again(self) -> None:
        self.next = iter(self.held)

    def scaled(self, x: Tensor) -> Tensor:
        if self.next is None:
            self.held.append(x.square().mean().sqrt().clamp_min(1e-12))
            return x / self.held[-1]
        return x / next(self.next)


@contextlib.contextmanager
def _without_statistics() -> Iterator[_Scales]:
    """Layer and group normalisation divide by one number a call: their own statistics mix the channels."""
    scales = _Scales()
    functional = torch.nn.functional
    before = functional.layer_norm, functional.group_norm

    def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        x = scales.scaled(x)
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    def group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        x = scales.scaled(x)
        shape = (1, -1, *(1,) * (x.dim() - 2))
        x = x if weight is None else x * weight.reshape(shape)
        return x if bias is None else x + bias.reshape(shape)

    functional.layer_norm, functional.group_norm = layer_norm, group_norm  # type: ignore[assignment]
    try:
        yield scales
    finally:
        functional.layer_norm, functional.group_norm = before
