"""Options of commands that are options of methods now: for one release they mean what they meant, with a note."""

from __future__ import annotations

from typing import Any

import pytest

from spectrim.cli.former import FORMER

CALL = ("compress", "nets:tiny", "--data", "nets:batches")
HALF = ("--budget", "macs=50%")
SPARSE, FILTERS, LEARNED = "low-rank-plus-sparse", "principal-filters", "learned-ranks"

CASES = {
    "pattern": (SPARSE, ("--pattern", "rows", "--pattern", "2:4"), [f"{SPARSE}:patterns=rows+2:4"]),
    "low_rank_share": (SPARSE, ("--low-rank-share", "0.3"), [f"{SPARSE}:share=0.3"]),
    "rule": (FILTERS, ("--rule", "l1-max"), [f"{FILTERS}:rule=l1-max"]),
    "pooling": (FILTERS, ("--pooling", "none"), [f"{FILTERS}:pooling=none"]),
    "with_low_rank": (FILTERS, ("--with-low-rank",), [FILTERS, "low-rank"]),
    "rank_epochs": (LEARNED, ("--rank-epochs", "3"), [f"{LEARNED}:rank_epochs=3"]),
    "rank_lr": (LEARNED, ("--rank-lr", "0.1"), [f"{LEARNED}:rank_lr=0.1"]),
    "c_steps": (LEARNED, ("--c-steps", "8"), [f"{LEARNED}:c_steps=8"]),
    "energy": (LEARNED, ("--energy", "output"), [f"{LEARNED}:energy=output"]),
    "multiplier": (LEARNED, ("--multiplier", "1e-09"), [f"{LEARNED}:multiplier=1e-09"]),
    "cost": (
        LEARNED,
        ("--multiplier", "1e-09", "--cost", "bytes"),
        [f"{LEARNED}:multiplier=1e-09,cost=bytes"],
    ),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What compress was asked for, in place of doing it."""
    heard: list[Any] = []
    monkeypatch.setattr(
        "spectrim.cli.shrinking.compress_and_tell", lambda out, request, *rest: heard.append(request.methods)
    )
    monkeypatch.setattr("spectrim.cli.learning.compress_by_learning", lambda out, run, *rest: heard.append(run))
    return heard


def test_every_former_option_is_here():
    assert CASES.keys() == FORMER.keys()


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", CASES)
def test_a_former_option_means_what_it_meant_and_says_how_it_is_written_now(run, asked: list[Any], name: str):
    method, former, now = CASES[name]
    goal = () if "--multiplier" in former else HALF
    train = ("--train", "nets:batches") if method == LEARNED else ()
    options = [word for text in now for word in ("--method", text)]
    old = run(*CALL, *goal, *train, "--method", method, *former)
    new = run(*CALL, *goal, *train, *options)
    assert asked[0] == asked[1]
    assert f"write {' '.join(options)}\n" in old.stderr
    assert former[0] in old.stderr
    assert "next release" not in new.stderr
    assert "next release" not in run(*CALL, *goal, *train, "--method", method, *former, "--quiet").stderr


@pytest.mark.parametrize("name", CASES)
def test_a_former_option_of_another_method_is_refused(run, name: str):
    method, former, _ = CASES[name]
    error = run(*CALL, *HALF, *former, code=2).stderr
    assert f"is for --method {method}, not for --method low-rank" in error
    assert former[0] in error


@pytest.mark.slow
def test_profile_takes_those_it_had(run):
    call = ("profile", "nets:tiny", "--data", "nets:batches")
    text = run(*call, "--method", FILTERS, "--pooling", "none")
    assert f"write --method {FILTERS}:pooling=none" in text.stderr
    assert text.stdout == run(*call, "--method", f"{FILTERS}:pooling=none").stdout
    wide = ("profile", "nets:tiny", "--input", "1x8x8", "--only", "wide")
    old = run.json(*wide, "--method", SPARSE, "--pattern", "rows", "--low-rank-share", "0.2")
    assert old == run.json(*wide, "--method", f"{SPARSE}:patterns=rows,share=0.2")


def test_former_options_are_not_in_the_help(run):
    for command, flags in (("compress", FORMER.values()), ("profile", [FORMER["pattern"], FORMER["pooling"]])):
        text = run(command, "--help").stdout
        shown = [former.flag for former in flags if f"  {former.flag} " in text and former.flag != "--cost"]
        assert not shown
