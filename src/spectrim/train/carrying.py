"""An optimizer goes on with a network in which layers were replaced: what it knows of weights is carried over."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.application.work import narrow_as
from spectrim.errors import called_as
from spectrim.network.printing import count
from spectrim.nn.copying import copy_model
from spectrim.nn.shipping import compressed_in, rewritten
from spectrim.nn.standing import StandIn, laid_out

# Running means of gradients, which follow a change of variables as gradients do. Means of squares do not.
_GRADIENTS = frozenset({"momentum_buffer", "exp_avg"})


@dataclass(frozen=True)
class Carried:
    """What became of an optimizer's state.

    Attributes
    ----------
    kept
        Names of the parameters that are as they were, state and all, or without the entries of channels that went.
    projected
        Factors whose momentum is that of the layers that they are part of, by the chain rule.
    reset
        Parameters that begin without state.
    """

    kept: tuple[str, ...]
    projected: tuple[str, ...]
    reset: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{count(len(self.kept), 'parameter')} kept, {count(len(self.projected), 'factor')} with the momentum of "
            f"the layer, {count(len(self.reset), 'parameter')} reset"
        )


@torch.no_grad()
@called_as("Write carry_optimizer(optimizer, dense, result.model)", optimizer=Optimizer, old=nn.Module, new=nn.Module)
def carry_optimizer(optimizer: Optimizer, old: nn.Module, new: nn.Module) -> Carried:
    """Have an optimizer go on with a compressed network, in place.

    Parameters
    ----------
    optimizer
        Of the parameters of ``old``. Its groups keep their options, and get the parameters of ``new`` in place.
    old
        The network that was trained.
    new
        What was made of it, by :func:`spectrim.compress` or :func:`spectrim.apply`. It may be compressed before.

    Returns
    -------
    Carried
        State of parameters of one name and shape is kept, and where channels went the entries that are left. For the
        pair ``W = B A`` of a layer whose gradients have the mean ``G``, the means of SGD with momentum are ``B^T G``
        and ``G A^T``, which is what the pair's own would be if it had always computed the layer's product; so it is for
        chains, sums and factors that layers share. Means of squares (Adam) do not follow, so that state which has some
        is reset, and so is that of layers that were compressed before and have another rank now.

    Raises
    ------
    ValueError
        If the optimizer holds no parameter of ``old``, or none of ``new`` has come from one; and where layers of
        ``new`` hold weights in another layout (:func:`spectrim.with_linear_layers`).

    Notes
    -----
    Learning rates and steps of schedulers are left as they are: a scheduler holds the optimizer, which stays the same.
    """
    new = compressed_in(new)
    group_of, state = _trained(optimizer, old)
    if unlike := set(rewritten(new)) - set(rewritten(old)):
        raise ValueError(
            f"{min(unlike)!r} has nn.Linear layers in the new network and not in the old one: train what "
            "with_linear_layers gives, compress that, and pass both"
        )
    shapes = _cut(old, new, state)
    momenta = dict(_projected(old, new, state))
    kept, projected, reset = [], [], []
    groups: list[list[nn.Parameter]] = [[] for _ in optimizer.param_groups]
    fresh: dict[nn.Parameter, dict[str, Any]] = {}
    for name, parameter in new.named_parameters():
        layer = _layer_of(name, new)
        source = name if shapes.get(name) == parameter.shape else _bias_of(name, layer, new, shapes)
        origin = source or _origin(name, layer, group_of)
        if origin not in group_of:
            continue  # of a layer that was not trained
        groups[group_of[origin]].append(parameter)
        if source in state:
            fresh[parameter] = copy.deepcopy(state[source])
            kept.append(name)
        elif name in momenta:
            fresh[parameter] = momenta[name]
            projected.append(name)
        elif state:
            reset.append(name)
    if not any(groups):
        raise ValueError(
            f"no parameter of this {type(new).__name__} has come from what the optimizer has trained: pass what was "
            f"made of the {type(old).__name__}"
        )
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters
    optimizer.state.clear()
    for parameter, entries in fresh.items():
        optimizer.state[parameter] = entries
    return Carried(tuple(kept), tuple(projected), tuple(reset))


def _trained(optimizer: Optimizer, old: nn.Module) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """The groups of an optimizer's parameters, and what it knows of them, by their names in the network."""
    names = {id(p): name for name, p in old.named_parameters()}
    group_of = {names[id(p)]: n for n, g in enumerate(optimizer.param_groups) for p in g["params"] if id(p) in names}
    if not group_of:
        raise ValueError(
            f"the optimizer holds no parameter of this {type(old).__name__}: pass the network that it has trained, and "
            "then what was made of it"
        )
    return group_of, {names[id(p)]: dict(entries) for p, entries in optimizer.state.items() if id(p) in names}


def _origin(name: str, layer: str, trained: Iterable[str]) -> str | None:
    """The trained parameter that one of another shape has come from: the layer's weight, or any of its parts."""
    names = list(trained)
    exact = (each for each in (f"{layer}.weight", name) if each in names)
    return next(exact, next((each for each in names if each.startswith(f"{layer}.")), None))


def _layer_of(name: str, model: nn.Module) -> str:
    """The layer that a parameter is part of: that of the outermost pair, or its module."""
    parts = name.split(".")
    for number in range(1, len(parts)):
        path = ".".join(parts[:number])
        if isinstance(model.get_submodule(path), StandIn):
            return path
    return ".".join(parts[:-1])


def _bias_of(name: str, layer: str, new: nn.Module, shapes: Mapping[str, torch.Size]) -> str | None:
    """The dense layer's bias that a part of what stands for it has taken over."""
    module, bias = new.get_submodule(layer), f"{layer}.bias"
    own = isinstance(module, StandIn) and module.bias_parameter() is new.get_parameter(name)
    return bias if own and bias in shapes else None


def _cut(old: nn.Module, new: nn.Module, state: dict[str, dict[str, Any]]) -> Mapping[str, torch.Size]:
    """Leave of the state, in place, the entries of channels that are still there: shapes of the old network without.

    State of a parameter that lost channels is dropped if it has tensors of another shape, as factored ones.
    """
    before = {name: p.shape for name, p in old.named_parameters()}
    # As parameters of the network that lost the channels, tensors lose what those do.
    holder = copy_model(old)
    narrow_as(holder, old, new)
    shapes = {name: p.shape for name, p in holder.named_parameters()}
    changed = {name for name in before.keys() & state.keys() if before[name] != shapes[name]}
    tensors = {n: {k: v for k, v in state[n].items() if isinstance(v, Tensor) and v.dim()} for n in changed}
    for name in [name for name in changed if any(v.shape != before[name] for v in tensors[name].values())]:
        del state[name], tensors[name]
    for key in set().union(*tensors.values()):
        holder, having = copy_model(old), [name for name, held in tensors.items() if key in held]
        for name in having:
            holder.get_parameter(name).copy_(tensors[name][key])
        narrow_as(holder, old, new)
        for name in having:
            state[name][key] = holder.get_parameter(name).detach()
    return shapes


def _projected(
    old: nn.Module, new: nn.Module, state: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Momenta of factors, by their names, where a mean of gradients is all that the optimizer has."""
    names = {id(p): name for name, p in new.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for layer, standing in new.named_modules():
        entries = state.get(f"{layer}.weight")
        if not isinstance(standing, StandIn) or entries is None or isinstance(old.get_submodule(layer), StandIn):
            continue
        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor) and value.dim()}
        if not tensors or not tensors.keys() <= _GRADIENTS:
            continue
        others = {key: value for key, value in entries.items() if key not in tensors}
        for key, gradient in tensors.items():
            for part, value in _through(standing, gradient):
                held = found.setdefault(names[id(part)], copy.deepcopy(others))
                # Of a factor that layers share the gradients add up.
                held[key] = held[key] + value if key in held else value
    yield from found.items()


def _through(standing: StandIn, gradient: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Gradients of what a weight is made of, given that of the weight: of a pair ``B^T G`` and ``G A^T``."""
    parts = [p for p in standing.parameters() if p.requires_grad]
    with torch.enable_grad():
        product = laid_out(standing.whole()[0], standing.original)
        gradients = torch.autograd.grad(product, parts, gradient.to(product.dtype), allow_unused=True)
    for part, value in zip(parts, gradients, strict=True):
        # A bias is no part of the weight.
        if value is not None:
            yield part, value.detach()
