"""A limit in bytes is met by the file that is written, its header included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from spectrim.errors import InfeasibleBudgetError
from spectrim.network.sites import Sites
from spectrim.network.skipped import Skipped
from spectrim.nn.checkpoint import file_size, header_bytes
from spectrim.selection.budget import Budget, Limit
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import Selector

_HEADER = "names, shapes, digests and the plan, which the file holds beside numbers: fewer layers take fewer"
# Bytes that a header may grow by from one plan to the next.
_SLACK = 64
# Share of the limit that may be kept for a header and be more than it needs.
_IDLE = 0.01


Planned = Callable[[Sites, Candidates, Budget], tuple[Plan, Candidates]]


def on_file(model: nn.Module, budget: Budget) -> Budget:
    """The budget with a limit on bytes as a number, a share being one of the file of the (dense) model."""
    if budget.bytes is None:
        return budget
    return budget.replace(bytes=Limit(Budget(bytes=budget.bytes).limits({"bytes": file_size(model)})["bytes"]))


def selected(model: nn.Module, sites: Sites, table: Candidates, budget: Budget, selector: Selector) -> Plan:
    """The plan of a selector, for a model in which all layers of the table are dense; bytes are those of files."""
    if budget.bytes is None:
        return selector(table, budget)

    def planned(_: Sites, wider: Candidates, limits: Budget) -> tuple[Plan, Candidates]:
        return selector(wider, limits), wider

    plan = within_file(model, sites, table, budget, planned, selector)[1]
    dense = table.dense["bytes"] + header_bytes(model)
    return dataclasses.replace(plan, dense_costs={**plan.dense_costs, "bytes": dense})


def within_file(
    model: nn.Module, sites: Sites, table: Candidates, budget: Budget, planned: Planned, selector: Selector
) -> tuple[Sites, Plan, Candidates, Budget]:
    """A plan whose file is within a limit on bytes, a share being one of the dense network's file.

    The file holds the plan, and the plan the layers: the header of what the ``selector`` takes from the table as it is
    is counted as what nothing is chosen for, and another one if that of the plan does not fit; where that leaves
    nothing, the plan of the smallest file is tried.

    Raises
    ------
    InfeasibleBudgetError
        If the budget cannot be met; of bytes it carries the size of a file that can be made, and the dense file's.
    """
    dense = table.dense["bytes"] + header_bytes(model)
    limit = budget.limits({**table.dense, "bytes": dense})["bytes"]
    budget = budget.replace(bytes=Limit(limit))

    def within(known: Sites, wider: Candidates) -> tuple[Plan, Candidates]:
        return planned(known, wider, budget)

    try:
        room = _room(model, table, budget, selector)
        return *_settled(model, sites, table, within, room, idle=round(_IDLE * limit)), budget
    except InfeasibleBudgetError as error:
        if error.cost != "bytes":
            raise
        try:
            known, plan, wider = _smallest(model, sites, table, budget, planned)
        except InfeasibleBudgetError:
            # Not by bytes alone: what cannot be met is told of all limits together.
            raise error.of(dense) from None
    if plan.costs["bytes"] > limit:
        # A plan may happen to take less than the limit that was needed to find it.
        least = max(plan.costs["bytes"], plan.budget["bytes"])
        # The table's dense network has the header of a plan that it has no need of.
        alone = wider.left_alone("bytes")
        raise InfeasibleBudgetError("bytes", limit, least, wider.dense["bytes"], skipped=alone).of(dense)
    return known, dataclasses.replace(plan, budget={**plan.budget, "bytes": limit}), wider, budget


def _room(model: nn.Module, table: Candidates, budget: Budget, selector: Selector) -> int:
    """Bytes of a header as that of the plan that is selected; 0 if there is none."""
    try:
        return header_bytes(model, selector(table, budget)) + _SLACK
    except InfeasibleBudgetError:
        return 0


def _settled(
    model: nn.Module, sites: Sites, table: Candidates, planned: Callable[[Sites, Candidates], tuple[Plan, Candidates]],
    room: int = 0, *, idle: int,
) -> tuple[Sites, Plan, Candidates]:  # fmt: skip
    """A plan whose header is within the bytes that are counted for it, and what counts them.

    It begins with a ``room`` of so many. More than it needs by ``idle`` bytes is taken from it once.
    """
    begun = False
    while True:
        known, wider = _with_header(sites, table, room)
        plan, wider = planned(known, wider)
        header = header_bytes(model, plan)
        if header <= room and (begun or room - header <= idle):
            return known, plan, wider
        room, begun = header + _SLACK, True


def _with_header(sites: Sites, table: Candidates, room: int) -> tuple[Sites, Candidates]:
    """Sites and table that count so many bytes of a header as what nothing is chosen for."""
    told = Skipped("header", "text", _HEADER, {"bytes": float(room)})
    fixed = {**table.fixed, "bytes": table.fixed["bytes"] + room}
    wider = dataclasses.replace(table, fixed=fixed, skipped=(*table.skipped, told)) if room else table
    return dataclasses.replace(sites, other_bytes=sites.other_bytes + room), wider


def _smallest(
    model: nn.Module, sites: Sites, table: Candidates, budget: Budget, planned: Planned
) -> tuple[Sites, Plan, Candidates]:
    """The plan of the smallest file that is found, whatever the budget has for a limit on bytes, and what counts it."""

    def least(known: Sites, wider: Candidates) -> tuple[Plan, Candidates]:
        limit = 1.0
        while True:
            try:
                return planned(known, wider, budget.replace(bytes=Limit(limit)))
            except InfeasibleBudgetError as error:
                if error.cost != "bytes" or error.lowest <= limit:
                    raise
                limit = error.lowest

    return _settled(model, sites, table, least, idle=0)
