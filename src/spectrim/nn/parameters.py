"""Parameters, attributes and modes of a model, whatever its class makes of what gives them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def parameters_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters of a model and of the modules in it, each once.

    A class may have its ``parameters`` give those alone that are to be trained.
    """
    return (parameter for _, parameter in nn.Module.named_parameters(model))


def in_place_of(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter of other values, trained if the former one is, with what users have written on that."""
    made = nn.Parameter(values, parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def asked(module: nn.Module, name: str) -> Any:
    """What a module answers for an attribute; None where it has none, or its own code for that fails."""
    try:
        return getattr(module, name, None)
    except Exception:  # a property, or __getattr__, of somebody's class may raise anything
        return None


def own_kinds(model: nn.Module) -> list[type]:
    """Classes of a model's modules, and what they derive from, that are neither torch's nor this library's."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    return [kind for kind in kinds if not kind.__module__.startswith(("torch.", "spectrim.", "builtins"))]


def version_of(tensor: Tensor) -> int:
    """Counts changes in place; inference tensors have no counter."""
    return -1 if tensor.is_inference() else tensor._version


@contextlib.contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Each module is in training mode, or not, as before on leaving."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
