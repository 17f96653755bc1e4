"""``spectrim compress --compete``: sets of methods make a network each, and the best is kept."""

from __future__ import annotations

import pytest

COMPRESS = ("compress", "nets:tiny", "--only", "wide", "--budget", "macs=60%")
DATA = ("--data", "nets:batches")


def test_the_best_of_several_sets(run) -> None:
    said = " ".join(run(*COMPRESS, *DATA, "--compete", "--out", "small").output.split())
    assert "methods that competed, by what the network lost: low rank:" in said
    assert "filters, then low rank:" in said


def test_no_further_set_after_some_seconds(run) -> None:
    said = " ".join(run(*COMPRESS, *DATA, "--compete", "--seconds", "0", "--out", "small").output.split())
    assert "not tried, as 0 s were over" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--input", "1x8x8", "--compete"), "give --data"),
        ((*DATA, "--seconds", "5"), "give --compete too"),
        ((*DATA, "--compete", "--method", "weight-svd"), "does not combine with --compete"),
        ((*DATA, "--compete", "--min-agreement", "0.9"), "does not combine with --compete"),
    ],
)
def test_what_does_not_go_together(run, options: tuple[str, ...], said: str) -> None:
    assert said in " ".join(run(*COMPRESS, *options, code=2).output.split())
