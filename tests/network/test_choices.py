"""Choices: types by kind, what they are as plans hold them, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import dataclass

import pytest

from spectrim.errors import PlanError
from spectrim.network.choices import (
    DENSE,
    ChannelsChoice,
    Choice,
    DenseChoice,
    LowRankChoice,
    Place,
    SharedChoice,
    SumChoice,
    ZeroChoice,
    read_choice,
)

PLACES = (Place("block.0.conv", "out", 1), Place("pos", "2", 1), Place("fc", "in", 4))
# Choices, their settings as plans hold them, and their words.
CHOICES = [
    (DENSE, {}, "dense"),
    (
        LowRankChoice("channel", 8, True, method="svd"),
        {"unfolding": "channel", "rank": 8, "bias": True},
        "channel, rank 8",
    ),
    (LowRankChoice("input", 2, False), {"unfolding": "input", "rank": 2, "bias": False}, "input, rank 2"),
    (LowRankChoice("input", 2), {"unfolding": "input", "rank": 2}, "input, rank 2"),
    (
        SharedChoice("channel", 8, 3, True, method="joint"),
        {"unfolding": "channel", "rank": 8, "left_rank": 3, "bias": True},
        "channel, rank 8, both factors shared (3 + 5)",
    ),
    (
        SharedChoice("channel", 8, 8, True, once=True),
        {"unfolding": "channel", "rank": 8, "left_rank": 8, "bias": True, "once": True},
        "channel, rank 8, first factor shared, computed once",
    ),
    (
        SharedChoice("channel", 8, 0, True),
        {"unfolding": "channel", "rank": 8, "left_rank": 0, "bias": True},
        "channel, rank 8, second factor shared",
    ),
    (
        SumChoice("channel", 4, 0.05, "unstructured", True),
        {"unfolding": "channel", "rank": 4, "density": 0.05, "pattern": "unstructured", "bias": True},
        "channel, rank 4 + 5 % unstructured",
    ),
    (
        SumChoice("channel", 0, 0.5, "2:4", True),
        {"unfolding": "channel", "rank": 0, "density": 0.5, "pattern": "2:4", "bias": True},
        "50 % 2:4",
    ),
    (
        SumChoice("input", 3, 0.0, "rows", False),
        {"unfolding": "input", "rank": 3, "density": 0.0, "pattern": "rows", "bias": False},
        "input, rank 3",
    ),
    (
        ChannelsChoice((0, 2, 3), 4, PLACES, method="filters"),
        {"kept": (0, 2, 3), "of": 4, "sides": "block.0.conv:out:1 pos:2:1 fc:in:4"},
        "3 of 4 channels",
    ),
    (
        ChannelsChoice((0,), 4, (Place("of keys ", "out", 1), Place(" 2:0 ", ".heads", 12), Place("", ".n", 1))),
        {"kept": (0,), "of": 4, "sides": "of keys :out:1  2:0 :.heads:12 :.n:1"},
        "1 of 4 channels",
    ),
    (ZeroChoice(0), {"rank": 0}, "zero"),
]


@pytest.mark.parametrize(("choice", "settings", "words"), CHOICES, ids=lambda value: str(value)[:40])
def test_a_choice_is_written_read_and_said_in_one_way(choice: Choice, settings: dict, words: str) -> None:
    assert choice.settings == settings
    assert list(choice.settings) == list(settings)
    assert choice.record() == {"kind": choice.kind, "method": choice.method, "settings": settings}
    assert read_choice(choice.record()) == choice
    again = Choice(choice.kind, choice.method, dict(reversed(settings.items())))
    assert again == choice
    assert type(again) is type(choice)
    assert hash(again) == hash(choice)
    assert str(choice) == words
    assert all(choice[name] == value for name, value in settings.items())
    assert choice.is_dense is (choice is DENSE)
    for same in (copy.deepcopy(choice), pickle.loads(pickle.dumps(choice)), dataclasses.replace(choice)):
        assert same == choice
    assert dataclasses.replace(choice, method="another") != choice


def test_no_arguments_mean_dense() -> None:
    assert Choice() == DENSE == read_choice({})
    assert isinstance(Choice(), DenseChoice)


PAIR = {"unfolding": "channel", "rank": 2, "left_rank": 0}
SUM = {"unfolding": "channel", "rank": 1, "density": 0.5, "pattern": "rows"}
KEPT = {"kept": (0, 2), "of": 4, "sides": "a:out:1 b:in:1"}
WRONG = [
    ("low_rank", {"rank": 2}, "lacks the field 'unfolding'"),
    ("low_rank", {"unfolding": "channel", "rank": 2, "bia5": True}, "has no field 'bia5'; it has unfolding"),
    ("low_rank", {"unfolding": "channel", "rank": 2, "method": "x"}, "has no field 'method'"),
    *(("low_rank", {"unfolding": "channel", "rank": rank}, "^rank of a 'low_rank' choice is ")
      for rank in (0, -1, "3", True, None, 2.0, 1e300, float("nan"), (1, 2))),
    ("low_rank", {"unfolding": 3, "rank": 2}, "^unfolding of .* is 3: Expected `str`"),
    ("low_rank", {"unfolding": "channel", "rank": 2, "bias": 1}, "^bias of .* is 1: Expected `bool"),
    ("low_rank", {"unfolding": "channel", "rank": "9" * 500}, "is '9{50,60}: Expected"),
    ("shared_basis", PAIR | {"left_rank": 3}, "left_rank is 3; expected at most the rank, 2"),
    ("shared_basis", PAIR | {"left_rank": -1}, "left_rank .* is -1"),
    ("shared_basis", PAIR | {"left_rank": 1, "once": True}, "a first factor that is shared whole"),
    ("shared_basis", PAIR | {"once": "yes"}, "once .* is 'yes'"),
    *(("low_rank_plus_sparse", SUM | {"density": density}, "^density of .* is ")
      for density in (-0.1, 1.1, "0.5", None, True, float("nan"), float("inf"))),
    ("low_rank_plus_sparse", SUM | {"rank": -1}, "^rank of .* is -1"),
    *(("kept_channels", KEPT | {"sides": sides}, "(written|text) as module:axis:entries")
      for sides in ("a", "a:out", "a:out:", "a:out:x", "a:out:-1", ":out:1", "a:out:1.5", "a:out:²", None, 7)),
    *(("kept_channels", KEPT | {"kept": kept}, "different channels, ascending, from 0 to 3, at least one")
      for kept in ((), (0, 0), (2, 0), (0, 4), (-1, 2))),
    ("kept_channels", KEPT | {"kept": 3}, "^kept of .* is 3"),
    ("kept_channels", KEPT | {"kept": (True, 2)}, "^kept of .*: Expected `int`, got `bool`"),
    ("kept_channels", KEPT | {"of": "4"}, "^of of .* is '4'"),
    ("kept_channels", KEPT | {"of": 0}, "^of of .* is 0"),
    ("zero", {"rank": 1}, "^rank of .* is 1"),
    ("dense", {"rank": 1}, "a 'dense' choice has no field 'rank'; it has none"),
    ("magic", {}, "unknown kind of choice 'magic'; known are dense, low_rank.*Import the module that declares it"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "complaint"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_unknown_missing_or_of_another_type_is_refused_by_name(
    kind: str, settings: dict[str, object], complaint: str
) -> None:
    with pytest.raises(PlanError, match=complaint):
        Choice(kind, "m", settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("record", [None, [], "low_rank", {"kind": 3}, {"method": None}, {"settings": []}, {"knd": ""}])
def test_what_is_no_choice_is_refused(record: object) -> None:
    with pytest.raises(PlanError, match="a choice is written as kind, method and settings"):
        read_choice(record)


def test_a_kind_of_another_package_takes_part() -> None:
    @dataclass(frozen=True)
    class CoreChoice(Choice, kind="core_for_this_test"):
        ranks: tuple[int, int]
        core: str = "full"

    choice = CoreChoice((3, 4), method="Mine")
    assert read_choice(choice.record()) == choice == Choice("core_for_this_test", "Mine", {"ranks": (3, 4)})
    assert choice.record()["settings"] == {"ranks": (3, 4)}
    assert str(choice) == "ranks (3, 4)"
    assert choice.cut is None
    assert choice.biased(True)
    assert not choice.biased(False)
    with pytest.raises(PlanError, match="^ranks of a 'core_for_this_test' choice is .3., 4.: Expected `array`|`int`"):
        Choice("core_for_this_test", "Mine", {"ranks": ("3", 4)})  # type: ignore[dict-item]


def test_a_kind_has_one_type() -> None:
    with pytest.raises(TypeError, match="kind 'low_rank' of .*Mine is that of spectrim.network.choices.LowRankChoice"):

        class Mine(Choice, kind="low_rank"):
            pass

    assert type(Choice("low_rank", "", {"unfolding": "channel", "rank": 1})) is LowRankChoice


def test_a_type_that_is_made_again_takes_the_place_of_the_first() -> None:
    def cell() -> type[Choice]:
        @dataclass(frozen=True)
        class Again(Choice, kind="again_for_this_test"):
            pass

        return Again

    cell()
    second = cell()
    assert type(Choice("again_for_this_test")) is second


def test_a_type_that_is_no_dataclass_is_refused() -> None:
    class Bare(Choice, kind="bare_for_this_test"):
        rank: int

    with pytest.raises(TypeError, match="Bare has to be a frozen dataclass"):
        Choice("bare_for_this_test")


def test_what_is_cut_and_whether_there_is_a_bias() -> None:
    assert [choice.cut for choice, *_ in CHOICES] == [
        None, ("channel", 8), ("input", 2), ("input", 2), *[("channel", 8)] * 3, ("channel", 4), ("channel", 0),
        ("input", 3), ("responses", 3), ("responses", 1), ("", 0),
    ]  # fmt: skip
    for bias, wanted in ((True, (True, True)), (False, (False, False)), (None, (True, False))):
        choice = LowRankChoice("channel", 1, bias)
        assert (choice.biased(True), choice.biased(False)) == wanted


def test_heads_of_attention_are_called_heads() -> None:
    heads = (Place("q", "out", 8), Place("k", "out", 8), Place("o", "in", 8), Place("attention.heads", "number", 1))
    assert str(ChannelsChoice((0, 2, 3), 4, heads)) == "3 of 4 heads"
    assert str(ChannelsChoice((0,), 2, (Place("conv", "out", 1), Place("fc", "in", 16)))) == "1 of 2 channels"
