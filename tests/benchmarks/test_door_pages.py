"""What was seen in the browser becomes a claim and a row a page."""

from __future__ import annotations

from benchmarks.door_pages import found
from tests.browser.browser import Seen


def _seen(page: str, **wrong) -> list[Seen]:
    return [
        Seen(page, width, scheme, **{"sideways": 0, **wrong}) for width in (1280, 390) for scheme in ("light", "dark")
    ]


def test_faults_are_counted_by_page():
    rule = {"rule": "color-contrast", "impact": "serious"}
    small = {"rule": "landmark-unique", "impact": "moderate"}
    result = found([*_seen("a", axe=[small]), *_seen("b", sideways=4, outside=["x"], axe=[rule, small])])
    assert result["claims"]["D3"]["value"] == 12
    assert not result["claims"]["D3"]["met"]
    assert result["claims"]["D3"]["note"] == "4, 0, 4, 4 in 8 views of 2 pages"
    assert [(row["page"], row["axe serious"], row["axe other"]) for row in result["pages"]] == [
        ("a", 0, "landmark-unique"), ("b", 4, "landmark-unique"),
    ]  # fmt: skip
    assert found(_seen("a"))["claims"]["D3"]["met"]
    stopped = found(_seen("a"), left=3)["claims"]["D3"]
    assert not stopped["met"]
    assert stopped["note"].endswith("3 not looked at")
