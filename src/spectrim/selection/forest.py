"""Groups of sites beside the sites themselves: a forest of rows, of which a plan takes a cut.

A group's row is on offer in place of the rows of its sites. Groups are nested or apart, so that rows form trees: a
group above smaller groups and sites. A selector that knows nothing of groups sees one row a tree
(:func:`flattened`), whose options are those of the group and, as single options, the good ways to choose for the parts
apart. There are few of these: at every price of a cost, parts that are chosen apart are chosen each for itself, so
the best sums lie on the sum of the parts' convex hulls, whose corners are as many as theirs together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spectrim.network.choices import DENSE, Choice
from spectrim.selection import knapsack
from spectrim.selection.candidates import Candidates, Option, Row
from spectrim.selection.knapsack import Floats

Picks = tuple[tuple[int, int], ...]
"""Numbers of rows and of their options, covering every site of a tree once."""


@dataclass(frozen=True)
class ApartChoice(Choice, kind="apart"):
    """The sites of a tree are chosen for each on its own. Only within a selector's call."""

    picks: Picks


@dataclass(frozen=True, eq=False)
class Flat:
    """A table without groups that stands for one with groups."""

    candidates: Candidates  # one row a tree
    picks: tuple[tuple[Picks, ...], ...]  # what every option of every row means in the original table

    def expand(self, picks: Sequence[int]) -> dict[int, int]:
        """Picks of the flat table as those of the original: row number to index of the option."""
        return dict(pair for chosen, pick in zip(self.picks, picks, strict=True) for pair in chosen[pick])


class Forest:
    """The trees of a table.

    Parameters
    ----------
    candidates
        Its single rows come before its groups.

    Raises
    ------
    ValueError
        If a group names a site that has no row, or two groups overlap without one containing the other.
    """

    def __init__(self, candidates: Candidates) -> None:
        rows = candidates.rows
        numbers = {row.site: n for n, row in enumerate(rows) if not row.members}
        for row in rows:
            unknown = [site for site in row.members if site not in numbers]
            if unknown:
                raise ValueError(f"group {row.site!r} names site {unknown[0]!r}, which the table does not have")
        self.rows = rows
        # Numbers of the single rows that each row covers, of its children (none for single sites), and of the rows that
        # no group contains, in the network's order.
        self.leaves = [tuple(numbers[s] for s in row.members) if row.members else (n,) for n, row in enumerate(rows)]
        self.children: list[list[int]] = [[] for _ in rows]
        groups = sorted((n for n, row in enumerate(rows) if row.members), key=lambda n: len(self.leaves[n]))
        top = {n: n for n in numbers.values()}
        for number in groups:
            inside = list(dict.fromkeys(top[leaf] for leaf in self.leaves[number]))
            covered = [leaf for part in inside for leaf in self.leaves[part]]
            if sorted(covered) != sorted(self.leaves[number]):
                other = next((p for p in inside if not set(self.leaves[p]) < set(self.leaves[number])), inside[0])
                raise ValueError(
                    f"groups {rows[number].site!r} and {rows[other].site!r} overlap; of two groups one contains more "
                    "sites and all of the other's, or they have none in common"
                )
            self.children[number] = inside
            top.update(dict.fromkeys(covered, number))
        self.roots = sorted(set(top.values()), key=lambda n: min(self.leaves[n]))

    def best(self, number: int, scores: Sequence[Floats]) -> tuple[float, Picks]:
        """Least sum of scores over the ways to cover a row's sites; what is not allowed has infinite scores."""
        together = int(np.argmin(scores[number]))
        value, picks = float(scores[number][together]), ((number, together),)
        if not self.children[number]:
            return value, picks
        parts = [self.best(child, scores) for child in self.children[number]]
        total = sum(value for value, _ in parts)
        # On a tie nothing is shared.
        if total <= value * (1 + knapsack.ROUNDING):
            return total, tuple(pair for _, below in parts for pair in below)
        return value, picks


def flattened(candidates: Candidates, names: Sequence[str]) -> Flat:
    """The table with one row a tree.

    Parameters
    ----------
    names
        Costs that matter: sums of parts are those that are best for each of them and for all together.
    """
    if not any(row.members for row in candidates.rows):
        picks = tuple(tuple(((n, k),) for k in range(len(row.options))) for n, row in enumerate(candidates.rows))
        return Flat(candidates, picks)
    forest = Forest(candidates)
    rows: list[Row] = []
    picks_of: list[tuple[Picks, ...]] = []
    for root in forest.roots:
        row = candidates.rows[root]
        if not row.members:
            rows.append(row)
            picks_of.append(tuple(((root, k),) for k in range(len(row.options))))
            continue
        states = _states(forest, root, names)
        # Losses of parts add up, whatever scale and exponent each has; the row's own scale makes errors of them again.
        scale = sum(candidates.rows[leaf].scale for leaf in forest.leaves[root]) or 1.0
        options = [Option(_choice(forest, state.picks), state.loss / scale, state.costs) for state in states]
        rows.append(dataclasses.replace(row, options=tuple(options), scale=scale, exponent=1.0, members=()))
        picks_of.append(tuple(state.picks for state in states))
    return Flat(dataclasses.replace(candidates, rows=tuple(rows)), tuple(picks_of))


@dataclass(frozen=True, eq=False)
class _State:
    """One way to cover the sites of a tree."""

    loss: float
    costs: Mapping[str, float]
    picks: Picks


def _states(forest: Forest, number: int, names: Sequence[str]) -> list[_State]:
    """Ways to cover a row's sites; the first is dense."""
    row = forest.rows[number]
    together = [_State(row.loss(o), o.costs, ((number, k),)) for k, o in enumerate(row.options)]
    if not forest.children[number]:
        return together
    parts = [_states(forest, child, names) for child in forest.children[number]]
    apart: dict[Picks, _State] = {}
    for weights in _prices(parts, names):
        for state in _sums(parts, names, weights):
            apart.setdefault(state.picks, state)
    dense = tuple(pair for part in parts for pair in part[0].picks)
    return [apart.pop(dense), *apart.values(), *together[1:]]


def _prices(parts: Sequence[Sequence[_State]], names: Sequence[str]) -> list[Floats]:
    """Every cost alone, and all together, each as a share of the dense one."""
    dense = np.array([sum(part[0].costs[name] for part in parts) for name in names])
    shares = 1 / np.where(dense > 0, dense, 1.0)
    alone = [np.where(np.arange(len(names)) == n, shares, 0.0) for n in range(len(names))]
    return [shares] if len(names) == 1 else [*alone, shares]


def _sums(parts: Sequence[Sequence[_State]], names: Sequence[str], weights: Floats) -> list[_State]:
    """The corners of the sum of the parts' convex hulls, from dense down; dense first."""
    paths: list[list[_State]] = []
    steps: list[tuple[float, int]] = []
    for number, part in enumerate(parts):
        loss = np.array([state.loss for state in part])
        cost = np.array([[state.costs[name] for name in names] for state in part])
        price = cost @ weights
        allowed = knapsack.cheaper(cost)
        corners, slopes = knapsack.hull(knapsack.front(allowed, loss, price), loss, price)
        paths.append([part[corner] for corner in corners])
        steps += [(slope, number) for slope in slopes]
        if paths[-1][0] is not part[0]:
            # Something cheaper loses nothing: dense is no corner, and still the start.
            paths[-1].insert(0, part[0])
            steps.append((-1.0, number))
    steps.sort()
    at = [0] * len(parts)
    corner_sums = [_sum([path[0] for path in paths])]
    for _, number in steps:
        at[number] += 1
        corner_sums.append(_sum([path[k] for path, k in zip(paths, at, strict=True)]))
    return corner_sums


def _sum(states: Sequence[_State]) -> _State:
    costs = {name: sum(state.costs[name] for state in states) for name in states[0].costs}
    return _State(sum(s.loss for s in states), costs, tuple(pair for state in states for pair in state.picks))


def _choice(forest: Forest, picks: Picks) -> Choice:
    """What an option of a tree is called; selectors do not look inside."""
    if len(picks) == 1:
        ((number, pick),) = picks
        return forest.rows[number].options[pick].choice
    if all(forest.rows[number].options[pick].choice.is_dense for number, pick in picks):
        return DENSE
    return ApartChoice(picks)
