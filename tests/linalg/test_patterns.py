"""Patterns: what they cut a weight into, and the best entries of each by exhaustive search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from spectrim.linalg import patterns
from spectrim.linalg.patterns import Blocks, NofM, Taps, pattern, taps

SHAPES = {
    "linear": (1, 8, 12),
    "conv": (1, 6, 4, 3, 2),
    "grouped": (2, 4, 6, 3),
    "volume": (1, 2, 4, 2, 2, 3),
}
NAMES = ("unstructured", "rows", "2:4", "4:6", "2x2", "1x4", "channels", "taps-1@1", "taps-2x1@1x1", "taps-1x2x2@1x0x1")


CASES = [(shape, name) for shape, name in itertools.product(SHAPES.values(), NAMES) if pattern(name).fits(shape)]


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_open_and_close_are_inverse_and_sizes_agree(shape, name):
    kind = pattern(name)
    weight = torch.arange(math.prod(shape)).reshape(shape)
    opened = kind.open(weight)
    assert tuple(opened.shape) == kind.size(shape)
    assert math.prod(kind.size(shape)) == math.prod(shape)
    assert torch.equal(kind.close(opened, shape), weight)
    assert kind.name == name
    assert pattern(kind.name) == kind


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_masks_have_units_in_whole_and_as_many_in_each_pool(shape, name):
    kind = pattern(name)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for density in (0.0, 0.1, 0.4, 0.75, 1.0):
        mask = kind.keep(scores, density)
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == kind.stored(shape, density)
        opened = kind.open(mask)
        assert torch.equal(opened.all(-1), opened.any(-1))
        assert set(opened.any(-1).sum(1).tolist()) == {kind.kept(shape, density)}
        units = kind.units(mask)
        assert units.shape == (math.prod(kind.size(shape)[:2]),)
        assert torch.equal(kind.expand(units, shape), mask)


SMALL = {"unstructured": (1, 2, 4), "rows": (1, 3, 4), "2:4": (1, 2, 8), "2x1": (1, 4, 3), "channels": (2, 2, 4, 2)}


@pytest.mark.parametrize("name", SMALL)
def test_what_is_kept_has_the_largest_sum_of_scores_that_the_pattern_allows(name):
    kind, shape, density = pattern(name), SMALL[name], 0.5
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    pools, units, _ = kind.size(shape)
    each = kind.open(scores).sum(-1)
    kept = kind.kept(shape, density)
    # Pools are apart from each other, so that the best choice in each is the best of all.
    best = sum(
        max(float(each[pool, list(some)].sum()) for some in itertools.combinations(range(units), kept))
        for pool in range(pools)
    )
    assert float(scores[kind.keep(scores, density)].sum()) == pytest.approx(best)


def test_units_are_what_the_table_says():
    weight = torch.arange(2 * 4 * 3 * 2).reshape(1, 2, 4, 3, 2)
    assert pattern("rows").open(weight).shape == (2, 24, 1)
    assert pattern("2:4").open(weight)[0, :, 0].tolist() == [0, 1, 2, 3]
    block = pattern("2x2").open(weight)[0, 0].tolist()
    assert block == [int(weight[0, o, i, 0, 0]) for o in range(2) for i in range(2)]
    channel = pattern("channels").open(weight)[0, 1]
    assert sorted(channel.tolist()) == sorted(weight[0, :, 1].reshape(-1).tolist())
    tap = pattern("taps-1x1@0x0").open(weight)[0, 1]
    assert tap.tolist() == weight[0, :, :, 0, 1].reshape(-1).tolist()


def test_what_does_not_fit():
    assert not NofM(2, 4).fits((1, 3, 6))
    assert not Blocks(2, 2).fits((1, 3, 4))
    assert not Blocks(2, 2).fits((2, 4, 3))
    assert not Taps((1, 1), (0, 0)).fits((1, 2, 2, 3))
    assert not Taps((2, 2), (2, 0)).fits((1, 2, 2, 3, 3))
    # Everything is no part.
    assert not Taps((3, 3), (0, 0)).fits((1, 2, 2, 3, 3))


def test_densities_that_a_pattern_has_of_its_own():
    assert NofM(2, 4).densities((0.1, 0.9), (1, 4, 8)) == (0.5,)
    assert Taps((1, 3), (1, 0)).densities((0.1,), (1, 4, 8, 3, 3)) == (1 / 3,)
    assert pattern("rows").densities((0.1, 0.9), (1, 4, 8)) == (0.1, 0.9)


def test_taps_finds_the_best_box_of_every_size():
    scores = torch.rand(1, 2, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    energy = scores.sum(dim=(0, 1, 2))
    found = {kind.extent: kind for kind in taps(scores)}
    assert set(found) == set(itertools.product((1, 2, 3), repeat=2)) - {(3, 3)}
    for (rows, columns), kind in found.items():
        sums = energy.unfold(0, rows, 1).unfold(1, columns, 1).sum((-2, -1))
        assert float(energy[kind.box].sum()) == pytest.approx(float(sums.max()))
        assert float(scores[kind.keep(scores, 1.0)].sum()) == pytest.approx(float(sums.max()))


@pytest.mark.parametrize(
    "name",
    ["", "2:", "0:4", "5:4", "1:1", "0x2", "2x", "taps", "taps-1x1", "taps-1@1x1", "taps-0@0", "rows ", "a" * 99],
)
def test_names_of_no_pattern_are_refused(name):
    with pytest.raises(ValueError, match="pattern"):
        patterns.pattern(name)


def test_of_boxes_that_keep_as_much_the_first_is_taken() -> None:
    found = taps(torch.ones(1, 2, 2, 3, 3))
    assert {box.corner for box in found} == {(0, 0)}
    assert len(found) == 8
