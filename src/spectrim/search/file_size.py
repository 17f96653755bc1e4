"""A limit in bytes is met by the file that is written, its header included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from spectrim.errors import InfeasibleBudgetError
from spectrim.network.sites import Sites
from spectrim.network.skipped import Skipped
from spectrim.nn.checkpoint import header_bytes
from spectrim.selection.budget import Budget, Limit
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan

_HEADER = "names, shapes, digests and the plan, which the file holds beside numbers: fewer layers take fewer"
# Bytes that a header may grow by from one plan to the next.
_SLACK = 64


def within_file(
    model: nn.Module,
    sites: Sites,
    plan: Plan,
    table: Candidates,
    budget: Budget,
    planned: Callable[[Sites, Candidates, Budget], tuple[Plan, Candidates]],
) -> tuple[Sites, Plan, Candidates, Budget]:
    """A plan whose file is within a limit on bytes, a share being one of the dense network's file.

    The file holds the plan, and the plan the layers: the header is counted as what nothing is chosen for, and the plan
    made again.
    """
    dense = table.dense["bytes"] + header_bytes(model)
    limit = budget.limits({**table.dense, "bytes": dense})["bytes"]
    budget, room = budget.replace(bytes=Limit(limit)), 0
    while (header := header_bytes(model, plan)) > room:
        room, more = header + _SLACK, header + _SLACK - room
        sites = dataclasses.replace(sites, other_bytes=sites.other_bytes + more)
        fixed = {**table.fixed, "bytes": table.fixed["bytes"] + more}
        others = tuple(each for each in table.skipped if each.reason != _HEADER)
        told = Skipped("header", "text", _HEADER, {"bytes": float(room)})
        table = dataclasses.replace(table, fixed=fixed, skipped=(*others, told))
        try:
            plan, table = planned(sites, table, budget)
        except InfeasibleBudgetError as error:
            # The table's dense network has the header of a plan that it has no need of.
            raise error.of(dense) if error.cost == "bytes" else error from None
    return sites, plan, table, budget
