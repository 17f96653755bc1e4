"""Every file of results has the one form that benchmarks/README.md documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import schema

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def changed(tmp_path: Path, **changes: Any) -> Path:
    held = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text("utf-8")) | changes
    path = tmp_path / "demo.json"
    path.write_text(json.dumps({key: value for key, value in held.items() if value != "gone"}))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_result_has_the_form(path: Path):
    assert schema.checked(path)["claims"].keys() >= set()
    assert str(ROOT) not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"date": "gone"}, "missing required field `date`"),
        ({"seeds": ["0"]}, r"Expected `int`, got `str`.*seeds"),
        ({"claims": {"F1": {"value": 1.0}}}, "missing required field `unit`"),
        ({"extra": 3}, "extra is neither a list of records"),
        ({"experiment": "other"}, "expected the name of the file"),
    ],
)
def test_another_form_is_an_error_that_names_the_place(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        schema.checked(changed(tmp_path, **changes))


def test_the_documentation_names_every_key():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    keys = [*schema.Result.__struct_fields__, *schema.FURTHER, *schema.Claim.__struct_fields__]
    assert not [key for key in keys if f"`{key}`" not in text]
