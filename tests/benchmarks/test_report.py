"""The report: pages follow from results, and the pages in the repository follow from the results in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
PAGE = f"# Title\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"


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
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs" / "benchmarks.md").write_text(PAGE)
    for each in results:
        (tmp_path / "benchmarks" / "results" / f"{each['experiment']}.json").write_text(json.dumps(each))
    return tmp_path


def rows_of(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]


def test_pages_keep_what_is_outside_the_marks_and_nothing_inside(folder: Path):
    report.main(["--root", str(folder)])
    for path in (folder / "README.md", folder / "docs" / "benchmarks.md"):
        text = path.read_text()
        assert text.startswith(f"# Title\n\nbefore\n\n{report.BEGIN}\n")
        assert text.endswith(f"\n{report.END}\n\nafter\n")
        assert "\nold\n" not in text


def test_writing_again_changes_no_byte(folder: Path):
    report.write(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report.write(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_claims_are_in_the_order_of_their_numbers_with_what_was_measured(results: list[dict[str, Any]]):
    rows = rows_of(report.readme(results))[2:6]
    assert [row[0] for row in rows] == ["F2", "F3", "F6", "F10"]
    assert [row[-1] for row in rows] == ["**no**", "yes", "yes", "**no**"]
    assert [row[3] for row in rows] == ["-0.3 points", "0.25 points", "1 points", "- points"]


def test_docs_hold_the_command_the_details_and_every_table(results: list[dict[str, Any]]):
    text = report.page(results, ["accuracy-resnet20.svg"])
    assert "`python -m benchmarks.run speed_32`" in text
    assert "a \\| b" in text
    assert "| -3.25 |" in text
    assert "![accuracy resnet20](figures/accuracy-resnet20.svg)" in text
    assert "0123456789ab" in text
    for each in results:
        assert f"## {each['experiment'].replace('_', ' ')}" in text


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
    assert names == {"accuracy-resnet20.svg", "time-against-macs.svg"}
    assert all(b"<svg" in (folder / "docs" / "figures" / name).read_bytes() for name in names)


def test_without_results_the_pages_say_so():
    assert report.readme([]) == report.page([]) == report.NONE
    assert report.figures([]) == {}


@pytest.mark.parametrize("text", ["no marks", report.BEGIN, f"{report.END} {report.BEGIN}", PAGE + PAGE])
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
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    written = {path.relative_to(tmp_path) for path in report.write(tmp_path)}
    for name in ("README.md", "docs/benchmarks.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name} is out of date: make bench-report"
    kept = {path.relative_to(ROOT) for path in (ROOT / "docs" / "figures").glob("*.svg")}
    assert {path for path in written if path.suffix == ".svg"} == kept


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_every_result_says_how_it_came_about(path: Path):
    held = json.loads(path.read_text())
    assert held["experiment"] == path.stem
    assert {"config", "date", "wall_seconds", "environment", "code", "claims", "rows", "seeds"} <= held.keys()
    for claim in held["claims"].values():
        assert {"value", "unit", "target", "met", "command"} <= claim.keys()
    assert str(ROOT) not in path.read_text()
