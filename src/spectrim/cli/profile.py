"""``spectrim profile``: what a model costs, and how much of it its spectra could spare."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from spectrim.cli import options
from spectrim.cli.common import Output, command, option, refuse
from spectrim.cli.former import formerly
from spectrim.cli.methods import FILTERS, LEARNED, SPARSE, Methods
from spectrim.cli.references import UsageError
from spectrim.cli.values import named_costs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spectrim.selection.candidates import Candidates, Row

_FORMATS = (".svg", ".png", ".pdf")
_SHARES = (0.9, 0.99)
_LOSSES = (0.01, 0.05)
_SIZES = (0.5, 0.25)


@dataclass(frozen=True)
class ShownOptions:
    """What is shown."""

    cost: list[str] | None = options.costs_option()
    figure: Path | None = option("Principal filters: draw the recommended widths, as widths.svg, .png or .pdf.", "FILE")
    latency: bool = option("Measure the milliseconds of every layer too.", default=False, flags=("--latency",))

    def __post_init__(self) -> None:
        named_costs(self.cost)
        if self.figure is not None and self.figure.suffix not in _FORMATS:
            raise UsageError(f"--figure {str(self.figure)!r}: expected a name ending in {', '.join(_FORMATS)}")


@command
@formerly("pattern", "low_rank_share", "pooling")
def profile(
    out: Output,
    context: typer.Context,
    network: options.NetworkOptions,
    *,
    inputs: options.InputOptions,
    layers: options.LayerOptions,
    sharing: options.SharingOptions,
    method: options.Methods = None,
    shown: ShownOptions,
) -> None:
    """List layers, costs and spectra; say what would be skipped and why.

    Nothing is changed. Without data or an input shape only parameters are counted.

    Examples
    --------
    $ spectrim profile net.py:build --input 3x224x224
    $ spectrim profile torchvision:resnet18 -d imagefolder:photos
    """
    methods, figure = Methods.read(method), shown.figure
    _check(context, methods, inputs, shown)
    from spectrim.cli.filter_widths import Widths
    from spectrim.cli.filters import with_channels
    from spectrim.cli.steps import (
        NONE_ALIKE,
        check_patterns,
        prepared,
        print_skipped,
        skipped_values,
        table_of,
        wanted_groups,
    )
    from spectrim.cli.subject import Subject
    from spectrim.cli.unfinished import make_folder
    from spectrim.cli.values import read_costs
    from spectrim.methods import PrincipalFilters
    from spectrim.pipeline.making import Making

    groups, costs = wanted_groups(sharing, methods), read_costs(shown.cost)
    if figure is not None:
        make_folder(out, figure.parent, [figure.name])
    chosen = methods.chosen(inputs.data is not None, multiple_of=layers.multiple_of, share=groups is not False)
    work = Subject.load(network, layers, inputs, timed=shown.latency)
    out.say(f"looking at {work.whose}")
    check_patterns(chosen, work.sites)
    sites = work.sites
    if any(method.removes_channels for method in chosen):
        sites = with_channels(work.dense, sites, work.example)
    known = prepared(out, work, sites, groups)
    for filters in chosen:
        if isinstance(filters, PrincipalFilters):
            Widths.of(known.sites, filters).finish(out, network.model, known.sites, figure)
            return
    table = table_of(out, known, Making(chosen, costs=costs))
    rows = [_layer(row, table) for row in table.singles]
    if SPARSE in methods:
        rows = [{**layer, "smallest": _smallest(row)} for layer, row in zip(rows, table.singles, strict=True)]
    shared = [_group(row, table) for row in table if row.members]
    if out.as_json:
        out.document(
            {
                "model": network.model,
                "costs": table.dense,
                "fixed": dict(table.fixed),
                "unit": table.unit,
                "samples": known.sites.samples,
                "layers": rows,
                **({"groups": shared} if groups is not False else {}),
                "skipped": skipped_values(known.sites),
                "facts": dict(table.facts),
            }
        )
        return
    _print(out, table, rows)
    if SPARSE in methods:
        _print_smallest(out, rows)
    if shared:
        _print_groups(out, shared)
    elif groups is not False:
        out.print(NONE_ALIKE)
    print_skipped(out, known.sites)


def _check(context: typer.Context, methods: Methods, inputs: options.InputOptions, shown: ShownOptions) -> None:
    """Refuse options that do not go with each other."""
    if LEARNED in methods:
        raise UsageError(f"--method {LEARNED} is for compress: it learns ranks in training, and profile only looks")
    methods.check_data(inputs.data is not None)
    if FILTERS in methods:
        why = f"does not combine with --method {FILTERS}"
        refuse(context, {"share", "groups", "cost"}, why)
        refuse(context, {"latency"}, f"{why}, which times no layers")
    else:
        refuse(context, {"figure"}, f"is for --method {FILTERS}, not for {methods}")
    if shown.latency and inputs.data is None and inputs.input_shape is None:
        raise UsageError("--latency needs --data or --input, to know what the layers see")


def _layer(row: Row, table: Candidates) -> dict[str, Any]:
    """One layer: costs, the rank that holds a share of the energy, the share of cost left at a given loss."""
    main = "macs" if "macs" in table.costs else "parameters"
    return {
        "name": row.site,
        "kind": row.kind,
        "costs": dict(row.dense.costs),
        "ranks": {
            key: {f"{share:.0%}": _rank(values, share) for share in _SHARES} for key, values in row.spectra.items()
        },
        "components": {key: len(values) for key, values in row.spectra.items()},
        f"{main}_left": {
            f"{loss:.0%}": min(o.costs[main] for o in row.options if o.error <= loss)
            / max(row.dense.costs[main], 1e-300)
            for loss in _LOSSES
        },
    }


def _smallest(row: Row) -> dict[str, Any]:
    """Of one layer, the choice that stores the fewest bytes at a given loss: bytes, and rank, density and pattern."""
    found = {}
    for loss in _LOSSES:
        best = min((o for o in row.options if o.error <= loss), key=lambda o: (o.costs["bytes"], o.error))
        found[f"{loss:.0%}"] = {
            "bytes": best.costs["bytes"],
            "left": best.costs["bytes"] / max(row.dense.costs["bytes"], 1e-300),
            "error": best.error,
            "choice": None if best.choice.is_dense else {"method": best.choice.method, **best.choice.settings},
            "words": str(best.choice),
        }
    return found


def _group(row: Row, table: Candidates) -> dict[str, Any]:
    """A group: its layers, and what they lose at given sizes, each for itself and with a shared factor."""
    parts = tuple(table[member] for member in row.members)
    alone = dataclasses.replace(table, rows=parts, fixed=dict.fromkeys(table.fixed, 0.0))
    dense = alone.dense["parameters"]
    most = sum(part.scale for part in alone)
    lost: dict[str, dict[str, Any]] = {}
    for size in _SIZES:
        within = [option for option in row.options[1:] if option.costs["parameters"] <= size * dense]
        best = min(within, key=row.loss, default=None)
        lost[f"{size:.0%}"] = {
            "apart": _apart(alone, size, most),
            "shared": None if best is None else row.loss(best) / max(most, 1e-300),
            "choice": None if best is None else {"method": best.choice.method, **best.choice.settings},
            "words": "" if best is None else str(best.choice),
        }
    return {
        "name": row.site,
        "kind": row.kind,
        "members": list(row.members),
        "costs": dict(row.dense.costs),
        "lost": lost,
    }


def _apart(alone: Candidates, size: float, most: float) -> float | None:
    """What layers lose if each is factorised for itself, within a share of their parameters; None if they cannot."""
    from spectrim.errors import InfeasibleBudgetError
    from spectrim.selection.budget import Budget
    from spectrim.selection.selectors import exact

    try:
        return exact(alone, Budget(parameters=size)).loss / max(most, 1e-300)
    except InfeasibleBudgetError:
        return None


def _rank(values: Sequence[float], share: float) -> int | None:
    """How many components hold a share of the energy; None if more than the table keeps."""
    return next((rank for rank, held in enumerate(accumulate(values), 1) if held >= share - 1e-9), None)


def _print(out: Output, table: Candidates, layers: Sequence[dict[str, Any]]) -> None:
    from spectrim.report.comparison import show

    main = "macs" if "macs" in table.costs else "parameters"
    title = _HEADS[main]
    counted = [c for c in table.costs if c != "bytes"]
    columns = ["layer", "kind", *(f">{_HEADS.get(c, c)}" for c in counted), ">rank for\n90 %", ">rank for\n99 %", ">of"]
    columns += [f">{title} at\n{loss:.0%} lost" for loss in _LOSSES]
    rows = []

    def shown(costs: Mapping[str, float]) -> list[str]:
        return [show(costs[c], _UNITS.get(c, "")) for c in counted]

    for layer in layers:
        # The channel unfolding is the one that every layer has; the others are in the JSON document.
        key = next((k for k in layer["ranks"] if k.endswith("/channel")), next(iter(layer["ranks"]), ""))
        ranks = layer["ranks"].get(key, {})
        size = layer["components"].get(key)
        rows.append(
            (
                layer["name"],
                layer["kind"],
                *shown(layer["costs"]),
                *(str(ranks[s] or f">{size}") if ranks else "" for s in ("90%", "99%")),
                str(size or ""),
                *(f"{layer[main + '_left'][f'{loss:.0%}']:.0%}" for loss in _LOSSES),
            )
        )
    for name, costs in (("(not touched)", table.fixed), ("all", table.dense)):
        rows.append((name, "", *shown(costs), "", "", "", "", ""))
    out.table(columns, rows)
    if table.unit:
        out.prose(
            f"Lost is a share of {table.unit}. Rank for 90 %: components that hold that much of it, of so many, when "
            f"the weight is a matrix of output by input channels. {title} at 1% lost: what is left of the layer at "
            "the best choice that loses no more."
        )
    else:
        out.prose("Nothing can be factorised.")


def _print_smallest(out: Output, layers: Sequence[dict[str, Any]]) -> None:
    columns = ["layer"]
    for loss in _LOSSES:
        columns += [f">bytes at {loss:.0%} lost", "as"]
    rows = []
    for layer in layers:
        cells = [layer["name"]]
        for found in layer["smallest"].values():
            cells += [f"{found['left']:.0%}", found["words"]]
        rows.append(cells)
    out.table(columns, rows, title="Fewest stored bytes, positions counted")


def _print_groups(out: Output, groups: Sequence[dict[str, Any]]) -> None:
    from spectrim.report.comparison import show
    from spectrim.selection.budget import UNITS

    columns = ["group", ">layers", ">parameters"]
    for size in groups[0]["lost"]:
        columns += [f">lost at {size}, apart", ">shared", "shared factor"]
    rows = []
    for group in groups:
        cells = [group["name"], str(len(group["members"])), show(group["costs"]["parameters"], UNITS["parameters"])]
        for found in group["lost"].values():
            cells += ["" if found[how] is None else f"{found[how]:.2%}" for how in ("apart", "shared")]
            cells.append(found["words"])
        rows.append(cells)
    out.table(columns, rows, title="Groups that may share factors")
    for group in groups:
        out.prose(f"{group['name']}: {', '.join(group['members'])}")
    out.prose(
        "Lost is a share of the group's energy, at a share of its parameters: each layer factorised for itself, and "
        "all with a shared factor."
    )


_HEADS = {"macs": "MACs", "parameters": "params"}
_UNITS = {"latency": "ms"}  # the others are in the heads
