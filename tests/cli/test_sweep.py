"""``spectrim sweep``: the table, the page, the folder, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spectrim.selection.front import Sweep
from spectrim.selection.point import sealed, unsealed

SWEEP = ("sweep", "nets:tiny", "--data", "nets:batches")


def test_points_are_judged_written_drawn_and_added_to(run):
    text = run(*SWEEP, "--points", "0.8,50%").stdout
    found = Sweep.read("sweep")
    assert [point.asked for point in found] == ["macs=80%", "macs=50%"]
    assert all(f"{point.judged.error:.2%}".replace("%", " %") in text for point in found)
    assert all(name in text for name in ("run.json", "*/point.json", "*/plan.json"))
    assert "model.safetensors" not in text
    assert Path("sweep/sweep.svg").read_bytes().startswith(b"<?xml")
    page = Path("sweep/sweep.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|url\(", page)
    assert page.count('class="dot plan"') == 2
    again = text.strip().splitlines()[-1].split()
    plan = Path(again[again.index("--plan") + 1])
    assert json.loads(plan.read_text())["costs"]["macs"] == min(point.costs["macs"] for point in found)

    trained = ("--train", "nets:batches", "--epochs", "1", "--models", "--no-report")
    added = run.json(*SWEEP, "--points", "0.5", *trained)
    assert added["judged_by"] == "same class first"
    assert [point["tuned_error"] is not None for point in added["points"]] == [True]
    assert added["points"][0]["error"] == found[-1].carried_out.error
    assert Path(added["points"][0]["folder"], "model.safetensors").is_file()
    assert (
        "spectrim.load(tiny(), 'sweep/macs-50pct/model.safetensors')" in run(*SWEEP, "--points", "0.5", *trained).stdout
    )
    said = run(*SWEEP, "--points", "0.5", "--skip", "conv", code=2)
    assert "holds another sweep: --skip was None and is ['conv']" in said.stderr


def test_a_folder_from_before_sets_of_methods_competed_goes_on(run):
    first = run.json(*SWEEP, "--points", "0.8", "--no-report")["points"]
    record = unsealed(Path("sweep/run.json").read_bytes(), "a record")
    assert record["--method"] == ["low-rank"]
    Path("sweep/run.json").write_text(json.dumps(sealed({**record, "--method": ["auto"]})))
    assert run.json(*SWEEP, "--points", "0.8,0.6", "--no-report")["points"][0] == first[0]
    assert unsealed(Path("sweep/run.json").read_bytes(), "a record") == record
    assert "--method was ['low-rank'] and is ['weight-svd']" in run(*SWEEP, "--method", "weight-svd", code=2).stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--points", "0.8,1.5"), "'1.5' is no share of the dense network"),
        (("--points", "0.8,x"), "'x' is no share of the dense network"),
        (("--cost", "flops"), "--cost 'flops' is not counted; .* Did you mean 'macs'"),
        (("--points", "0.5", "--budget", "macs=50%"), "--points 0.5 does not combine with --budget macs=50%"),
        (("--method", "learned-ranks"), "spectrim path does so"),
    ],
)
def test_what_cannot_be_swept_is_refused(run, options: tuple[str, ...], said: str):
    assert re.search(said, run(*SWEEP, *options, code=2).stderr)
    assert not Path("sweep").exists()


@pytest.mark.slow
def test_a_table_of_everything_fits_80_columns(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    more = ("--latency", "--train", "nets:batches", "--epochs", "1", "--no-report")
    text = run(*SWEEP, "--points", "0.5", *more).stdout
    (rule,) = [line for line in text.splitlines() if set(line) == {"-", " "}]
    assert len(rule) <= 80
    assert len(rule.split()) == 7
    assert max(map(len, text.split("Written")[0].splitlines())) <= 80


def test_a_metric_has_its_standard_error_in_text_rows_and_page(run):
    arguments = (*SWEEP, "--points", "0.5", "--test", "nets:batches")
    assert "accuracy has a standard error of up to" in run(*arguments).stdout
    assert run.json(*arguments)["points"][0]["standard_error"] > 0
    assert "A bar is one standard error" in Path("sweep/sweep.html").read_text(encoding="utf-8")


def test_data_are_asked_for_and_a_budget_that_nothing_meets_is_told(run):
    assert "give --data" in run("sweep", "nets:tiny", code=2).stderr
    assert "cannot be met" in run(*SWEEP, "--points", "0.001", code=3).stderr
    assert not Path("sweep/sweep.html").exists()
