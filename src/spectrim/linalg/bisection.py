"""The end of the range in which a condition holds, by halving."""

from __future__ import annotations

from collections.abc import Callable


def last_integer(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest whole number below ``high`` for which a condition holds that holds up to some number.

    ``low`` is taken to hold and ``high`` not to; neither is asked for.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def last_number(holds: Callable[[float], bool], low: float, high: float, halvings: int) -> float:
    """As :func:`last_integer` among all numbers, up to the ``2 ** halvings``-th part of the interval, from below."""
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
