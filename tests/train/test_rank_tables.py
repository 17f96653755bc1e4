"""Tables of the C step: rank 0, losses at a strength, what can be built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from torch import nn

import spectrim as st
from spectrim.methods import WeightSVD
from spectrim.network.choices import DENSE, LowRankChoice
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Sites
from spectrim.selection.candidates import Candidates, Option, Row
from spectrim.tables import tabulate
from spectrim.testing import LAYERS, sample_inputs
from spectrim.train.c_step import ZERO, buildable, rank, rank_methods, with_distances, with_zero, without_zero
from tests.cases import batches_for, settled


def sites_of(kind: str) -> Sites:
    layer = LAYERS[kind].make()
    inputs = sample_inputs(LAYERS[kind].shape, 4, channel=-1 if isinstance(layer, nn.Linear) else 0)
    model = nn.Sequential(layer)
    return st.calibrate(model, st.find(model), [inputs])


@pytest.mark.table(every=2)
@pytest.mark.parametrize("kind", LAYERS)
def test_rank_zero_costs_the_bias_and_loses_everything(kind: str) -> None:
    sites = sites_of(kind)
    table = tabulate(sites, [WeightSVD()], costs={"layers": len})
    found = with_zero(table, sites)
    (row,) = found.rows
    spec = sites.sites[0].spec
    outputs = spec.out_channels * spec.bias
    assert row.options[:-1] == table.rows[0].options
    assert row.options[-1] == Option(ZERO, 1.0, {"parameters": outputs, "bytes": 4 * outputs, "macs": 0, "layers": 0})
    assert found.dense == table.dense
    assert without_zero(found) == table
    assert not ZERO.is_dense


def test_rank_zero_is_measured_at_no_time() -> None:
    def timer(chains: Sequence[Sequence[LayerSpec]], **_: object) -> list[float]:
        return [float(len(chain)) for chain in chains]

    sites = sites_of("conv2d")
    table = tabulate(sites, [WeightSVD()], latency=st.Latency(cache=None, timer=timer))
    assert with_zero(table, sites).rows[0].options[-1].costs["latency"] == 0


def test_methods_of_a_c_step() -> None:
    spec = sites_of("conv2d").sites[0].spec
    (paper,), (free,) = rank_methods(paper=True), rank_methods(paper=False)
    assert [how.name for how in paper.offered(spec)] == ["channel"]
    assert list(paper.ranks(spec, paper.offered(spec)[0])) == list(range(1, 9))
    assert len(free.offered(spec)) == 4
    assert free == WeightSVD()


@pytest.mark.parametrize("mu", [0.5, 3.0])
def test_losses_at_a_strength(mu: float) -> None:
    model = settled("residual")
    sites = st.find(model)
    table = tabulate(sites, [WeightSVD()])
    shares = with_distances(table, sites, mu, normalize=True)
    energies = with_distances(table, sites, mu, normalize=False)
    for site, row, share, energy in zip(sites, table, shares, energies, strict=True):
        whole = float(site.weight.double().square().sum())
        for option in row.options:
            assert share.loss(option) == pytest.approx(mu / 2 * option.error)
            assert energy.loss(option) == pytest.approx(mu / 2 * whole * option.error)


def test_sensitivity_of_the_sites_is_kept() -> None:
    model, batches = settled("residual"), batches_for("residual")
    sites = st.sensitivity(model, st.calibrate(model, st.find(model), batches), batches)
    table = tabulate(sites, [WeightSVD()])
    assert len({row.scale for row in table}) == len(table)
    for row, found in zip(table, with_distances(table, sites, 2.0, normalize=True), strict=True):
        assert found.scale == 2.0 * row.scale
        assert found.exponent == row.exponent


def ranked(rank: int, **costs: float) -> Option:
    return Option(LowRankChoice("channel", rank, method="svd"), 1 / (1 + rank), costs)


def row(*options: Option, **dense: float) -> Row:
    return Row("a", "Linear", (Option(DENSE, 0.0, dense), *options, Option(ZERO, 1.0, dict.fromkeys(dense, 0.0))))


def test_what_is_built_for_a_choice() -> None:
    options = [ranked(1, macs=4.0, bytes=3.0), ranked(2, macs=8.0, bytes=6.0), ranked(3, macs=12.0, bytes=9.0)]
    held = row(*options, macs=8.0, bytes=8.0)
    chosen = {n: held.options[buildable(held, option.choice)] for n, option in enumerate(held.options)}
    assert chosen[0] == held.dense
    assert chosen[1] == options[0]
    # It saves bytes, but no MACs.
    assert chosen[2] == options[1]
    assert chosen[3] == held.dense
    assert chosen[4] == options[0]


def test_rank_zero_becomes_the_cheapest_of_the_lowest_ranks() -> None:
    other = dataclasses.replace(ranked(1, macs=3.0), choice=LowRankChoice("input", 1, method="svd"))
    held = row(ranked(2, macs=2.0), ranked(1, macs=4.0), other, macs=8.0)
    assert held.options[buildable(held, ZERO)] == other
    assert buildable(row(macs=8.0), ZERO) == 0


def test_ranks_of_choices() -> None:
    assert rank(DENSE, 7) == 7
    assert rank(ZERO, 7) == 0
    assert rank(LowRankChoice("channel", 3), 7) == 3


def test_a_table_without_rank_zero_stays_as_it_is() -> None:
    table = Candidates((row(ranked(1, macs=4.0), macs=8.0),), {"macs": 1.0}, "weight energy")
    bare = without_zero(table)
    assert [o.choice for o in bare.rows[0].options] == [DENSE, ranked(1).choice]
    assert without_zero(bare) == bare
