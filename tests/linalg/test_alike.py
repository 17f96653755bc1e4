"""How many independent rows the rows of samples are worth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectrim.linalg.alike import Alike


def worth(rows: Tensor, parts: int = 1) -> float:
    """Of rows ``[samples, positions, d]``."""
    alike = Alike(rows.shape[2])
    for number, part in enumerate(rows.tensor_split(parts)):
        size, positions, _ = part.shape
        alike.add(part.flatten(0, 1), torch.arange(size).repeat_interleave(positions), size, number)
    return alike.independent


@pytest.mark.parametrize("equal", [1, 4, 16])
def test_copies_of_a_row_are_one_row(equal: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(400, 16 // equal, 24).repeat_interleave(equal, 1)
    assert worth(rows) == pytest.approx(400 * 16 / equal, rel=0.25)


def test_neither_cut_nor_units_nor_what_hardly_changes_make_a_difference() -> None:
    torch.manual_seed(0)
    rows = torch.randn(64, 4, 8).repeat_interleave(4, 1)
    rows[:, :, 0] = 1e-9 * (torch.arange(64) == 3).unsqueeze(1)
    known = worth(rows)
    for parts in (3, 64):
        assert worth(rows, parts) == pytest.approx(known, rel=1e-9)
    assert worth(1e6 * rows + 1e6) == pytest.approx(known, rel=1e-2)
    assert known == pytest.approx(256, rel=0.4)


def test_calls_of_one_pass_are_of_the_same_samples() -> None:
    torch.manual_seed(0)
    rows, alike = torch.randn(64, 6, 8), Alike(8)
    for part in rows.split(2, 1):
        alike.add(part.flatten(0, 1), torch.arange(64).repeat_interleave(2), 64, 0)
    assert alike.independent == pytest.approx(worth(rows), rel=1e-9)


def test_rows_that_do_not_change_are_counted() -> None:
    assert worth(torch.ones(8, 4, 3)) == 32
    assert Alike(3).independent == 0
