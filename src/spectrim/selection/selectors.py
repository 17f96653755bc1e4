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

Where sites may share factors, a group is on offer in place of its sites (:mod:`spectrim.selection.forest`). All
selectors but :func:`exact` then see groups and good choices for the sites apart as options of one site.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable

import numpy as np

from spectrim.errors import called_as
from spectrim.selection import knapsack
from spectrim.selection.budget import Budget, BudgetLike, check_costs
from spectrim.selection.budgeted import Budgeted
from spectrim.selection.candidates import Candidates
from spectrim.selection.forest import Forest
from spectrim.selection.knapsack import ROUNDING, Indices, Items
from spectrim.selection.plan import Plan, make_plan

log = logging.getLogger(__name__)

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

    def end(items: Items) -> Indices | None:
        share = (items.cost / np.where(items.dense > 0, items.dense, 1)[items.site]).max(1)
        paths = [knapsack.front(group, items.loss, share) for group in items.groups]
        return knapsack.walk(items, paths, [-share[path[:-1]] for path in paths], together=True)[0]

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

    def end(items: Items) -> Indices | None:
        paths = [knapsack.front(group, items.error, items.cost @ items.need) for group in items.groups]
        return knapsack.walk(items, paths, [items.error[path[1:]] for path in paths], together=True)[0]

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
    return _by_walk(candidates, budget, "greedy", lambda items: knapsack.walk_hulls(items, items.need)[0])


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
    budgeted = Budgeted.of(candidates, budget)
    items = budgeted.items
    if items is None:
        return budgeted.plan(None, None, "lagrangian", 0.0)
    picks, bound, multipliers = budgeted.relax(items)
    plan = budgeted.plan(items, picks, "lagrangian", bound)
    return dataclasses.replace(plan, multipliers=dict(zip(items.names, multipliers.tolist(), strict=True)))


def exact(candidates: Candidates, budget: Budget) -> Plan:
    """The plan of least loss, by mixed-integer programming (HiGHS), up to a relative gap of ``1e-6``.

    With more than 40 sites the gap is ``1e-4``. Options that :func:`lagrangian`'s plan and bound prove to be in no
    better plan are left out, which keeps the program small; where they prove that plan good enough there is none.
    ``bound`` of the plan is the proven lower bound, and its share ``1 - bound / loss`` is kept in the plan's ``facts``
    as ``"proven gap"``. If the solver fails or takes longer than 30 s, the plan is that of :func:`lagrangian` and its
    ``selector`` says so.

    Raises
    ------
    InfeasibleBudgetError, ValueError
        As :func:`uniform`.
    """
    budgeted = Budgeted.of(candidates, budget)
    items = budgeted.items
    if items is None:
        return budgeted.plan(None, None, "exact", 0.0)
    picks, bound, multipliers = budgeted.relax(items)
    best = float(items.loss[picks].sum())
    # Of few sites the plan shall be the best to the last digit.
    enough = ROUNDING if len(items.dense) <= knapsack.FEW_SITES else knapsack.WIDE_GAP
    if best - bound <= enough * best:
        return budgeted.plan(items, picks, "exact", bound)
    small = budgeted.promising(items, picks, best, multipliers)
    solution = knapsack.solve_mixed_integer(small, scale=best)
    if isinstance(solution, str):
        return budgeted.plan(items, picks, f"lagrangian (exact: {solution})", bound)
    better, proven = solution
    if small.loss[better].sum() < best:
        items, picks = small, better
    return budgeted.plan(items, picks, "exact", max(bound, min(proven, best)))


@called_as("Write select(table, 'macs=50%'), with the table of tabulate(sites)", candidates=Candidates)
def select(candidates: Candidates, budget: BudgetLike, selector: Selector = exact) -> Plan:
    """Choose one option a site so that the network meets the budget and loses little.

    Parameters
    ----------
    candidates
        What ``tabulate`` returned.
    budget
        Limits on the whole network, untouched layers included: a :class:`~spectrim.Budget`, text such as
        ``"macs=50%"``, or a mapping. One on bytes limits the numbers, since the table knows no names: the whole file
        is what :func:`spectrim.compress` limits.
    selector
        :func:`exact`, :func:`lagrangian`, :func:`greedy`, :func:`uniform`, :func:`energy`, or a function of yours.

    Raises
    ------
    InfeasibleBudgetError
        If no plan meets the budget; it holds the lowest reachable cost.
    ValueError
        If the table lacks a cost that the budget limits, or holds errors or costs that are NaN or infinite.
    TypeError
        If a selector of yours gives anything but a plan.
    """
    plan = selector(candidates, Budget.of(budget))
    if not isinstance(plan, Plan):
        name = getattr(selector, "__name__", str(selector))
        raise TypeError(
            f"selector {name} gave {plan!r:.80}: expected a Plan, as spectrim.selection.plan.make_plan makes it"
        )
    log.info("%s: %r, loss %.4g, proven bound %s", plan.selector, plan, plan.loss, plan.bound)
    return plan


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
    check_costs("the multiplier is for", (cost,), candidates.costs)
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


def _by_walk(candidates: Candidates, budget: Budget, selector: str, end: Callable[[Items], Indices | None]) -> Plan:
    budgeted = Budgeted.of(candidates, budget)
    picks = None
    if budgeted.items is not None:
        picks = end(budgeted.items)
        picks = knapsack.closest(budgeted.items) if picks is None else picks
    return budgeted.plan(budgeted.items, picks, selector)


def check_reachable(table: Candidates, budgets: Iterable[Budget]) -> None:
    """See that budgets can be met by what a table offers, before there is a training to be lost.

    Milliseconds are not looked at.

    Raises
    ------
    InfeasibleBudgetError
        For the first budget that cannot be met.
    """
    for budget in budgets:
        if set(budget.costs) != {"latency"}:
            lagrangian(table, budget.replace(latency=None))
