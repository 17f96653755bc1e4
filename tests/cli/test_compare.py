"""``spectrim compare``: several files, plans or points of a sweep in one table."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import spectrim as st
from tests.cli import nets

MEASURED = ("--model", "nets:tiny", "--data", "nets:batches", "--test", "nets:batches")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with two points, one of which has kept its weights."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    found = st.sweep(nets.tiny().eval(), nets.batches(), ("macs", [0.5]), folder=folder, keep_models=True)
    st.sweep(nets.tiny().eval(), nets.batches(), ("macs", [0.8]), folder=folder)
    assert len(found) == 1
    return folder


@pytest.fixture(autouse=True)
def _here(swept: Path, near: None) -> None:
    shutil.copytree(swept, "sweep")


def test_networks_are_compared_by_their_plans_alone_or_measured(run):
    told = run.json("compare", "sweep")
    assert set(told["networks"]) == {"macs-80pct", "macs-50pct"}
    counted = {n: {r["metric"]: r["ratio"] for r in c["rows"]} for n, c in told["networks"].items()}
    assert counted["macs-50pct"]["MACs (planned)"] > counted["macs-80pct"]["MACs (planned)"] > 1
    # No header of a file is among them.
    assert {"weights (planned)", "bytes (planned)"} & counted["macs-50pct"].keys() == {"weights (planned)"}

    found = run.json("compare", "sweep/macs-50pct", "sweep/macs-80pct/plan.json", *MEASURED)
    measured = {name: {row["metric"]: row for row in each["rows"]} for name, each in found["networks"].items()}
    assert found["files"]["macs-50pct"].endswith("model.safetensors")
    assert "accuracy" in measured["macs-50pct"]
    assert "latency p50" not in measured["macs-50pct"]
    for name, rows in measured.items():
        assert rows["MACs"]["ratio"] == pytest.approx(counted[name]["MACs (planned)"])
    errors = {name: each["error"] for name, each in found["agreement"].items()}
    assert 0 < errors["macs-80pct"] < errors["macs-50pct"]


def test_figures_that_were_kept_are_told(run):
    compress = ("compress", "nets:tiny", "--data", "nets:batches", "--test", "nets:batches", "-b", "macs=50%")
    made = run.json(*compress, "--out", "half", "--no-report")
    told = run.json("compare", "half", "sweep")
    rows = {row["metric"]: row for row in told["networks"]["half"]["rows"]}
    assert rows["accuracy (kept)"]["compressed"] == pytest.approx(made["scores"]["compressed"])
    assert told["agreement"]["half"]["error"] == pytest.approx(made["agreement"]["error"])
    assert told["agreement"]["macs-50pct"]["error"] > told["agreement"]["macs-80pct"]["error"] > 0
    images = made["test_samples"]
    assert run.json("compare", "half", "--page", "half.html")["networks"]["half"]
    assert f"points on {images:,} samples" in Path("half.html").read_text()
    Path("half/result.json").write_text("{")
    assert "result.json: not what compress writes" in run("compare", "half", code=2).stderr


def test_networks_are_timed_in_one_table(run):
    shutil.copy("sweep/macs-50pct/model.safetensors", "other.safetensors")
    text = run("compare", "sweep/macs-50pct", "other.safetensors", *MEASURED, "--latency").stdout
    assert re.search(r"dense\s+macs-50pct\s+other\.safetensors", text)
    assert re.search(r"latency p50 .* ms .* ms .* ms", text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "'nowhere' is neither a file nor a folder"),
        (("sweep/macs-50pct", "sweep/macs-50pct"), "is named twice"),
        (("sweep", "--data", "nets:batches"), "--data nets:batches needs --model"),
        (("sweep", "--model", "nets:tiny"), "--model needs --data or --test"),
        (("sweep", "--model", "nets:tiny", "--test", "nets:batches"), "macs-80pct is a plan: give --data"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, arguments: tuple[str, ...], said: str):
    assert said in run("compare", *arguments, code=2).stderr
    assert Path("sweep").is_dir()


def test_a_page_tells_what_is_printed(run):
    run("compare", "sweep", "--page", "pages/compared.html")
    read = Path("pages/compared.html").read_text()
    for text in ("2 networks beside the dense one", "macs-50pct", "same class first", "What was chosen", "sha256"):
        assert text in read
    run("compare", "sweep/macs-50pct", "sweep/macs-80pct/plan.json", *MEASURED, "--page", "measured.html")
    measured = Path("measured.html").read_text()
    assert "nets:tiny</h1>" in measured
    assert measured.count('class="error"') == 3  # the accuracy of the dense network and of two others
    assert "were fitted to those of --data" in measured
    assert "expected a name ending in .html" in run("compare", "sweep", "--page", "compared", code=2).stderr
    assert "results cannot go to" in run("compare", "sweep", "--page", "measured.html/x.html", code=2).stderr
