"""The comparison of the golden set can fail, and one of its cases gives the same bits twice."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import golden
from benchmarks.golden_cases import CASES, Record

RANK = ("plan", "entries", 0, "choice", "settings", "rank")


def records() -> dict[str, Record]:
    plan: dict[str, Any] = {
        "entries": [{"site": "a", "choice": {"kind": "low_rank", "settings": {"rank": 3}}, "error": 0.25}],
        "methods": {"WeightSVD": {"type": "WeightSVD", "options": {"multiple_of": None}}},
        "facts": {"threads": 1},
        "multipliers": {"macs": 1e-9},
    }
    tensors = {"model/weight": torch.rand(4, 3), "model/mask": torch.rand(5) > 0.5}
    tensors["table/errors"] = torch.rand(6, dtype=torch.float64)
    return {"first": Record({"plan": plan}, tensors), "second": Record({"plan": copy.deepcopy(plan)}, {})}


def changed(before: dict[str, Record], path: tuple[Any, ...], value: Any) -> dict[str, Record]:
    """A copy with another value at one place of the first case."""
    after = copy.deepcopy(before)
    held: Any = after["first"].values
    for key in path[:-1]:
        held = held[key]
    held[path[-1]] = value
    return after


def differing(before: dict[str, Record], after: dict[str, Record]) -> dict[str, list[str]]:
    return golden.summary(golden.compare(before, after))["different"]


def status(before: dict[str, Record], after: dict[str, Record], folder: Path) -> int:
    """What the command says of two files."""
    files = folder / "before.safetensors", folder / "after.safetensors"
    for records, file in zip((before, after), files, strict=True):
        golden.write(records, file)
    return golden.main(["--compare", *map(str, files)])


def test_equal_files_are_equal(tmp_path, capsys):
    before = records()
    assert status(before, copy.deepcopy(before), tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == ["first: equal bits", "second: equal bits"]
    expected = {"cases": 2, "equal": 2, "equal_bits": 2, "largest": 0.0, "different": {}}
    assert golden.summary(golden.compare(before, golden.read(tmp_path / "before.safetensors"))) == expected


@pytest.mark.parametrize("name", ["model/weight", "model/mask", "table/errors"])
def test_a_changed_bit_is_found(name, tmp_path, capsys):
    before = records()
    after = copy.deepcopy(before)
    after["first"].tensors[name].view(torch.uint8)[(0,) * before["first"].tensors[name].ndim] ^= 1
    [difference] = golden.compare(before, after)["first"]
    assert difference.where == name
    assert status(before, after, tmp_path) == (difference.size > golden.TOLERANCE)
    assert "first: equal bits" not in capsys.readouterr().out
    # The last bit of a number in float64 is rounding that was allowed for; of float32 and of a mask it is not.
    assert (difference.size <= golden.TOLERANCE) == (name == "table/errors")
    assert golden.compare(before, after)["second"] == ()


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (RANK, 4, "plan/entries/0/choice/settings/rank"),
        ((*RANK[:-2], "kind"), "dense", "plan/entries/0/choice/kind"),
        (("plan", "entries"), [], "plan/entries"),
        (("plan", "entries", 0, "error"), 0.25 + 1e-9, "plan/entries/0/error"),
        (("plan", "multipliers", "macs"), 1.001e-9, "plan/multipliers/macs"),
        (("plan", "facts", "threads"), 2, "plan/facts/threads"),
        (("plan", "facts"), {}, "plan/facts/threads"),
        (("plan", "methods", "WeightSVD", "options", "module"), "mine", "plan/methods/WeightSVD/options/module"),
    ],
)
def test_a_changed_choice_or_number_is_found(path, value, where, tmp_path):
    before = records()
    after = changed(before, path, value)
    [difference] = golden.compare(before, after)["first"]
    assert difference.where == where
    assert list(differing(before, after)) == ["first"]
    assert status(before, after, tmp_path) == 1


def test_a_missing_case_tensor_or_field_is_found(tmp_path):
    before = records()
    without = {"first": before["first"]}
    assert differing(before, without) == {"second": ["there is no such case after"]}
    assert differing(without, before) == {"second": ["there is no such case before"]}
    assert status(before, without, tmp_path) == status(without, before, tmp_path) == 1
    fewer = copy.deepcopy(before)
    del fewer["first"].tensors["model/mask"]
    del fewer["first"].values["plan"]["methods"]
    assert differing(before, fewer) == differing(fewer, before) == {"first": ["plan/methods", "model/mask"]}


def test_records_of_methods_may_name_a_module_and_facts_may_be_new():
    before = records()
    after = changed(before, ("plan", "methods", "WeightSVD", "module"), "spectrim.methods.weight_svd")
    after = changed(after, ("plan", "facts", "torch"), "2.13")
    assert golden.compare(before, after)["first"] == ()
    # What has been there must stay.
    lost = ["plan/methods/WeightSVD/module", "plan/facts/torch"]
    assert differing(after, before) == {"first": lost}


def test_rounding_of_sums_is_told_and_allowed():
    before = records()
    after = changed(before, ("plan", "entries", 0, "error"), math.nextafter(0.25, 1))
    found = golden.summary(golden.compare(before, after))
    assert (found["equal"], found["equal_bits"]) == (2, 1)
    assert 0 < found["largest"] < golden.TOLERANCE


def test_a_number_that_is_no_number_any_more_is_found():
    before = records()
    after = copy.deepcopy(before)
    after["first"].tensors["model/weight"][0, 0] = math.nan
    assert differing(before, after) == {"first": ["model/weight by nan"]}


def test_there_are_twenty_cases_and_one_gives_the_same_bits_twice():
    assert len(CASES) == 20
    once, again = golden.run(["linear-layers"]), golden.run(["linear-layers"])
    assert {"plan", "table", "ranks/plan"} <= set(once["linear-layers"].values)
    assert golden.compare(once, again) == {"linear-layers": ()}
