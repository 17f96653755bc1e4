"""How many filters each group of channels needs, by the recipes of principal filter analysis: a table and a figure."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.cli.common import Output
from spectrim.cli.filters import sample_notes
from spectrim.cli.steps import print_skipped, skipped_values
from spectrim.cost import counted
from spectrim.cost.whole import Network
from spectrim.errors import first_few
from spectrim.methods import PrincipalFilters
from spectrim.network.coupling import IN, OUT, THROUGH
from spectrim.network.sites import Channels, Sites
from spectrim.search.widths import KL, Energy, Recipe, widths

SHARES = (0.8, 0.9, 0.95, 0.98, 0.99)
"""Of energy, as in the published figure."""
_COSTS: Mapping[str, counted.Cost] = {"parameters": counted.parameters, "macs": counted.macs}
_SHOWN = 3  # names of layers in a cell of the table


@dataclass(frozen=True)
class Widths:
    """Recommended widths of all groups."""

    # One a group of channels: ``name``, ``channels``, ``dead`` filters, layers that it is ``written_by``, ``passed_by``
    # (depthwise ones) and ``read_by``, ``widths`` as recommended and ``rounded`` ones, by the recipe as ``--recipe``
    # takes it.
    groups: tuple[Mapping[str, Any], ...]
    # ``parameters`` and ``macs`` of the whole network with the rounded widths, by the recipe.
    networks: Mapping[str, Mapping[str, float]]
    dense: Mapping[str, float]  # the same of the network as it is
    notes: tuple[str, ...]  # what a reader should know

    @classmethod
    def of(cls, sites: Sites, method: PrincipalFilters) -> Widths:
        """Read the widths off the spectra of coupled and calibrated sites."""
        recipes: dict[str, Recipe] = {"kl": KL(), **{f"energy={share}": Energy(share) for share in SHARES}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few samples; it is among the notes
            asked = {key: widths(sites, recipe, method=method, rounded=False) for key, recipe in recipes.items()}
            rounded = {key: widths(sites, recipe, method=method) for key, recipe in recipes.items()}
        order = {site.name: number for number, site in enumerate(sites)}
        groups = tuple(_group(site, method, asked, rounded, order) for site in sites.coupled())
        network = Network(sites, _COSTS)
        return cls(
            groups,
            {key: network.cost(widths=numbers) for key, numbers in rounded.items()},
            network.cost(),
            tuple(sample_notes(sites, method)),
        )

    def finish(self, out: Output, model: str, sites: Sites, figure: Path | None = None) -> None:
        """Draw the figure if it has a name, print the tables or the document."""
        files = {} if figure is None else {"figure": str(figure)}
        if figure is not None:
            self.draw(figure)
        out.document(
            {
                "model": model,
                "samples": sites.samples,
                "costs": dict(self.dense),
                "groups": [dict(group) for group in self.groups],
                "networks": {key: dict(found) for key, found in self.networks.items()},
                "notes": list(self.notes),
                "skipped": skipped_values(sites),
                "files": files,
            }
        )
        self.print(out)
        print_skipped(out, sites)
        for name, file in files.items():
            out.print(f"{name} {file}")

    def print(self, out: Output) -> None:
        """Two tables: the widths with what they lead to, and the layers of every group."""
        recipes = list(self.networks)
        numbers = [[each["channels"], each["dead"], *map(each["widths"].get, recipes)] for each in self.groups]
        rows = [(_name(group), *map(str, line)) for group, line in zip(self.groups, numbers, strict=True)]
        rows.append(("all groups", *(str(sum(column)) for column in zip(*numbers, strict=True))))
        for cost, title in (("parameters", "parameters"), ("macs", "MACs")):
            cells = [_count(found[cost], self.dense[cost]) for found in self.networks.values()]
            rows.append((title, _count(self.dense[cost]), "", *cells))
        columns = ["group", ">now", ">dead", *(f">{_head(recipe)}" for recipe in recipes)]
        out.table(columns, rows, title="Recommended numbers of filters: PFA-KL, and PFA-En at shares of the energy")
        out.print(
            "Filters as recommended; parameters and MACs of the network with these rounded up to multiples that\n"
            "suit the device, as compress --recipe makes it. A group has the name of its first layer."
        )
        for note in self.notes:
            out.print(note)
        places = {"written_by": "written by", "passed_by": "passed by", "read_by": "read by"}
        used = [key for key in places if any(group[key] for group in self.groups)]
        lists = [(_name(group), *(first_few(group[key], _SHOWN) for key in used)) for group in self.groups]
        out.table(["group", *(places[key] for key in used)], lists, title="Layers of each group")

    def draw(self, file: Path) -> None:
        """Write the figure."""
        from spectrim.report.figures import recommended_widths, write_figure

        channels = {_name(group): group["channels"] for group in self.groups}
        found = {
            f"PFA-{_head(key)}": {_name(group): group["widths"][key] for group in self.groups} for key in self.networks
        }
        write_figure(recommended_widths(channels, found), file)


def _group(
    site: Channels,
    method: PrincipalFilters,
    asked: Mapping[str, Mapping[str, int]],
    rounded: Mapping[str, Mapping[str, int]],
    order: Mapping[str, int],
) -> dict[str, Any]:
    coupling, layers = site.coupling, {spec.name for spec in site.layers}

    def places(axis: str) -> list[str]:
        # Normalisation is no layer.
        found = {side.name for side in coupling.on(axis)} & layers
        return sorted(found, key=lambda name: (order.get(name, len(order)), name))

    return {
        "name": site.name,
        "channels": coupling.channels,
        "dead": method.dead(site),
        "written_by": places(OUT),
        "passed_by": places(THROUGH),
        "read_by": places(IN),
        "widths": {key: numbers[site.name] for key, numbers in asked.items()},
        "rounded": {key: numbers[site.name] for key, numbers in rounded.items()},
    }


def _name(group: Mapping[str, Any]) -> str:
    return group["name"].removesuffix(":out")


def _head(recipe: str) -> str:
    return "KL" if recipe == "kl" else recipe.replace("energy=", "En ")


def _count(value: float, dense: float | None = None) -> str:
    from spectrim.report.comparison import show

    return show(value, "") if dense is None else f"{show(value, '')}\n{value / max(dense, 1.0):.0%}"
