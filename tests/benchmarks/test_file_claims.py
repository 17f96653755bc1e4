"""Changed files and killed writes, at a size that takes a second or two: the claims N3 and N4 hold, and can fail."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import killed_writes, mutated_files, run
from benchmarks.killed_writes import Action
from benchmarks.mutated_files import Kind, mutate

EXPERIMENTS = Path(run.__file__).parent / "experiments"


def smoke(name: str) -> dict[str, Any]:
    config = json.loads((EXPERIMENTS / f"{name}.json").read_text())
    return {**config, **config["smoke"]}


def test_changed_files_are_refused_or_read_as_they_say():
    found = mutated_files.run(smoke("mutated_files"), {})
    claim = found["claims"]["N3"]
    assert claim["met"], found["rows"]
    assert claim["value"] == 0
    assert all(row["refused"] for row in found["rows"] if row["kind"] != "large plans")


def test_a_reader_that_raises_something_else_or_reads_something_else_is_counted():
    kind = Kind(b'{"a": 1, "b": [1, 2, 3]}', lambda path: json.loads(path.read_text()), tensors=False)
    row = mutate(kind, 200, seed=0)
    assert row["other"] > 10  # no error of the library
    assert row["silent"] > 10  # other values, and nothing said
    assert row["refused"] + row["read"] + row["other"] + row["silent"] == 200


def test_every_kind_of_change_is_made():
    draw = random.Random(0)
    document: dict[str, Any] = {"a": {"b": [1, 2, {"c": 3}]}, "d": "text"}
    seen = set()
    for _ in range(100):
        copied = json.loads(json.dumps(document))
        mutated_files.revalued(copied, draw)
        seen.add(repr(copied))
    assert len(seen) > 30
    tensors = {repr(mutated_files.other(torch.ones(2, 3), draw)) for _ in range(60)}
    assert len(tensors) >= 7


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="kills children")
def test_killed_writes_leave_whole_files(tmp_path: Path):
    found = killed_writes.run(smoke("killed_writes"), {"work": tmp_path})
    assert found["claims"]["N4"]["value"] == 0, found["rows"]
    assert all(row["killed"] >= 6 for row in found["rows"])
    assert {row["action"] for row in found["rows"]} == set(smoke("killed_writes")["kills"])


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="kills children")
def test_a_writer_that_leaves_parts_is_found():
    whole = b"<svg>" + bytes(100) + b"</svg>"

    def write() -> None:
        with open("a.svg", "wb", buffering=0) as file:
            file.write(whole[:50])
            Path("b.svg").write_bytes(whole)  # at which it is killed
            file.write(whole[50:])

    row = killed_writes.kill(Action(write, ("a.svg", "b.svg")), 8, 3, 0)
    assert any("a.svg: ValueError: not whole" in problem for problem in row["wrong"])
