"""Bisection: the end of the range in which a condition holds."""

from __future__ import annotations

import pytest

from spectrim.linalg.bisection import last_integer, last_number


@pytest.mark.parametrize("high", [1, 2, 3, 8, 9])
def test_the_last_integer_is_that_of_a_search_one_by_one(high: int) -> None:
    for last in range(high):
        asked: list[int] = []

        def holds(number: int, last: int = last, asked: list[int] = asked) -> bool:
            asked.append(number)
            return number <= last

        assert last_integer(holds, 0, high) == last
        assert all(0 < number < high for number in asked)
        assert len(asked) <= (high - 1).bit_length()


def test_the_last_number_lies_below_the_end_by_less_than_an_interval() -> None:
    found = last_number(lambda number: number <= 0.3, 0.0, 1.0, 20)
    assert 0 <= 0.3 - found < 2**-20
    assert last_number(lambda number: True, 0.25, 1.0, 0) == 0.25
    assert last_number(lambda number: False, 0.25, 1.0, 9) == 0.25
