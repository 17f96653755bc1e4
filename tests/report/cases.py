"""Small tables and plans that the report tests draw."""

from __future__ import annotations

from collections.abc import Sequence

from spectrim.network.choices import DENSE, LowRankChoice, SharedChoice, SumChoice
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates, Option, Row
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import lagrangian

HOSTILE = ["<script>alert(1)</script>", "a $\\frac{x$ & 'b' \"c\"", "layer.{{ 7 * 7 }}.$_^"]


def table(names: Sequence[str]) -> Candidates:
    """One row a name: ranks 1 to 8 of two unfoldings, with errors that halve from rank to rank."""
    rows = []
    for index, name in enumerate(names):
        size = 100.0 * (1 + index % 4)
        options = [Option(DENSE, 0.0, {"macs": 10 * size, "parameters": size})]
        options += [
            Option(
                LowRankChoice(how, rank, True, method="WeightSVD"),
                slope**rank,
                {"macs": rank * size, "parameters": rank * size / 10},
            )
            for how, slope in (("channel", 0.5), ("height-first", 0.4))
            for rank in range(1, 9)
        ]
        spectra = {f"WeightSVD/{how}": tuple(s**k for k in range(12)) for how, s in (("channel", 0.5), ("input", 0.3))}
        spectra["WeightSVD/height-first"] = tuple(0.4**k for k in range(12))
        rows.append(Row(name, "Conv2d 3x3", tuple(options), spectra=spectra))
    return Candidates(tuple(rows), {"macs": 500.0, "parameters": 50.0}, "weight energy")


def plan(candidates: Candidates, macs: float = 0.5) -> Plan:
    return lagrangian(candidates, Budget(macs=macs))


def shared(names: Sequence[str], members: int = 2) -> Candidates:
    """The table of :func:`table` with a group of its first rows, which loses half of what they lose apart."""
    alone = table(names)
    parts = alone.rows[:members]
    options = [Option(DENSE, 0.0, _sum(parts, 0))]
    for number, first in enumerate(parts[0].options[1:], 1):
        how, rank = first.choice["unfolding"], first.choice["rank"]
        left_rank, method = (rank, "JointSVD-left") if rank % 2 else (0, "JointSVD-right")
        choice = SharedChoice(how, rank, left_rank, True, method=method)
        options.append(Option(choice, first.error / 2, _sum(parts, number)))
    spectra = {f"JointSVD-{part}/height-first": tuple(0.4**k for k in range(12)) for part in ("left", "right")}
    group = Row(
        "group of " + names[0],
        f"{members} x Conv2d 3x3",
        tuple(options),
        scale=float(members),
        spectra=spectra,
        members=tuple(row.site for row in parts),
    )
    return Candidates((*alone.rows, group), alone.fixed, alone.unit)


def _sum(rows: Sequence[Row], number: int) -> dict[str, float]:
    return {cost: sum(row.options[number].costs[cost] for row in rows) for cost in ("macs", "parameters")}


def sums(parts: Sequence[tuple[int, float, str]]) -> tuple[Candidates, Plan]:
    """A table and plan of layers with ``(rank, density, pattern)``; the position of each entry takes a byte."""
    rows = []
    for number, (rank, density, pattern) in enumerate(parts):
        numbers = 10.0 * rank + 1000 * density
        made = Option(
            SumChoice("channel", rank, density, pattern, True, method="LowRankPlusSparse"),
            0.1,
            {"macs": 10 * numbers, "parameters": numbers, "bytes": 4 * numbers + 1000 * density},
        )
        dense = Option(DENSE, 0.0, {"macs": 10_000.0, "parameters": 1000.0, "bytes": 4000.0})
        spectra = {"LowRankPlusSparse/channel": tuple(0.5**k for k in range(12))}
        rows.append(Row(f"layer{number}", "Conv2d 3x3", (dense, made), spectra=spectra))
    fixed = {"macs": 0.0, "parameters": 0.0, "bytes": 0.0}
    candidates = Candidates(tuple(rows), fixed, "output energy")
    return candidates, lagrangian(candidates, Budget(bytes=0.3))
