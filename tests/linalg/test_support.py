"""What a fit tells of its support, where it is known whether it should."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectrim.linalg.additive import Additive, Alternation, decompose
from spectrim.linalg.low_rank_steps import Alternating, Exact, Greedy, Product
from spectrim.linalg.metric import Full, Plain
from spectrim.linalg.patterns import pattern
from spectrim.linalg.sparse import Quadratic, Sparse
from spectrim.linalg.support import examine
from spectrim.linalg.unfold import unfolding

UNSTRUCTURED = pattern("unstructured")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(*, size: float = 3.0, noise: float = 0.05, o: int = 32, n: int = 48) -> tuple[Tensor, Tensor]:
    low = random(1, o, 3) @ random(1, 3, n, seed=1) / math.sqrt(3)
    mask = torch.rand(1, o, n, generator=torch.Generator().manual_seed(2)) < 0.05
    return low + size * random(1, o, n, seed=3).sign() * mask + noise * random(1, o, n, seed=4), mask


def fit(target: Tensor, mask: Tensor, moment: Tensor, *, rank: int = 3) -> tuple[Additive, Quadratic]:
    metric = Full(moment)
    density = float(mask.double().mean())
    found = decompose(target, Quadratic(metric), Exact(metric), rank, UNSTRUCTURED, density, target.shape[2:])
    return found, Quadratic(metric)


def inputs(n: int = 48, *, twins: float | None = None) -> Tensor:
    rows = random(400, n, seed=5)
    if twins is not None:
        rows[:, 1::2] = rows[:, ::2] + twins * rows[:, 1::2]
    return (rows.T @ rows / 400).unsqueeze(0)


def test_a_support_that_stands_out_is_determined() -> None:
    target, mask = planted()
    found, error = fit(target, mask, inputs())
    told = examine(target, error, found, UNSTRUCTURED, (48,))
    assert torch.equal(found.sparse.mask, mask)
    assert told.is_determined
    assert told.gap > 10
    assert 0 < told.overlap < 0.9


def test_entries_below_the_noise_are_not() -> None:
    target, mask = planted(size=0.02)
    found, error = fit(target, mask, inputs())
    told = examine(target, error, found, UNSTRUCTURED, (48,))
    assert not torch.equal(found.sparse.mask, mask)
    assert not told.is_determined
    assert told.gap < 1.5


def test_neither_are_entries_at_inputs_that_are_nearly_the_same() -> None:
    target, mask = planted()
    found, error = fit(target, mask, inputs(twins=0.01))
    assert examine(target, error, found, UNSTRUCTURED, (48,)).gap < 0.1


def test_a_whole_row_may_belong_to_either_part() -> None:
    low = random(1, 32, 3) @ random(1, 3, 48, seed=1)
    mask = torch.zeros(1, 32, 48, dtype=torch.bool)
    mask[:, 0] = True
    state = Sparse(5 * random(1, 32, 48, seed=2) * mask, mask, 0.0)
    left = torch.linalg.qr(low @ random(1, 48, 3, seed=6)).Q
    found = Additive(Product(low, (left, left.mT @ low)), state, (0.0,), True)
    error = Quadratic(Plain(1, (48,), torch.device("cpu")))
    told = examine(low + state.weight + 0.01 * random(1, 32, 48, seed=3), error, found, UNSTRUCTURED, (48,))
    assert told.overlap == pytest.approx(1, abs=1e-6)
    assert not told.is_determined


def test_the_overlap_is_the_cosine_of_the_smallest_angle() -> None:
    target, _ = planted(o=8, n=10)
    metric = Full(torch.diag(torch.linspace(0.5, 2, 10, dtype=torch.float64)).unsqueeze(0))
    outer = torch.diag(torch.linspace(2, 0.5, 8, dtype=torch.float64)).unsqueeze(0)
    error = Quadratic(metric, outer)
    found = decompose(target, error, Greedy(metric, outer.sqrt()), 2, UNSTRUCTURED, 0.1, (10,))
    assert found.product is not None
    # Bases of the tangent space and of the support, in units of equal curvature.
    left, right = found.product.factors
    scale = error.scale(8)[0]
    tangent = [scale * torch.outer(u, e) for u in left[0].T for e in torch.eye(10, dtype=torch.float64)]
    tangent += [scale * torch.outer(e, v) for v in right[0] for e in torch.eye(8, dtype=torch.float64)]
    basis, values, _ = torch.linalg.svd(torch.stack([t.flatten() for t in tangent], 1), full_matrices=False)
    basis = basis[:, values > 1e-9 * values[0]]
    entries = torch.eye(80, dtype=torch.float64)[:, found.sparse.mask[0].flatten()]
    wanted = float(torch.linalg.matrix_norm(basis.T @ entries, 2))
    told = examine(target, error, found, UNSTRUCTURED, (10,), turns=300)
    assert told.overlap == pytest.approx(wanted, rel=1e-3)


def test_the_gap_is_that_of_losses_and_gains() -> None:
    target = torch.tensor([[[4.0, 0.1, 0.0, 2.0], [0.3, 1.0, 0.0, 0.0]]], dtype=torch.float64)
    mask = target.abs() > 0.5
    metric = Full(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.25], dtype=torch.float64)).unsqueeze(0))
    error = Quadratic(metric)
    weight = target * mask
    found = Additive(None, Sparse(weight, mask, error.value(target - weight)), (0.1,), True)
    told = examine(target, error, found, UNSTRUCTURED, (4,))
    # The weakest kept entries lose 1, the best dropped one would gain 0.09.
    assert told.gap == pytest.approx(1 / 0.09)
    assert told.overlap == 0
    alike = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    shared = examine(target, Quadratic(metric, alike.unsqueeze(0)), found, UNSTRUCTURED, (4,))
    # An output that is partly like another one can take an entry over, up to 1 - 0.36.
    assert shared.gap < told.gap


def test_nothing_kept_or_dropped_leaves_no_doubt() -> None:
    target, mask = planted()
    for held in (torch.zeros_like(mask), torch.ones_like(mask)):
        found = Additive(None, Sparse(target * held, held, 0.0), (0.0,), True)
        assert examine(target, Quadratic(Full(inputs())), found, UNSTRUCTURED, (48,)).gap > 1e3


def test_other_splits_are_refused() -> None:
    target = random(1, 8, 36)
    metric = Plain(1, (4, 3, 3), torch.device("cpu"), unfolding((3, 3), "height-first"))
    step = Alternating(metric)
    found = decompose(target, Quadratic(metric), step, 2, UNSTRUCTURED, 0.1, (4, 3, 3), alternation=Alternation(3))
    with pytest.raises(ValueError, match="expected those of the split after the whole kernel, with 8 outputs and 36"):
        examine(target, Quadratic(metric), found, UNSTRUCTURED, (4, 3, 3))
