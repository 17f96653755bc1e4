"""The multiple-choice knapsack behind the selectors, on flat arrays: fronts, walks, relaxation, integer program.

:mod:`spectrim.selection.selectors` has the selectors and says what each promises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectrim.errors import InfeasibleBudgetError
from spectrim.selection import integer
from spectrim.selection.candidates import Row

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

ROUNDING = 1e-12
GAP = 1e-6
# With more sites than this the last digits take the solver much longer than the rest, and change nothing in practice.
FEW_SITES = 40
WIDE_GAP = 1e-4
SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class Items:
    """The options worth choosing, as flat columns, those of a site next to each other, and what they may cost together.

    ``site``, ``index`` (in the row's options), ``loss`` and ``error`` are ``[n]``, ``cost`` is ``[n, c]`` over the
    limits that the dense network exceeds, called ``names``. ``dense`` is ``[sites, c]``; ``fixed``, ``limit`` and
    ``room`` (what the sites may cost) are ``[c]``. With ``cover`` an option stands for the sites it names, not for
    ``site``, which is then its row.
    """

    names: tuple[str, ...]
    site: Indices
    index: Indices
    loss: Floats
    error: Floats
    cost: Floats
    dense: Floats
    fixed: Floats
    limit: Floats
    cover: tuple[tuple[int, ...], ...] | None = None

    @property
    def room(self) -> Floats:
        return self.limit * (1 + ROUNDING) - self.fixed

    @property
    def starts(self) -> Indices:
        return np.flatnonzero(np.diff(self.site, prepend=-1))

    @property
    def groups(self) -> list[Indices]:
        """The positions of each site's options."""
        return np.split(np.arange(len(self.site)), self.starts[1:])

    @property
    def need(self) -> Floats:
        """A weight a cost: one over what must be saved, so that urgent costs count more."""
        return 1 / (self.fixed + self.dense.sum(0) - self.limit)

    def fits(self, picks: Indices) -> bool:
        return bool((self.cost[picks].sum(0) <= self.room).all())

    def lower_bound(self, multipliers: Floats) -> float:
        """The Lagrangian dual, a lower bound of the loss within the budget for any multipliers >= 0."""
        scores = np.minimum.reduceat(self.loss + self.cost @ multipliers, self.starts)
        return float(scores.sum() - multipliers @ self.room)

    def keep(self, mask: NDArray[np.bool_]) -> Items:
        columns = ("site", "index", "loss", "error", "cost")
        kept = {name: getattr(self, name)[mask] for name in columns}
        if self.cover is not None:
            kept["cover"] = tuple(self.cover[n] for n in np.flatnonzero(mask))
        return dataclasses.replace(self, **kept)


def columns(row: Row, costs: Sequence[str]) -> tuple[Floats, Floats, Floats]:
    """Loss ``[m]``, error ``[m]`` and costs ``[m, c]`` of a row's options, checked."""
    if not row.options or not row.dense.choice.is_dense or row.dense.error > 0:
        raise ValueError(f"site {row.site!r}: the first option must be the dense one, with error 0")
    error = np.array([option.error for option in row.options], dtype=float)
    if not np.isfinite(error).all():
        bad = row.options[int(np.argmin(np.isfinite(error)))]
        raise ValueError(f"site {row.site!r}: option {str(bad.choice)!r} has error {bad.error}; errors must be finite")
    try:
        loss = np.array([row.loss(option) for option in row.options], dtype=float)
    except OverflowError:
        loss = np.array([np.inf])
    if not (np.isfinite(loss) & (loss >= 0)).all():
        raise ValueError(
            f"site {row.site!r}: sensitivity {row.scale} * error ** {row.exponent} gives losses that are negative or "
            "not finite; scale and exponent must be finite and not negative"
        )
    try:
        cost = np.array([[option.costs[c] for c in costs] for option in row.options], dtype=float)
    except KeyError as missing:
        raise ValueError(f"site {row.site!r}: an option has no cost {missing}") from None
    if not (np.isfinite(cost) & (cost >= 0)).all():
        raise ValueError(f"site {row.site!r}: an option has a cost that is negative or not finite")
    return loss, np.maximum(error, 0.0), cost


def cheaper(costs: Floats) -> Indices:
    """The dense option and those that cost strictly less in every column."""
    allowed = (costs < costs[0]).all(1)
    allowed[0] = True
    return np.flatnonzero(allowed)


def undominated(values: Floats) -> Indices:
    """Rows of ``values [m, d]`` that no other row equals or undercuts in every column; of equal rows the first."""
    order = np.lexsort(values.T[::-1])
    ranked = values[order]
    # Only an earlier row in lexicographic order can dominate.
    dominates = np.logical_and.reduce([column[:, None] <= column[None, :] for column in ranked.T])
    return np.sort(order[~np.triu(dominates, 1).any(0)])


def front(group: Indices, value: Floats, cost: Floats) -> Indices:
    """The positions of ``group`` from least value to least cost, without those that another undercuts in both."""
    order = group[np.lexsort((value[group], cost[group]))]
    least = np.minimum.accumulate(np.concatenate([[np.inf], value[order]]))[:-1]
    return order[value[order] < least][::-1]


def hull(path: Indices, value: Floats, cost: Floats) -> tuple[Indices, Floats]:
    """The corners of a front's lower convex hull, and the value added per cost saved from each to the next."""
    corners: list[tuple[int, float, float]] = []
    slopes: list[float] = []
    for point in zip(path.tolist(), value[path].tolist(), cost[path].tolist(), strict=True):
        while corners:
            slope = (point[1] - corners[-1][1]) / (corners[-1][2] - point[2])
            if not slopes or slope > slopes[-1]:
                slopes.append(slope)
                break
            corners.pop()
            slopes.pop()
        corners.append(point)
    return np.array([corner[0] for corner in corners], dtype=np.intp), np.array(slopes, dtype=float)


def walk(items: Items, paths: list[Indices], keys: list[Floats], *, together: bool) -> tuple[Indices | None, float]:
    """Take the steps along all paths in ascending order of their keys until every limit is met.

    ``keys[i][k]`` is that of the step from ``paths[i][k]`` to the next, ascending along a path. With ``together``,
    steps of equal keys are taken all or none. Returns the picks, None if the end is above a limit, and the last key.
    """
    site = np.repeat(np.arange(len(paths)), [len(k) for k in keys])
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    site, key = site[order], key[order]
    change = np.concatenate([np.diff(items.cost[path], axis=0) for path in paths])[order]
    start = items.cost[[path[0] for path in paths]].sum(0)
    met = (start + np.concatenate([np.zeros((1, change.shape[1])), np.cumsum(change, axis=0)]) <= items.room).all(1)
    if together:
        met[1:-1] &= key[1:] != key[:-1]
    if not met.any():
        return None, 0.0
    steps = int(np.argmax(met))
    taken = np.bincount(site[:steps], minlength=len(paths))
    return np.array([path[n] for path, n in zip(paths, taken, strict=True)]), float(key[steps - 1]) if steps else 0.0


def walk_hulls(items: Items, weights: Floats) -> tuple[Indices | None, float]:
    """Walk down the convex hulls of loss over weighted cost; the picks, and the multiplier of the last step."""
    price = items.cost @ weights
    hulls = [hull(front(group, items.loss, price), items.loss, price) for group in items.groups]
    return walk(items, [corners for corners, _ in hulls], [slopes for _, slopes in hulls], together=False)


def _spend(items: Items, picks: Indices, weights: Floats) -> Indices:
    """Use what is left of the budget: the change of one site that fits and gains most for its cost, until none does."""
    price = items.cost @ weights
    least = float((items.dense @ weights).max()) * ROUNDING
    while True:
        gain = items.loss[picks][items.site] - items.loss
        fits = (items.cost - items.cost[picks][items.site] <= items.room - items.cost[picks].sum(0)).all(1)
        worth = gain / np.maximum(price - price[picks][items.site], least)
        best = int(np.argmax(np.where(fits & (gain > 0), worth, -1.0)))
        changed = picks.copy()
        changed[items.site[best]] = best
        if not (fits[best] and gain[best] > 0 and items.fits(changed)):
            return picks
        picks = changed


def relax(items: Items) -> tuple[Indices, float, Floats]:
    """Picks, lower bound and multipliers of the Lagrangian relaxation."""
    if len(items.limit) == 1:
        picks, slope = walk_hulls(items, np.ones(1))
        best = _spend(items, closest(items) if picks is None else picks, np.ones(1))
        multipliers = np.array([slope])
    else:
        multipliers = relaxed_multipliers(items)
        mixed = multipliers + 0.1 * items.need * (multipliers / items.need).max()
        tried = [multipliers, mixed, items.need] if multipliers.any() else [items.need]
        ends = [(picks, weights) for weights in tried if (picks := walk_hulls(items, weights)[0]) is not None]
        plans = [_spend(items, picks, weights) for picks, weights in ends or [(closest(items), items.need)]]
        best = min(plans, key=lambda picks: float(items.loss[picks].sum()))
    bound = max(items.lower_bound(multipliers), items.lower_bound(0 * multipliers))
    return best, bound, multipliers


def _one_each(items: Items) -> Any:
    """The sparse matrix ``[sites, n]`` of which options belong to which site."""
    from scipy.sparse import csr_array

    n = len(items.site)
    site, option = items.site, np.arange(n)
    if items.cover is not None:
        site = np.concatenate([np.array(sites, dtype=np.intp) for sites in items.cover])
        option = np.repeat(option, [len(sites) for sites in items.cover])
    return csr_array((np.ones(len(site)), (site, option)), shape=(len(items.dense), n))


def _chosen(items: Items, x: Floats) -> Indices:
    """The option of each site with the largest share of a solver's solution."""
    if items.cover is not None:
        return np.flatnonzero(x > 0.5)
    return np.array([group[np.argmax(x[group])] for group in items.groups])


def relaxed_multipliers(items: Items) -> Floats:
    """The multipliers of the linear relaxation, zero if that has no solution.

    They maximise the Lagrangian dual, which is concave in few unknowns. Kelley's cutting planes find them from planes
    that touch it, each of which costs one pass over the options, far less than a program with a variable an option.
    """
    unit, scale = items.dense.sum(0), float(items.loss.max()) or 1.0
    loss, cost, room = items.loss / scale, items.cost / unit, items.room / unit
    starts, most = items.starts, 1e4
    ends = np.append(starts[1:], len(loss))
    planes: list[Floats] = []
    at = multipliers = np.zeros(len(unit))
    best = -np.inf
    for _ in range(_PLANES):
        score = loss + cost @ at
        least = np.minimum.reduceat(score, starts)
        # The first option of each site that attains its least score.
        ties = np.flatnonzero(score == np.repeat(least, ends - starts))
        picks = ties[np.searchsorted(ties, starts)]
        value, slope = float(least.sum() - at @ room), cost[picks].sum(0) - room
        if value > best:
            best, multipliers = value, at
        planes.append(np.append(slope, value - slope @ at))
        corner, above = _highest(np.array(planes), most)
        if above - best <= _NEAR * max(abs(best), _NEAR):
            break
        # Between the best point and the top of the planes, which may be far out while there are few.
        at = 0.5 * (multipliers + corner)
    return multipliers * scale / unit if (multipliers < 0.4 * most).all() else np.zeros(len(unit))


# Planes from which multipliers are found, and how near the top of the dual they have to come.
_PLANES = 300
_NEAR = 1e-9


def _highest(planes: Floats, most: float) -> tuple[Floats, float]:
    """The point ``0 <= m <= most`` where the lowest of the planes ``[slope, offset]`` is highest, and how high."""
    from scipy.optimize import linprog

    count = planes.shape[1] - 1
    result = linprog(
        np.append(np.zeros(count), -1.0),
        A_ub=np.column_stack([-planes[:, :-1], np.ones(len(planes))]),
        b_ub=planes[:, -1],
        bounds=[(0, most)] * count + [(None, None)],
    )
    if result.status != 0:
        return np.zeros(count), -np.inf
    return result.x[:-1], float(result.x[-1])


def solve_mixed_integer(items: Items, scale: float) -> tuple[Indices, float] | str:
    """Picks of least loss and a proven lower bound, or what went wrong. ``scale`` is a loss of the right magnitude."""
    from scipy.optimize import Bounds, LinearConstraint

    # The solver's tolerances are absolute, 1e-6: sums near 1000 make them 1e-9 of the loss and of the costs.
    unit = 1000 / items.dense.sum(0)
    room, proven = items.room * unit, None
    gap = GAP if len(items.dense) <= FEW_SITES else WIDE_GAP
    for _ in range(5):
        result = integer.milp(
            items.loss * (1000 / scale),
            integrality=np.ones(len(items.site)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(_one_each(items), 1, 1),
                LinearConstraint((items.cost * unit).T, -np.inf, room),
            ],
            options={"mip_rel_gap": gap, "time_limit": SECONDS},
        )
        if result.status != 0:
            return str(result.message)
        if proven is None:
            proven = float(result.fun if result.mip_dual_bound is None else result.mip_dual_bound) * scale / 1000
        picks = _chosen(items, result.x)
        if items.fits(picks):
            return picks, proven
        room = room - 2 * np.maximum((items.cost[picks] * unit).sum(0) - room, 0.0)
    return "its plans exceed the budget by rounding"


def closest(items: Items) -> Indices:
    """The picks whose largest ratio of cost to limit is smallest; raises if that is above one."""
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.sparse import csr_array, hstack

    n, sites = len(items.site), len(items.dense)
    share = np.column_stack([1000 * (items.cost / items.limit).T, -np.ones(len(items.limit))])
    result = integer.milp(
        np.append(np.zeros(n), 1.0),
        integrality=np.append(np.ones(n), 0),
        bounds=Bounds(np.zeros(n + 1), np.append(np.ones(n), np.inf)),  # type: ignore[arg-type]
        constraints=[
            LinearConstraint(hstack([_one_each(items), csr_array((sites, 1))]), 1, 1),
            LinearConstraint(share, -np.inf, -1000 * items.fixed / items.limit),  # type: ignore[arg-type]
        ],
        options={"mip_rel_gap": 0, "time_limit": SECONDS},
    )
    if result.x is None:
        raise RuntimeError(f"the search for a plan within {', '.join(items.names)} failed: {result.message}")
    picks = _chosen(items, result.x[:n])
    if items.fits(picks):
        return picks
    totals = items.fixed + items.cost[picks].sum(0)
    worst = int(np.argmax(totals / items.limit))
    dense = float(items.fixed[worst] + items.dense[:, worst].sum())
    limit, lowest = float(items.limit[worst]), float(totals[worst])
    raise InfeasibleBudgetError(items.names[worst], limit, lowest, dense, together=tuple(items.names))
