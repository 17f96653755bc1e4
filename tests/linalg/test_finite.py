"""Whether all numbers are finite."""

from __future__ import annotations

import math

import pytest
import torch

from spectrim.linalg.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 7, -1])
def test_one_entry_that_is_not_finite_is_seen(dtype, place):
    """Wherever it is, whatever it is, and in whichever tensor."""
    fine = torch.randn(3, 5, dtype=torch.float64).to(dtype)
    assert all_finite(fine, torch.tensor([torch.finfo(dtype).max], dtype=dtype), torch.empty(0))
    for odd in (math.nan, math.inf, -math.inf):
        spoilt = fine.clone()
        spoilt.view(-1)[place] = odd
        assert not all_finite(spoilt)
        assert not all_finite(fine, spoilt.mT)
