"""Costs and budgets on the command line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from spectrim.cli.common import usage
from spectrim.cli.references import Reference, UsageError, factory, halves
from spectrim.selection.budget import COSTS, Budget


def read_costs(texts: Sequence[str] | None) -> dict[str, Callable[[Any], float]]:
    """The functions of layers that ``--cost NAME=package.module:function`` names, by the cost.

    Raises
    ------
    UsageError
        For text of another form, a name that is taken, or what cannot be imported or called.
    """
    found: dict[str, Callable[[Any], float]] = {}
    for text in texts or ():
        name, equals, place = text.partition("=")
        module, function = halves(place)
        if not equals or not name.strip() or not function:
            raise UsageError(f"--cost {text!r}: write NAME=package.module:function, as joules=energy:joules")
        if name in COSTS or name in found:
            raise UsageError(f"--cost {text!r}: there is a cost {name!r} already; choose another name")
        found[name] = factory(Reference(place, module, function), "cost")
    return found


def read_budget(limits: Sequence[str], costs: Collection[str] = ()) -> Budget:
    """The budget that ``--budget`` states, over the library's costs and those of ``--cost``.

    Raises
    ------
    UsageError
        For text that cannot be read, or a cost that is not counted.
    """
    with usage("--budget"):
        budget = Budget.parse(*limits)
    known = (*COSTS, *costs)
    for cost in budget.costs:
        if cost not in known:
            raise UsageError(
                f"--budget limits {cost!r}, which is not counted; choose from {', '.join(known)}, or give "
                f"--cost {cost}=package.module:function"
            )
    return budget
