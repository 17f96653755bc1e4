"""The report: pages follow from results, and the pages in the repository follow from the results in it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import questions, report

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = report.marks()
PAGE = f"# Title\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n"
CODE = "```python\nprint(2 + 2)\n```\n"
# The generated places of each page.
PLACES = {
    "README.md": ("rows", "claims", "output"),
    "docs/index.md": ("headline", "example", "rows", "claims"),
    "docs/claims.md": ("results",),
    "docs/benchmarks.md": ("results",),
    "docs/tutorials/text-detector.md": ("results",),
}


def page_with(names: tuple[str, ...], code: str = "") -> str:
    return f"# Title\n\n{code}\n" + "".join("{}\nold\n{}\n".format(*report.marks(name)) for name in names) + "after\n"


def result(name: str, claims: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    claim = {
        "value": 1.0,
        "unit": "points",
        "target": ">= 1",
        "met": True,
        "command": f"python -m benchmarks.run {name}",
    }
    return {
        "experiment": name,
        "config": {},
        "date": "2026-01-02",
        "wall_seconds": 12.5,
        "environment": {
            "cpu": "Some CPU",
            "cores": 2,
            "gpu": None,
            "system": "Linux x86_64",
            "torch_threads": 2,
            "python": "3.11",
            "torch": "2.6",
            "load_average": 0.1,
        },
        "code": {"spectrim": "0.1.0", "commit": "0123456789abcdef", "changed": False},
        "claims": {key: {**claim, **given} for key, given in claims.items()},
        "rows": rows,
        "seeds": [0, 1],
        "notes": ["a note"],
        **more,
    }


def accuracy(macs: float, value: float, **more: Any) -> dict[str, Any]:
    return {"network": "resnet20", "method": "spectrim", "macs": macs, "epochs": 12, "accuracy": value, **more}


@pytest.fixture
def results() -> list[dict[str, Any]]:
    tuned = [
        accuracy(17.39e6, 91.6, seed=0),
        accuracy(17.30e6, 91.4, seed=1),
        accuracy(17.1e6, 90.3, method="torch-pruning"),
        accuracy(9e6, 89.5),
    ]
    shot = [
        {"network": "resnet20", "variant": "dense", "macs": 40.55e6, "accuracy": 91.73},
        {"network": "resnet20", "variant": "all", "macs": 17.4e6, "accuracy": 87.5},
        {"network": "resnet20", "variant": "weight SVD", "macs": 17.4e6, "accuracy": 60.0},
    ]
    speed = {
        "network": "vgg16",
        "size": 32,
        "batch": 1,
        "asked": "2x",
        "macs_ratio": 2.0,
        "time_ratio": 1.8,
        "saved_ratio": 0.89,
    }
    return [
        result(
            "resnet20_finetune", {"F3": {"value": 0.25}, "F10": {"met": False, "value": None, "note": "a | b"}}, tuned
        ),
        result("resnet20_oneshot", {"F2": {"value": -0.3, "met": False}}, shot),
        result("speed_32", {"F6": {}}, [speed], interpolation=[{"rank": 16, "error_percent": -3.25}]),
    ]


@pytest.fixture
def folder(tmp_path: Path, results: list[dict[str, Any]]) -> Path:
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "docs" / "tutorials").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name, places in PLACES.items():
        (tmp_path / name).write_text(page_with(places, CODE))
    for each in results:
        (tmp_path / "benchmarks" / "results" / f"{each['experiment']}.json").write_text(json.dumps(each))
    return tmp_path


def rows_of(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]


def test_pages_keep_what_is_outside_the_marks_and_nothing_inside(folder: Path):
    report.main(["--root", str(folder), "--example"])
    for name in PLACES:
        text = (folder / name).read_text()
        assert text.startswith(f"# Title\n\n{CODE}")
        assert text.endswith("\nafter\n")
        assert "\nold\n" not in text


def test_the_example_of_the_readme_is_run_and_stands_on_the_landing_page(folder: Path):
    report.main(["--root", str(folder), "--example"])
    assert "```text\n4\n```" in (folder / "README.md").read_text()
    assert f"{CODE}\n```text\n4\n```" in (folder / "docs" / "index.md").read_text()


def test_writing_again_changes_no_byte(folder: Path):
    report.write(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report.write(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_claims_stand_under_their_question_with_what_was_measured(results: list[dict[str, Any]]):
    text = report.ledger(results)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert [line.split(".")[0] for line in headings if line.startswith("###")] == [
        "### F2",
        "### F3",
        "### F6",
        "### F10",
    ]
    assert headings[0] == f"## {questions.QUESTIONS[1].title}"
    assert headings[-2] == "## Other results"
    assert "measured: -0.3 points" in text
    assert text.startswith("Of 4 claims that were set before measuring, 2 are met and 2 are not.")


def test_many_figures_behind_a_claim_stand_one_below_the_other():
    figures = [f"layer {number} with {'x' * 130}" for number in range(3)]
    many = report.ledger([result("house", {"H4": {"note": "; ".join(figures)}}, [])])
    assert "- measured: 1 points\n    - layer 0" in many
    assert many.count("\n    - ") == 3
    few = report.ledger([result("house", {"H4": {"note": "one; two; three"}}, [])])
    assert "- measured: 1 points (one; two; three)" in few


def test_a_value_below_zero_is_told_in_its_own_words():
    words = questions.Words("a", "b", below_zero="points gained")
    lost = {"value": -0.2, "unit": "points lost at most", "met": True}
    assert report._short(report._worded(lost, words)) == "0.2 points gained"
    assert report._worded({**lost, "value": 0.2}, words)["unit"] == "points lost at most"
    assert report._worded(lost, questions.Words("a", "b")) == lost


def test_what_was_missed_says_why_and_what_was_met_does_not(results: list[dict[str, Any]]):
    text = report.ledger([result("house", {"H4": {"met": False}, "H3": {}}, [])])
    assert f"Why: {questions.WORDS['H4'].missed}" in text
    assert questions.WORDS["H3"].missed not in text


def test_narrow_networks_are_named_where_the_figure_stands():
    narrow = result("filters_vgg16", {"P4": {}}, [{"network": "vgg16", "accuracy": 82.0}])
    assert "measured (a quarter of VGG-16's width): 1 points" in report.ledger([narrow])
    assert "| vgg16 (a quarter of VGG-16's width) | 82.00 |" in report.page([narrow])


def test_every_claim_and_figure_of_the_results_has_words():
    results = report.load(ROOT / "benchmarks" / "results")
    keys = {key for key, _, _ in report.claims(results)}
    asked = {key for question in questions.QUESTIONS for key in question.claims}
    assert keys <= asked == questions.WORDS.keys()
    drawn = {figure for question in questions.QUESTIONS for figure in question.figures}
    assert drawn == questions.CAPTIONS.keys()
    kept = {path.stem.removesuffix("-dark") for path in (ROOT / "docs" / "figures").glob("*.svg")}
    assert kept - {"how-it-works"} <= drawn


def test_benchmarks_fold_their_tables_under_questions(results: list[dict[str, Any]]):
    text = report.page(results, ["accuracy-resnet20.svg", "accuracy-resnet20-dark.svg"])
    asked = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert asked == [*(question.title for question in questions.QUESTIONS[1:4]), "Other results"]
    assert text.count('<details markdown="1">') == text.count("</details>") == len(results)
    assert "(figures/accuracy-resnet20-dark.svg#only-dark)" in text
    assert questions.CAPTIONS["accuracy-resnet20"].text in text
    assert "| -3.25 |" in text
    assert "0123456789ab" in text


def test_links_of_the_benchmarks_lead_to_the_claims(results: list[dict[str, Any]]):
    anchors = set(re.findall(r"claims\.md#([\w-]+)", report.page(results)))
    titles = re.findall(r"^### (.*)$", report.ledger(results), re.MULTILINE)
    assert anchors == {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", t).strip().lower()) for t in titles}


def test_the_headline_takes_the_best_of_each_arm_at_one_budget():
    def row(arm: str, macs: float, value: float) -> dict[str, Any]:
        return {"network": "resnet20", "arm": arm, "batch_norm": "as it is", "macs": macs, "test_accuracy": value}

    rows = [row("dense", 40e6, 91.7), row("Spectrim", 17.4e6, 89.8), row("CP", 17.1e6, 80.0), row("CP", 17.1e6, 84.0),
            row("CP", 9e6, 99.0), row("Spectrim", 9e6, 79.0)]  # fmt: skip
    text = report.headline([result("front_neighbours", {}, rows)])
    assert "**89.8 %**" in text
    assert "**44% of the work**" in text
    assert "CP 84.0 %" in text


def test_accuracies_average_seeds_and_stand_beside_the_published_ones(results: list[dict[str, Any]]):
    head, _, *rows = rows_of(report.accuracies(results))
    assert head[1:] == ["Spectrim, 12 epochs", "Spectrim, no fine-tuning", "Torch-Pruning, 12 epochs", report.LEARNED]
    assert rows[0][0] == "40.55 (dense: 91.73 %)"
    assert rows[1][1:] == ["91.50", "87.50", "90.30", "90.51"]
    assert rows[2][1:] == ["89.50", "-", "-", "87.11"]


def test_variants_are_no_points_of_the_curve(results: list[dict[str, Any]]):
    assert all(y != 60.0 for points in report.curves(results, "resnet20").values() for _, y in points)


def test_figures_are_svg_and_stale_ones_go(folder: Path):
    stale = folder / "docs" / "figures" / "old.svg"
    stale.write_text("<svg/>")
    report.write(folder)
    names = {path.name for path in (folder / "docs" / "figures").iterdir()}
    drawn = ("accuracy-resnet20", "how-it-works", "time-against-macs")
    assert names == {f"{name}{scheme}.svg" for name in drawn for scheme in ("", "-dark")}
    assert all(b"<svg" in (folder / "docs" / "figures" / name).read_bytes() for name in names)


def test_without_results_the_pages_say_so():
    assert {f([]) for f in (report.front_rows, report.counted, report.ledger, report.page, report.headline)} == {
        report.NONE
    }
    assert report.figures([]) == {}


@pytest.mark.parametrize("text", ["no marks", BEGIN, f"{END} {BEGIN}", PAGE + PAGE])
def test_a_page_without_its_marks_is_refused(text: str):
    with pytest.raises(ValueError, match="each once"):
        report.placed(text, "x")


@pytest.mark.parametrize(
    ("value", "key", "text"),
    [
        (17.39e6, "macs", "17.39 M"),
        (2.0, "macs_ratio", "2"),
        (91.5, "accuracy", "91.50"),
        (True, "met", "yes"),
        (None, "", "-"),
    ],
)
def test_numbers_are_shown_for_people(value: Any, key: str, text: str):
    assert report.show(value, key) == text


def test_the_pages_in_the_repository_are_those_of_its_results(tmp_path: Path):
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    (tmp_path / "docs" / "tutorials").mkdir(parents=True)
    for name in PLACES:
        shutil.copy(ROOT / name, tmp_path / name)
    written = {path.relative_to(tmp_path) for path in report.write(tmp_path)}
    for name in PLACES:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name} is out of date: make bench-report"
    kept = {path.relative_to(ROOT) for path in (ROOT / "docs" / "figures").glob("*.svg")}
    assert {path for path in written if path.suffix == ".svg"} == kept


def test_claims_of_one_file_stand_with_their_own_day_and_machine():
    strangers = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "strangers.json").read_text())
    other = {"date": "2001-02-03", "environment": {"cpu": "Some CPU"}}
    page = report.ledger([{**strangers, "measured": {**strangers["measured"], "N2": other}}])
    assert "`python -m benchmarks.strangers N2` on Some CPU, 2001-02-03" in page
    assert page.count("Some CPU") == 1
