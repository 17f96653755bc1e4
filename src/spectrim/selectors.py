"""Selectors: one option for every site of a table, within a budget.

Every selector is a function ``(Candidates, Budget) -> Plan``. The problem is the multiple-choice knapsack

    min sum_i loss_i(j_i)   subject to   fixed_c + sum_i cost_ic(j_i) <= limit_c   for every limited cost c

over one option ``j_i`` a site. Options that are not strictly cheaper than leaving the site dense, in every cost that
the budget limits, are dropped first, and so are dominated ones (another option loses no more and costs no more). What
is left lies on a path from dense to cheapest at each site; all selectors but :func:`exact` walk such paths in an order
of their own and stop at the first plan within the budget.

All of them return a plan within all limits, or raise :class:`~spectrim.errors.InfeasibleBudgetError` if there is none.
With several limits, a walk can end above one of them though some plan meets all; the plan that comes closest, found by
mixed-integer programming, then takes the place of the walk's end. A cost counts as within its limit up to a relative
``1e-12``, for the rounding of sums.

Where sites may share factors, a group is on offer in place of its sites (:mod:`spectrim.forest`). All selectors but
:func:`exact` then see groups and good choices for the sites apart as options of one site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spectrim import knapsack
from spectrim.budget import Budget
from spectrim.errors import InfeasibleBudgetError
from spectrim.forest import Flat, Forest, flattened
from spectrim.knapsack import ROUNDING, Indices, Table
from spectrim.plan import Candidates, Plan, make_plan

Selector = Callable[[Candidates, Budget], Plan]


def uniform(candidates: Candidates, budget: Budget) -> Plan:
    """Every site at the same fraction of its own cost.

    Each site takes the option that loses least among those that cost at most a fraction ``t`` of the dense site (in
    each limited cost), for the largest ``t`` that meets the budget. Sites that cannot go so low take their cheapest
    option; sites where nothing is cheaper stay dense.

    Raises
    ------
    InfeasibleBudgetError
        If no plan meets the budget.
    ValueError
        If the table is not fit for selection; the message names the site.
    """

    def end(table: Table) -> Indices | None:
        share = (table.cost / np.where(table.dense > 0, table.dense, 1)[table.site]).max(1)
        paths = [knapsack.front(group, table.loss, share) for group in table.groups]
        return knapsack.walk(table, paths, [-share[path[:-1]] for path in paths], together=True)[0]

    return _by_walk(candidates, budget, "uniform", end)


def energy(candidates: Candidates, budget: Budget) -> Plan:
    """Every site at the same relative error.

    Each site takes its cheapest option with an error up to a threshold, for the smallest threshold that meets the
    budget. Sensitivities play no part. With several limits, "cheapest" adds the costs up, each as a fraction of what
    has to be saved.

    Raises
    ------
    InfeasibleBudgetError, ValueError
        As :func:`uniform`.
    """

    def end(table: Table) -> Indices | None:
        paths = [knapsack.front(group, table.error, table.cost @ table.need) for group in table.groups]
        return knapsack.walk(table, paths, [table.error[path[1:]] for path in paths], together=True)[0]

    return _by_walk(candidates, budget, "energy", end)


def greedy(candidates: Candidates, budget: Budget) -> Plan:
    """From dense, the step with the least added loss for the cost saved, again and again until within the budget.

    A step takes one site to any cheaper option of it. With several limits, savings add up, each as a fraction of what
    has to be saved. The last step may save more than was needed; :func:`lagrangian` walks the same way and spends
    that again.

    Raises
    ------
    InfeasibleBudgetError, ValueError
        As :func:`uniform`.
    """
    return _by_walk(candidates, budget, "greedy", lambda table: knapsack.descend(table, table.need)[0])


def lagrangian(candidates: Candidates, budget: Budget) -> Plan:
    """Minimise loss + multiplier * cost, then spend what is left of the budget.

    The multiplier is the smallest at which the minimiser meets the budget, found among the slopes of the lower convex
    hulls of the sites. Unused budget then goes to the changes that reduce the loss most for the cost they add.
    ``bound`` of the plan is the Lagrangian dual, attained at its ``multipliers``: no plan within the budget loses less.
    With one limit, the loss exceeds the bound by at most one step of one site. With several limits, the multipliers are
    those of the linear relaxation; the bound holds too, but how close the loss comes to it is not guaranteed.

    Raises
    ------
    InfeasibleBudgetError, ValueError
        As :func:`uniform`.
    """
    problem = _read(candidates, budget)
    table = problem.table
    if table is None:
        return problem.plan(None, None, "lagrangian", 0.0)
    picks, bound, multipliers = problem.relax(table)
    plan = problem.plan(table, picks, "lagrangian", bound)
    return dataclasses.replace(plan, multipliers=dict(zip(table.names, multipliers.tolist(), strict=True)))


def exact(candidates: Candidates, budget: Budget) -> Plan:
    """The plan of least loss, by mixed-integer programming (HiGHS), up to a relative gap of ``1e-6``.

    Options that :func:`lagrangian`'s plan and bound prove to be in no better plan are left out, which keeps the program
    small. ``bound`` of the plan is the proven lower bound. If the solver fails or takes longer than 30 s, the
    plan is that of :func:`lagrangian` and its ``selector`` says so.

    Raises
    ------
    InfeasibleBudgetError, ValueError
        As :func:`uniform`.
    """
    problem = _read(candidates, budget)
    table = problem.table
    if table is None:
        return problem.plan(None, None, "exact", 0.0)
    picks, bound, multipliers = problem.relax(table)
    best = float(table.loss[picks].sum())
    if best - bound <= ROUNDING * best:
        return problem.plan(table, picks, "exact", bound)
    small = problem.promising(table, picks, best, multipliers)
    solution = knapsack.solve(small, scale=best)
    if isinstance(solution, str):
        return problem.plan(table, picks, f"lagrangian (exact: {solution})", bound)
    found, proven = solution
    if small.loss[found].sum() < best:
        table, picks = small, found
    return problem.plan(table, picks, "exact", max(bound, min(proven, best)))


def select(candidates: Candidates, budget: Budget, selector: Selector = exact) -> Plan:
    """Choose one option a site so that the network meets the budget and loses little.

    Parameters
    ----------
    candidates
        What ``tabulate`` returned.
    budget
        Limits on the whole network, untouched layers included.
    selector
        :func:`exact`, :func:`lagrangian`, :func:`greedy`, :func:`uniform`, :func:`energy`, or a function of yours.

    Raises
    ------
    InfeasibleBudgetError
        If no plan meets the budget; it holds the lowest reachable cost.
    ValueError
        If the table lacks a cost that the budget limits, or holds errors or costs that are NaN or infinite.
    """
    return selector(candidates, budget)


def at_multiplier(candidates: Candidates, cost: str, multiplier: float, *, dense: bool = True) -> Plan:
    """The plan that minimises ``loss + multiplier * cost``, site by site, without a budget.

    Of options whose sums are equal (to rounding) the cheaper one is taken.

    Parameters
    ----------
    cost
        Name of the cost, as in ``candidates.costs``.
    multiplier
        Loss that one unit of the cost is worth; finite and >= 0.
    dense
        Whether a site may stay dense; then, as everywhere, an option that is not strictly cheaper than dense is not
        considered. Without it all options but the dense one are, also those that cost more.

    Raises
    ------
    ValueError
        For another multiplier, a cost the table does not hold, or a site without any option but dense when that is
        not allowed.
    """
    if not 0 <= multiplier < float("inf"):
        raise ValueError(f"multiplier {multiplier!r} must be finite and at least 0")
    if cost not in candidates.costs:
        raise ValueError(f"the table has no cost {cost!r}; it has {', '.join(candidates.costs)}")
    forest = Forest(candidates)
    scores: list[np.ndarray] = []
    for row in candidates.rows:
        loss, _, costs = knapsack.columns(row, (cost,))
        price = costs[:, 0]
        allowed = knapsack.cheaper(costs) if dense else np.arange(1, len(price))
        if not len(allowed) and not row.members:
            raise ValueError(f"site {row.site!r} has no option but dense, which is not allowed here")
        score = np.full(len(price), np.inf)
        total = (loss + multiplier * price)[allowed]
        if len(allowed):
            least = allowed[total <= total.min() * (1 + ROUNDING)]
            score[least[np.lexsort((loss[least], price[least]))[0]]] = total.min()
        scores.append(score)
    picks = dict(pair for root in forest.roots for pair in forest.best(root, scores)[1])
    plan = make_plan(candidates, picks, budget={}, selector=f"at_multiplier({cost}, {multiplier:.6g})")
    return dataclasses.replace(plan, multipliers={cost: float(multiplier)})


@dataclass(frozen=True, eq=False)
class _Problem:
    """A table under a budget. ``table`` is that of the trees, or None if the dense network meets all limits."""

    candidates: Candidates
    budget: Budget
    flat: Flat
    table: Table | None

    @property
    def grouped(self) -> bool:
        return self.flat.candidates is not self.candidates

    def relax(self, table: Table) -> tuple[Indices, float, np.ndarray]:
        """Picks, lower bound and multipliers of the Lagrangian relaxation."""
        picks, bound, multipliers = knapsack.relax(table)
        if self.grouped:
            # With several limits the sums of parts that the trees offer need not hold the best one at these prices.
            real, forest = self._real(table), Forest(self.candidates)
            zero = np.zeros_like(multipliers)
            bound = max(_bound(real, forest, multipliers)[0], _bound(real, forest, zero)[0], 0.0)
        return picks, bound, multipliers

    def promising(self, table: Table, picks: Indices, best: float, multipliers: np.ndarray) -> Table:
        """The options that may be in a better plan than ``picks``, whose loss is ``best``."""
        if not self.grouped:
            score = table.loss + table.cost @ multipliers
            reduced = score - np.minimum.reduceat(score, table.starts)[table.site]
            possible = reduced <= (best - table.lower_bound(multipliers)) * (1 + knapsack.GAP)
            possible[picks] = True
            return table.keep(possible)
        real = self._real(table)
        bound, reduced = _bound(real, Forest(self.candidates), multipliers)
        possible = reduced <= (best - bound) * (1 + knapsack.GAP)
        held = self.flat.expand(table.index[picks].tolist())
        possible |= np.array([held.get(int(r)) == k for r, k in zip(real.site, real.index, strict=True)])
        return real.keep(possible)

    def _real(self, table: Table) -> Table:
        """The options of all rows, groups among them, each with the sites it covers."""
        forest, names = Forest(self.candidates), tuple(self.budget.limits(self.candidates.dense))
        at = [names.index(c) for c in table.names]
        parts = []
        for number, row in enumerate(self.candidates.rows):
            loss, error, cost = knapsack.columns(row, names)
            kept = knapsack.cheaper(cost)
            kept = kept[knapsack.undominated(np.column_stack([loss[kept], cost[kept][:, at]]))]
            # That nothing is done in a group is said by its sites.
            kept = kept[kept > 0] if row.members else kept
            parts.append((np.full(len(kept), number), kept, loss[kept], error[kept], cost[kept][:, at]))
        site, index, loss, error, cost = (np.concatenate(column) for column in zip(*parts, strict=True))
        dense = np.array([[row.dense.costs[c] for c in table.names] for row in self.candidates.singles], dtype=float)
        cover = tuple(forest.leaves[n] for n in site)
        return dataclasses.replace(
            table, site=site, index=index, loss=loss, error=error, cost=cost, dense=dense, cover=cover
        )

    def plan(self, table: Table | None, picks: Indices | None, selector: str, bound: float | None = None) -> Plan:
        """The plan of the picked positions; without a table, all dense."""
        limits = self.budget.limits(self.candidates.dense)
        if table is None or picks is None:
            chosen = self.flat.expand([0] * len(self.flat.candidates))
        elif table.cover is not None:
            chosen = dict(zip(table.site[picks].tolist(), table.index[picks].tolist(), strict=True))
        else:
            chosen = self.flat.expand(table.index[picks].tolist())
        plan = make_plan(self.candidates, chosen, budget=limits, selector=selector)
        return plan if bound is None else dataclasses.replace(plan, bound=min(bound, plan.loss))


def _bound(real: Table, forest: Forest, multipliers: np.ndarray) -> tuple[float, np.ndarray]:
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


def _read(candidates: Candidates, budget: Budget) -> _Problem:
    """The table under the budget's limits."""
    dense = candidates.dense
    limits = budget.limits(dense)
    names = tuple(limits)
    flat = flattened(candidates, names)
    # Every option allowed is cheaper in all limited costs, so that a limit met by the dense network always holds.
    binding = [c for c in names if dense[c] > limits[c] * (1 + ROUNDING)]
    at = [names.index(c) for c in binding]
    parts = []
    for row in flat.candidates.rows:
        loss, error, cost = knapsack.columns(row, names)
        kept = knapsack.cheaper(cost)
        kept = kept[knapsack.undominated(np.column_stack([loss[kept], error[kept], cost[kept][:, at]]))]
        parts.append((kept, loss[kept], error[kept], cost[kept][:, at], cost[0, at]))
    if not binding:
        return _Problem(candidates, budget, flat, None)
    fixed = np.array([candidates.fixed[c] for c in binding], dtype=float)
    lowest = fixed + sum((part[3].min(0) for part in parts), np.zeros(len(binding)))
    for c, low in zip(binding, lowest, strict=True):
        if low > limits[c] * (1 + ROUNDING):
            raise InfeasibleBudgetError(c, limits[c], float(low), dense[c])
    table = Table(
        names=tuple(binding),
        site=np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts]),
        index=np.concatenate([part[0] for part in parts]),
        loss=np.concatenate([part[1] for part in parts]),
        error=np.concatenate([part[2] for part in parts]),
        cost=np.concatenate([part[3] for part in parts]),
        dense=np.stack([part[4] for part in parts]),
        fixed=fixed,
        limit=np.array([limits[c] for c in binding]),
    )
    return _Problem(candidates, budget, flat, table)


def _by_walk(candidates: Candidates, budget: Budget, selector: str, end: Callable[[Table], Indices | None]) -> Plan:
    problem = _read(candidates, budget)
    picks = None
    if problem.table is not None:
        picks = end(problem.table)
        picks = knapsack.closest(problem.table) if picks is None else picks
    return problem.plan(problem.table, picks, selector)
