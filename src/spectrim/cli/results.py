"""What a finished compression leaves behind: files, a table, a document."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.cli.common import Output
from spectrim.cli.origins import load_lines, origin
from spectrim.cli.steps import skipped_values
from spectrim.cli.subject import Subject
from spectrim.errors import ExportError
from spectrim.network.choices import SumChoice
from spectrim.network.files import write_text
from spectrim.network.printing import count, show
from spectrim.nn.agreement import Agreement
from spectrim.nn.checkpoint import save
from spectrim.nn.shipping import is_shipped
from spectrim.pipeline import Result
from spectrim.report import Comparison, Measured, Score, animate_ranks, compare, write_report
from spectrim.selection.budget import UNITS
from spectrim.selection.plan import Plan
from spectrim.selection.printed import plan_grid
from spectrim.train import LearnedResult, TrainingResult

_LAYERS = 16
"""Lines of a table of layers, at most."""
_HOLDS = {
    "model": "the compressed network: weights and plan",
    "plan": "what was chosen for every layer; --plan carries it out again",
    "report": "the same for people: open it in a browser",
    "result": "all figures, as --json prints them; compare reads them",
    "transformers": "the network as a folder of transformers, for from_pretrained",
    "ranks": "the ranks that layers had while they were learned",
    "animation": "the same as a film",
}
"""What files are for, by what they hold."""


def write_result(result: Result, folder: Path) -> dict[str, Path]:
    """Write the network, its plan, and the ranks it went through if they were learned; files by what they hold.

    A model of transformers is written as a folder of its own kind as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"model": folder / "model.safetensors", "plan": folder / "plan.json"}
    save(result.model, result.plan, files["model"])
    result.plan.write(files["plan"])
    if is_shipped(result.model):
        files["transformers"] = folder / "transformers"
        result.model.save_pretrained(files["transformers"])  # type: ignore[operator]
    if isinstance(result, LearnedResult):
        files["ranks"] = folder / "ranks.json"
        result.trajectory.write(files["ranks"])
    return files


@dataclass(frozen=True)
class Outcome:
    """A compression, as far as it has come."""

    title: str  # of the report
    dense: nn.Module  # the model that was compressed
    result: Result  # the compressed one, and how it came about
    folder: Path  # where files go
    named: Mapping[str, str]  # references of model, weights and data, by their role
    # ``(stage, percent)`` in the order they were measured: ``dense`` first, the finished model last.
    scores: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()  # sentences for the report
    seeds: Mapping[str, int] = field(default_factory=dict)  # by what they are for

    def scored(self, stage: str, percent: float) -> Outcome:
        return dataclasses.replace(self, scores=(*self.scores, (stage, percent)))

    def noted(self, *notes: str) -> Outcome:
        return dataclasses.replace(self, notes=(*self.notes, *notes))

    def tuned(self, training: TrainingResult, agreed: Agreement | None) -> Outcome:
        """After fine-tuning, with the finished model's agreement in place of the one measured before."""
        epochs = count(training.epochs, "epoch")
        note = f"Fine-tuned for {epochs} in {training.seconds:.0f} s, with the dense model as teacher."
        return dataclasses.replace(self, result=self.result.reporting(agreement=agreed)).noted(note)

    @property
    def model(self) -> str:
        """The reference of the dense model."""
        return self.named["model"]

    @property
    def trained(self) -> bool:
        """Whether the compressed network was trained."""
        return isinstance(self.result, LearnedResult) or "training data" in self.named

    def known_score(self, model: nn.Module) -> float:
        """The score already measured of one of the two models."""
        return self.scores[0][1] if model is self.dense else self.scores[-1][1]

    def compared(self, work: Subject) -> tuple[Outcome, Comparison]:
        """Both networks measured, in torch's eager mode where the runtime cannot take the compressed one."""
        known = self.known_score if self.scores else None
        how = {"evaluate": known, "threads": work.network.threads}
        try:
            return self, compare(self.dense, self.result.model, work.example, runtime=work.network.runtime, **how)
        except ExportError as error:  # of the compressed network: the dense one was tried before the work
            eager = compare(self.dense, self.result.model, work.example, **how)
            return self.noted(f"Time is that of torch's eager mode: {error}."), eager

    def finish(
        self, out: Output, comparison: Comparison, *, report: bool = True, animate: bool = False, **more: Any
    ) -> None:
        """Write the files, print the table or the document."""
        plan = self.result.plan
        files = write_result(self.result, self.folder)
        trajectory = self.result.trajectory if isinstance(self.result, LearnedResult) else None
        if animate and trajectory is not None:
            files["animation"] = animate_ranks(trajectory, self.folder / "ranks.gif")
        notes = (
            *self.result.report.sentences,
            *_sums(plan),
            *self.notes,
            *_sharing(plan),
            *(() if self.result.report.tolerance is not None else _idle(plan)),
            *_warnings(comparison, plan, timed=bool(self.result.report.measured)),
        )
        load = load_lines(self.model, self.dense, files)
        if report:
            files["report"] = self.folder / "report.html"
            write_report(
                files["report"], self.result, title=self.title, comparison=comparison, measured=self._measured(),
                notes=notes, trajectory=trajectory,
                origin=origin(self.named, self.seeds, self.dense, self.result.model, load),
            )  # fmt: skip
        files["result"] = self.folder / "result.json"
        document = {**self._document(files, comparison, notes), "load": load, **more}
        text = json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False, default=str)
        write_text(files["result"], f"{text}\n")
        out.document(document)
        out.table(["", ">dense", ">compressed", "change"], comparison.to_rows())
        if (competed := self.result.report.competed).rows:
            out.grid(competed)
        out.grid(dataclasses.replace(plan_grid(plan, _LAYERS, files["plan"].name), notes=()))
        for note in notes:
            out.prose(note)
        out.written(self.folder, {path.name: _HOLDS[name] for name, path in files.items()})
        out.code("To load it in Python:", load)
        if missing := list(self._unmeasured()):
            out.print("\nNot measured:")
        for sentence, command in missing:
            out.prose(sentence, "  ")
            if command:
                out.print(f"    {command}")  # not wrapped, so that it can be copied

    def _document(self, files: Mapping[str, Path], comparison: Comparison, notes: Sequence[str]) -> dict[str, Any]:
        """All figures, as JSON values."""
        plan = self.result.plan
        agreed = self.result.report.agreement and dataclasses.asdict(self.result.report.agreement)
        return {
            "model": self.title,
            "files": {name: str(path) for name, path in files.items()},
            "costs": dict(plan.costs),
            "dense_costs": dict(plan.dense_costs),
            "budget": dict(plan.budget),
            "selector": plan.selector,
            "groups": [
                {"name": e.site, "members": list(e.members), "method": e.choice.method, "choice": str(e.choice)}
                for e in plan
                if e.members
            ],
            "scores": dict(self.scores),
            "test_samples": max((Score(score).samples for _, score in self.scores), default=0),
            "comparison": comparison.to_dict(),
            # Without what each sample adds.
            "agreement": agreed and {name: value for name, value in agreed.items() if name != "parts"},
            "skipped": skipped_values(self.result.sites),
            "arms": [arm.record() for arm in self.result.report.arms],
            "notes": list(notes),
        }

    def _unmeasured(self) -> Iterator[tuple[str, str]]:
        """What the numbers do not say, each with the command that would, if it is one of its own."""
        if not self.scores:
            command = ["spectrim", "evaluate", self.model, "-c", str(self.folder / "model.safetensors"), "-d", "DATA"]
            yield "accuracy, without --test:", shlex.join(command)
        if not self.result.sites.samples:
            yield "what layers lose on data: without --data they were fitted to their weights alone", ""
        elif not self.trained:
            yield "what training would win back: --train DATA fine-tunes", ""

    def _measured(self) -> tuple[Measured, ...]:
        plan = self.result.plan
        cost = next(iter(plan.budget), "macs")
        if cost not in plan.costs:
            return ()
        return tuple(
            Measured(stage, (plan.dense_costs if stage == "dense" else plan.costs)[cost], score)
            for stage, score in self.scores
        )


def _sharing(plan: Plan) -> list[str]:
    groups = [entry for entry in plan if entry.members]
    layers = sum(len(entry.members) for entry in groups)
    return [f"{layers} layers share factors, in {count(len(groups), 'group')}."] if groups else []


def _sums(plan: Plan) -> list[str]:
    """How many layers have a sparse part."""
    parts = [e.choice for e in plan if isinstance(e.choice, SumChoice) and e.choice.density]
    both = sum(1 for choice in parts if choice.rank)
    if not parts:
        return []
    return [f"{count(len(parts), 'layer')} with a sparse weight, {both} of them beside a low-rank pair."]


def _idle(plan: Plan) -> list[str]:
    """Which limits are none; those within a tolerance were found and not stated, and the report tells of them."""
    return [
        f"The budget of {show(limit, UNITS.get(cost, ''))} for {cost} limits nothing: the dense network takes "
        f"{show(plan.dense_costs[cost], UNITS.get(cost, ''))}."
        for cost, limit in plan.budget.items()
        if cost in plan.dense_costs and limit >= plan.dense_costs[cost]
    ]


def _warnings(comparison: Comparison, plan: Plan, *, timed: bool) -> list[str]:
    """What the measurement says against the plan. Where it is ``timed``, the report tells.

    Its times are those that the choice was made by.
    """
    found = []
    if "latency p50" in comparison and not timed:
        row = comparison["latency p50"]
        changed = any(not entry.choice.is_dense for entry in plan)
        if changed and row.compressed > row.dense and (row.speed is None or row.speed.differs):
            found.append(
                f"The compressed model is not faster here: {row.show(row.compressed)} against {row.show(row.dense)} "
                "dense. Use --budget latency=... or --guard to choose by measured time."
            )
        limit = plan.budget.get("latency")
        if limit is not None and row.compressed > 1.05 * limit:
            found.append(f"Measured latency {row.show(row.compressed)} is above the budget of {row.show(limit)}.")
    return found
