"""Claim A3 says what the rows of the detector do."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.headline import detector


def row(budget: str, arm: str, value: float, held_out: float, **more: Any) -> dict[str, Any]:
    kind = "dense" if arm == "dense" else "peer" if arm == "peer" else "ours"
    return {
        "network": "craft", "budget": budget, "arm": arm, "kind": kind, "value": value, "held_out": held_out,
        "error": 0.4, "parameters": 2e7 if arm == "dense" else 2e6, "macs": 3.6e10 if arm == "dense" else 9e9,
        "file_bytes": 8e7 if arm == "dense" else 8e6, **more,
    }  # fmt: skip


def time(faster: float) -> dict[str, Any]:
    key = {"network": "craft", "budget": "macs=25%", "arm": "low rank", "runtime": "eager", "batch": 1}
    interval = {"faster": faster, "low": faster - 0.5, "high": faster + 0.5}
    return {**key, "dense_ms": 900.0, "ms": 900 / faster, **interval}


DENSE = row("", "dense", 98.0, 98.0)
ALL = [DENSE, *(row(budget, "low rank", 97.5, 97.0) for budget in detector.ASKED)]
STEPS = {"steps": 9, "note": "9 steps", "kind": "trained"}
TRAINED = [row(budget, "low rank, trained", 97.9, 97.5, **STEPS) for budget in detector.ASKED]


def test_held_out_pages_choose_and_never_the_test_or_a_peer() -> None:
    better = row("bytes=6.7%", "shared factors", 90.0, 99.0)
    peer = row("bytes=6.7%", "peer", 99.9, 99.9)
    failed = {
        "network": "craft",
        "budget": detector.ASKED[0],
        "arm": "CP chains",
        "failed": "InfeasibleBudgetError: ...",
    }
    assert [each["arm"] for each in detector.chosen([*ALL, failed, better, peer])] == [
        "shared factors",
        "low rank",
        "low rank",
    ]
    assert detector.claims([*ALL, better], [])["A3"]["value"] == 8


@pytest.mark.parametrize(
    ("rows", "times", "met"),
    [
        ([*ALL, *TRAINED], [time(2.6)], True),
        ([*ALL, *TRAINED], [time(2.4)], False),
        ([*ALL, *TRAINED], [], False),
        (ALL, [time(2.6)], False),
        ([*ALL, *TRAINED][:-3], [time(2.6)], False),
        ([DENSE, *ALL[2:], *TRAINED[1:]], [time(2.6)], False),
    ],
)
def test_every_part_of_the_claim_is_needed(rows: list[Any], times: list[Any], met: bool) -> None:
    assert detector.claims(rows, times)["A3"]["met"] is met


def test_nothing_is_claimed_without_rows() -> None:
    assert detector.claims([DENSE], []) == detector.claims(ALL[1:], []) == {}


def test_the_table_has_the_dense_detector_first() -> None:
    lines = detector.table(ALL, [time(3.0)]).splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("| none | dense | 98.0 ± 0.4 | 20.00 M | 36.0 G | 80.0 MB |")
    assert lines[-1].endswith("| 8.0 MB | 0.30 s for 0.90 s dense (2.5 to 3.5x) |")
