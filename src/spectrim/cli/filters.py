"""Principal filter analysis on the command line: recipes, and what is said of filters that were removed."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from torch import nn

from spectrim.cli.methods import FILTERS, LOW_RANK, Methods
from spectrim.cli.references import UsageError
from spectrim.methods import Method, PrincipalFilters, from_record
from spectrim.network.choices import ChannelsChoice
from spectrim.network.printing import count
from spectrim.network.sites import Sites
from spectrim.preparation import coupled
from spectrim.search.widths import KL, Energy, recommend
from spectrim.selection.plan import Plan


def with_channels(model: nn.Module, sites: Sites, example: Any) -> Sites:
    """The sites with the channels that can be removed."""

    def refuse(why: str) -> NoReturn:
        raise UsageError(f"--method {FILTERS}: there are no filters to remove ({why})")

    return coupled(model, sites, example, told=refuse)


def planned_methods(plan: Plan, calibrated: bool) -> list[Method]:
    """The methods of a plan that removes filters, so that its table is like its own; none for other plans."""
    removed = removals(plan)
    if not removed:
        return []
    others = any(not entry.choice.is_dense for entry in plan if entry.site not in removed)
    beside = Methods.read((LOW_RANK,)).chosen(calibrated) if others else []
    return [from_record(plan.methods[next(iter(removed.values())).method]), *beside]


def removals(plan: Plan) -> dict[str, ChannelsChoice]:
    """What a plan removes, by the name of the channels."""
    return {entry.site: entry.choice for entry in plan if isinstance(entry.choice, ChannelsChoice)}


def filter_values(plan: Plan) -> list[dict[str, Any]]:
    """The groups of channels that a plan removes filters of, as JSON values."""
    return [
        {
            "name": name,
            "channels": choice.of,
            "kept": len(choice.kept),
            "places": list(dict.fromkeys(place.module for place in choice.sides)),
            "rule": plan.methods.get(choice.method, {}).get("options", {}).get("rule"),
            "error": plan[name].error,
        }
        for name, choice in removals(plan).items()
    ]


def filter_notes(plan: Plan, sites: Sites) -> list[str]:
    """Sentences on the filters that were removed, for people; none where there were no channels to choose from."""
    notes: list[str] = []
    for one, many in (("channel", "filters"), ("head", "heads of attention")):
        known = {c.name: c.channels for c in sites.couplings if c.unit == one}
        gone = {name: choice.gone for name, choice in removals(plan).items() if choice.unit == one}
        if known:
            notes.append(
                f"{sum(gone.values())} of {sum(known.values())} {many} removed, in {len(gone)} of {len(known)} groups "
                f"of {one}s."
            )
    if not notes:
        return []
    steps = plan.facts.get("steps")
    if steps is not None:
        notes.append(f"The plan was made in {count(steps, 'step')} toward the budget.")
    return notes


def recommended(sites: Sites, recipe: Energy | KL, method: PrincipalFilters) -> Plan:
    """The plan of a recipe. What it warns of is in :func:`sample_notes`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return recommend(sites, recipe, method=method)


def sample_notes(sites: Sites, method: PrincipalFilters) -> list[str]:
    """A warning where recipes have too few samples for the spectra they read."""
    counts = {site.name: site.require(method.statistic, "widths").count for site in sites.coupled()}
    wide = {c.channels: counts[c.name] for c in sites.couplings if counts[c.name] <= c.channels}
    groups = sum(counts[c.name] <= c.channels for c in sites.couplings)
    if not wide:
        return []
    return [
        f"{groups} of {len(counts)} groups have as many channels as there are responses to them, or more (up to "
        f"{max(wide)} channels with {wide[max(wide)]} responses): too few filters are recommended. Calibrate on more "
        "samples."
    ]
