"""Claims A1 and A2, from the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.headline.network import Metric, names, plugin
from benchmarks.run import claim

Row = Mapping[str, Any]
# Claim A2 names test accuracies of ResNet-20 at these budgets.
ASKED = {"macs=17.4M": 90.5, "macs=13.5M": 89.0, "macs=9M": 84.0}
# A difference of so many of its standard errors may be chance.
NOISE = 2.0


@dataclass(frozen=True)
class Point:
    """The rows of one network and budget that count: auto, the best single arm of ours, and the best peer."""

    network: str
    budget: str
    metric: Metric
    auto: Row
    single: Row | None
    peer: Row | None

    def lead(self, other: Row) -> float:
        """How much better auto is, in the metric's unit."""
        return round(self.metric.gain(self.auto["value"], other["value"]), 4)

    def noise(self, other: Row) -> float:
        """Of the difference, were the two tests independent: with the same test samples it is less."""
        return NOISE * math.hypot(self.auto["error"], other["error"])


def points(rows: Sequence[Row]) -> Iterator[Point]:
    """Every network and budget at which auto was run, with the best of each kind by the test data."""
    for auto in rows:
        if auto["arm"] == "auto" and "failed" not in auto and auto["network"] in names():
            best = best_of_each_kind(rows, auto["network"], auto["budget"])
            metric = plugin(auto["network"]).metric
            yield Point(auto["network"], auto["budget"], metric, auto, best.get("ours"), best.get("peer"))


def best_of_each_kind(rows: Sequence[Row], network: str, budget: str) -> dict[str, Row]:
    """Of the rows of a network and a budget the best by the test data: by ``dense``, ``auto``, ``ours``, ``peer``."""
    metric = plugin(network).metric
    best: dict[str, Row] = {}
    for row in rows:
        if (row["network"], row["budget"]) == (network, budget) and "failed" not in row:
            kind = row["kind"]
            if kind not in best or metric.gain(row["value"], best[kind]["value"]) > 0:
                best[kind] = row
    return best


def claims(rows: Sequence[Row], planned: int | None = None) -> dict[str, Any]:
    """A1 and A2, as far as there are rows for them; no claim is met before all that is planned has run."""
    found = list(points(rows))
    whole = sum(len(plugin(name).budgets) for name in names()) if planned is None else planned
    made = {}
    if single := [point for point in found if point.single is not None]:
        made["A1"] = _against_ourselves(single, whole)
    if peers := [point for point in found if point.peer is not None]:
        made["A2"] = _against_peers(peers, whole)
    return made


def _against_ourselves(found: Sequence[Point], planned: int) -> dict[str, Any]:
    worse = [p for p in found if p.single and p.lead(p.single) < -p.noise(p.single)]
    better = [p for p in found if p.single and p.lead(p.single) > 0]
    share = len(better) / len(found)
    said = "; ".join(
        f"{p.network} {p.budget}: {_signed(p.lead(p.single))} on {p.single['arm']}" for p in found if p.single
    )
    return claim(
        round(100 * share, 1), f"% of {len(found)} rows better than the best single arm; {len(worse)} worse than noise",
        "never worse than noise, better on half", not worse and share >= 0.5 and len(found) >= planned,
        f"{len(found)} of {planned} networks and budgets run: {len(better)} better than the best single arm, "
        f"{len(worse)} worse than noise ({NOISE:g} standard errors). {said}",
    ) | {"command": _COMMAND}  # fmt: skip


def _against_peers(found: Sequence[Point], planned: int) -> dict[str, Any]:
    ahead = [p for p in found if p.peer and p.lead(p.peer) > 0]
    tested = {p.budget: p.auto["value"] for p in found if p.network == "resnet20" and p.budget in ASKED}
    levels = all(tested.get(budget, 0) >= asked for budget, asked in ASKED.items())
    said = "; ".join(f"{p.network} {p.budget}: {_signed(p.lead(p.peer))} on {p.peer['arm']}" for p in found if p.peer)
    reached = ", ".join(
        f"{budget.removeprefix('macs=')} {tested[budget]:.2f} % (asked {asked:g})" if budget in tested
        else f"{budget.removeprefix('macs=')} not run"
        for budget, asked in ASKED.items()
    )  # fmt: skip
    return claim(
        len(ahead),
        f"of {len(found)} rows ahead of the best peer; {planned} networks and budgets planned",
        "ahead on every network and budget; ResNet-20 at 17.4, 13.5, 9.0 MMAC >= 90.5, 89.0, 84.0 %",
        len(ahead) == len(found) >= planned and levels,
        f"{len(found)} of {planned} networks and budgets run: {len(ahead)} ahead of the best peer: {said}. "
        f"ResNet-20 at {reached}",
    ) | {"command": _COMMAND}  # fmt: skip


def _signed(value: float) -> str:
    return f"{value:+.4g}"


_COMMAND = "make headline"
