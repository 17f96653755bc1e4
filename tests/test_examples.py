"""The examples run as they are written, and so do the cells of the notebook."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import notebook

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# What each says when it has worked. How fast a layer is depends on the machine: a budget may be out of reach there.
SAID = {
    "own_model": r"accuracy +[89]\d\.\d+ % +[89]\d\.\d+ %",
    "latency_budget": r"ms dense, .* ms compressed: |the lowest",
    "trainer": r"% trained on, saved and loaded",
    "lightning_callback": r"9\d\.\d % at [2-9]\.\d+ times fewer MACs",
    "service": r'\{"class": \d\}\ntraining parts loaded: ',
    "sweep": r" 80% +\d.*\n +60% +\d.*\n +40% +\d.*\n +25% +\d",
}
# They train for seconds, or load trainers: `make docs` runs them beside the build of the site.
LONG = ("own_model", "sweep", "latency_budget", "lightning_callback", "trainer")
WRITTEN = {"own_model": "small.safetensors", "trainer": "small/model.safetensors", "service": "digits.safetensors"}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder; what scripts settle for the whole process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECTRIM_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_every_example_is_known_listed_and_short() -> None:
    assert {path.stem for path in SCRIPTS} == set(SAID)
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in [*SCRIPTS, *NOTEBOOKS]:
        assert f"({path.name})" in listed
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60
        assert f"python examples/{path.name}" in text


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem in LONG else path for path in SCRIPTS],
    ids=lambda path: path.stem,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the trainers, whose calls these scripts are
def test_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert re.search(SAID[path.stem], capsys.readouterr().out)
    if path.stem in WRITTEN:
        assert (tmp_path / WRITTEN[path.stem]).stat().st_size > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_its_outputs_are_kept_small(path: Path, tmp_path: Path):
    found = notebook.read(path)
    kept = [cell["outputs"] for cell in found["cells"] if cell["cell_type"] == "code"]
    assert path.stat().st_size < 64 * 1024
    count = notebook.run(found)
    again = [cell["outputs"] for cell in found["cells"] if cell["cell_type"] == "code"]
    assert count == len(kept) == 5
    assert all(again)
    assert [[output["output_type"] for output in each] for each in again] == [
        [output["output_type"] for output in each] for each in kept
    ]
    assert (tmp_path / "small.safetensors").stat().st_size > 0
