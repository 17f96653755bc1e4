"""Budgets on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from spectrim.cli.common import usage
from spectrim.cli.references import UsageError
from spectrim.selection.budget import COSTS, Budget


def read_budget(limits: Sequence[str]) -> Budget:
    """The budget that ``--budget`` states.

    Raises
    ------
    UsageError
        For text that cannot be read, or a cost that is not counted.
    """
    with usage("--budget"):
        budget = Budget.parse(*limits)
    for cost in budget.costs:
        if cost not in COSTS:
            raise UsageError(f"--budget limits {cost!r}, which is not counted; choose from {', '.join(COSTS)}")
    return budget
