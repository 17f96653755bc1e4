"""Factor types: multiplied out, counted, made empty, and built into modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from spectrim.costs import parameters
from spectrim.errors import PlanError
from spectrim.factors import Factors, LowRank, kinds
from spectrim.nn.build import build, skeleton
from spectrim.plan import Choice
from spectrim.unfold import fold, unfoldings
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
        empty = LowRank.empty([shape], {"rank": 2, "unfolding": factors.how.name, "bias": True})
        assert empty.left.shape == factors.left.shape
        assert empty.right.shape == factors.right.shape
        assert (empty.how, empty.shape, empty.shift) == (factors.how, factors.shape, None)


@pytest.mark.parametrize("rank", [0, -1, 10**12, 2.5, True, "3", None])
def test_a_rank_that_no_decomposition_has_allocates_nothing(rank: object) -> None:
    with pytest.raises(ValueError, match="expected a whole number from 1 to the full rank 4"):
        LowRank.empty([(1, 5, 4)], {"rank": rank, "unfolding": "channel"})


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
            (pair,) = skeleton(Choice("low_rank", "any", {"unfolding": how.name, "rank": 2, "bias": bias}), site.layers)
            specs = site.spec.factor(how, 2, bias=bias)
            assert sum(p.numel() for p in pair.parameters()) == parameters(specs)
            assert (pair.second.bias is not None) is bias


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        (Choice("magic", "any", {}), "unknown kind 'magic'; known are low_rank"),
        (Choice("low_rank", "any", {"rank": 2}), "lacks the setting 'unfolding'"),
        (Choice("low_rank", "any", {"rank": 2, "unfolding": "height-first"}), "has no unfolding 'height-first'"),
        (Choice("low_rank", "any", {"rank": 10**9, "unfolding": "channel"}), "rank 1000000000"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused(choice: Choice, complaint: str) -> None:
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
        def empty(cls, shapes: Sequence[Sequence[int]], settings: Mapping[str, object]) -> Strange:
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
