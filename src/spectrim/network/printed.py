"""Sites as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spectrim.network.printing import Grid, amount, count, folded, listed, reasons, tail
from spectrim.network.sites import Sites


def sites_grid(sites: Sites) -> Grid:
    """A line a layer: what it is, what it costs, and how much was seen of it."""
    layers = [row for row in sites.rows() if not row["skipped"]]
    others = [row for row in sites.rows() if row["skipped"]]
    lines = [
        [
            tail(row["layer"]),
            row["kind"],
            f"{row['in_channels']} -> {row['out_channels']}",
            amount("macs", row["macs"]) if sites.seen else "",
            amount("parameters", row["parameters"]),
            amount("", row["rows"]) if row["rows"] else "",
        ]
        for row in layers
    ]
    parameters = sum(row["parameters"] for row in layers)
    macs = sum(row["macs"] for row in layers)
    beside = (
        sum(spec.products for spec in sites.untouched) + sites.other_macs,
        sum(spec.stored + spec.out_channels * spec.bias for spec in sites.untouched) + sites.other_parameters,
    )
    totals = [
        _total("these layers", macs, parameters, sites.seen),
        _total("whole network", macs + beside[0], parameters + beside[1], sites.seen),
    ]
    title = [f"{count(len(sites), 'layer')} to choose at", f"{len(others):,} left alone" if others else ""]
    title += [f"{count(sites.samples, 'sample')} seen" if sites.samples else "not calibrated yet"]
    return Grid(
        ["layer", "kind", ">channels", ">MACs", ">parameters", ">rows seen"],
        folded(lines, lambda rest: ["...", f"({len(rest):,} more)", *[""] * 4]),
        totals,
        title="; ".join(part for part in title if part),
        notes=tuple(_notes(sites)),
        words=[("rows seen", "inputs of the layer that its statistics rest on")] if sites.samples else [],
    )


def _total(name: str, macs: float, parameters: float, seen: bool) -> Sequence[str]:
    return [name, "", "", amount("macs", macs) if seen else "", amount("parameters", parameters), ""]


def _notes(sites: Sites) -> Iterator[str]:
    for name, members in [*sites.groups.items()][:5]:
        yield f"{tail(name)}: may share a factor: {listed(members, 4)}"
    if len(sites.groups) > 5:
        yield f"{len(sites.groups) - 5} more groups, see sites.groups"
    if sites.couplings:
        numbers: dict[str, int] = {}
        for coupling in sites.couplings:
            numbers[coupling.unit] = numbers.get(coupling.unit, 0) + coupling.channels
        what = " and ".join(count(number, unit) for unit, number in numbers.items())
        yield f"{what} in {count(len(sites.couplings), 'group')} can be removed, see sites.couplings"
    yield from reasons(((each.name, each.kind, each.reason) for each in sites.skipped), "sites.skipped")
    yield from sites.notes
