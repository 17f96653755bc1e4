"""The structure of a package in figures, on a package made up for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import structure

SOURCES = {
    "__init__.py": "",
    "verbs.py": ("from made.low import base\nimport made.low.other\ndef verb():\n    from made.high.top import Top\n"),
    "low/__init__.py": "",
    "low/base.py": "import os\n",
    "low/other.py": "from made.low.base import os\n",
    "high/__init__.py": "from made import verbs\n",
    "high/top.py": (
        "class Top:\n"
        "    def method(self, a, /, b, *rest, c, **more):\n"
        '        """Says what it does."""\n'
        "        if a and b or c:\n"
        "            return [x for x in rest if x]\n"
        "        return 1 if a else 0\n"
    ),
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in SOURCES.items():
        path = tmp_path / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "made"


def test_arrows_lead_from_room_to_room_once(package: Path) -> None:
    assert structure.arrows(package) == {("verbs", "low"), ("verbs", "high"), ("high", "verbs")}


def test_lines_of_all_modules(package: Path) -> None:
    assert structure.lines(package) == sum(len(text.splitlines()) for text in SOURCES.values())


def test_functions_are_measured_without_their_docstring(package: Path) -> None:
    verb, method = sorted(structure.functions(package), key=lambda f: f.parameters)
    assert (verb.place, verb.lines, verb.branches, verb.parameters) == ("verbs.py:verb", 1, 1, 0)
    # One, the two conditions, two further operands, and the loop of the comprehension.
    assert (method.place, method.lines, method.branches, method.parameters) == ("high/top.py:method", 3, 6, 3)
