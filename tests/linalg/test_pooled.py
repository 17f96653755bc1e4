"""Moments of few vectors beside known ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectrim.linalg.moments import Moments
from spectrim.linalg.pooled import discounted, larger, larger_apart, pooled


def moments(rows: Tensor) -> Moments:
    made = Moments(len(rows), rows.shape[2])
    made.update(rows)
    return made


def test_how_much_larger_vectors_are_in_their_own_directions() -> None:
    known = torch.randn(2, 4000, 6, generator=torch.Generator().manual_seed(0)).double()
    line = torch.randn(1, 500, 1, generator=torch.Generator().manual_seed(1)).double().expand(2, 500, 6)
    assert larger(moments(known), moments(known)) == pytest.approx(1)
    assert larger(moments(10 * known), moments(known)) == pytest.approx(100, rel=0.01)
    assert larger(moments(known / 10), moments(known)) == 1
    assert larger(moments(line), moments(known)) == pytest.approx(6, rel=0.3)
    # A constant off the known mean, and nothing but that mean.
    assert larger(moments(torch.full((2, 9, 6), 3.0)), moments(known)) == pytest.approx(6 * 9, rel=0.2)
    assert larger(moments(known.mean(1, keepdim=True)), moments(known)) == pytest.approx(1)


def test_neither_units_nor_entries_that_never_changed_tell_of_another_kind() -> None:
    known = torch.randn(1, 900, 5, generator=torch.Generator().manual_seed(0)).double()
    now, by = 3 * known[:, :40] + 1, 10 ** torch.linspace(-6, 6, 5).double()
    assert larger(moments(now * by), moments(known * by)) == pytest.approx(larger(moments(now), moments(known)))
    still = torch.cat([known, torch.zeros(1, 900, 1)], dim=2)
    beside = torch.cat([now, torch.full((1, 40, 1), 1e6)], dim=2)
    assert larger(moments(beside), moments(still)) == pytest.approx(larger(moments(now), moments(known)))


def test_entries_one_by_one() -> None:
    known = torch.randn(2, 900, 5, generator=torch.Generator().manual_seed(0)).double()
    known[..., 4] = 2.0
    held = moments(known)
    assert larger_apart(held.mean, held.variance, held) == pytest.approx(1)
    assert larger_apart(held.mean, 100 * held.variance, held) == pytest.approx(100)
    away = torch.where(held.variance > 0, 3 * held.variance.sqrt(), 1e6)
    assert larger_apart(held.mean + away, held.variance, held) == pytest.approx(10)


def test_a_share_shrinks_with_the_square() -> None:
    assert discounted(0.5, 1.0) == 0.5
    assert discounted(0.5, 3.0) == pytest.approx(0.1)
    assert discounted(0.5, 1e300) == 0.0


@pytest.mark.parametrize(("share", "count"), [(0.3, 300), (1e-9, 1), (0.9999, 999)])
def test_a_share_of_the_samples_is_as_now_and_the_others_are_as_known(share: float, count: int) -> None:
    draw = torch.Generator().manual_seed(0)
    now = moments(3 * torch.randn(2, 50, 4, generator=draw).double() + 1)
    known = moments(torch.randn(2, 1000, 4, generator=draw).double())
    before = now.mean.clone(), now.covariance.clone()
    both, part = pooled(now, known, share), count / 1000
    assert both.count == known.count
    torch.testing.assert_close(both.mean, part * now.mean + (1 - part) * known.mean)
    apart = (now.mean - known.mean).unsqueeze(1)
    mixed = part * now.covariance + (1 - part) * known.covariance + part * (1 - part) * apart.mT * apart
    torch.testing.assert_close(both.covariance, mixed)
    assert now.count == 50
    assert torch.equal(now.mean, before[0])
    assert torch.equal(now.covariance, before[1])


def test_where_all_are_given_or_nothing_is_known_the_samples_stand_for_themselves() -> None:
    now, known = (moments(torch.randn(1, n, 3, dtype=torch.float64)) for n in (9, 40))
    assert pooled(now, known, 1.0) is now
    assert pooled(now, Moments(1, 3), 0.5) is now
