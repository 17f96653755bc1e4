"""Coupled channels as plain values: what may be kept, what is left of each axis, and their text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrim.errors import PlanError
from spectrim.network.choices import ChannelsChoice, Place
from spectrim.network.coupling import Coupling, Side, axes_left


def side(name: str, axis: str, first: int, channels: int, size: int, per: int = 1) -> Side:
    """Channels that lie one after the other, each with ``per`` neighbouring entries."""
    return Side(name, axis, first + torch.arange(channels * per).reshape(channels, per), size)


def concatenation(a: int = 3, b: int = 4) -> tuple[Coupling, Coupling]:
    """Two layers whose outputs lie side by side in a norm and, each pixel apart, in a linear layer."""
    first = (side("a", "out", 0, a, a), side("norm", "through", 0, a, a + b), side("c", "in", 0, a, 2 * (a + b), 2))
    second = (
        side("b", "out", 0, b, b),
        side("norm", "through", a, b, a + b),
        side("c", "in", 2 * a, b, 2 * (a + b), 2),
    )
    return Coupling("a:out", first), Coupling("b:out", second)


def plain(axes) -> dict[tuple[str, str], list[int]]:
    return {axis: left.tolist() for axis, left in axes.items()}


def test_two_couplings_on_one_axis() -> None:
    couplings = concatenation()
    axes = axes_left(couplings, {"a:out": [0, 2], "b:out": [1]})
    assert plain(axes) == {
        ("a", "out"): [0, 2],
        ("b", "out"): [1],
        ("norm", "through"): [0, 2, 4],
        ("c", "in"): [0, 1, 4, 5, 8, 9],
    }
    assert plain(axes_left(couplings, {"b:out": [0, 3]})) == {
        ("b", "out"): [0, 3],
        ("norm", "through"): [0, 1, 2, 3, 6],
        ("c", "in"): [0, 1, 2, 3, 4, 5, 6, 7, 12, 13],
    }
    assert plain(axes_left(couplings, {"a:out": [0, 1, 2]})) == {}
    assert plain(axes_left(couplings, {})) == {}


def test_numbers_after_a_removal() -> None:
    couplings = concatenation()
    kept = {"a:out": [0, 2], "b:out": [1, 3]}
    axes = axes_left(couplings, kept)
    a, b = (c.after(kept[c.name], axes) for c in couplings)
    assert (a.channels, b.channels) == (2, 2)
    assert [(s.positions.tolist(), s.size) for s in b.sides] == [
        ([[0], [1]], 2),
        ([[2], [3]], 4),
        ([[4, 5], [6, 7]], 8),
    ]
    assert [s.positions.flatten().tolist() for s in a.sides] == [[0, 1], [0, 1], [0, 1, 2, 3]]


@given(st.data(), st.integers(1, 5), st.integers(1, 5))
def test_two_removals_one_after_the_other_are_one(data, n: int, m: int) -> None:
    def part(count: int) -> list[int]:
        return sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))

    couplings = concatenation(n, m)
    first = {"a:out": part(n), "b:out": part(m)}
    axes = axes_left(couplings, first)
    later = [c.after(first[c.name], axes) for c in couplings]
    second = {c.name: part(c.channels) for c in later}
    further = axes_left(later, second)
    both = axes_left(couplings, {name: [first[name][c] for c in channels] for name, channels in second.items()})
    lengths = {(s.name, s.axis): s.size for c in couplings for s in c.sides}
    for axis, size in lengths.items():
        left = axes.get(axis, torch.arange(size))
        left = left[further[axis]] if axis in further else left
        assert left.tolist() == both.get(axis, torch.arange(size)).tolist()


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        ([], r"cannot keep \[\]"), ([0, 0], r"cannot keep \[0, 0\]"), ([2, 1], r"\[2, 1\]"), ([-1, 1], r"\[-1, 1\]"),
        ([0, 3], r"\[0, 3\].*from 0 to 2"), ([True, 2], r"\[True, 2\]"), ([0.0, 1.0], r"\[0.0, 1.0\]"),
        (["0"], r"\['0'\]"), (list(range(40)), "and 30 more"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept(kept: list[object], text: str) -> None:
    couplings = concatenation()
    with pytest.raises(PlanError, match=f"channels 'a:out': .*{text}"):
        couplings[0].check(kept)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="'a:out'"):
        axes_left(couplings, {"a:out": kept})  # type: ignore[dict-item]


def test_pools_keep_equal_numbers() -> None:
    coupling = Coupling("g:out", (side("g", "out", 0, 6, 6),), pools=3)
    coupling.check([0, 3, 4])
    coupling.check(range(6))
    with pytest.raises(PlanError, match=r"of each 2 channels .* all 3 groups; \[0, 1, 2\] leaves \[2, 1, 0\]"):
        coupling.check([0, 1, 2])


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(PlanError, match="no coupled channels 'x:out'; there are 'a:out', 'b:out'"):
        axes_left(concatenation(), {"x:out": [0]})
    with pytest.raises(PlanError, match="there are none"):
        axes_left([], {"x:out": [0]})


def test_a_choice_says_what_is_lost_where() -> None:
    coupling = concatenation()[1]
    assert [str(place) for place in coupling.places] == ["b:out:1", "norm:through:1", "c:in:2"]
    assert coupling.on("in") == (coupling.sides[2],)
    choice = ChannelsChoice((1, 3), 4, coupling.places)
    assert choice.lost == (Place("b", "out", 2), Place("norm", "through", 2), Place("c", "in", 4))
    assert ChannelsChoice((0, 1, 2, 3), 4, coupling.places).lost[0] == Place("b", "out", 0)


@given(st.integers(1, 6), st.data())
def test_what_is_lost_is_what_the_axes_lose(n: int, data) -> None:
    couplings = concatenation(n, 3)
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    axes = axes_left(couplings, {"a:out": kept})
    sizes = {(s.name, s.axis): s.size for c in couplings for s in c.sides}
    for place in ChannelsChoice(kept, n, couplings[0].places).lost:
        axis = place.module, place.axis
        assert place.entries == sizes[axis] - len(axes.get(axis, range(sizes[axis])))
