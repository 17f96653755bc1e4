"""A table under a budget, as selectors solve it: trees of rows, binding limits, bounds, and the way back to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spectrim.errors import InfeasibleBudgetError
from spectrim.selection import knapsack
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates, Row
from spectrim.selection.forest import Flat, Forest, flattened
from spectrim.selection.knapsack import ROUNDING, Floats, Indices, Items
from spectrim.selection.plan import Plan, make_plan

# Of a plan's facts: by which share of its loss a better plan could lose less, at the most.
PROVEN_GAP = "proven gap"


@dataclass(frozen=True, eq=False)
class Budgeted:
    """A table within absolute limits."""

    candidates: Candidates  # the table
    limits: Mapping[str, float]  # by the name of the cost
    flat: Flat  # the table of the trees
    items: Items | None  # its options as a knapsack; None if the dense network meets all limits

    @classmethod
    def of(cls, candidates: Candidates, budget: Budget) -> Budgeted:
        """The table within the budget.

        Raises
        ------
        InfeasibleBudgetError
            If a limit cannot be met even alone.
        ValueError
            If the table lacks a cost that is limited, or holds numbers that cannot be.
        """
        dense = candidates.dense
        limits = budget.limits(dense)
        names = tuple(limits)
        flat = flattened(candidates, names)
        # Every option allowed is cheaper in all limited costs, so that a limit met by the dense network always holds.
        binding = [c for c in names if dense[c] > limits[c] * (1 + ROUNDING)]
        parts = [_worth_choosing(row, names, binding, by_error=True) for row in flat.candidates.rows]
        if not binding:
            return cls(candidates, limits, flat, None)
        fixed = np.array([candidates.fixed[c] for c in binding], dtype=float)
        lowest = fixed + sum((part[3].min(0) for part in parts), np.zeros(len(binding)))
        for c, low in zip(binding, lowest, strict=True):
            if low > limits[c] * (1 + ROUNDING):
                raise InfeasibleBudgetError(c, limits[c], float(low), dense[c], skipped=candidates.left_alone(c))
        index, loss, error, cost = (np.concatenate(column) for column in zip(*parts, strict=True))
        items = Items(
            names=tuple(binding),
            site=np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts]),
            index=index,
            loss=loss,
            error=error,
            cost=cost,
            dense=np.array([[row.dense.costs[c] for c in binding] for row in flat.candidates.rows], dtype=float),
            fixed=fixed,
            limit=np.array([limits[c] for c in binding]),
        )
        return cls(candidates, limits, flat, items)

    @property
    def grouped(self) -> bool:
        return self.flat.candidates is not self.candidates

    def relax(self, items: Items) -> tuple[Indices, float, np.ndarray]:
        """Picks, lower bound and multipliers of the Lagrangian relaxation."""
        picks, bound, multipliers = knapsack.relax(items)
        if self.grouped:
            # With several limits the sums of parts that the trees offer need not hold the best one at these prices.
            zero = np.zeros_like(multipliers)
            bound = max(_bound(self._real, self._forest, m)[0] for m in (multipliers, zero))
        return picks, bound, multipliers

    def promising(self, items: Items, picks: Indices, best: float, multipliers: np.ndarray) -> Items:
        """The options that may be in a better plan than ``picks``, whose loss is ``best``."""
        if not self.grouped:
            score = items.loss + items.cost @ multipliers
            reduced = score - np.minimum.reduceat(score, items.starts)[items.site]
            possible = reduced <= (best - items.lower_bound(multipliers)) * (1 + knapsack.GAP)
            possible[picks] = True
            return items.keep(possible)
        real = self._real
        bound, reduced = _bound(real, self._forest, multipliers)
        possible = reduced <= (best - bound) * (1 + knapsack.GAP)
        picked = self.flat.expand(items.index[picks].tolist())
        possible |= np.array([picked.get(int(r)) == k for r, k in zip(real.site, real.index, strict=True)])
        return real.keep(possible)

    @cached_property
    def _forest(self) -> Forest:
        return Forest(self.candidates)

    @cached_property
    def _real(self) -> Items:
        """The options of all rows, groups among them, each with the sites it covers."""
        items = self.items
        assert items is not None
        names = tuple(self.limits)
        parts = []
        for number, row in enumerate(self.candidates.rows):
            kept, loss, error, cost = _worth_choosing(row, names, items.names, by_error=False)
            # That nothing is done in a group is said by its sites.
            part = slice(1, None) if row.members and len(kept) and kept[0] == 0 else slice(None)
            parts.append((np.full(len(kept[part]), number), kept[part], loss[part], error[part], cost[part]))
        site, index, loss, error, cost = (np.concatenate(column) for column in zip(*parts, strict=True))
        dense = np.array([[row.dense.costs[c] for c in items.names] for row in self.candidates.singles], dtype=float)
        cover = tuple(self._forest.leaves[n] for n in site)
        return dataclasses.replace(
            items, site=site, index=index, loss=loss, error=error, cost=cost, dense=dense, cover=cover
        )

    def plan(self, items: Items | None, picks: Indices | None, selector: str, bound: float | None = None) -> Plan:
        """The plan of the picked positions; without items, all dense."""
        if items is None or picks is None:
            chosen = self.flat.expand([0] * len(self.flat.candidates))
        elif items.cover is not None:
            chosen = dict(zip(items.site[picks].tolist(), items.index[picks].tolist(), strict=True))
        else:
            chosen = self.flat.expand(items.index[picks].tolist())
        plan = make_plan(self.candidates, chosen, budget=self.limits, selector=selector)
        if bound is None:
            return plan
        bound = min(bound, plan.loss)
        gap = 1 - bound / plan.loss if plan.loss > 0 else 0.0
        return dataclasses.replace(plan, bound=bound, facts={**plan.facts, PROVEN_GAP: gap})


def _worth_choosing(
    row: Row, names: Sequence[str], binding: Sequence[str], *, by_error: bool
) -> tuple[Indices, Floats, Floats, Floats]:
    """Indices of the options that are cheaper than dense and not dominated, with losses, errors and binding costs.

    ``by_error`` keeps those too that only another error distinguishes, for selectors that go by it.
    """
    loss, error, cost = knapsack.columns(row, names)
    kept = knapsack.cheaper(cost)
    cost = cost[:, [names.index(c) for c in binding]]
    values = [loss[kept], error[kept], cost[kept]] if by_error else [loss[kept], cost[kept]]
    kept = kept[knapsack.undominated(np.column_stack(values))]
    return kept, loss[kept], error[kept], cost[kept]


def _bound(real: Items, forest: Forest, multipliers: np.ndarray) -> tuple[float, np.ndarray]:
    """The Lagrangian dual, and by how much every option raises it."""
    score = real.loss + real.cost @ multipliers
    scores = [np.concatenate([score[real.site == n], [np.inf]]) for n in range(len(forest.rows))]
    total, rest = 0.0, np.zeros(len(forest.rows))
    values = [forest.best(n, scores)[0] for n in range(len(forest.rows))]
    above = list(forest.roots)
    for root in forest.roots:
        total += values[root]
        rest[root] = -values[root]
    while above:
        number = above.pop()
        apart = sum(values[child] for child in forest.children[number])
        for child in forest.children[number]:
            rest[child] = rest[number] + apart - values[child]
            above.append(child)
    return float(total - multipliers @ real.room), score + rest[real.site]
