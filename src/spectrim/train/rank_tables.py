"""Tables of the C step: options of rank 0, losses at a strength of the penalty, and which options can be built."""

from __future__ import annotations

import dataclasses

from spectrim.cost.counted import known
from spectrim.methods import JointSVD, Method, WeightSVD
from spectrim.methods.base import full_rank
from spectrim.network.choices import Choice, ZeroChoice
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Sites
from spectrim.selection.candidates import Candidates, Option, Row

ZERO = ZeroChoice(0)


def rank_methods(*, paper: bool, groups: bool = False) -> list[Method]:
    """What a C step offers by default: truncated SVDs in all unfoldings, or those of the paper; with groups joint ones.

    The paper's have no groups.
    """
    if paper:
        return [WeightSVD(unfoldings=("channel",), multiple_of=1, to_full_rank=True)]
    return [WeightSVD(), JointSVD("left"), JointSVD("right")] if groups else [WeightSVD()]


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
