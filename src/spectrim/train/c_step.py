"""The C step of learned ranks: one option a site for given weights, within a budget or at a multiplier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.errors import PlanError
from spectrim.methods import Method
from spectrim.network.sites import Sites
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan, make_plan
from spectrim.selection.selectors import at_multiplier, exact, lagrangian
from spectrim.tables import retabulate, tabulate
from spectrim.train.rank_tables import buildable, with_distances, with_zero, without_zero


class CStep:
    """The table of a run, kept up to date with the weights, and the choice made from it.

    Parameters
    ----------
    sites
        With the weights and moments that errors are measured on.
    methods
        What may be chosen.
    budget, multiplier, cost, normalize, dense
        As for :class:`~spectrim.train.LearnedRanks`.
    **options
        Of :func:`spectrim.tabulate`: ``latency``, ``dense_latency``, ``costs``.
    """

    def __init__(
        self,
        sites: Sites,
        methods: Sequence[Method],
        budget: Budget | None,
        multiplier: float | None,
        *,
        cost: str,
        normalize: bool,
        dense: bool,
        **options: Any,
    ) -> None:
        self.methods, self.budget, self.multiplier, self.cost = list(methods), budget, multiplier, cost
        self.normalize, self.dense, self._options = normalize, dense, options
        _check_finite(sites)
        table = tabulate(sites, self.methods, dear=not dense, **options)
        if not dense:
            _check_offers(table, self.methods)
        self.table = with_zero(table, sites)  # errors of all options for the weights that were seen last
        self._steady = True
        self._seen: dict[str, Tensor] = {site.name: site.weight.clone() for site in sites}

    def renew(self, sites: Sites) -> None:
        """Make the rows of the sites that have moved again."""
        _check_finite(sites)
        moved = set()
        for site in sites:
            if not torch.equal(site.weight, self._seen[site.name]):
                moved.add(site.name)
                self._seen[site.name] = site.weight
        for members in sites.groups.values():
            moved |= set(members) if moved & set(members) else set()
        moved_sites = tuple(site for site in sites if site.name in moved)
        self.table = self._again(dataclasses.replace(sites, sites=moved_sites))

    def choose(self, sites: Sites, mu: float, table: Candidates | None = None) -> Plan:
        """The plan of least ``mu/2 ||A - Delta||^2`` within the budget, or with the cost added at the multiplier."""
        table = with_distances(self.table if table is None else table, sites, mu, normalize=self.normalize)
        if self.budget is not None:
            return lagrangian(without_zero(table), self.budget)
        assert self.multiplier is not None
        return at_multiplier(table, self.cost, self.multiplier, dense=self.dense)

    def take_over(self, dense: Mapping[str, float]) -> None:
        """Go on with costs of the dense network that were measured before: their fixed part makes up the difference."""
        costs = self.table.dense
        fixed = {name: value + dense.get(name, costs[name]) - costs[name] for name, value in self.table.fixed.items()}
        self.table = dataclasses.replace(self.table, fixed=fixed)

    def last(self, sites: Sites, mu: float, plan: Plan) -> tuple[Candidates, Plan]:
        """Table and plan to build a network from: chosen exactly within a budget, else the ranks of ``plan``."""
        _check_finite(sites)
        fresh = self._again(sites)
        offered = (any(entry.choice == option.choice for option in fresh[entry.site].options) for entry in plan)
        if self.budget is None and not all(offered):
            # The first C step may have had methods of its own; these are the ones to build with.
            plan = self.choose(sites, mu, fresh)
        table = without_zero(with_distances(fresh, sites, mu, normalize=self.normalize))
        if self.budget is not None:
            return table, exact(table, self.budget)
        numbers = {row.site: number for number, row in enumerate(table.rows)}
        picks = {numbers[entry.site]: buildable(table[entry.site], entry.choice) for entry in plan}
        built = make_plan(table, picks, budget={}, selector=plan.selector)
        return table, dataclasses.replace(built, multipliers=plan.multipliers)

    def _again(self, sites: Sites) -> Candidates:
        """The table with the errors of these sites.

        What a method offers may follow the weights, as the unfolding that suits a layer best. Then rows are made anew,
        with their costs; the network's fixed part stays.
        """
        if self._steady:
            try:
                return retabulate(self.table, sites, self.methods)
            except ValueError:
                # Another error comes again below.
                self._steady = False
        fresh = with_zero(tabulate(sites, self.methods, dear=not self.dense, **self._options), sites)
        rows = {row.site: row for row in fresh.rows}
        return dataclasses.replace(self.table, rows=tuple(rows.get(row.site, row) for row in self.table.rows))


def _check_offers(table: Candidates, methods: Sequence[Method]) -> None:
    """Raise PlanError for a layer that may not stay dense and that no method has a rank for: it would be dropped."""
    for row in table.rows:
        if len(row.options) == 1 and not row.members:
            raise PlanError(
                f"site {row.site!r} ({row.kind}): {', '.join(method.name for method in methods)} "
                f"offer{'s' if len(methods) == 1 else ''} no rank for it, "
                "and with dense=False it would be dropped whole; allow an unfolding that fits it, or skip the layer"
            )


def _check_finite(sites: Sites) -> None:
    for site in sites:
        if not bool(site.weight.isfinite().all()):
            raise FloatingPointError(f"layer {site.name!r} has weights that are not finite. Lower lr, or clip")
