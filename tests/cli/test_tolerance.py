"""``spectrim compress`` with a tolerance in place of a budget."""

from __future__ import annotations

import pytest

from spectrim.cli.common import exit_code
from spectrim.errors import InfeasibleBudgetError, ToleranceError

COMPRESS = ("compress", "nets:tiny", "--only", "wide")
DATA = ("--data", "nets:batches")
TEST = ("--test", "nets:batches")


def test_a_drop_in_place_of_a_budget(run) -> None:
    found = run.json(*COMPRESS, *DATA, *TEST, "--max-drop", "20", "--out", "small")
    assert found["costs"]["macs"] < found["dense_costs"]["macs"]
    said = " ".join(found["notes"])
    assert "the tolerance is met: accuracy on --test is" in said
    assert "the smallest was taken that held on these samples" in said
    assert "the tolerance is met" in run(*COMPRESS, *DATA, "--min-agreement", "0.6", "--out", "other").output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((*DATA, "--max-drop", "1"), "measured on --test"),
        ((*DATA, *TEST, "--max-drop", "-1"), "--max-drop -1"),
        ((*DATA, "--min-agreement", "99"), "--min-agreement 99"),
        ((*DATA, *TEST, "--max-drop", "1", "--min-agreement", "0.9"), "give one of them"),
        (("--input", "1x8x8", "--min-agreement", "0.9"), "give --data"),
        ((*DATA, "--min-agreement", "0.9", "--plan", "plan.json"), "or --plan"),
    ],
)
def test_what_does_not_go_together(run, options: tuple[str, ...], said: str) -> None:
    assert said in " ".join(run(*COMPRESS, *options, code=2).output.split())


def test_a_budget_beyond_the_tolerance_ends_as_one_that_cannot_be_met() -> None:
    assert exit_code(ToleranceError("macs=60% holds it")) == exit_code(InfeasibleBudgetError("macs", 1, 2, 3)) == 3
