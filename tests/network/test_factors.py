"""Factor types: multiplied out, counted, made empty, and built into modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from spectrim.cost.counted import parameters
from spectrim.errors import PlanError
from spectrim.linalg.unfold import fold, unfoldings
from spectrim.network.choices import Choice, LowRankChoice, SharedChoice
from spectrim.network.factors import Factors, LowRank, SharedBasis, kinds
from spectrim.nn.build import build, skeleton
from tests.cases import LAYERS, small_site

SHAPES = [(1, 5, 4), (2, 3, 4, 3), (1, 6, 3, 3, 2), (2, 2, 3, 2, 1, 3)]


def drawn(shape: tuple[int, ...], rank: int) -> list[LowRank]:
    g, o, i, *kernel = shape
    found = []
    for how in unfoldings(kernel):
        rows, columns = how.sizes(kernel)
        left, right = torch.randn(g, i * rows, rank).double(), torch.randn(g, rank, o * columns).double()
        found.append(LowRank(left, right, None, how, (o, i, *kernel)))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_is_the_folded_product(shape: tuple[int, ...]) -> None:
    for factors in drawn(shape, 2):
        (dense,) = factors.dense()
        assert tuple(dense.shape) == shape
        torch.testing.assert_close(dense, fold(factors.left @ factors.right, factors.how, shape[1:]))
        assert torch.linalg.matrix_rank(factors.left @ factors.right).tolist() == [2] * shape[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_numel_counts_both_factors(shape: tuple[int, ...]) -> None:
    for factors in drawn(shape, 3):
        assert factors.rank == 3
        assert factors.numel() == factors.left.numel() + factors.right.numel()


@pytest.mark.parametrize("shape", SHAPES)
def test_empty_factors_have_the_shapes_of_full_ones(shape: tuple[int, ...]) -> None:
    for factors in drawn(shape, 2):
        empty = LowRank.empty([shape], LowRankChoice(factors.how.name, 2, True))
        assert empty.left.shape == factors.left.shape
        assert empty.right.shape == factors.right.shape
        assert (empty.how, empty.shape, empty.shift) == (factors.how, factors.shape, None)


@pytest.mark.parametrize("rank", [0, -1, 5, 10**12])
def test_a_rank_that_no_decomposition_has_allocates_nothing(rank: int) -> None:
    with pytest.raises(ValueError, match="expected a whole number from 1 to the full rank 4|Expected `int` >= 1"):
        LowRank.empty([(1, 5, 4)], LowRankChoice("channel", rank))


def test_the_kind_is_registered() -> None:
    assert kinds()["low_rank"] is LowRank
    assert LowRank.kind == "low_rank"
    kinds()["other"] = LowRank  # type: ignore[index]
    assert "other" not in kinds()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_skeleton_has_the_shapes_of_the_choice(kind: str) -> None:
    site, _, _ = small_site(kind, calibrated=False)
    for how in unfoldings(site.spec.kernel):
        for bias in (True, False):
            (pair,) = skeleton(LowRankChoice(how.name, 2, bias), site.layers)
            specs = site.spec.factor(how, 2, bias=bias)
            assert sum(p.numel() for p in pair.parameters()) == parameters(specs)
            assert (pair.second.bias is not None) is bias


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        (LowRankChoice("height-first", 2), "has no unfolding 'height-first'"),
        (LowRankChoice("channel", 10**9), "rank 1000000000"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused(choice: LowRankChoice, complaint: str) -> None:
    site, _, _ = small_site("linear", calibrated=False)
    with pytest.raises(PlanError, match=complaint):
        skeleton(choice, site.layers)


def test_factors_without_a_builder_are_named() -> None:
    @dataclass(frozen=True, eq=False)
    class Strange(Factors, kind="strange_for_this_test"):
        def dense(self) -> tuple[Tensor, ...]:
            return ()

        def numel(self) -> int:
            return 0

        @classmethod
        def empty(cls, shapes: Sequence[Sequence[int]], choice: object) -> Strange:
            return cls()

    site, _, _ = small_site("linear", calibrated=False)
    with pytest.raises(TypeError, match="no builder for factors of type Strange; register one with build.register"):
        build(Strange(), site.layers, site.biases)


def test_the_shift_is_added_to_the_bias() -> None:
    for kind in ("conv2d", "conv2d-strided-no-bias"):
        site, _, _ = small_site(kind, calibrated=False)
        (factors, *_) = drawn(site.spec.shape, 2)
        shift = torch.arange(site.spec.out_channels).double()
        (pair,) = build(
            LowRank(factors.left, factors.right, shift, factors.how, factors.shape), site.layers, site.biases
        )
        old = site.biases[0]
        torch.testing.assert_close(pair.second.bias.detach(), shift.float() + (0 if old is None else old))


def shared(shapes: Sequence[Sequence[int]], rank: int, left_rank: int, name: str = "channel") -> SharedBasis:
    empty = SharedBasis.empty(shapes, SharedChoice(name, rank, left_rank, True))
    filled = {
        field: tuple(torch.randn_like(t) for t in held) if isinstance(held, tuple) else torch.randn_like(held)
        for field in ("own_lefts", "shared_right", "shared_left", "own_rights")
        for held in [getattr(empty, field)]
    }
    return dataclasses.replace(empty, **filled)


@pytest.mark.parametrize("name", ["channel", "input", "height-first"])
@pytest.mark.parametrize(("rank", "left_rank"), [(3, 0), (3, 3), (4, 1)])
def test_shared_factors_multiply_out_to_the_sum_of_both_products(name: str, rank: int, left_rank: int) -> None:
    factors = shared([(2, 6, 4, 3, 3)] * 3, rank, left_rank, name)
    assert factors.ranks == (left_rank, rank - left_rank)
    for n, dense in enumerate(factors.dense()):
        product = factors.own_lefts[n] @ factors.shared_right + factors.shared_left @ factors.own_rights[n]
        torch.testing.assert_close(dense, fold(product, factors.how, (6, 4, 3, 3)))
    (left, right, shape), *_ = factors.pairs()
    assert (left.shape[-1], right.shape[-2], shape) == (rank, rank, (6, 4, 3, 3))
    rows, columns = left.shape[-2], right.shape[-1]
    own = 3 * (left_rank * columns + (rank - left_rank) * rows)
    assert factors.numel() == 2 * (own + left_rank * rows + (rank - left_rank) * columns)


def test_layers_of_other_sizes_share_the_side_they_have_in_common() -> None:
    right = shared([(1, 6, 4, 3, 3), (1, 6, 2, 3, 3)], 3, 0)
    assert [tuple(w.shape) for w in right.dense()] == [(1, 6, 4, 3, 3), (1, 6, 2, 3, 3)]
    assert right.numel() == 3 * (36 + 18 + 6)
    left = shared([(1, 6, 4, 3, 3), (1, 5, 4, 3, 3)], 3, 3)
    assert [tuple(w.shape) for w in left.dense()] == [(1, 6, 4, 3, 3), (1, 5, 4, 3, 3)]
    assert left.numel() == 3 * (36 + 6 + 5)


@pytest.mark.parametrize(
    ("shapes", "rank", "left_rank"),
    [
        ([(1, 64, 8)] * 4, 32, 0),  # right-shared: the rows of all four add up
        ([(1, 64, 8)] * 4, 21, 0),
        ([(1, 4, 64)] * 4, 16, 16),  # left-shared: their columns do
        ([(1, 8, 8)] * 3, 16, 8),
    ],
)
def test_every_rank_that_a_stack_can_have_is_made(shapes: list[tuple[int, ...]], rank: int, left_rank: int) -> None:
    assert shared(shapes, rank, left_rank).ranks == (left_rank, rank - left_rank)


PAIR = [(1, 5, 4, 3, 3), (1, 5, 4, 3, 3)]
HUGE = 10**12


@pytest.mark.parametrize(
    ("shapes", "changes", "complaint"),
    [
        (PAIR, {"rank": HUGE}, f"rank.* {HUGE}"),
        (PAIR, {"rank": HUGE, "left_rank": HUGE}, "rank"),
        (PAIR, {"rank": 0}, "rank"),
        (PAIR, {"rank": -2, "left_rank": -3}, "rank"),
        (PAIR, {"rank": 2, "left_rank": -1}, "rank"),
        (PAIR, {"rank": 2, "left_rank": 3}, "rank"),
        (PAIR, {"rank": 2.0}, "rank .* is 2.0"),
        (PAIR, {"rank": True}, "rank .* is True"),
        (PAIR, {"left_rank": "1"}, "left_rank .* is '1'"),
        (PAIR, {"left_rank": None}, "left_rank .* is None"),
        (PAIR, {"rank": (1, 2)}, r"rank .* is \(1, 2\)"),
        (PAIR, {"unfolding": "diagonal"}, "has no unfolding 'diagonal'"),
        (PAIR, {"once": 1, "left_rank": 2}, "once .* is 1"),
        (PAIR, {"once": True, "left_rank": 1}, "a first factor that is shared whole"),
        (PAIR[:1], {}, "layers that share a factor"),
        ([], {}, "layers that share a factor"),
        ([PAIR[0], (1, 5, 4, 1, 1)], {}, "equal groups and kernels"),
        ([PAIR[0], (2, 5, 4, 3, 3)], {}, "equal groups and kernels"),
        ([PAIR[0], (1, 5, 3, 3, 3)], {"left_rank": 2}, "36, 27. rows and .5, 5. columns cannot share"),
        ([PAIR[0], (1, 6, 4, 3, 3)], {"left_rank": 0}, "36, 36. rows and .5, 6. columns cannot share"),
    ],
)
def test_shared_settings_that_make_no_sense_allocate_nothing(
    shapes: list[tuple[int, ...]], changes: dict[str, object], complaint: str
) -> None:
    settings = {"unfolding": "channel", "rank": 2, "left_rank": 0} | changes
    with pytest.raises((PlanError, ValueError), match=complaint):
        SharedBasis.empty(shapes, Choice("shared_basis", "m", settings))


def test_shared_settings_must_be_there() -> None:
    for name in ("unfolding", "rank", "left_rank"):
        settings = {k: v for k, v in {"unfolding": "channel", "rank": 2, "left_rank": 0}.items() if k != name}
        with pytest.raises(PlanError, match=f"lacks the field '{name}'"):
            Choice("shared_basis", "m", settings)


def test_a_kind_has_one_type_of_factors() -> None:
    with pytest.raises(
        TypeError, match="kind 'low_rank' of .*Mine is that of spectrim.network.factors.LowRank already"
    ):

        class Mine(LowRank, kind="low_rank"):
            pass

    assert kinds()["low_rank"] is LowRank
