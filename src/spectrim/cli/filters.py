"""Principal filter analysis on the command line: its options, and what is said of filters that were removed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import typer
from torch import nn

from spectrim.channel_plans.widths import KL, Energy, recommend
from spectrim.cli.common import refuse
from spectrim.cli.references import UsageError
from spectrim.methods import PrincipalFilters
from spectrim.network.choices import ChannelsChoice
from spectrim.network.sites import Sites
from spectrim.nn.channels.graph import couple
from spectrim.selection.plan import Plan

METHOD = "principal-filters"
# Parameters of commands that no other method has.
PARAMETERS = frozenset({"width_recipe", "rule", "pooling", "with_low_rank", "figure"})
_NEEDS_BUDGET = frozenset({"budget", "plan_file", "selector", "guard", "with_low_rank"})
_SHARING = frozenset({"share", "groups"})


@dataclass(frozen=True)
class Filters:
    """What the command line says about removing filters.

    Attributes
    ----------
    rule
        By which filters are chosen.
    pooling
        Of responses over the positions of a sample.
    recipe
        That says how many filters stay, where there is no budget to say it.
    with_low_rank
        Whether low rank is on offer beside it.
    """

    rule: str = PrincipalFilters.rule
    pooling: str = PrincipalFilters.pooling
    recipe: Energy | KL | None = None
    with_low_rank: bool = False

    @classmethod
    def of(
        cls,
        context: typer.Context,
        method: str,
        *,
        recipe: str | None = None,
        rule: str = rule,
        pooling: str = pooling,
        with_low_rank: bool = False,
    ) -> Filters:
        """What ``--recipe``, ``--rule``, ``--pooling`` and ``--with-low-rank`` say.

        Raises
        ------
        UsageError
            If they do not go with the method or with other options, or their values cannot be used.
        """
        if method != METHOD:
            refuse(context, PARAMETERS, f"is for --method {METHOD}, not for --method {method}")
            return cls()
        refuse(context, _SHARING, f"does not combine with --method {METHOD}")
        try:
            PrincipalFilters(rule=rule)
            PrincipalFilters(pooling=pooling)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        if recipe is None:
            return cls(rule, pooling, None, with_low_rank)
        found = _recipe(recipe)
        refuse(
            context,
            _NEEDS_BUDGET,
            f"does not combine with --recipe {recipe}, which says by itself how many filters stay",
        )
        return cls(rule, pooling, found)

    def method(self, multiple_of: int | None) -> PrincipalFilters:
        return PrincipalFilters(rule=self.rule, pooling=self.pooling, multiple_of=multiple_of)


def with_channels(model: nn.Module, sites: Sites, example: Any) -> Sites:
    """The sites with the channels that can be removed.

    Raises
    ------
    UsageError
        If there are none, or what finds them is not installed.
    """
    known = len(sites.skipped)
    try:
        found = couple(model, sites, example)
    except ImportError as error:
        raise UsageError(f"--method {METHOD}: {error}") from error
    if not found.couplings:
        reasons = "; ".join(f"{s.name or s.kind}: {s.reason}" for s in found.skipped[known:][:3])
        raise UsageError(f"--method {METHOD}: there are no filters to remove ({reasons or 'no layer reads another'})")
    return found


def planned_filters(plan: Plan) -> Filters | None:
    """What a plan that removes filters was made with, so that the table is like its own; None for other plans."""
    removed = removals(plan)
    if not removed:
        return None
    options = plan.methods.get(next(iter(removed.values())).method, {}).get("options", {})
    given = {key: options[key] for key in ("rule", "pooling") if key in options}
    others = any(not entry.choice.is_dense for entry in plan if entry.site not in removed)
    return Filters(**given, with_low_rank=others)


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
    known = {coupling.name: coupling.channels for coupling in sites.couplings}
    if not known:
        return []
    gone = {name: choice.gone for name, choice in removals(plan).items()}
    notes = [
        f"{sum(gone.values())} of {sum(known.values())} filters removed, in {len(gone)} of {len(known)} groups of "
        "channels."
    ]
    steps = plan.facts.get("steps")
    if steps is not None:
        notes.append(f"The plan was made in {steps} step{'s'[: steps > 1]} toward the budget.")
    return notes


def recommended(sites: Sites, filters: Filters, multiple_of: int | None) -> Plan:
    """The plan of a recipe. What it warns of is in :func:`sample_notes`."""
    assert filters.recipe is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return recommend(sites, filters.recipe, method=filters.method(multiple_of))


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


def _recipe(text: str) -> Energy | KL:
    name, equals, value = text.partition("=")
    if text == "kl":
        return KL()
    if name == "energy" and equals:
        try:
            return Energy(float(value))
        except ValueError as error:
            reason = str(error) if "share" in str(error) else f"{value!r} is not a number"
            raise UsageError(f"--recipe {text}: {reason}") from error
    raise UsageError(f"--recipe {text!r} is not known; choose kl, or energy=SHARE, as energy=0.95")
