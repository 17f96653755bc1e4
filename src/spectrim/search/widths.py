"""How many channels each group needs, read off the spectrum of its responses (PFA).

The published method has two recipes: :class:`Energy`, the fewest components that hold a share of the energy, and
:class:`KL`, which has no parameter. A share may also be found for a budget, by search over what the network costs with
the widths it leads to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from spectrim.cost import counted
from spectrim.cost.latency import Latency
from spectrim.cost.whole import Network
from spectrim.errors import InfeasibleBudgetError, called_as
from spectrim.linalg import principal
from spectrim.linalg.bisection import last_number
from spectrim.methods import PrincipalFilters, statistics
from spectrim.network.choices import DENSE, Choice
from spectrim.network.sites import Channels, Sites
from spectrim.search import entries
from spectrim.selection.budget import Budget, BudgetLike
from spectrim.selection.candidates import skipped_shares
from spectrim.selection.plan import Plan

# Halvings of the interval in which the share of energy lies that meets a budget.
_HALVINGS = 40


@dataclass(frozen=True)
class Energy:
    """PFA-En: as many channels as there are principal components that hold a share of the energy.

    Attributes
    ----------
    share
        Above 0, up to 1.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"the share of energy is {self.share!r}; expected a number above 0, up to 1")

    def __call__(self, energies: Tensor) -> int:
        return principal.energy_width(energies, self.share)


@dataclass(frozen=True)
class KL:
    """PFA-KL: the closer the spectrum is to a flat one, the more channels stay; no parameter."""

    def __call__(self, energies: Tensor) -> int:
        return principal.kl_width(energies)


Recipe = Callable[[Tensor], int]


def widths(
    sites: Sites, recipe: Recipe, *, method: PrincipalFilters | None = None, rounded: bool = True
) -> dict[str, int]:
    """The number of channels that a recipe recommends for every group.

    Parameters
    ----------
    sites
        Coupled and calibrated.
    recipe
        :class:`Energy`, :class:`KL`, or a function from a spectrum to a width.
    method
        Whose pooling and multiples are used.
    rounded
        Up to the multiple that suits the device; else as recommended.
    """
    analysis = method or PrincipalFilters()
    energies = _energies(sites, analysis)
    return {site.name: _width(site, recipe(energies[site.name]), analysis, rounded) for site in sites.coupled()}


@called_as("Write recommend(sites, Energy(0.9)), with the sites of couple and calibrate", sites=Sites)
def recommend(
    sites: Sites,
    recipe: Recipe | BudgetLike,
    *,
    method: PrincipalFilters | None = None,
    latency: Latency | None = None,
    costs: Mapping[str, counted.Cost] | None = None,
) -> Plan:
    """A plan by principal filter analysis alone: the recipe says how many channels stay, the method's rule which.

    Parameters
    ----------
    sites
        Coupled (:func:`spectrim.couple`) and calibrated.
    recipe
        :class:`Energy`, :class:`KL`, or a budget: then the largest share of energy is taken that meets it, counted on
        the layers as they would be, and what is left of the budget is spent on the groups closest to their next width.
    latency
        Measures the layers for a budget in milliseconds.
    costs
        Further costs of your own by name, as for :func:`spectrim.tabulate`.

    Returns
    -------
    Plan
        For :func:`spectrim.apply`. Layers without coupled channels stay as they are.

    Raises
    ------
    InfeasibleBudgetError
        If the least widths cost more than the budget.

    References
    ----------
    Suau, Zappella, Apostoloff: Filter distillation for network compression, WACV 2020.
    """
    analysis = method or PrincipalFilters()
    network = Network(sites, counted.known(sites, costs), latency=latency)
    dense = network.cost()
    facts = latency.facts() if latency is not None else {}
    limits: Mapping[str, float] = {}
    with counted.made_for(facts):
        if not callable(recipe):
            limits = Budget.of(recipe).limits(dense)
            share, numbers = _for_budget(network, analysis, limits)
            facts = {"energy share": share, **facts}
            name = f"PFA-En for a budget ({share:.8g})"
        else:
            numbers = widths(sites, recipe, method=analysis)
            name = f"PFA {recipe}"
    of_channels, losses = [], []
    for site in sites.coupled():
        choice, error, scale = _choice(site, numbers[site.name], analysis)
        of_channels.append(entries.channels(network, site.coupling, choice, error))
        losses.append(scale * max(error, 0.0))
    return Plan(
        entries=(*entries.layers(network, numbers), *of_channels),
        costs=network.cost(widths=numbers),
        dense_costs=dense,
        budget=dict(limits),
        unit=next((statistics.error_unit(site) for site in sites if site.statistics), ""),
        selector=name,
        loss=sum(losses, 0.0),
        methods={analysis.name: analysis.record()},
        facts=facts,
    )


def _energies(sites: Sites, method: PrincipalFilters) -> dict[str, Tensor]:
    """The spectrum of every group; a warning for those that the samples cannot fill."""
    energies = {site.name: method.energies(site) for site in sites.coupled()}  # refuses what was not calibrated
    counts = {site.name: site.require(method.statistic, type(method).__name__).count for site in sites.coupled()}
    few = [c for c in sites.couplings if 0 < counts[c.name] <= c.channels]
    if few:
        count = counts[few[0].name]
        warnings.warn(
            f"{len(few)} of {len(sites.couplings)} groups have more channels than responses were seen, first "
            f"{few[0].name!r} with {few[0].channels} channels and {count} responses: their spectra cannot have that "
            "many components, and too few channels will be recommended. Calibrate on more samples.",
            stacklevel=4,
        )
    return energies


def _width(site: Channels, number: int, method: PrincipalFilters, rounded: bool) -> int:
    n, pools = site.coupling.channels, site.coupling.pools
    step = method.step(site) if rounded else 1
    # Up to the next multiple that every pool has the same part of.
    step = math.lcm(step, pools)
    return min(n, -(-max(number, method.least) // step) * step)


def _for_budget(
    network: Network, method: PrincipalFilters, limits: Mapping[str, float]
) -> tuple[float, dict[str, int]]:
    coupled = {site.name: site for site in network.sites.coupled()}
    energies = _energies(network.sites, method)

    def at(share: float) -> dict[str, int]:
        return {
            name: _width(site, principal.energy_width(energies[name], share), method, True)
            for name, site in coupled.items()
        }

    def over(numbers: Mapping[str, int]) -> str | None:
        costs = network.cost(widths=numbers)
        return next((c for c in limits if costs[c] > limits[c] * (1 + 1e-9)), None)

    low, high = 1e-9, 1.0
    numbers = at(low)
    worst = over(numbers)
    if worst is not None:
        lowest = network.cost(widths=numbers)[worst]
        dense = network.cost()[worst]
        skipped = skipped_shares(network.left_alone(), worst, dense)
        raise InfeasibleBudgetError(worst, limits[worst], lowest, dense, skipped=skipped)
    if over(at(high)) is None:
        # All energy may lie in a few components, such as those that few samples span.
        low = high
    low = last_number(lambda share: over(at(share)) is None, low, high, _HALVINGS if low < high else 0)
    numbers = at(low)
    # The next widths in the order in which a growing share would take them, as long as they fit.
    kept_energy = {name: (e.cumsum(0) / e.sum().clamp_min(1e-300)).tolist() for name, e in energies.items()}
    growing = set(coupled)
    while growing:
        name = min(growing, key=lambda name: kept_energy[name][numbers[name] - 1])
        wider = _width(coupled[name], numbers[name] + 1, method, True)
        if wider > numbers[name] and over({**numbers, name: wider}) is None:
            numbers[name] = wider
        else:
            growing.remove(name)
    return low, numbers


def _choice(site: Channels, number: int, method: PrincipalFilters) -> tuple[Choice, float, float]:
    """The choice that leaves so many channels, its error, and the loss that an error of one would be."""
    gone = site.coupling.channels - number
    if gone <= 0:
        return DENSE, 0.0, 0.0
    order, errors, scale = method.elimination(site)
    return method.choice(site, order[:gone]), float(errors[gone]), scale
