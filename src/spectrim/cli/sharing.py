"""Which layers may share factors, as the command line says it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from spectrim.cli.common import usage
from spectrim.cli.methods import JOINT, LOW_RANK, Methods
from spectrim.cli.options import SharingOptions
from spectrim.cli.references import UsageError
from spectrim.cli.values import read_groups
from spectrim.methods.joint_layers import compatible
from spectrim.network.groups import group
from spectrim.network.sites import Sites
from spectrim.selection.plan import Plan

NONE_ALIKE = "no layers are alike enough to share factors, as far as their names, shapes and inputs tell"
Wanted = bool | Mapping[str, Sequence[str]]
"""True for the groups that the rules find, False for none, or names of layers by the name of the group."""


def wanted_groups(options: SharingOptions, methods: Methods, limited: Collection[str] = ()) -> Wanted:
    """What ``--share``, ``--groups`` and ``--method`` say together, where budgets limit these costs.

    What sharing saves is parameters and bytes: under other budgets it is hardly ever chosen, and costs time.
    """
    joint = next((name for name in (JOINT, "joint-svd") if name in methods), None)
    if options.share is False and joint is not None:
        raise UsageError(f"--method {joint} does not combine with --no-share: it is for layers that share factors")
    if options.groups is not None:
        return read_groups(options.groups)
    if options.share is None:
        usual = methods.names == (LOW_RANK,) and not {"parameters", "bytes"}.isdisjoint(limited)
        return usual or joint is not None
    return options.share


def offer(sites: Sites, wanted: Wanted) -> Sites:
    """The sites with the groups that are wanted."""
    if wanted is False:
        return sites
    if wanted is True:
        return group(sites)
    left = {skipped.name: skipped.reason for skipped in sites.skipped}
    for name, members in wanted.items():
        for member in members:
            if member not in sites:
                why = f"which is left alone: {left[member]}" if member in left else "which the model does not have"
                raise UsageError(f"--groups: group {name!r} names layer {member!r}, {why}")
    with usage("--groups"):
        found = group(sites, wanted)
    for name, members in found.groups.items():
        if not _alike(sites, members):
            specs = [sites[member].spec for member in members]
            each = ", ".join(f"{s.name!r} ({s.kind}, {s.in_channels} -> {s.out_channels})" for s in specs)
            raise UsageError(
                f"--groups: the layers of group {name!r} cannot share a factor: {each}; expected equal kernels and "
                "equal input or output channels"
            )
    return found


def planned_groups(plan: Plan, sites: Sites) -> Wanted:
    """The groups of a plan, so that the table has them too; False without any."""
    found = {entry.site: entry.members for entry in plan if len(entry.members) > 1 and entry.site not in sites}
    known = {name: members for name, members in found.items() if all(member in sites for member in members)}
    return {name: members for name, members in known.items() if _alike(sites, members)} or False


def _alike(sites: Sites, members: Sequence[str]) -> bool:
    specs = [sites[member].spec for member in members]
    return compatible(specs, "left") or compatible(specs, "right")
