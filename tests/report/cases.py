"""Small tables and plans that the report tests draw."""

from __future__ import annotations

from collections.abc import Sequence

from spectrim.budget import Budget
from spectrim.plan import DENSE, Candidates, Choice, Option, Plan, Row
from spectrim.selectors import lagrangian


def table(names: Sequence[str]) -> Candidates:
    """One row a name: ranks 1 to 8 of two unfoldings, with errors that halve from rank to rank."""
    rows = []
    for index, name in enumerate(names):
        size = 100.0 * (1 + index % 4)
        options = [Option(DENSE, 0.0, {"macs": 10 * size, "parameters": size})]
        options += [
            Option(
                Choice("low_rank", "WeightSVD", {"unfolding": how, "rank": rank, "bias": True}),
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
