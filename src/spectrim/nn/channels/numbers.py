"""Numbers of channels that modules hold themselves, or read off a configuration that others read too."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn


class Fewer:
    """A configuration with other numbers for one module: whatever else is asked for or set later, the shared one says.

    The configuration of the whole network stays as it is, since files and ``from_pretrained`` make the dense one of it.
    """

    def __init__(self, shared: Any, numbers: dict[str, int]) -> None:
        vars(self).update(_shared=shared, **numbers)

    def __getattr__(self, name: str) -> Any:
        # Copies ask before there is anything.
        if name.startswith("__") or "_shared" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["_shared"], name)


def number_at(module: nn.Module, path: str) -> int | None:
    """The whole number at ``heads``, or at ``config.heads`` of what the module holds; None where there is none."""
    name, _, of = path.partition(".")
    held = vars(module).get(name)
    number = held if not of else None if isinstance(held, nn.Module) else getattr(held, of, None)
    return number if type(number) is int else None


def set_number(module: nn.Module, path: str, number: int) -> None:
    """Set it, for this module alone."""
    name, _, of = path.partition(".")
    if not of:
        setattr(module, name, number)
        return
    held = getattr(module, name)
    if isinstance(held, Fewer):
        vars(held)[of] = number
    else:
        setattr(module, name, Fewer(held, {of: number}))


def numbers_of(module: nn.Module) -> Iterator[tuple[str, int]]:
    """All whole numbers of a module, by their paths."""
    for name, held in vars(module).items():
        if type(held) is int and not name.startswith("_"):
            yield name, held
        elif not name.startswith("_") and _configures(held):
            said = ((of, number) for of, number in vars(held).items() if type(number) is int)
            yield from ((f"{name}.{of}", number) for of, number in said if not of.startswith("_"))


def _configures(held: Any) -> bool:
    """Whether it may be a configuration: an object of plain values."""
    kinds = (nn.Module, Tensor, type, FunctionType, MethodType)
    return hasattr(held, "__dict__") and not isinstance(held, kinds) and not callable(held)
