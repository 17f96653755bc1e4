"""One self-contained HTML page about a compression: it loads nothing from anywhere, runs no script, and prints well."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.errors import called_as
from spectrim.network.choices import SumChoice
from spectrim.network.files import write_text
from spectrim.network.printing import Grid, count
from spectrim.network.sites import Skipped
from spectrim.report import charts, summary
from spectrim.report.charts import COST_NAMES, Chart, cost_text, cost_title
from spectrim.report.comparison import Comparison
from spectrim.report.figures import Measured
from spectrim.report.machine import machine_facts
from spectrim.report.measures import Score
from spectrim.report.origin import Origin, Part, not_measured
from spectrim.report.rank_charts import rank_charts, rank_rows
from spectrim.report.rank_panels import check_recorded
from spectrim.report.words import glossary
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Entry, Plan
from spectrim.selection.trajectory import Trajectory

if TYPE_CHECKING:
    from jinja2 import Template

    from spectrim.nn.agreement import Agreement
    from spectrim.nn.watch.reconstruct import Errors
    from spectrim.pipeline import Result

choice_text = str  # its former name, until version 0.3


class Written:
    """A page that can be written to a file."""

    title: str
    origin: Origin

    def html(self) -> str:
        """The page as text."""
        raise NotImplementedError

    def _rendered(self, name: str, **parts: Any) -> str:
        """A template of this folder with what it asks for."""
        return _template(name).render(title=self.title, origin=self.origin, css=_style(), **parts)

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all, and return where it is."""
        write_text(path, self.html())
        return Path(path)


@dataclass(frozen=True)
class Page(Written):
    """What a page tells. Parts that are None or empty are left out.

    Attributes
    ----------
    title
        Heading, for example the model's name.
    plan
        What was chosen.
    candidates
        The table it was chosen from, for the spectra and the predicted curve.
    comparison
        What was measured of both models.
    skipped
        Layers left alone.
    measured
        Networks to put on the accuracy-cost figure.
    notes
        Sentences under the summary: warnings, how the network was trained.
    facts
        Machine and versions; taken from the comparison or from this machine if empty.
    trajectory
        Ranks while they were learned.
    fits
        What reconstructed layers miss of their dense answers, by the layer.
    agreement
        How far the outputs are from the dense network's.
    origin
        When, by which command, from what it was made, and how it is loaded.
    arms
        What became of the sets of methods that competed, as a table.
    """

    title: str
    plan: Plan
    candidates: Candidates | None = None
    comparison: Comparison | None = None
    skipped: Sequence[Skipped] = ()
    measured: Sequence[Measured] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    trajectory: Trajectory | None = None
    fits: Mapping[str, Errors] = field(default_factory=dict)
    agreement: Agreement | None = None
    origin: Origin = field(default_factory=Origin)
    arms: Grid | None = None

    def html(self) -> str:
        """The page as text. Raises ValueError if there is a trajectory without a C step."""
        parts = {**self._numbers(), **self._pictures(), **self._learned()}
        parts["words"] = list(glossary(_text(parts), (str(entry.choice) for entry in self.plan), self.plan.selector))
        skipped = [(each.name or each.kind, each.kind, each.reason) for each in self.skipped]
        return self._rendered(
            "page.html.jinja", kind="Spectrim report", said=" ".join(self._said()), notes=list(self.notes),
            skipped=skipped, plan_json=self.plan.to_json(), **parts,
        )  # fmt: skip

    def _said(self) -> Iterator[str]:
        """Under the title, what the plan was made for, how, and what it was measured with."""
        if limits := [f"{cost_title(c)} \u2264 {cost_text(c, limit)}" for c, limit in self.plan.budget.items()]:
            yield f"Budget: {', '.join(limits)}."
        if self.plan.selector:
            yield f"Selected by: {self.plan.selector}."
        if self.comparison:
            yield f"Measured with batches of {self.comparison.batch}."

    @property
    def _costs(self) -> list[str]:
        """The costs that have a column."""
        shown = [c for c in dict.fromkeys([*COST_NAMES, *self.plan.dense_costs]) if c in self.plan.dense_costs]
        # Elsewhere bytes are in step with parameters.
        return [c for c in shown if c != "bytes" or _counts_bytes(self.plan)]

    def _numbers(self) -> dict[str, Any]:
        """What the tables tell."""
        plan, comparison = self.plan, self.comparison
        facts = dict(self.facts) or dict(comparison.facts if comparison else {}) or machine_facts()
        return {
            "tiles": summary.tiles(plan, comparison, self.agreement, stored=_counts_bytes(plan)),
            "rows": list(summary.rows(plan, comparison, self.agreement)),
            "layers": [_layer(entry, self._costs, self.fits) for entry in plan],
            "fitted": any(fit.held_out is not None for fit in self.fits.values()),
            "cost_names": [cost_title(c) for c in self._costs],
            "arms": self.arms,
            "unit": plan.unit,
            "shared": any(entry.members for entry in plan),
            "facts": {**facts, **{f"plan: {name}": _fact(value) for name, value in plan.facts.items()}},
            "unmeasured": list(not_measured(comparison, self.agreement)),
        }

    def _pictures(self) -> dict[str, Any]:
        """What the charts show."""
        plan, table = self.plan, self.candidates
        first = next(iter(plan.budget), "") or next(iter(self._costs), "")
        costs = dict.fromkeys(c for c in (first, "macs") if c in plan.dense_costs)
        curves = [chart for chart in (self._score_chart(first), self._loss_chart(first)) if chart is not None]
        return {
            "networks": [(cost_title(cost), charts.network(plan, cost)) for cost in costs],
            "curves": curves,
            "predicted": any(chart.curves for chart in curves),
            "measured": bool(self.measured),
            "noise": any(Score(each.score).samples for each in self.measured),
            "spectra": charts.spectra(table, plan) if table is not None else [],
            "unfoldings": sorted({cut[0] for e in plan if (cut := e.choice.cut) and cut[1]}),
            "sparse": _has_sparse(plan),
        }

    def _score_chart(self, cost: str) -> Chart | None:
        if not self.measured or not cost:
            return None
        rows = self.comparison.rows if self.comparison else ()
        score = next((row.metric for row in rows if row.better == "higher"), "score")
        return charts.score_chart(self.measured, self.plan.dense_costs[cost], cost, score)

    def _loss_chart(self, cost: str) -> Chart | None:
        table = self.candidates
        if table is None or cost not in table.dense:
            return None
        # Where channels are removed costs do not add up, and no selection from one table is a prediction.
        points = [] if any(row.of_channels for row in table) else charts.predicted(table, cost)
        return charts.loss_chart(points, table, self.plan, cost)

    def _learned(self) -> dict[str, Any]:
        if self.trajectory is None:
            return {"ranks": []}
        check_recorded(self.trajectory)
        return {
            "ranks": rank_rows(self.trajectory),
            "steps": len(self.trajectory),
            "learning": rank_charts(self.trajectory),
            "learned": _learning(self.trajectory),
        }


@called_as("Write write_report(path, result)", path=(str, os.PathLike))
def write_report(
    path: str | Path,
    result: Result,
    *,
    title: str = "Compression report",
    comparison: Comparison | None = None,
    measured: Sequence[Measured] = (),
    notes: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    trajectory: Trajectory | None = None,
    origin: Origin | None = None,
) -> Path:
    """Write the page about what :func:`spectrim.compress` returned.

    Parameters
    ----------
    path
        The HTML file.
    title, comparison, measured, notes, facts, trajectory
        As in :class:`Page`; by default the notes of the result's own report.
    origin
        Where the network comes from and how it is loaded; by default now, from the running program, with the digest of
        the tensors of the result.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ValueError
        If there is a trajectory without a C step.
    """
    notes = tuple(dict.fromkeys([*result.report.sentences, *notes]))
    report = result.report
    origin = origin or Origin(parts=(Part.of_model("compressed weights", title, result.model),))
    page = Page(
        title, result.plan, result.candidates, comparison, result.sites.skipped, measured, notes, facts or {},
        trajectory, report.fits, report.agreement, origin, report.competed,
    )  # fmt: skip
    return page.write(path)


@cache
def _template(name: str) -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("spectrim", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name)


@cache
def _style() -> Any:
    """The style that pages have in common."""
    from markupsafe import Markup

    return Markup(files("spectrim.report").joinpath("page.css").read_text(encoding="utf-8"))


def _fact(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value


def _text(parts: Mapping[str, Any]) -> str:
    """What the page says in our own words: names of layers may be any words."""
    cells = [text for row in parts["rows"] for text in row] + [tile.name for tile in parts["tiles"]]
    costs = [text for layer in parts["layers"] for pair in layer["costs"] for text in pair]
    said = [parts["unit"], *parts["unmeasured"], *parts["cost_names"], *parts["facts"]]
    said += [*("held out" for _ in range(parts["fitted"])), *("C step" for _ in parts["ranks"]), "dense"]
    return "; ".join([*cells, *costs, *said])


def _counts_bytes(plan: Plan) -> bool:
    """Whether bytes are a limit, or positions of sparse weights are among them."""
    return "bytes" in plan.budget or _has_sparse(plan)


def _has_sparse(plan: Plan) -> bool:
    return any(isinstance(entry.choice, SumChoice) and entry.choice.density for entry in plan)


def _learning(trajectory: Trajectory) -> str:
    """How a run of learned ranks went, in sentences."""
    steps, settled, distance = len(trajectory), trajectory.settled, trajectory.records[-1].distance
    took = count(steps, "C step")
    if steps > 1:
        took += f", the last {settled} without a change" if settled else ", with changes to the last"
    return f"{took}. At the end the weights were at a relative distance of {distance:.2g} from their low-rank copies."


def _layer(entry: Entry, shown: Sequence[str], fits: Mapping[str, Errors]) -> dict[str, Any]:
    missed = [fits[name] for name in entry.sites if name in fits]
    unseen = [fit.held_out for fit in missed if fit.held_out is not None]
    return {
        "fitted": f"{sum(fit.fitted for fit in missed) / len(missed):.2%}" if missed else "",
        "held_out": f"{sum(unseen) / len(unseen):.2%}" if unseen else "",
        "name": entry.site,
        "members": list(entry.members),
        "kind": entry.kind,
        "choice": str(entry.choice),
        "method": entry.choice.method or "",
        "dense": entry.choice.is_dense,
        "error": f"{entry.error:.2%}" if not entry.choice.is_dense else "",
        "costs": [(cost_text(c, entry.dense_costs[c]), cost_text(c, entry.costs[c])) for c in shown],
    }
