"""What methods offer in the layers that removals of channels leave, from one plan to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from spectrim.cost.whole import Network
from spectrim.methods import Curve, Method
from spectrim.network.choices import ChannelsChoice
from spectrim.network.coupling import axes_left
from spectrim.network.narrowing import narrowed
from spectrim.network.sites import Site
from spectrim.progress import Progress
from spectrim.selection.candidates import Candidates
from spectrim.tables import Asked, merged, own_curve, parted, tabulate

Curves = dict[Hashable, Curve]
"""What methods offer in one network: by the method, the site, and what is left of the axes of its layers."""

Asking = Callable[[Mapping[tuple[str, str], Sequence[int]]], Asked]
"""How methods are asked, by what is left of axes that lost channels, as :func:`asked_once` of some curves does it."""


def asked_once(curves: Curves, kept: Mapping[tuple[str, str], Sequence[int]], ask: Asked = own_curve) -> Asked:
    """Asks a method only for what is not among the ``curves`` yet, by what is left of axes that lost channels."""
    left: dict[str, list[Hashable]] = {}
    for (layer, axis), positions in kept.items():
        left.setdefault(layer, []).append((axis, tuple(positions)))

    def curve(method: Method, site: Site) -> Curve:
        # Two of one name may differ in their options, and a user's own type may bear the name of one of ours.
        key = (type(method), repr(method), site.name, *((part.name, *left.get(part.name, ())) for part in site.parts))
        if key not in curves:
            curves[key] = ask(method, site)
        return curves[key]

    return curve


@dataclass(frozen=True)
class Remaining:
    """Tables of what is left of a network.

    From one plan to the next few layers lose other channels: a method is asked once for a layer with the same ones.
    """

    table: Candidates  # of the dense network
    methods: Sequence[Method]  # that are asked, none of channels
    network: Network
    guard: bool
    asking: Asking

    def after(self, removals: Mapping[str, ChannelsChoice], progress: Progress) -> Candidates:
        """The table of the layers as the removals leave them."""
        if not removals:
            return merged([parted(self.table, method.name) for method in self.methods])
        network = self.network
        kept = {name: choice.kept for name, choice in removals.items()}
        left = {axis: positions.tolist() for axis, positions in axes_left(network.sites.couplings, kept).items()}
        # What is no layer takes the time that it takes in the whole network.
        time = network.cost(removals).get("latency")
        return tabulate(
            narrowed(network.sites, kept), self.methods, latency=network.latency, dense_latency=time,
            costs=network.costs, guard=self.guard, curve=self.asking(left), progress=progress,
        )  # fmt: skip
