from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from spectrim.network.choices import Choice
from spectrim.network.sites import Sites, Skipped
from spectrim.pipeline import Report, Result
from spectrim.report import Comparison, Measure, Measured, Page, machine, write_report
from spectrim.report.summary import tiles
from spectrim.search.arms import Tried, arms_grid
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from tests.report.cases import HOSTILE, plan, shared, sums, table
from tests.report.test_ranks import run


class _Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in {"src", "href", "srcset", "data", "action"}]

    def handle_data(self, data):
        self.text += data


def _page(names: list[str]) -> tuple[Page, Candidates, Plan]:
    candidates = table(names)
    chosen = plan(candidates)
    comparison = Comparison(
        (Measure("accuracy", "%", 91.0, 90.75, "higher"), Measure("latency p50", "ms", 2.0, 2.5)), 4, {"torch": "2"}
    )
    skipped = (Skipped("stem" + names[0], "Conv2d g8", "depthwise " + names[-1]),)
    measured = (Measured("dense " + names[0], candidates.dense["macs"], 91.0),)
    return Page("Net " + names[0], chosen, candidates, comparison, skipped, measured, [names[-1]]), candidates, chosen


def test_the_page_loads_nothing():
    page, _, _ = _page(["a", "b"])
    html = page.html()
    reader = _Reader(html)
    assert reader.tags.count("svg") > 5
    assert not reader.links
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)


def test_names_are_escaped_everywhere():
    page, _, _ = _page(HOSTILE)
    reader = _Reader(page.html())
    assert "script" not in reader.tags
    for name in HOSTILE:
        assert name in reader.text
    assert "layer.49" not in reader.text


def test_the_page_tells_what_there_is():
    page, _, chosen = _page(["conv1", "conv2"])
    html = page.html()
    reader = _Reader(html)
    for words in ("Net conv1", "-0.25 points", "0.80x", "2.00 ms", "depthwise conv2", "Budget: MACs", "lagrangian"):
        assert words in reader.text
    for heading in ("The plan, layer by layer", "MACs by layer", "Accuracy and cost", "Spectra and chosen ranks"):
        assert reader.text.count(heading) >= 1
    for entry in chosen:
        assert entry.site in reader.text
    found = re.search(r"<details.*<pre[^>]*>(.*)</pre>", html, re.S)
    assert found is not None
    assert Plan.from_json(_Reader(found[1]).text) == chosen


def test_a_group_is_shown_with_its_layers_and_what_they_share():
    candidates = shared(["first", "second", "third"])
    chosen = plan(candidates)
    entry = chosen["first"]
    reader = _Reader(Page("Net", chosen, candidates).html())
    factor = "first" if entry.choice["left_rank"] else "second"
    for words in (entry.site, *entry.members, "2 x Conv2d 3x3", f"rank {entry.choice['rank']}, {factor} factor shared"):
        assert words in reader.text
    assert "whose layers are listed below its name" in reader.text
    assert "listed below" not in _Reader(Page("Net", plan(table(["first"]))).html()).text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"left_rank": 8, "once": True}, "channel, rank 8, first factor shared, computed once"),
        ({"left_rank": 8}, "channel, rank 8, first factor shared"),
        ({"left_rank": 0}, "channel, rank 8, second factor shared"),
        ({"left_rank": 3}, "channel, rank 8, both factors shared (3 + 5)"),
    ],
)
def test_what_is_shared_in_words(settings: dict[str, int], words: str):
    choice = Choice("shared_basis", "JointSVD", {"unfolding": "channel", "rank": 8, "bias": True, **settings})
    assert str(choice) == words


def test_a_page_needs_a_plan_only():
    _, _, chosen = _page(["conv"])
    reader = _Reader(Page("Bare", chosen).html())
    assert "planned" in reader.text
    assert "None." in reader.text
    assert "processor" in reader.text


@pytest.mark.parametrize("notes", [(), ("slower",)])
def test_write_report_takes_a_result(tmp_path: Path, notes: tuple[str, ...]):
    import torch

    _, candidates, chosen = _page(["conv"])
    report = Report(chosen, (), 3, notes=("measured SLOWER",))
    skipped = (Skipped("stem", "Conv2d", "asked for"), Skipped("", "Net", "it holds a weight itself"))
    result = Result(torch.nn.Identity(), chosen, report, candidates, Sites((), skipped))
    path = write_report(tmp_path / "r.html", result, title="T", notes=notes)
    text = _Reader(path.read_text(encoding="utf-8")).text
    assert "asked for" in text
    assert "NetNet" in "".join(text.split()), "the network itself has no path, and is named by its class"
    assert all(note in text for note in ("measured SLOWER", *notes))


def _written(tmp_path: Path, **options) -> _Reader:
    import torch

    _, candidates, chosen = _page(["conv"])
    result = Result(torch.nn.Identity(), chosen, Report(chosen, (), 3), candidates, Sites(()))
    return _Reader(write_report(tmp_path / "r.html", result, **options).read_text(encoding="utf-8"))


def test_learned_ranks_have_a_section(tmp_path: Path):
    without = _written(tmp_path)
    learned = run(4)
    settled = replace(learned, records=(*learned.records, learned.records[-1], learned.records[-1]))
    page = _written(tmp_path, trajectory=settled)
    assert "Ranks while learning" not in without.text
    assert page.tags.count("svg") > without.tags.count("svg") + 3
    assert "C step 1: dense" in page.text or "dense" in page.text
    assert "6 C steps, the last 2 without a change." in page.text
    assert "relative distance of 0.73 " in page.text


@pytest.mark.parametrize(("steps", "words"), [(1, "1 C step. "), (3, "3 C steps, with changes to the last. ")])
def test_the_sentence_about_learning_fits_short_and_moving_runs(tmp_path: Path, steps: int, words: str):
    assert words in _written(tmp_path, trajectory=run(steps)).text


def test_a_page_about_no_c_step_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no C step to draw"):
        _written(tmp_path, trajectory=replace(run(1), records=()))


def test_sparse_parts_are_named_and_bytes_have_a_column():
    candidates, chosen = sums([(4, 0.05, "unstructured"), (0, 0.5, "2:4"), (3, 0.0, "rows")])
    rows = (Measure("file size", "B", 12000.0, 5000.0), Measure("latency p50", "ms", 1.0, 2.0))
    reader = _Reader(Page("Net", chosen, candidates, Comparison(rows)).html())
    for words in ("channel, rank 4 + 5 % unstructured", "50 % 2:4", "channel, rank 3", "Weights", "file size"):
        assert words in reader.text
    assert [str(entry.choice) for entry in chosen][1:] == ["50 % 2:4", "channel, rank 3"]
    # In step with parameters elsewhere, bytes have none.
    other = table(["a", "b"])
    assert "file size" not in [tile.name for tile in tiles(plan(other), Comparison(rows), None, stored=False)]


def test_what_competed_is_a_table_and_its_names_are_text():
    page, _, chosen = _page(["a", "b"])
    cost = next(iter(chosen.budget))
    tried = (
        Tried('<b>"&', 0.1, 3.0, standard_error=0.01, costs=chosen.costs, dense_costs=chosen.dense_costs, chosen=True),
        Tried("other", note="skipped: its table predicts 2 times the loss"),
    )
    reader = _Reader(replace(page, arms=arms_grid(tried, cost)).html())
    assert "Methods that competed" in reader.text
    for text in ('<b>"&', "0.1 \u00b1 0.01", "chosen", "skipped: its table predicts 2 times the loss"):
        assert text in reader.text
    # Without a competition there is no such table.
    assert "Methods that competed" not in _Reader(page.html()).text


def test_a_source_tree_that_is_not_installed_has_a_page(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", missing)
    assert machine.machine_facts()["spectrim"] == "not installed"
