"""One self-contained HTML page about several compressed networks beside the dense one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spectrim.network.printing import count
from spectrim.report.charts import Chart, score_chart
from spectrim.report.figures import Measured
from spectrim.report.machine import machine_facts
from spectrim.report.measures import Score
from spectrim.report.origin import Origin
from spectrim.report.page import Written
from spectrim.report.side_by_side import SideBySide
from spectrim.report.words import glossary
from spectrim.selection.plan import Plan

LABELS = 4  # beside dots, at most


@dataclass(frozen=True)
class SideBySidePage(Written):
    """What a page about several networks tells.

    Attributes
    ----------
    title
        Heading, for example the model's name.
    networks
        What is known of each.
    plans
        What was chosen for each, by its name.
    notes
        Sentences above the figure.
    facts
        Machine and versions; of this machine if empty.
    origin
        When, by which command and from what it was made.
    """

    title: str
    networks: SideBySide
    plans: Mapping[str, Plan] = field(default_factory=dict)
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)

    def html(self) -> str:
        """The page as text."""
        heads, lines = self.networks.table()
        notes = [*self.networks.sentences, *self.notes]
        choices = [str(entry.choice) for plan in self.plans.values() for entry in plan]
        said = "; ".join(["dense", *notes, *(cell for line in lines for cell in line)])
        chart = networks_chart(self.networks)
        caption = "A dot is a network: further to the left less work is left, and further up it is better."
        if chart is not None and not any(dot.barred for dot in chart.dots):
            caption += " On how many samples is not known, so that there are no error bars."
        return self._rendered(
            "networks.html.jinja", kind="networks side by side by Spectrim", notes=notes,
            said=f"{count(len(self.networks), 'network')} beside the dense one.",
            curves=[] if chart is None else [("How good they are, and what they cost", chart, caption)],
            legend="Behind a value: dense over compressed, as a ratio; of scores the difference in points.",
            heads=["measure", *heads[1:]], lines=lines,
            plans=[(name, changes(plan)) for name, plan in self.plans.items()], load="",
            words=list(glossary(said, choices)), facts=dict(self.facts) or machine_facts(),
        )  # fmt: skip


def changes(plan: Plan) -> list[tuple[str, str, str]]:
    """Layers that a plan changes, with the choice and what it loses."""
    return [(entry.site, str(entry.choice), f"{entry.error:.2%}") for entry in plan if not entry.choice.is_dense]


def _agreed(networks: SideBySide) -> list[float]:
    """How often the dense network's class comes first, where it is known."""
    agreed = [networks.agreements.get(name) for name in networks.comparisons]
    return [Score(100 * each.top1, each.samples) for each in agreed if each is not None and each.top1 is not None]


def networks_chart(networks: SideBySide) -> Chart | None:
    """A dot a network: its score, or how often the dense network's class comes first, over its multiply-accumulates.

    None where one of them is not known of every network.
    """
    names = list(networks.comparisons)
    known = [{row.metric: row for row in each.rows} for each in networks.comparisons.values()]
    common = [metric for metric in (known[0] if known else {}) if all(metric in rows for rows in known)]
    cost = next((metric for metric in common if metric in ("MACs", "MACs (planned)")), None)
    score = next((m for m in common if known[0][m].unit == "%" and known[0][m].better == "higher"), None)
    if score is not None:
        dense, scores = known[0][score].dense, [rows[score].compressed for rows in known]
    else:
        score, dense, scores = "same class first", 100.0, _agreed(networks)
    if cost is None or len(scores) < len(names):
        return None
    whole, costs = known[0][cost].dense, [rows[cost].compressed for rows in known]
    measured = [Measured("dense", whole, dense), *map(Measured, names, costs, scores)]
    chart = score_chart(measured, whole, "macs", score)
    labels = _labels(measured)
    dots = [dataclasses.replace(dot, label=label) for dot, label in zip(chart.dots, labels, strict=True)]
    return dataclasses.replace(chart, dots=tuple(dots))


def _labels(networks: Sequence[Measured]) -> list[str]:
    """Names beside dots, the dense network's first. Of many those of the least and the most cost alone, since values
    stand in the table, and labels would lie on each other on a phone."""
    dense, *others = networks
    ends = [pick(others, key=lambda each: each.cost) for pick in (min, max)]
    shown = {each.label for each in (dense, *(others if len(others) <= LABELS else ends))}
    return [each.label if each.label in shown else "" for each in networks]
