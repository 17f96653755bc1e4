"""Principal filter analysis: how many channels a group needs, and which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spectrim.cost.counted import rank_multiple
from spectrim.errors import MissingMomentsError
from spectrim.linalg import principal, subset
from spectrim.linalg.lowrank import profile
from spectrim.methods import statistics
from spectrim.methods.base import OUTPUT_ENERGY, Curve, Method, check_least
from spectrim.network import narrowing
from spectrim.network.choices import ChannelsChoice, Choice
from spectrim.network.coupling import IN
from spectrim.network.factors import KeptChannels
from spectrim.network.sites import Channels, Site
from spectrim.network.structure import Apart

RECONSTRUCTION = "reconstruction"
RULES = (RECONSTRUCTION, *principal.RULES)
POOLINGS = ("max", "mean", "none")

# Wide groups lose several channels at a time, so that no group takes more steps than this.
_STEPS = 64


@dataclass(frozen=True)
class PrincipalFilters(Method):
    """Remove filters whose responses the remaining ones make up for.

    For a group of coupled channels, solve ``min E ||W x - W' x_S||^2`` over subsets ``S`` of given size and the weights
    ``W'`` of the layers that read them: greedily in ``S``, in closed form in ``W'``. The rules of the published method
    choose by correlations of pooled responses instead; what they lose is measured in the same way.

    Attributes
    ----------
    rule
        ``reconstruction``, or ``l1-max``, ``abs-max`` and their controls ``l1-min``, ``abs-min``.
    pooling
        Over the positions of a sample, for correlations and spectra: ``max``, ``mean`` or ``none``.
    multiple_of
        Offer widths that are multiples of this; what suits the device and the group's width if None.
    least
        The smallest width on offer.

    Notes
    -----
    The error is the share of the readers' centred output energy lost on the calibration samples; with a sensitivity,
    weighed by the gradients that reach them. Only sites of coupled channels are offered anything
    (:func:`spectrim.couple`).

    References
    ----------
    Suau, Zappella, Apostoloff: Filter distillation for network compression, WACV 2020.
    """

    takes: ClassVar[type[Site]] = Channels
    offers: ClassVar[type[Choice]] = ChannelsChoice

    rule: str = RECONSTRUCTION
    pooling: str = "max"
    multiple_of: int | None = None
    least: int = 1

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}; expected one of {', '.join(RULES)}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}; expected one of {', '.join(POOLINGS)}")
        check_least(self, 1, "multiple_of", "least")

    def curve(self, site: Channels) -> Curve:
        order, errors, scale = self.elimination(site)
        n = site.coupling.channels
        energies = self.energies(site)
        return Curve(
            tuple(self.choice(site, order[: n - width]) for width in self.widths(site)),
            tuple(float(errors[n - width]) for width in self.widths(site)),
            _unit(site),
            scale,
            {"responses": profile(energies.unsqueeze(0))} if float(energies.sum()) > 0 else {},
        )

    def leanest(self, site: Channels) -> Sequence[Choice]:
        return [self.choice(site, [*range(width, site.coupling.channels)]) for width in self.widths(site)[-1:]]

    def widths(self, site: Channels) -> tuple[int, ...]:
        """Numbers of channels on offer, descending, all below the present one."""
        n, pools = site.coupling.channels, site.coupling.pools
        step = self.step(site)
        widths = [w for w in range(step, n, step) if w >= self.least and w % pools == 0]
        return tuple(reversed(widths))

    def step(self, site: Channels) -> int:
        """The multiple that widths are rounded to: the layer's, of which a head has several entries."""
        spec, entries = site.layers[0], site.coupling.sides[0].positions.shape[1]
        return self.multiple_of or max(1, rank_multiple(spec.device, spec.dtype, site.coupling.channels) // entries)

    def choice(self, site: Channels, removed: list[int]) -> ChannelsChoice:
        """Do without these channels."""
        gone = set(removed)
        kept = tuple(c for c in range(site.coupling.channels) if c not in gone)
        return ChannelsChoice(kept, site.coupling.channels, site.coupling.places, method=self.name)

    def layers(self, site: Channels, choice: ChannelsChoice) -> Apart:
        return narrowing.specs(site, len(choice.kept))

    def factorize(self, site: Channels, choice: ChannelsChoice) -> KeptChannels:
        """The weights of the layers of a site with fewer channels, those of the readers corrected."""
        parts = narrowing.cut_layers(site, choice.kept)
        weights, names = zip(*((part.weight, part.name) for part in parts), strict=True)
        return KeptChannels(choice.kept, weights, site.coupling, names)

    @property
    def statistic(self) -> str:
        """Name of the pooled statistic whose spectrum and correlations are used."""
        return "unpooled" if self.pooling == "none" else self.pooling

    def energies(self, site: Channels) -> Tensor:
        """The spectrum of the responses, ``[n]``, descending."""
        responses = site.require(self.statistic, type(self).__name__)
        return principal.spectrum(responses.covariance[0])

    def dead(self, site: Channels) -> int:
        """Channels whose responses never vary."""
        responses = site.require(self.statistic, "the number of dead filters")
        return len(principal.inactive(responses.covariance[0]))

    def elimination(self, site: Channels) -> tuple[list[int], Tensor, float]:
        """The order in which channels go, the error once so many are gone ``[n]``, and the site's scale.

        Raises
        ------
        MissingMomentsError
            If no layer that reads the channels was calibrated.
        """
        n = site.coupling.channels
        reading = {side.name for side in site.coupling.on(IN)}
        readers: list[subset.Reader] = []
        scale = 0.0
        for part in site.parts:
            if part.name not in reading or not (part.statistics or site.pooled.unpooled):
                continue
            mixed = statistics.mixed_weight(part)
            of_layer = narrowing.readers(site, part, mixed.mT @ mixed)
            # Sums over layers need losses in one unit.
            total = sum(reader.energy for reader in of_layer)
            part_scale = statistics.scale(part, total)
            for reader in of_layer:
                reader.gram *= part_scale / total if total > 0 else 0.0
            readers += of_layer
            scale += part_scale
        if not readers:
            raise MissingMomentsError(
                f"PrincipalFilters needs calibration statistics, and channels {site.name!r} hold none. "
                "Run calibrate(model, couple(model, find(model), example), batches) first."
            )
        step = max(self.step(site), -(-n // _STEPS))
        order, lost = subset.elimination(
            readers, n, pools=site.coupling.pools, order=self._by_rule(site), at_a_time=step if n > _STEPS else 1
        )
        return order, lost / scale if scale > 0 else lost, scale

    def _by_rule(self, site: Channels) -> list[int] | None:
        if self.rule == RECONSTRUCTION:
            return None
        covariance = site.require(self.statistic, type(self).__name__).covariance[0]
        order = principal.removal_order(
            principal.correlations(covariance), 1, self.rule, principal.inactive(covariance)
        )
        return _in_turn(order, site.coupling.channels, site.coupling.pools)


def _in_turn(order: list[int], channels: int, pools: int) -> list[int]:
    """The same order within each pool, one of each pool in turn."""
    order = [*order, *(c for c in range(channels) if c not in set(order))]
    size = channels // pools
    runs = [[c for c in order if c // size == pool] for pool in range(pools)]
    return [c for together in zip(*runs, strict=True) for c in together]


def _unit(site: Channels) -> str:
    reading = {side.name for side in site.coupling.on(IN)}
    units = (statistics.error_unit(part) for part in site.parts if part.name in reading and part.statistics)
    return next(units, OUTPUT_ENERGY)
