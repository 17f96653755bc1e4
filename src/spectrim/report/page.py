"""One self-contained HTML page about a compression: it loads nothing from anywhere, and prints well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.network.choices import SumChoice
from spectrim.network.files import write_text
from spectrim.network.sites import Skipped
from spectrim.report import figures
from spectrim.report.comparison import Comparison, Measure, show
from spectrim.report.figures import Measured
from spectrim.report.machine import machine_facts
from spectrim.report.ranks import rank_paths
from spectrim.selection.budget import UNITS
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Entry, Plan
from spectrim.selection.trajectory import Trajectory

if TYPE_CHECKING:
    from jinja2 import Template

    from spectrim.nn.watch.reconstruct import Errors
    from spectrim.pipeline import Result

_COST_NAMES = {"macs": "MACs", "parameters": "Parameters", "bytes": "Weights", "latency": "Predicted latency"}


choice_text = str  # its former name, until version 0.3


@dataclass(frozen=True)
class Page:
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

    def html(self) -> str:
        """The page as text."""
        plan = self.plan
        shown = [c for c in dict.fromkeys([*_COST_NAMES, *plan.dense_costs]) if c in plan.dense_costs]
        if "bytes" in shown and not _counts_bytes(plan):
            shown.remove("bytes")  # in step with parameters
        facts = dict(self.facts) or dict(self.comparison.facts if self.comparison else {}) or machine_facts()
        return _template().render(
            title=self.title,
            tiles=_tiles(plan, self.comparison),
            comparison=self.comparison,
            notes=list(self.notes),
            figures=self._figures(shown),
            layers=[_layer(entry, shown, self.fits) for entry in plan],
            fitted=any(fit.held_out is not None for fit in self.fits.values()),
            cost_names=[_COST_NAMES.get(c, c) for c in shown],
            unit=plan.unit,
            shared=any(entry.members for entry in plan),
            skipped=list(self.skipped),
            facts={**facts, **{f"costs: {k}": v for k, v in plan.facts.items()}},
            budget=[f"{_COST_NAMES.get(c, c)} \u2264 {_show(c, limit)}" for c, limit in plan.budget.items()],
            selector=plan.selector,
            plan_json=plan.to_json(),
        )

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all, and return where it is."""
        write_text(path, self.html())
        return Path(path)

    def _figures(self, shown: Sequence[str]) -> list[dict[str, str]]:
        plan = self.plan
        first = next(iter(plan.budget), "") or (shown[0] if shown else "")
        found = []

        def add(name: str, figure: Any, caption: str) -> None:
            found.append({"name": name, "uri": figures.to_data_uri(figure), "caption": caption})

        if self.candidates is not None and first:
            add(
                "Accuracy and cost" if self.measured else "Loss and cost",
                figures.tradeoff(self.candidates, self.plan, cost=first, measured=self.measured),
                "What the table predicts to lose at every budget"
                + (", and what was measured above it." if self.measured else "."),
            )
        for cost in [*([first] if first else []), *(c for c in shown if c != first)]:
            if len(found) < 3:
                add(
                    f"{_COST_NAMES.get(cost, cost)} by layer",
                    figures.costs(self.plan, cost),
                    "Wide grey bars are dense, narrow blue ones the plan; the share that remains is beside them.",
                )
        if self.trajectory is not None:
            add("Ranks while learning", rank_paths(self.trajectory), _learning(self.trajectory))
        if self.candidates is not None and any(row.spectra for row in self.candidates):
            add(
                "Spectra and chosen ranks",
                figures.spectra(self.candidates, self.plan),
                "Share of energy in each component, logarithmic. What lies right of the orange line is cut off"
                + (", and in part made up for by single weights: density and pattern." if _has_sparse(plan) else "."),
            )
        return found


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
) -> Path:
    """Write the page about what :func:`spectrim.compress` returned.

    Parameters
    ----------
    path
        The HTML file.
    title, comparison, measured, notes, facts, trajectory
        As in :class:`Page`; by default the notes of the result's own report.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ValueError
        If there is a trajectory without a C step.
    OSError
        If the file cannot be written.
    """
    notes = tuple(dict.fromkeys([*result.report.sentences, *notes]))
    page = Page(
        title,
        result.plan,
        result.candidates,
        comparison,
        result.sites.skipped,
        measured,
        notes,
        facts or {},
        trajectory,
        result.report.fits,
    )
    return page.write(path)


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("spectrim.report").joinpath("page.html.jinja").read_text(encoding="utf-8"))


def _counts_bytes(plan: Plan) -> bool:
    """Whether bytes are a limit, or positions of sparse weights are among them."""
    return "bytes" in plan.budget or _has_sparse(plan)


def _has_sparse(plan: Plan) -> bool:
    return any(isinstance(entry.choice, SumChoice) and entry.choice.density for entry in plan)


def _tiles(plan: Plan, comparison: Comparison | None) -> list[dict[str, str]]:
    """The numbers at the top: measured where there is a measurement, planned otherwise."""
    if comparison is None:
        return [
            {
                "name": f"{_COST_NAMES.get(c, c)} (planned)",
                "value": f"{plan.ratio(c):.2f}x",
                "detail": f"{_show(c, plan.dense_costs[c])} \u2192 {_show(c, plan.costs[c])}",
                "good": "yes" if plan.ratio(c) >= 1 else "no",
            }
            for c in plan.dense_costs
        ]
    metrics = {"MACs", "parameters", "latency p50", *(("file size",) if _counts_bytes(plan) else ())}
    wanted = [r for r in comparison.rows if r.better == "higher" or r.metric in metrics]
    return [
        {
            "name": r.metric,
            "value": r.change,
            "detail": f"{r.show(r.dense)} \u2192 {r.show(r.compressed)}",
            "good": "yes" if _holds(r) else "no",
        }
        for r in wanted
    ]


def _learning(trajectory: Trajectory) -> str:
    """How a run of learned ranks went, in sentences."""
    steps, settled, distance = len(trajectory), trajectory.settled, trajectory.records[-1].distance
    took = f"{steps} C step{'s' if steps > 1 else ''}"
    if steps > 1:
        took += f", the last {settled} without a change" if settled else ", with changes to the last"
    metric = any(record.metric is not None for record in trajectory.records)
    return (
        f"{took}. At the end the weights were at a relative distance of {distance:.2g} from their low-rank copies. "
        "A line of the map is a layer, a column a C step; below it are costs, the distance"
        + (" and what was measured of the copies." if metric else ".")
    )


def _holds(row: Measure) -> bool:
    """Whether a line is no loss: half a point of a score is within what people accept."""
    if row.speed is not None and not row.speed.differs:
        return True
    return row.compressed >= row.dense - 0.5 if row.better == "higher" else row.compressed <= row.dense


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
        "costs": [(_show(c, entry.dense_costs[c]), _show(c, entry.costs[c])) for c in shown],
    }


def _show(cost: str, value: float) -> str:
    return show(value, UNITS.get(cost, ""))
