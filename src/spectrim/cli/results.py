"""What a finished compression leaves behind: files, a table, a document."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.cli.common import Output
from spectrim.nn.checkpoint import save
from spectrim.plan import Candidates, Plan
from spectrim.report import Comparison, Measured, Page
from spectrim.sites import Sites


@dataclass(frozen=True)
class Outcome:
    """A compression, as far as it has come.

    Attributes
    ----------
    title
        Of the report.
    dense, small
        The models.
    plan, table, sites
        How one became the other.
    folder
        Where files go.
    scores
        ``(stage, percent)`` in the order they were measured: ``dense`` first, the finished model last.
    notes
        Sentences for the report.
    """

    title: str
    dense: nn.Module
    small: nn.Module
    plan: Plan
    table: Candidates
    sites: Sites
    folder: Path
    scores: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()

    def scored(self, stage: str, percent: float) -> Outcome:
        return dataclasses.replace(self, scores=(*self.scores, (stage, percent)))

    def noted(self, note: str) -> Outcome:
        return dataclasses.replace(self, notes=(*self.notes, note))

    def known_score(self, model: nn.Module) -> float:
        """The score already measured of one of the two models."""
        return self.scores[0][1] if model is self.dense else self.scores[-1][1]

    def finish(self, out: Output, comparison: Comparison, *, report: bool = True, **more: Any) -> None:
        """Write the files, print the table or the document."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {"model": self.folder / "model.safetensors", "plan": self.folder / "plan.json"}
        save(self.small, self.plan, files["model"])
        self.plan.write(files["plan"])
        notes = (*self.notes, *_warnings(comparison, self.plan))
        if report:
            files["report"] = self.folder / "report.html"
            self._page(comparison, notes).write(files["report"])
        out.document(
            {
                "model": self.title,
                "files": {name: str(path) for name, path in files.items()},
                "costs": dict(self.plan.costs),
                "dense_costs": dict(self.plan.dense_costs),
                "budget": dict(self.plan.budget),
                "selector": self.plan.selector,
                "scores": dict(self.scores),
                "comparison": comparison.to_dict(),
                "skipped": [{"name": s.name, "kind": s.kind, "reason": s.reason} for s in self.sites.skipped],
                "notes": list(notes),
                **more,
            }
        )
        out.table(["", ">dense", ">compressed", ">change"], comparison.to_rows())
        for note in notes:
            out.print(note)
        for name, path in files.items():
            out.print(f"{name:7} {path}")

    def _page(self, comparison: Comparison, notes: tuple[str, ...]) -> Page:
        cost = next(iter(self.plan.budget), "macs")
        measured = ()
        if cost in self.plan.costs:
            measured = tuple(
                Measured(stage, (self.plan.dense_costs if stage == "dense" else self.plan.costs)[cost], score)
                for stage, score in self.scores
            )
        return Page(self.title, self.plan, self.table, comparison, self.sites.skipped, measured, notes)


def _warnings(comparison: Comparison, plan: Plan) -> list[str]:
    """What the measurement says against the plan."""
    found = []
    if "latency p50" in comparison:
        row = comparison["latency p50"]
        if row.compressed > row.dense:
            found.append(
                f"The compressed model is not faster here: {row.show(row.compressed)} against {row.show(row.dense)} dense. "
                "Use --budget latency=... or --guard to choose by measured time."
            )
        limit = plan.budget.get("latency")
        if limit is not None and row.compressed > 1.05 * limit:
            found.append(f"Measured latency {row.show(row.compressed)} is above the budget of {row.show(limit)}.")
    return found
