"""``spectrim profile``: what a model costs, and how much of it its spectra could spare."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.cli import common
from spectrim.cli.common import Output, command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spectrim.selection.candidates import Candidates, Row

_SHARES = (0.9, 0.99)
_LOSSES = (0.01, 0.05)
_SIZES = (0.5, 0.25)


@command
def profile(
    out: Output,
    context: typer.Context,
    model: common.Model,
    weights: common.Weights = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Calibration batches: spectra of the responses, MACs.")
    ] = None,
    input_shape: common.Input = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="auto, weight-svd, activation-svd, joint, low-rank-plus-sparse, or principal-filters, which lists how "
            "many filters each group of channels needs.",
        ),
    ] = "auto",
    skip: common.Skip = None,
    only: common.Only = None,
    share: Annotated[
        bool, typer.Option("--share", help="List groups of layers that may share factors, and what it saves.")
    ] = False,
    groups: common.Groups = None,
    pattern: common.Patterns = None,
    low_rank_share: common.LowRankShare = None,
    pooling: Annotated[
        str,
        typer.Option(
            "--pooling", help="Principal filters: max, mean or none; of responses over the positions of a sample."
        ),
    ] = "max",
    figure: Annotated[
        Path | None,
        typer.Option("--figure", help="Principal filters: draw the recommended widths, as widths.svg, .png or .pdf."),
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Measure the milliseconds of every layer too.")] = False,
    batch: common.Batch = 1,
    threads: common.Threads = None,
    device: common.Device = "cpu",
) -> None:
    """List layers, costs and spectra; say what would be skipped and why.

    Without data or an input shape only parameters are counted.
    """
    from spectrim.cli.data import load_data
    from spectrim.cli.filter_widths import Widths, check_figure
    from spectrim.cli.filters import METHOD as FILTERS
    from spectrim.cli.filters import Filters, with_channels
    from spectrim.cli.models import load_model
    from spectrim.cli.references import UsageError
    from spectrim.cli.sharing import NONE_ALIKE, wanted_groups
    from spectrim.cli.sparsity import METHOD, Sparsity
    from spectrim.cli.steps import (
        chosen_methods,
        device_named,
        first_batch,
        locate,
        prepared,
        print_skipped,
        random_input,
        skipped_values,
        table_of,
    )

    sparsity = Sparsity.of(context, method, pattern, low_rank_share)
    filters = Filters.of(context, method, pooling=pooling)
    check_figure(figure)
    chosen_methods(method, data is not None, filters=filters)
    if method == FILTERS:
        common.refuse(context, {"latency"}, f"does not combine with --method {method}, which times no layers")
    sharing = wanted_groups(share or None, groups, method)
    device = device_named(device, threads)
    if latency and data is None and input_shape is None:
        raise UsageError("--latency needs --data or --input, to know what the layers see")
    network = load_model(model, weights).to(device)
    batches = load_data(data, purpose="calibration", device=device) if data is not None else None
    example = first_batch(batches, batch, str(data)) if batches is not None else None
    if example is None and input_shape is not None:
        example = random_input(input_shape, batch, device)
    clock = None
    if latency:
        from spectrim.cost.latency import Latency

        clock = Latency(device=device, batch=batch)
    sites = locate(network, skip, only)
    sparsity.check(sites)
    if method == FILTERS:
        sites = with_channels(network, sites, example)
    known = prepared(out, network, sites, batches=batches, example=example, groups=sharing, latency=clock)
    if method == FILTERS:
        Widths.of(known.sites, filters.method(None)).finish(out, model, known.sites, figure)
        return
    methods = chosen_methods(method, data is not None, share=sharing is not False, sparsity=sparsity)
    table = table_of(out, known, methods)
    layers = [_layer(row, table) for row in table.singles]
    if method == METHOD:
        layers = [{**layer, "smallest": _smallest(row)} for layer, row in zip(layers, table.singles, strict=True)]
    shared = [_group(row, table) for row in table if row.members]
    if out.as_json:
        out.document(
            {
                "model": model,
                "costs": table.dense,
                "fixed": dict(table.fixed),
                "unit": table.unit,
                "samples": known.sites.samples,
                "layers": layers,
                **({"groups": shared} if sharing is not False else {}),
                "skipped": skipped_values(known.sites),
                "facts": dict(table.facts),
            }
        )
        return
    _print(out, table, layers)
    if method == METHOD:
        _print_smallest(out, layers)
    if shared:
        _print_groups(out, shared)
    elif sharing is not False:
        out.print(NONE_ALIKE)
    print_skipped(out, known.sites)


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
    total = 0.0
    for rank, value in enumerate(values, 1):
        total += value
        if total >= share - 1e-9:
            return rank
    return None


def _print(out: Output, table: Candidates, layers: Sequence[dict[str, Any]]) -> None:
    from spectrim.report.comparison import show
    from spectrim.selection.budget import UNITS

    main = "macs" if "macs" in table.costs else "parameters"
    title = {"macs": "MACs", "parameters": "parameters"}[main]
    counted = [c for c in ("parameters", "macs", "latency") if c in table.costs]
    columns = ["layer", "kind", *(f">{_HEADS[c]}" for c in counted), ">rank 90 %", ">rank 99 %", ">of"]
    columns += [f">{title} at {loss:.0%} lost" for loss in _LOSSES]
    rows = []
    for layer in layers:
        # The channel unfolding is the one that every layer has; the others are in the JSON document.
        key = next((k for k in layer["ranks"] if k.endswith("/channel")), next(iter(layer["ranks"]), ""))
        ranks = layer["ranks"].get(key, {})
        size = layer["components"].get(key)
        rows.append(
            (
                layer["name"],
                layer["kind"],
                *(show(layer["costs"][c], UNITS[c]) for c in counted),
                *(str(ranks[s] or f">{size}") if ranks else "" for s in ("90%", "99%")),
                str(size or ""),
                *(f"{layer[main + '_left'][f'{loss:.0%}']:.0%}" for loss in _LOSSES),
            )
        )
    fixed = [show(table.fixed[c], UNITS[c]) for c in counted]
    rows.append(("(not touched)", "", *fixed, "", "", "", "", ""))
    rows.append(("all", "", *(show(table.dense[c], UNITS[c]) for c in counted), "", "", "", "", ""))
    out.table(columns, rows)
    out.print(
        f"Lost is {table.unit or 'nothing, since nothing can be factorised'}; ranks are of the channel unfolding."
    )


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
        out.print(f"{group['name']}: {', '.join(group['members'])}")
    out.print(
        "Lost is a share of the group's energy, at a share of its parameters: each layer factorised for itself, and "
        "all with a shared factor."
    )


_HEADS = {"parameters": "parameters", "macs": "MACs", "latency": "latency"}
