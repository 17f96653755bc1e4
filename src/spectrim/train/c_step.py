"""The C step of learned ranks: its table, and one option a site for given weights, by a budget or at a multiplier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.cost.counted import known
from spectrim.errors import PlanError
from spectrim.methods import ActivationSVD, JointSVD, Method, WeightSVD
from spectrim.methods.base import full_rank
from spectrim.network.choices import Choice, ZeroChoice
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Sites
from spectrim.search.file_size import selected
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates, Option, Row
from spectrim.selection.plan import Plan, make_plan
from spectrim.selection.selectors import at_multiplier, exact, lagrangian
from spectrim.tables import retabulate, tabulate


@dataclass
class CStep:
    """The table of a run, kept up to date with the weights, and the choice made from it."""

    sites: InitVar[Sites]  # with the weights and moments that errors are measured on
    methods: Sequence[Method]  # what may be chosen
    # As for :class:`~spectrim.train.LearnedRanks`.
    budget: Budget | None
    multiplier: float | None
    cost: str
    normalize: bool
    dense: bool
    options: Mapping[str, Any]  # of :func:`spectrim.tabulate`: ``latency``, ``dense_latency``, ``costs``

    def __post_init__(self, sites: Sites) -> None:
        _check_finite(sites)
        table = tabulate(sites, self.methods, dear=not self.dense, **self.options)
        if not self.dense:
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

    def last(self, sites: Sites, mu: float, plan: Plan, model: nn.Module | None = None) -> tuple[Candidates, Plan]:
        """Table and plan to build a network from: chosen exactly within a budget, else the ranks of ``plan``.

        With the model a limit on bytes is one on its file.
        """
        _check_finite(sites)
        fresh = self._again(sites)
        offered = (any(entry.choice == option.choice for option in fresh[entry.site].options) for entry in plan)
        if self.budget is None and not all(offered):
            # The first C step may have had methods of its own; these are the ones to build with.
            plan = self.choose(sites, mu, fresh)
        table = without_zero(with_distances(fresh, sites, mu, normalize=self.normalize))
        if self.budget is not None:
            if model is None:
                return table, exact(table, self.budget)
            return table, selected(model, sites, table, self.budget, exact)
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
        fresh = with_zero(tabulate(sites, self.methods, dear=not self.dense, **self.options), sites)
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


ZERO = ZeroChoice(0)


def rank_methods(*, paper: bool, groups: bool = False, by_data: bool = False) -> list[Method]:
    """What a C step offers by default: truncated SVDs in all unfoldings, or those of the paper; with groups joint ones.

    The paper's have no groups. ``by_data`` makes them low rank of responses.
    """
    if paper:
        return [WeightSVD(unfoldings=("channel",), multiple_of=1, to_full_rank=True)]
    alone: list[Method] = [ActivationSVD() if by_data else WeightSVD()]
    return [*alone, JointSVD("left"), JointSVD("right")] if groups else alone


def with_zero(table: Candidates, sites: Sites) -> Candidates:
    """The table with rank 0 offered at every site."""
    counted = known(sites)
    rows = []
    for row in table.rows:
        if row.members:
            rows.append(row)
            continue
        empty = [dataclasses.replace(sites.layer(row.site).spec, in_channels=0)]
        # A cost that is measured, or is the user's, takes nothing for a layer that is not there.
        costs = {name: counted[name](empty) if name in counted else 0.0 for name in table.costs}
        rows.append(dataclasses.replace(row, options=(*row.options, Option(ZERO, 1.0, costs))))
    return dataclasses.replace(table, rows=tuple(rows))


def without_zero(table: Candidates) -> Candidates:
    """The table without rank 0."""
    rows = (dataclasses.replace(r, options=tuple(o for o in r.options if o.choice != ZERO)) for r in table.rows)
    return dataclasses.replace(table, rows=tuple(rows))


def with_distances(table: Candidates, sites: Sites, mu: float, *, normalize: bool) -> Candidates:
    """The table with the loss ``mu/2 ||A - Delta||^2`` of every option.

    ``||A||^2`` counts as 1 with ``normalize``, for every site of a group. A row that has a scale of its own, from
    calibration, keeps it in place of ``1/2 ||A||^2``.
    """
    rows = []
    for row in table.rows:
        names = row.sites
        energy = sum(float(sites.layer(name).weight.double().square().sum()) for name in names)
        half = row.scale if row.scale != len(names) else 0.5 * len(names)
        options = row.options
        if not energy:
            # Nothing is lost of nothing: a layer of zeros has rank 0.
            options = tuple(dataclasses.replace(option, error=0.0) for option in options)
        scale = mu * (half if normalize else 0.5 * energy)
        rows.append(dataclasses.replace(row, options=options, scale=scale))
    return dataclasses.replace(table, rows=tuple(rows))


def buildable(row: Row, choice: Choice) -> int:
    """Index of the option to build for a choice: dense where it does not pay, the least that does for :data:`ZERO`."""
    options = row.options
    pays = [n for n, o in enumerate(options) if any(o.costs[name] < cost for name, cost in row.dense.costs.items())]
    if choice == ZERO:
        ranked = {n: cut[1] for n in pays if (cut := options[n].choice.cut) and options[n].choice != ZERO}
        return min(ranked, key=lambda n: (ranked[n], sum(options[n].costs.values())), default=0)
    index = next(n for n, option in enumerate(options) if option.choice == choice)
    return index if index in pays else 0


def rank(choice: Choice, otherwise: int) -> int:
    """Rank of a choice, 0 for a sparse weight alone; ``otherwise`` for a layer left dense."""
    return choice.cut[1] if choice.cut else otherwise


def full(spec: LayerSpec) -> int:
    """Full rank of a layer, the largest over its unfoldings."""
    return max(full_rank(spec, how) for how in WeightSVD().offered(spec))
