"""An optimizer goes on with a network in which layers were replaced: what it knows of weights is carried over."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.errors import called_as
from spectrim.network.printing import count
from spectrim.nn.modules import Factored
from spectrim.nn.standing import StandIn, laid_out

# Running means of gradients, which follow a change of variables as gradients do. Means of squares do not.
_GRADIENTS = frozenset({"momentum_buffer", "exp_avg"})


@dataclass(frozen=True)
class Carried:
    """What became of an optimizer's state.

    Attributes
    ----------
    kept
        Names of the parameters that are as they were, state and all.
    projected
        Factors whose momentum is that of the layer, by the chain rule.
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
        State of parameters of one name and shape is kept. For the pair ``W = B A`` of a layer whose gradients have the
        mean ``G``, the means of SGD with momentum are ``B^T G`` and ``G A^T``, which is what the pair's own would be if
        it had always computed the layer's product. Means of squares (Adam) do not follow, so that state which has some
        is reset, and so is that of all other layers.

    Raises
    ------
    ValueError
        If the optimizer holds no parameter of ``old``, or none of ``new`` has come from one.

    Notes
    -----
    Learning rates and steps of schedulers are left as they are: a scheduler holds the optimizer, which stays the same.
    """
    names = {id(p): name for name, p in old.named_parameters()}
    group_of = {names[id(p)]: n for n, g in enumerate(optimizer.param_groups) for p in g["params"] if id(p) in names}
    if not group_of:
        raise ValueError(
            f"the optimizer holds no parameter of this {type(old).__name__}: pass the network that it has trained, and "
            "then what was made of it"
        )
    state = {names[id(p)]: entries for p, entries in optimizer.state.items() if id(p) in names}
    shapes = {name: p.shape for name, p in old.named_parameters()}
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
            fresh[parameter] = {
                k: v.clone() if isinstance(v, Tensor) else copy.copy(v) for k, v in state[source].items()
            }
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
    """The dense layer's bias that the last layer of a pair has taken over."""
    module = new.get_submodule(layer)
    bias = f"{layer}.bias"
    last = isinstance(module, Factored) and name == f"{layer}.{len(module) - 1}.bias"
    return bias if last and bias in shapes else None


def _projected(
    old: nn.Module, new: nn.Module, state: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Momenta of factors, by their names, where a mean of gradients is all that the optimizer has."""
    for layer, pair in new.named_modules():
        entries = state.get(f"{layer}.weight")
        if not isinstance(pair, Factored) or entries is None or isinstance(old.get_submodule(layer), StandIn):
            continue
        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor) and value.dim()}
        if not tensors or not tensors.keys() <= _GRADIENTS:
            continue
        others = {key: value for key, value in entries.items() if key not in tensors}
        parts: list[dict[str, Any]] = [{}, {}]
        for key, gradient in tensors.items():
            for part, value in zip(parts, _through(pair, gradient), strict=True):
                part[key] = value
        for number, part in enumerate(parts):
            yield f"{layer}.{number}.weight", {**copy.deepcopy(others), **part}


def _through(pair: Factored, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the weights of a pair, given that of its product: ``B^T G`` and ``G A^T``, by autograd."""
    first, second = pair.first.weight, pair.second.weight
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    with torch.enable_grad():
        product = laid_out(pair.whole()[0], pair.original)
        gradients = torch.autograd.grad(product, [first, second], gradient.to(product.dtype), allow_unused=False)
    return tuple(each.detach() for each in gradients)  # type: ignore[return-value]
