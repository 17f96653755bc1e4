"""Plans as JSON, and differences between plans."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import PlanError, SpectrimError
from spectrim.network.choices import DENSE, ChannelsChoice, Choice, LowRankChoice, Place, SharedChoice, SumChoice
from spectrim.selection.candidates import Candidates, Option, Row
from spectrim.selection.plan import VERSION, Entry, Plan, make_plan

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
numbers = st.floats(0, allow_nan=False, allow_infinity=False)
costs = st.dictionaries(st.sampled_from(["parameters", "macs", "bytes", "latency"]), numbers)
ranks = st.integers(1, 2**60)
kept = st.lists(st.integers(0, 4096), min_size=1, max_size=5, unique=True).map(sorted).map(tuple)
places = st.builds(Place, st.just("a.b"), st.sampled_from(["in", "out"]), st.integers(1, 9))
choices = st.one_of(
    st.just(DENSE),
    st.builds(LowRankChoice, names, ranks, st.none() | st.booleans(), method=names),
    st.builds(SharedChoice, names, st.integers(5, 9), st.integers(0, 5), st.booleans(), method=names),
    st.builds(lambda how, rank: SharedChoice(how, rank, rank, True, once=True), names, ranks),
    st.builds(SumChoice, names, st.integers(0, 9), st.floats(0, 1), names, st.booleans(), method=names),
    st.builds(ChannelsChoice, kept, st.just(5000), st.lists(places, max_size=3).map(tuple), method=names),
)
entries = st.builds(Entry, names, names, choices, numbers, costs, costs)
facts = st.dictionaries(names, st.one_of(names, st.integers(0, 64), st.booleans(), st.none()), max_size=3)
plans = st.builds(
    Plan,
    entries=st.lists(entries, max_size=4, unique_by=lambda e: e.site).map(tuple),
    costs=costs,
    dense_costs=costs,
    budget=costs,
    unit=names,
    selector=names,
    loss=numbers,
    bound=st.none() | numbers,
    multipliers=costs,
    methods=st.dictionaries(names, facts, max_size=2),
    facts=facts,
)


def example() -> Plan:
    return Plan(
        entries=(
            Entry("conv1", "Conv2d 3x3", DENSE, 0.0, {"macs": 100.0}, {"macs": 100.0}),
            Entry(
                "layer1.0",
                "Conv2d 3x3/2",
                LowRankChoice("height-first", 8, True, method="svd"),
                0.125,
                {"macs": 40.0},
                {"macs": 90.0},
            ),
        ),
        costs={"macs": 150.0},
        dense_costs={"macs": 200.0},
        budget={"macs": 160.0},
        unit="output energy",
        selector="exact",
        loss=0.125,
        bound=0.12,
        multipliers={"macs": 2.5e-9},
        methods={"svd": {"type": "WeightSVD", "multiple_of": 8}},
        facts={"device": "cpu"},
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plans)
def test_a_plan_survives_json(plan: Plan) -> None:
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    for mine, theirs in zip(plan, again, strict=True):
        assert {k: type(v) for k, v in mine.choice.settings.items()} == {
            k: type(v) for k, v in theirs.choice.settings.items()
        }
    assert {e.choice for e in again} == {e.choice for e in plan}


def test_equal_plans_give_equal_text() -> None:
    plan = example()
    entry = plan.entries[1]
    turned = Choice(entry.choice.kind, "svd", dict(list(entry.choice.settings.items())[::-1]))
    other = dataclasses.replace(plan, entries=(plan.entries[0], dataclasses.replace(entry, choice=turned)))
    assert other == plan
    assert other.to_json() == plan.to_json()
    assert hash(turned) == hash(entry.choice)


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    example().write(path)
    assert Plan.read(path) == example()
    assert json.loads(path.read_text())["version"] == VERSION


def test_plans_written_before_there_were_multipliers_are_read() -> None:
    text = json.dumps({key: value for key, value in document().items() if key != "multipliers"})
    assert Plan.from_json(text) == dataclasses.replace(example(), multipliers={})
    assert example().multipliers == {"macs": 2.5e-9}
    assert make_plan(table(), [0, 1], budget={}, selector="mine").multipliers == {}


def test_a_plan_is_text_of_one_line_or_of_many() -> None:
    plan = example()
    short, long = plan.to_json(lines=False), plan.to_json()
    assert "\n" not in short
    assert len(long.splitlines()) > len(plan)
    assert json.loads(short) == json.loads(long)


def test_mutated_json_is_read_or_refused() -> None:
    text = example().to_json().encode()
    source = random.Random(0)
    refused = 0
    for _ in range(2000):
        mutated = bytearray(text)
        for _ in range(source.randint(1, 3)):
            at = source.randrange(len(mutated))
            match source.randrange(4):
                case 0:
                    mutated[at] = source.randrange(256)
                case 1:
                    del mutated[at : at + source.randint(1, 20)]
                case 2:
                    mutated[at:at] = bytes(source.choices(b'{}[]",:0129eE.-nulltrue\\\xff\x00', k=source.randint(1, 4)))
                case 3:
                    del mutated[at:]
            if not mutated:
                break
        try:
            plan = Plan.from_json(bytes(mutated))
        except PlanError:
            refused += 1
        else:
            assert Plan.from_json(plan.to_json()) == plan
    assert refused > 1000


def document(**changes: object) -> dict:
    return {**json.loads(example().to_json()), **changes}


ENTRY = json.loads(example().to_json())["entries"][1]


def of_choice(**changes: object) -> str:
    """A plan whose choice has been edited."""
    return json.dumps(document(entries=[{**ENTRY, "choice": {**ENTRY["choice"], **changes}}]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a plan"),
        ("{", "not a plan"),
        ("null", "not a plan"),
        ("[]", "not a plan"),
        ("{}", "entries"),
        ("\ud800", "not a plan"),
        (b"\xff\xfe", "not a plan"),
        ("[" * 100_000, "not a plan"),
        (json.dumps(document(facts="x")), r"\$.facts"),
        (json.dumps(document(loss=None)), r"\$.loss"),
        (json.dumps(document(multipliers={"macs": "1"})), r"\$.multipliers"),
        (json.dumps(document(version=VERSION + 1)), f"version {VERSION + 1}"),
        (json.dumps(document(version="1")), r"\$.version"),
        (json.dumps(document(color="red")), "no field 'color'"),
        (json.dumps(document(entries=[{**ENTRY, "rank": 3}])), "entry has no field 'rank'"),
        (
            json.dumps(document(entries=[{**ENTRY, "choice": {"knd": "low_rank"}}])),
            "'layer1.0'.*unknown field `knd`",
        ),
        (json.dumps(document(entries=[{**ENTRY, "error": "0.1"}])), r"\$.entries\[0\].error"),
        (json.dumps(document(entries=[{k: v for k, v in ENTRY.items() if k != "site"}])), "site"),
        (of_choice(settings={"a": 1}), "site 'layer1.0': a 'low_rank' choice has no field 'a'"),
        (of_choice(settings={"rank": 8}), "site 'layer1.0': a 'low_rank' choice lacks the field 'unfolding'"),
        (
            of_choice(settings={"rank": "8", "unfolding": "channel"}),
            "'layer1.0': rank of .* is '8': Expected `int`",
        ),
        (of_choice(settings=[]), "site 'layer1.0'.*settings"),
        (of_choice(kind="magic"), "site 'layer1.0': unknown kind of choice 'magic'; known are .*low_rank.*Import"),
        (of_choice(kind=3), "site 'layer1.0'.*kind"),
        (of_choice(method=None), "method"),
        (example().to_json().replace('"bias"', '"bia5"'), "site 'layer1.0': .* has no field 'bia5'; it has .*bias"),
        (json.dumps(document(entries=[ENTRY, ENTRY])), "once"),
        (json.dumps(document(costs={"macs": -1})), "at least 0; this one says that it has -1.0 macs"),
        (json.dumps(document(entries=[{**ENTRY, "costs": {"bytes": -2}}])), "'layer1.0' has -2.0 bytes"),
        (json.dumps(document(entries=[{**ENTRY, "error": -3}])), "at least 0; this plan has -3.0 for 'layer1.0'"),
        (example().to_json().replace("0.125", "NaN"), "not a plan"),
        (example().to_json().replace("0.125", "1e999"), "not a plan"),
    ],
)
def test_malformed_plans_are_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json(text)
    assert isinstance(caught.value, SpectrimError)


def test_a_text_is_read_with_the_mark_of_an_editor_and_what_is_no_text_says_how_a_file_is_read(tmp_path: Path) -> None:
    text = example().to_json()
    assert Plan.from_json(f"\ufeff{text}") == Plan.from_json(b"\xef\xbb\xbf" + text.encode()) == example()
    with pytest.raises(TypeError, match=r"a plan is read from its text, not from .*: a file is read by read\(path\)"):
        Plan.from_json(tmp_path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match=r"it is the name of a file, which read\('plan\.json'\) reads"):
        Plan.from_json("plan.json")


def test_diff_names_the_sites_that_differ() -> None:
    plan = example()
    first, second = plan.entries
    assert plan.diff(plan) == ()
    other = LowRankChoice("channel", 4, method="svd")
    extra = dataclasses.replace(first, site="head")
    changed = dataclasses.replace(plan, entries=(dataclasses.replace(second, choice=other), extra))
    assert plan.diff(changed) == (("conv1", DENSE, None), ("layer1.0", second.choice, other), ("head", None, DENSE))
    assert changed.diff(plan) == (("layer1.0", other, second.choice), ("head", DENSE, None), ("conv1", None, DENSE))


def test_a_plan_by_site() -> None:
    plan = example()
    assert plan["layer1.0"] is plan.entries[1]
    assert list(plan) == list(plan.entries)
    assert plan.ratio("macs") == pytest.approx(4 / 3)
    with pytest.raises(KeyError, match="no site 'layer2'.*'conv1', 'layer1.0'"):
        plan["layer2"]


def test_choices_read_like_what_they_are() -> None:
    assert str(DENSE) == "dense"
    choice = LowRankChoice("channel", 8, method="svd")
    assert str(choice) == "channel, rank 8"
    assert choice["rank"] == choice.rank == 8
    assert not choice.is_dense
    assert DENSE.is_dense


def table() -> Candidates:
    dense = Option(DENSE, 0.0, {"macs": 10.0, "bytes": 40.0})
    half = Option(LowRankChoice("channel", 2, method="svd"), 0.25, {"macs": 5.0, "bytes": 20.0})
    rows = (Row("a", "Linear", (dense, half)), Row("b", "Linear", (dense, half), scale=2.0, exponent=0.5))
    methods = {"svd": {"type": "WeightSVD"}, "pca": {"type": "ActivationSVD"}}
    return Candidates(rows, {"macs": 3.0, "bytes": 8.0}, "weight energy", methods, {"device": "cpu"})


def test_make_plan_adds_up_the_whole_network() -> None:
    plan = make_plan(table(), [0, 1], budget={"macs": 20.0}, selector="mine", bound=0.5)
    assert plan.costs == {"macs": 18.0, "bytes": 68.0}
    assert plan.dense_costs == table().dense == {"macs": 23.0, "bytes": 88.0}
    assert plan.loss == 2.0 * 0.25**0.5
    assert (plan.selector, plan.unit, plan.bound) == ("mine", "weight energy", 0.5)
    assert plan.methods == {"svd": {"type": "WeightSVD"}}
    assert plan.facts == {"device": "cpu"}
    with pytest.raises(ValueError, match="covers every site"):
        make_plan(table(), [0], budget={}, selector="mine")


def test_the_table_by_site_and_its_weights() -> None:
    candidates = table()
    assert len(candidates) == 2
    assert candidates["b"].loss(candidates["b"].options[1]) == 1.0
    assert candidates.costs == ("macs", "bytes")
    weighted = candidates.weighted({"a": (4.0, 2.0)})
    assert weighted["a"].loss(weighted["a"].options[1]) == 0.25
    assert weighted["b"] == candidates["b"]
    assert candidates["a"].scale == 1.0
    with pytest.raises(KeyError, match="'c'"):
        candidates.weighted({"c": (1.0, 1.0)})
    with pytest.raises(KeyError, match="no site 'c'"):
        candidates["c"]


def grouped() -> Candidates:
    joined = Option(SharedChoice("channel", 4, 4, method="joint"), 0.1, {"macs": 6.0, "bytes": 24.0})
    dense = Option(DENSE, 0.0, {"macs": 20.0, "bytes": 80.0})
    rows = (*table().rows, Row("a+b", "2 x Linear", (dense, joined), scale=3.0, members=("a", "b")))
    return dataclasses.replace(table(), rows=rows)


def test_a_plan_of_a_group_names_its_sites() -> None:
    candidates = grouped()
    assert candidates.dense == table().dense
    assert [row.site for row in candidates.singles] == ["a", "b"]
    plan = make_plan(candidates, {2: 1}, budget={}, selector="mine")
    [entry] = plan
    assert (entry.site, entry.members, entry.sites) == ("a+b", ("a", "b"), ("a", "b"))
    assert plan["b"] is plan["a+b"] is entry
    assert plan.costs == {"macs": 9.0, "bytes": 32.0}
    assert plan.dense_costs == table().dense
    assert plan.loss == pytest.approx(0.3)
    assert Plan.from_json(plan.to_json()) == plan
    apart = make_plan(candidates, {1: 1, 0: 0}, budget={}, selector="mine")
    assert [e.site for e in apart] == ["a", "b"]
    joined, half = entry.choice, table().rows[0].options[1].choice
    assert apart.diff(plan) == (("a", DENSE, joined), ("b", half, joined))
    for picks in ({0: 0, 2: 1}, {0: 0}, {}):
        with pytest.raises(ValueError, match="covers every site once"):
            make_plan(candidates, picks, budget={}, selector="mine")


def test_plans_written_before_there_were_groups_are_read() -> None:
    entries = [{key: value for key, value in entry.items() if key != "members"} for entry in document()["entries"]]
    assert Plan.from_json(json.dumps(document(entries=entries))) == example()
    twice = [{**ENTRY, "site": "g", "members": ["x", "y"]}, {**ENTRY, "site": "y"}]
    with pytest.raises(PlanError, match="names each site once; this one has .* twice"):
        Plan.from_json(json.dumps(document(entries=twice)))


def test_no_label_says_what_is_of_channels() -> None:
    """A table and a plan have a field for it; a plan's file has the kind alone."""
    dense = Option(DENSE, 0.0, {"macs": 10.0})
    fewer = Option(ChannelsChoice((0, 1), 4, (Place("a", "out", 1),), method="filters"), 0.1, {"macs": 5.0})
    rows = (Row("a", "all 4 channels", (dense,)), Row("a:out", "4 channels", (dense, fewer), of_channels=True))
    plan = make_plan(Candidates(rows, {"macs": 1.0}, "output energy"), [0, 1], budget={}, selector="mine")
    assert [entry.of_channels for entry in plan] == [False, True]
    again = Plan.from_json(plan.to_json())
    assert again["a:out"].of_channels
    assert "of_channels" not in plan.to_json()
    with pytest.raises(PlanError, match="entry has no field 'of_channels'"):
        Plan.from_json(plan.to_json().replace('"members"', '"of_channels": true, "members"', 1))


@pytest.mark.parametrize("error", [1e-9, 1e-4, 0.5])
def test_a_small_error_is_a_small_loss_and_none_is_none(error: float) -> None:
    options = (Option(DENSE, 0.0, {"macs": 4.0}), Option(LowRankChoice("channel", 1), error, {"macs": 2.0}))
    row = Row("a", "Linear", options, scale=3.0)
    assert row.loss(options[1]) == pytest.approx(3 * error**row.exponent, rel=1e-12)
    assert row.loss(options[0]) == 0


def test_a_group_stands_where_its_first_layer_does() -> None:
    options = (Option(DENSE, 0.0, {"macs": 4.0}), Option(LowRankChoice("channel", 1), 0.1, {"macs": 2.0}))
    rows = [Row(name, "Linear", options) for name in "abc"]
    table = Candidates((*rows, Row("both", "2 x Linear", options, members=("a", "c"))), {"macs": 0.0}, "weight energy")
    plan = make_plan(table, {1: 0, 3: 1}, budget={}, selector="by hand")
    assert [entry.site for entry in plan] == ["both", "b"]
