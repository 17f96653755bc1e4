"""The claims of the door: each is kept by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import door, door_fresh


def _found(name: str, value: int, **lists: list) -> dict:
    on = {"date": "2026-01-01", "wall_seconds": 1.5, "environment": {}, "code": {}}
    claims = {name: {"value": value, "unit": "", "target": "", "met": True}}
    return {"claims": claims, "measured": {name: on}, "notes": [f"of {name}"], **lists}


def test_a_claim_takes_the_place_of_its_own_result_alone(tmp_path: Path):
    target = tmp_path / "door.json"
    door.keep("D3", _found("D3", 1, pages=[{"page": "a"}]), target)
    door.keep("D1", _found("D1", 2, readme=[{"lines": 3}]), target)
    door.keep("D3", _found("D3", 4, pages=[{"page": "b"}]), target)
    kept = json.loads(target.read_text())
    assert {name: claim["value"] for name, claim in kept["claims"].items()} == {"D1": 2, "D3": 4}
    assert (kept["pages"], kept["readme"]) == ([{"page": "b"}], [{"lines": 3}])
    assert (kept["notes"], kept["wall_seconds"]) == (["of D1", "of D3"], 3.0)


def test_what_has_a_result_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "door.json"
    door.keep("D3", _found("D3", 1), target)
    assert door.main([], target, {"D3": "door", "D9": "no_such_module"}) == 0
    said = capsys.readouterr().err
    assert "D3: has a result" in said
    assert "D9: not run, there is no benchmarks/no_such_module.py" in said


def test_the_page_of_a_transcript_holds_what_was_typed_and_said():
    steps = [
        door_fresh.Step("", "pip install x", "", 60.0),
        door_fresh.Step("", "python net.py", "", 30.0),
        door_fresh.Step(
            "Why:", "spectrim compress net.py:build " + "--option value " * 6 + "--last", "It said so.", 30.0
        ),
    ]
    page = door_fresh.page(steps)
    assert "they took 2.0 minutes" in page
    assert "```text\nIt said so.\n```" in page
    typed = page[page.index("spectrim compress") : page.index("--last") + 6]
    assert all(len(line) <= 80 for line in typed.splitlines())
    assert typed.replace(" \\\n   ", "") == steps[2].command
