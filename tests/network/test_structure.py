from __future__ import annotations

import dataclasses

import pytest
import torch

from spectrim.cost.counted import macs, parameters
from spectrim.linalg.moments import Moments
from spectrim.linalg.patterns import Unstructured
from spectrim.linalg.unfold import unfolding, unfoldings
from spectrim.methods.joint_svd import JointSVD
from spectrim.methods.low_rank_plus_sparse import LowRankPlusSparse
from spectrim.methods.weight_svd import WeightSVD
from spectrim.network.choices import Choice
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Group, Layer, Site, Statistics
from spectrim.network.structure import Addend, Apart, Chain, Pair, Structure, Sum, structure_of

CONV = LayerSpec(("conv",), 24, 16, (3, 3), (2, 1), (1, 1), (1, 1), (0, 0), inputs=((8, 8),))
SPATIAL = unfolding((3, 3), "height-first")
SPARSE = CONV.sparse(Unstructured(), 0.25, bias=False)


def test_a_structure_is_the_sequence_of_its_layers() -> None:
    pair = CONV.factor(SPATIAL, 4)
    first, second = pair
    total = Sum((pair, Chain((SPARSE,))))
    both = Apart((total, Chain([CONV])))
    assert list(both) == [first, second, SPARSE, CONV]
    assert len(both) == 4
    assert (both[2], both[-1], both[:2]) == (SPARSE, CONV, (first, second))
    assert SPARSE in both
    assert macs(both) == macs(pair) + macs([SPARSE]) + macs([CONV])
    assert parameters(both) == parameters([*pair, SPARSE, CONV])
    assert not Chain(())


def test_chains_tell_what_is_run_together_and_what_is_added() -> None:
    pair, sparse = CONV.factor(SPATIAL, 4), Chain((SPARSE,))
    assert pair.chains() == (pair,)
    assert Sum((pair, sparse)).chains() == (pair, Addend((SPARSE,)))
    assert Apart((Sum((pair, sparse)), sparse)).chains() == (pair, Addend((SPARSE,)), sparse)


def test_a_plain_sequence_is_a_chain() -> None:
    assert structure_of([CONV, CONV]) == Chain((CONV, CONV))
    total = Sum((CONV.factor(SPATIAL, 4), Chain((SPARSE,))))
    assert structure_of(total) is total


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("how", unfoldings((3, 3)), ids=lambda how: how.name)
def test_a_pair_knows_its_layer_and_its_family(how, groups: int) -> None:
    spec = dataclasses.replace(CONV, groups=groups)
    pair = spec.factor(how, 2, bias=False)
    assert isinstance(pair, Pair)
    assert (pair.whole, pair.rank) == (spec, 2)
    assert pair.at_rank(3) == spec.factor(how, 3, bias=False)


def test_one_call_of_a_pair_is_one_call_of_its_layer() -> None:
    pair = CONV.at(((8, 8), (6, 6))).factor(SPATIAL, 2)
    once = pair.at(((6, 6), pair[1].inputs[1]))
    assert once == CONV.at(((6, 6),)).factor(SPATIAL, 2)


def chosen(method, site: Site, settings: dict[str, object], kind: str) -> Structure:
    return method.layers(site, Choice(kind, method.name, settings))


def test_methods_keep_the_structure_of_what_they_make() -> None:
    site = Layer(CONV, torch.zeros(CONV.shape))
    low_rank = {"unfolding": SPATIAL.name, "rank": 4, "bias": True}
    pair = CONV.factor(SPATIAL, 4)
    assert chosen(WeightSVD(), site, low_rank, "low_rank") == pair

    total = {**low_rank, "density": 0.25, "pattern": "unstructured"}
    both = LowRankPlusSparse()
    assert chosen(both, site, total, "low_rank_plus_sparse") == Sum((pair, Chain((SPARSE,))))
    assert chosen(both, site, {**total, "density": 0.0}, "low_rank_plus_sparse") == pair
    alone = Chain((CONV.sparse(Unstructured(), 0.25),))
    assert chosen(both, site, {**total, "rank": 0}, "low_rank_plus_sparse") == alone
    assert not chosen(both, site, {**total, "rank": 0, "density": 0.0}, "low_rank_plus_sparse")


@pytest.mark.parametrize("once", [False, True])
def test_the_layers_of_a_group_stand_apart(once: bool) -> None:
    parts = [
        Layer(LayerSpec((name,), 12, 8, inputs=((1,),)), torch.zeros(1, 8, 12), None, Statistics(input=Moments(1, 12)))
        for name in ("q", "k")
    ]
    group = Group("q+k", tuple(parts), once)
    method = JointSVD("left")
    made = method.layers(group, method.choice(group, unfolding((), "channel"), 2, bias=False))
    assert isinstance(made, Apart)
    kinds = [(type(chain), [spec.name for spec in chain]) for chain in made.chains()]
    assert kinds == [(Pair, ["q", "q"]), (Chain, ["k"]) if once else (Pair, ["k", "k"])]
    assert [spec.shared for spec in made] == ([0, 0, 0] if once else [0, 0, 24, 0])
