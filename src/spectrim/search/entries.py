"""Entries of plans that remove channels: each layer costs what it does with the channels that are left to it."""

from __future__ import annotations

from spectrim.cost.whole import Network, Widths
from spectrim.network.choices import DENSE, Choice
from spectrim.network.coupling import Coupling
from spectrim.selection.plan import Entry


def layers(network: Network, widths: Widths) -> list[Entry]:
    """All sites, each left as it is but for its channels."""
    return [
        Entry(s.name, s.spec.kind, DENSE, 0.0, network.row(s.name, widths=widths), network.row(s.name))
        for s in network.sites
    ]


def channels(network: Network, coupling: Coupling, choice: Choice, error: float) -> Entry:
    """Coupled channels. Their layers have entries of their own, and what is left to count is beside them."""
    name = coupling.name
    after, before = network.beside(name, {name: choice}), network.beside(name)
    return Entry(name, coupling.kind, choice, error, after, before, of_channels=True)
