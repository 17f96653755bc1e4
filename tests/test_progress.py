"""Progress: a bar for True, nobody for False and None, the caller's function, and nothing else."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.progress import reporting

MODEL = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
BATCHES = [torch.randn(32, 32, generator=torch.Generator().manual_seed(n)) for n in range(2)]


def calls() -> dict[str, object]:
    sites = st.find(MODEL)
    table = st.tabulate(sites)
    plan = st.select(table, st.Budget(parameters=0.5))
    return {
        "calibrate": lambda progress: st.calibrate(MODEL, sites, BATCHES, progress=progress),
        "tabulate": lambda progress: st.tabulate(sites, progress=progress),
        "apply": lambda progress: st.apply(MODEL, sites, plan, progress=progress),
        "compress": lambda progress: st.compress(MODEL, BATCHES, st.Budget(macs=0.5), progress=progress),
        "compare": lambda progress: st.compare(MODEL, MODEL, BATCHES[0], repeats=1, progress=progress),
    }


@pytest.mark.table(every=2)
@pytest.mark.parametrize("verb", ["calibrate", "tabulate", "apply", "compress", "compare"])
def test_true_shows_what_is_done_and_false_is_silent(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    call = calls()[verb]
    call(False)
    call(None)
    assert capsys.readouterr().err == ""
    call(True)
    told = capsys.readouterr().err.splitlines()
    assert any(line.endswith(("1 of 1", "2 of 2")) for line in told)


@pytest.mark.parametrize("verb", ["calibrate", "tabulate", "apply", "compress", "compare"])
def test_what_is_no_progress_is_refused_before_any_work(verb: str) -> None:
    with pytest.raises(TypeError, match=r"progress is 'yes': expected True for a bar, .* or a function"):
        calls()[verb]("yes")


def test_a_function_is_called_with_the_name_of_what_is_done() -> None:
    told: list[tuple[object, ...]] = []
    st.compress(MODEL, BATCHES, st.Budget(macs=0.5), progress=lambda *report: told.append(report))
    assert {what for what, *_ in told} == {"calibrate", "tabulate", "apply"}
    assert all(1 <= done <= total for _, done, total in told)


def test_signatures_stay_readable() -> None:
    assert "progress" in inspect.signature(st.apply).parameters
    assert next(iter(inspect.signature(st.compress).parameters)) == "model"


def test_an_error_inside_leaves_the_bar() -> None:
    with pytest.raises(ZeroDivisionError), reporting(True):
        raise ZeroDivisionError


# The switch for all verbs.


def test_the_environment_shows_bars_everywhere_or_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [(batch, torch.zeros(32, dtype=torch.long)) for batch in BATCHES]
    model = nn.Sequential(nn.Linear(32, 4))
    monkeypatch.setenv("SPECTRIM_PROGRESS", "1")
    st.calibrate(MODEL, st.find(MODEL), BATCHES)
    st.fine_tune(model, pairs, epochs=1)
    shown = capsys.readouterr().err
    assert "calibrate: 2 of 2" in shown
    assert "fine-tune: 2 of 2" in shown
    st.calibrate(MODEL, st.find(MODEL), BATCHES, progress=False)
    assert capsys.readouterr().err == "", "what the call says goes before the environment"
    monkeypatch.setenv("SPECTRIM_PROGRESS", "0")
    st.fine_tune(model, pairs, epochs=1)
    assert capsys.readouterr().err == ""


def test_one_verb_shows_bars_and_not_those_that_it_calls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECTRIM_PROGRESS", "1")
    with reporting(True), reporting(None) as inner:
        inner("inside", 1, 1)
    assert capsys.readouterr().err == ""
    with reporting(None) as outer:
        outer("outside", 1, 1)
    assert capsys.readouterr().err == "outside: 1 of 1\n"


def test_a_switch_that_is_neither_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRIM_PROGRESS", "yes")
    with pytest.raises(ValueError, match="SPECTRIM_PROGRESS is 'yes': expected 1 to show bars, 0 to show none"):
        st.compress(MODEL, BATCHES, st.Budget(macs=0.5))
