"""Trajectories of ranks as JSON, and when they have settled."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.selection.trajectory import Record, Trajectory

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
numbers = st.floats(0, allow_nan=False, allow_infinity=False)
costs = st.dictionaries(st.sampled_from(["parameters", "macs", "bytes", "latency"]), numbers)
ranks = st.lists(st.integers(0, 4096), max_size=4).map(tuple)
records = st.builds(
    Record,
    mu=numbers,
    multipliers=costs,
    ranks=ranks,
    choices=st.lists(names, max_size=4).map(tuple),
    costs=costs,
    distance=numbers,
    metric=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    seconds=numbers,
)
trajectories = st.builds(
    Trajectory,
    sites=st.lists(names, max_size=4).map(tuple),
    full=ranks,
    dense_costs=costs,
    budget=costs,
    records=st.lists(records, max_size=3).map(tuple),
)


def record(*choices: str, mu: float = 1.0) -> Record:
    return Record(mu, {"macs": 1e-6}, tuple(map(len, choices)), choices, {"macs": 8.0}, 0.25)


def example(*steps: tuple[str, ...]) -> Trajectory:
    return Trajectory(("a", "b"), (8, 9), {"macs": 16.0}, {"macs": 8.0}, tuple(record(*step) for step in steps))


@settings(max_examples=60)
@given(trajectories)
def test_a_trajectory_survives_json(trajectory: Trajectory) -> None:
    text = trajectory.to_json()
    again = Trajectory.from_json(text)
    assert again == trajectory
    assert again.to_json() == text
    assert Trajectory.from_json(text.encode()) == trajectory
    assert all(type(mine) is type(other) for r, s in zip(trajectory.records, again.records, strict=True)
               for mine, other in zip(r.ranks, s.ranks, strict=True))  # fmt: skip


def test_a_trajectory_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    trajectory = example(("1 channel", "dense"))
    trajectory.write(path)
    assert Trajectory.read(path) == trajectory
    assert path.read_text().endswith("}\n")
    assert json.loads(path.read_text())["records"][0]["choices"] == ["1 channel", "dense"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a trajectory of ranks"),
        ("{", "not a trajectory of ranks"),
        ("null", "Expected `object`"),
        ("[]", "Expected `object`"),
        ("{}", "required field `sites`"),
        ("\ud800", "not a trajectory of ranks"),
        (b"\xff\xfe", "not a trajectory of ranks"),
        (json.dumps(dataclasses.asdict(example()) | {"full": [1.5]}), r"Expected `int`, got `float` - at `\$\.full"),
        (json.dumps(dataclasses.asdict(example()) | {"records": [{"mu": "1"}]}), r"records\[0\]\.mu"),
    ],
)
def test_other_texts_are_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trajectory.from_json(text)


@pytest.mark.parametrize(
    ("steps", "settled"),
    [
        ([], 0),
        ([("1", "1")], 0),
        ([("1", "1"), ("1", "1")], 1),
        ([("1", "1"), ("1", "2")], 0),
        ([("1", "1"), ("2", "1"), ("2", "1"), ("2", "1")], 2),
        # What was settled once and moved again counts no more.
        ([("1", "1"), ("1", "1"), ("2", "1"), ("2", "1")], 1),
        # Equal ranks in another unfolding are another choice.
        ([("1 channel", "2"), ("1 input", "2")], 0),
    ],
)
def test_settled_counts_the_steps_at_the_end_that_changed_nothing(steps: list[tuple[str, str]], settled: int) -> None:
    trajectory = example(*steps)
    assert len(trajectory) == len(steps)
    assert trajectory.settled == settled
