"""Accuracy against MACs, gathered from result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
Point = tuple[float, float]

# Idelbayev and Carreira-Perpinan, CVPR 2020: (MMAC, test accuracy) after some 950 epochs of learning the ranks.
PUBLISHED: dict[str, tuple[Point, ...]] = {
    "resnet20": ((26.4, 91.24), (22.6, 90.78), (17.4, 90.51), (13.5, 90.13), (10.6, 89.02), (9.0, 87.11)),
    "resnet56": ((62.0, 92.83), (57.4, 92.66), (43.3, 92.48), (30.4, 91.67)),
}
LEARNED = "learned ranks (published)"


def curves(results: Sequence[Result], network: str) -> dict[str, list[Point]]:
    """``(MMAC, accuracy)`` by label, seeds averaged, from the rows of a network that hold both."""
    found: dict[str, list[Point]] = {}
    for result in results:
        for row in result.get("rows", []):
            if row.get("network") != network or "accuracy" not in row or "macs" not in row:
                continue
            label = _label(row)
            if label:
                found.setdefault(label, []).append((row["macs"] / 1e6, row["accuracy"]))
    return {label: averaged(points) for label, points in sorted(found.items())}


def _label(row: Mapping[str, Any]) -> str:
    if "arm" in row:
        # One-shot plans among such rows are those of other results, which are in the table already.
        return "Spectrim, learned ranks" if row["arm"].startswith("learned ranks") else ""
    variant, epochs = row.get("variant", "all"), row.get("epochs", 0)
    if variant == "dense":
        return "dense"
    if variant != "all":
        return ""
    name = {"spectrim": "Spectrim", "torch-pruning": "Torch-Pruning"}.get(
        row.get("method", "spectrim"), row.get("method")
    )
    return f"{name}, {epochs} epoch{'s' * (epochs > 1)}" if epochs else f"{name}, no fine-tuning"


def averaged(points: list[Point]) -> list[Point]:
    """Means of the points whose MACs are within 3 % of each other."""
    groups: list[list[Point]] = []
    for point in sorted(points, reverse=True):
        if groups and point[0] > 0.97 * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def networks(results: Sequence[Result]) -> list[str]:
    return [name for name in PUBLISHED if curves(results, name)]
