"""Tables for people: units, widths, folded middles, HTML, and what words mean."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from spectrim.network.printing import Grid, Printed, amount, change, folded, legend, percent, reasons, show, tail, total


@pytest.mark.parametrize(
    ("cost", "value", "text"),
    [
        ("macs", 2_359_296, "2.36 M"),
        ("macs", 40_551_000, "40.6 M"),
        ("macs", 999_900, "1.00 M"),
        ("parameters", 441_999, "442 k"),
        ("parameters", 9.996e3, "10.0 k"),
        ("parameters", 650, "650"),
        ("bytes", 1536, "1.50 KiB"),
        ("bytes", 12, "12 B"),
        ("latency", 0.1234, "0.123 ms"),
        ("latency", 12.34, "12.3 ms"),
        ("joules", 0.5, "0.5"),
        ("joules", 0, "0"),
    ],
)
def test_amounts_have_three_digits_and_a_unit(cost: str, value: float, text: str) -> None:
    assert amount(cost, value) == text


def test_changes_losses_and_names() -> None:
    assert change("macs", 2e6, 1e6) == "2.00 M -> 1.00 M"
    assert change("macs", 2e6, 2e6) == "2.00 M"
    assert total("macs", 2e6, 1e6) == "2.00 M -> 1.00 M MACs (50.0 %)"
    assert total("bytes", 2048, 1024) == "2.00 KiB -> 1.00 KiB (50.0 %)"
    assert [percent(lost) for lost in (0, 1e-6, 0.0042, 0.123)] == ["0.00 %", "< 0.01 %", "0.42 %", "12.3 %"]
    assert tail("encoder.layer.0.attention.self.query", 32) == "...layer.0.attention.self.query"
    assert tail("encoder.layer.0.attention.self.query", 20) == "...self.query"
    assert len(tail("a" * 50, 20)) == 20
    assert show(2.4e6, "MAC") == "2.40 M"


def test_lines_fit_the_width_and_words_fold_while_numbers_stay() -> None:
    grid = Grid(
        ["layer", "choice", ">lost"],
        [["a" * 30, "width-first, rank 20, first factor shared, computed once", "0.38 %"]],
        [["whole network", "", "12.3 %"]],
        title="word " * 40,
        notes=["note " * 40],
        words=[("rank r", "meaning " * 20)],
    )
    for width in (60, 80, 96):
        lines = grid.text(width).splitlines()
        assert max(map(len, lines)) <= width
        assert any(line.endswith("0.38 %") for line in lines)
        assert all(line == line.rstrip() for line in lines)
    assert grid.text(96) == grid.text()


def test_the_middle_of_many_rows_is_one() -> None:
    rows = folded(list(range(100)), lambda rest: -len(rest), 11)
    assert rows == [0, 1, 2, 3, 4, 5, -89, 95, 96, 97, 98, 99]
    assert folded([1, 2], len, 2) == [1, 2]


def test_only_words_that_occur_are_explained() -> None:
    assert [word for word, _ in legend(["width-first, rank 3"])] == ["rank r", "width-first"]
    assert [word for word, _ in legend(["channel, rank 3 + 20 % 2:4", "dense"])] == [
        "dense", "rank r", "channel", "n % pattern", "n:m",
    ]  # fmt: skip
    assert legend(["14 of 16 channels"])[0][0] == "n of m channels"
    assert legend([]) == []


def test_what_is_left_alone_is_told_by_the_reason_and_folded() -> None:
    lines = list(reasons([(f"norm{n}", "Norm", "it has no weight") for n in range(9)], "plan.rows()"))
    assert lines == ["left alone: norm0, norm1, norm2 and 6 more (Norm): it has no weight"]
    many = list(reasons([(f"l{n}", "Linear", f"reason {n}") for n in range(9)], "plan.rows()"))
    assert many[-1] == "left alone: 4 more for other reasons, see plan.rows()"
    assert len(many) == 6


class Tags(HTMLParser):
    """Collects tags, and checks that each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_escaped_closed_and_brings_no_colours_or_styles_of_its_own() -> None:
    page = Grid(
        ["<b>", ">n"], [["<script>alert(1)</script>", "2 -> 1"]], [["all", "1"]], "a & b", ["<i>"], [("x", "<y>")]
    )
    text = page.html()
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "2 \u2192 1" in text
    assert "<style" not in text
    assert {name for name, _ in tags.seen} == {"style"}
    assert not any(word in style for _, style in tags.seen for word in ("color", "background", "#"))


class Values(Printed):
    def _grid(self) -> Grid:
        return Grid(["a"], [["1"]])

    def _records(self) -> list[dict[str, object]]:
        return [{"a": 1}]


def test_a_data_frame_is_made_of_the_rows_and_without_pandas_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows: ("frame", rows)))
    assert Values().to_pandas() == ("frame", [{"a": 1}])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="needs pandas, which is not installed: pip install pandas"):
        Values().to_pandas()


def test_a_reason_stands_once_with_the_names_that_are_asked_for() -> None:
    left = [(f"layer{n}", "Mixer", "it mixes") for n in range(5)] + [("", "Net", "it holds a weight")]
    first, last = reasons(left, "elsewhere", names=5)
    assert first == "left alone: layer0, layer1, layer2, layer3, layer4 (Mixer): it mixes"
    assert last == "left alone: Net (Net): it holds a weight"
    assert next(reasons(left, "elsewhere")) == "left alone: layer0, layer1, layer2 and 2 more (Mixer): it mixes"
