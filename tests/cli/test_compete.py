"""``spectrim compress --compete``: sets of methods make a network each, and the best is kept."""

from __future__ import annotations

import json

import pytest

COMPRESS = ("compress", "nets:tiny", "--only", "wide", "--budget", "macs=60%")
DATA = ("--data", "nets:batches")


def test_the_best_of_several_sets(run) -> None:
    said = " ".join(run(*COMPRESS, *DATA, "--compete", "--out", "small").output.split())
    assert "competed" in said
    assert "filters, then low" in said
    assert "chosen" in said


@pytest.mark.slow
def test_the_smallest_within_a_tolerance(run) -> None:
    options = ("compress", "nets:tiny", "--only", "wide", *DATA, "--compete", "--min-agreement", "0.9", "--json")
    told = json.loads(run(*options, "--out", "small").stdout)
    assert [arm["chosen"] for arm in told["arms"]].count(True) == 1
    assert any("the tolerance is met" in note for note in told["notes"])


def test_no_further_set_after_some_seconds(run) -> None:
    said = " ".join(run(*COMPRESS, *DATA, "--method", "auto", "--seconds", "0", "--out", "small").output.split())
    assert "not tried, as 0 s were over" in said


@pytest.mark.slow
def test_where_low_rank_is_not_enough_sets_compete(run) -> None:
    command = ("compress", "filter_nets:separable", "--data", "nets:batches", "--budget", "macs=35%")
    said = " ".join(run(*command, "--out", "small").output.split())
    assert "sets of methods compete" in said
    assert "chosen" in said
    refused = run(*command, "--method", "activation-svd", "--out", "other", code=3)
    assert "cannot be met" in refused.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--input", "1x8x8", "--compete"), "give --data"),
        ((*DATA, "--seconds", "5", "--method", "weight-svd"), "give --method auto, or leave it out"),
        ((*DATA, "--seconds", "5", "--multiple-of", "4"), "--seconds 5 limits how long sets of methods compete"),
        ((*DATA, "--seconds", "5", "--no-share"), "--seconds 5 limits how long sets of methods compete"),
        ((*DATA, "--compete", "--method", "weight-svd"), "does not combine with --compete"),
        ((*DATA, "--method", "auto", "--method", "weight-svd"), "bring their own. Leave out --method auto"),
        ((*DATA, "--method", "auto", "--multiple-of", "4"), "does not combine with --method auto"),
        ((*DATA, "--compete", "--multiple-of", "4"), "does not combine with --compete"),
    ],
)
def test_what_does_not_go_together(run, options: tuple[str, ...], said: str) -> None:
    assert said in " ".join(run(*COMPRESS, *options, code=2).output.split())
