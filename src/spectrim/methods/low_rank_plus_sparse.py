"""Low rank plus sparse in the layer's responses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from spectrim.cost.counted import rank_multiple
from spectrim.linalg import additive, lowrank, patterns
from spectrim.linalg.patterns import Pattern
from spectrim.linalg.unfold import Unfolding, unfolding, unfoldings_named
from spectrim.methods import statistics
from spectrim.methods.additive_layer import AdditiveLayer
from spectrim.methods.base import Curve, Method, check_least, check_unfoldings, full_rank, pays
from spectrim.network.choices import Choice, SumChoice
from spectrim.network.factors import AdditiveFactors as Factors
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer
from spectrim.network.structure import Chain, Sum

# Turns of the decompositions that the curve is made of; a choice that is carried out takes more and loses less.
_CURVE_TURNS = 16
# Of a point that goes on from its neighbour's.
_NEXT_TURNS = 6
_FEWEST = 3
# Turns of the values alone, at most, after the decomposition that is carried out.
_POLISH = 6
# Of the sparse part where there is none.
_ANY = patterns.Unstructured()
_DENSITIES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.17, 0.22, 0.28, 0.35, 0.45, 0.6)
# What the low-rank part gets of the numbers stored.
_SHARES = (0.0, 0.15, 0.3, 0.5)
# For each of these shares, and twice as often for the sparse part alone, so many densities are on offer; half of them
# and of the ranks in large layers, a quarter in huge ones, which also take fewer turns when they are carried out. The
# one rank of these is far below where low rank saves nothing, which would take longest of all.
_FEW = 8
_LARGE = 400_000
_HUGE = 8_000_000
# From this many weights on the curve is found in float32.
_SINGLE = 2**14
# From this many on its points go on from their neighbours.
_PATH = 2**14
# Up to so many weights, what is built is the better of two searches.
_TINY = 2**11
# With more outputs than this the spectrum, which is to look at, would take longer than the fit.
_WIDE = 2048


@dataclass(frozen=True)
class LowRankPlusSparse(Method):
    """Solve ``min E ||(W - L - S) (x - m)||^2``, ``L`` of rank ``r`` and ``S`` sparse (Yu et al., CVPR 2017).

    The two parts take what the other cannot: directions that all outputs share, and single strong connections. A rank
    of 0 is pruning connections with reconstruction, a density of 0 is low rank in the layer's responses. Without
    calibration the inputs ``x`` count as uncorrelated and equally strong (GoDec).

    Attributes
    ----------
    patterns
        Of the sparse part, each on offer: ``"unstructured"``, ``"rows"``, ``"2:4"`` and the like, ``"4x4"`` and the
        like (blocks), ``"channels"`` and ``"taps"``. See :mod:`spectrim.linalg.patterns`.
    densities
        Numbers that both parts together may store, as shares of the layer's weights. Where they are many, each second
        one is on offer for a sparse part beside a low-rank one. 0 stands for low rank alone. Patterns with a density of
        their own have that.
    ranks
        How many ranks are on offer for low rank alone, equally spaced on a logarithmic scale. With 0 there is no
        low-rank part at all. A ``share`` takes their place.
    share
        Part of the numbers stored that the low-rank part gets, such as 0.3 (OATS; Zhang and Papyan 2025): a fixed
        split. None has several on offer, nothing and everything among them, and lets the selector choose.
    unfoldings
        Names of the unfoldings of the low-rank part on offer. None is the one that loses least on its own.
    multiple_of
        Offer ranks that are multiples of this; what suits the device and the layer's width if None.
    turns, tolerance
        When a choice is carried out: turns of the search for entries, at least 16, and the relative gain of a turn of
        the values that ends them.
    exact
        Find the low-rank part by eigendecompositions, the reference. The default does without.

    Notes
    -----
    The curve comes from few turns of the search at every point of a grid of ranks and densities, each going on from its
    neighbour's; what is carried out takes more and loses less. The error is the share of the layer's centred output
    energy lost. Layers whose patches are too long for their second moment are fitted in that of their slices.
    """

    offers: ClassVar[type[Choice]] = SumChoice
    reads_sketches: ClassVar[bool] = True

    patterns: tuple[str, ...] = ("unstructured",)
    densities: tuple[float, ...] = _DENSITIES
    ranks: int = 4
    share: float | None = None
    unfoldings: tuple[str, ...] | None = None
    multiple_of: int | None = None
    turns: int = 60
    tolerance: float = 1e-3
    exact: bool = False

    def __post_init__(self) -> None:
        check_unfoldings(self.unfoldings)
        if isinstance(self.patterns, str) or not self.patterns:
            raise ValueError(f"patterns is {self.patterns!r}; expected a tuple of names such as ('unstructured',)")
        for name in self.patterns:
            if name != "taps":
                patterns.pattern(name)
        if not self.densities or not all(0 <= density <= 1 for density in self.densities):
            raise ValueError(f"densities is {self.densities!r}; expected shares from 0 to 1")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share!r}; expected a number from 0 (sparse) to 1 (low rank), or None")
        if self.ranks < 0:
            raise ValueError(f"ranks is {self.ranks!r}; expected 0 or more")
        check_least(self, 1, "multiple_of")
        if self.turns < _FEWEST:
            raise ValueError(f"turns is {self.turns!r}; expected at least {_FEWEST}")

    def fits(self, site: Layer) -> bool:
        """One layer, whose inputs' moments are there if it has been calibrated at all."""
        return not site.statistics or bool(self._offered(site))

    def curve(self, site: Layer) -> Curve:
        unit = statistics.error_unit(site)
        if not self.fits(site):
            return Curve((), (), unit)
        return Curve.joined(unit, (self._curve(site, how, first=not n) for n, how in enumerate(self._chosen(site))))

    def leanest(self, site: Layer) -> Sequence[Choice] | None:
        if "taps" in self.patterns:
            return None  # which positions of a kernel stay is told by the data
        spec, several = site.spec, [patterns.pattern(name) for name in self.patterns]
        return [
            self.choice(site, how, rank, pattern, density)
            for how in self._offered(site)
            for rank, pattern, density in (
                *((rank, _ANY, 0.0) for rank in self._alone(spec, how)),
                *((r, p, d) for p in several if spec.allows(p) for r, d in self._grid(spec, how, p, first=True)),
            )
        ]

    def _curve(self, site: Layer, how: Unfolding, *, first: bool) -> Curve:
        layer = AdditiveLayer.of(site, how, exact=self.exact)
        total = layer.total
        fits = list(self._fits(site, layer, first=first))
        choices = tuple(self.choice(site, how, rank, pattern, density) for rank, pattern, density, _ in fits)
        errors = tuple(min(1.0, error / total) if total > 0 else 0.0 for *_, error in fits)
        wide = site.spec.shape[1] > _WIDE
        spectra = {} if wide else {how.name: lowrank.profile(layer.energies())}
        return Curve(choices, errors, statistics.error_unit(site), statistics.scale(site, total), spectra)

    def _fits(self, site: Layer, layer: AdditiveLayer, *, first: bool) -> Iterator[tuple[int, Pattern, float, float]]:
        """Ranks, patterns and densities on offer in an unfolding, with their errors."""
        quick, turns = _quick(layer), min(_CURVE_TURNS, self.turns)
        for rank in self._alone(site.spec, layer.how):
            yield rank, _ANY, 0.0, self._decompose(quick, rank, _ANY, 0.0, turns=turns).error
        for pattern in self._patterns(site, layer):
            grid = list(self._grid(site.spec, layer.how, pattern, first=first))
            fits = additive.path(
                quick.target, quick.error, quick.step, grid, quick.arranged(pattern), quick.kernel,
                turns=turns, between=min(_NEXT_TURNS, self.turns) if layer.target.numel() >= _PATH else 0,
            )  # fmt: skip
            for (rank, density), fit in zip(grid, fits, strict=True):
                yield rank, pattern, density, fit.error

    def factorize(self, site: Layer, choice: SumChoice) -> Factors:
        spec = site.spec
        how = unfolding(spec.kernel, choice.unfolding)
        if site.statistics and how.name not in {u.name for u in self._offered(site)}:
            site.require("input", f"LowRankPlusSparse ({how.name})")
        layer = AdditiveLayer.of(site, how, exact=self.exact)
        pattern = patterns.pattern(choice.pattern)
        longest, stated = max(_CURVE_TURNS, self.turns // _thin(spec)), min(_CURVE_TURNS, self.turns)
        quick = _quick(layer)
        # Of few entries more turns may find worse ones; the search that the curve tells of is then there as well.
        fit = min(
            (
                self._decompose(quick, choice.rank, pattern, choice.density, turns=turns, polish=_POLISH)
                for turns in ((longest, stated) if layer.target.numel() < _TINY else (longest,))
            ),
            key=lambda fit: fit.error,
        )
        if quick is not layer:
            fit = additive.settled(layer.target, layer.error, layer.step, fit.double())
        left, right = layer.factors(fit.product)
        left, right = lowrank.balance(left, right)
        shift = None
        if choice.bias and (site.statistics or not spec.bias):
            shift = layer.shift(fit).to(spec.dtype)
        dtype = spec.dtype
        sparse, mask = layer.sparse(fit), layer.whole(fit.sparse.mask)
        return Factors(left.to(dtype), right.to(dtype), sparse.to(dtype), mask, pattern, shift, how)

    def layers(self, site: Layer, choice: SumChoice) -> Chain | Sum:
        spec, rank, density = site.spec, choice.rank, choice.density
        how, pattern = unfolding(spec.kernel, choice.unfolding), patterns.pattern(choice.pattern)
        return _structure(spec, how, rank, pattern, density, bias=choice.biased(spec.bias))

    def choice(self, site: Layer, how: Unfolding, rank: int, pattern: Pattern, density: float) -> SumChoice:
        """The choice of a rank and a density."""
        biased = site.spec.bias or bool(site.statistics)
        return SumChoice(how.name, rank, density, pattern.name, biased, method=self.name)

    def _decompose(
        self, layer: AdditiveLayer, rank: int, pattern: Pattern, density: float, *, turns: int, polish: int = 0
    ) -> additive.Additive:
        return additive.decompose(
            layer.target,
            layer.error,
            layer.step,
            rank,
            layer.arranged(pattern),
            density,
            layer.kernel,
            alternation=additive.Alternation(turns, self.tolerance, polish=polish),
        )

    def _offered(self, site: Layer) -> list[Unfolding]:
        """Unfoldings that the site's statistics have a metric for."""
        return [
            how
            for how in unfoldings_named(site.spec.kernel, self.unfoldings)
            if not site.statistics or AdditiveLayer.known(site, how)
        ]

    def _chosen(self, site: Layer) -> list[Unfolding]:
        """Those asked for, or the one in which half of the numbers as low rank alone lose least."""
        offered = self._offered(site)
        if self.unfoldings is not None or len(offered) < 2 or not self.ranks:
            return offered if self.ranks else offered[:1]

        def lost(how: Unfolding) -> float:
            energies = AdditiveLayer.of(site, how).energies()
            each = sum(math.prod(part.shape) for part in site.spec.factor(how, 1))
            rank = math.prod(site.spec.shape) // (2 * each)
            return float(lowrank.tail_errors(energies)[min(rank, energies.shape[-1])])

        return [min(offered, key=lost)]

    @staticmethod
    def takes_pattern(name: str, spec: LayerSpec) -> bool:
        """Whether the weight of such a layer can have a pattern, given by its name."""
        if name == "taps":
            return max(spec.kernel, default=1) > 1 and not spec.transposed
        return spec.allows(patterns.pattern(name))

    def _patterns(self, site: Layer, layer: AdditiveLayer) -> Iterator[Pattern]:
        """The patterns on offer that the layer can have."""
        for name in self.patterns:
            if name == "taps":
                if len(site.spec.kernel):
                    boxes = patterns.taps(layer.scores())
                    yield from (pattern for pattern in boxes if site.spec.allows(pattern))
            elif site.spec.allows(pattern := patterns.pattern(name)):
                yield pattern

    def _grid(self, spec: LayerSpec, how: Unfolding, pattern: Pattern, *, first: bool) -> Iterator[tuple[int, float]]:
        """Ranks and densities on offer: those that store or multiply fewer numbers than the layer."""
        full = full_rank(spec, how)
        seen: set[tuple[int, int]] = set()
        for rank, density in self._splits(spec, how, pattern):
            kept = pattern.kept(spec.shape, density)
            # Without a low-rank part all unfoldings are the same.
            stored = kept or (rank and self.share is not None)
            wanted = stored and (rank or first) and rank <= full and (rank, kept) not in seen
            if wanted and self._pays(spec, how, rank, pattern, density):
                seen.add((rank, kept))
                yield rank, density

    def _splits(self, spec: LayerSpec, how: Unfolding, pattern: Pattern) -> Iterator[tuple[int, float]]:
        """Ranks and densities that share out so many numbers, in several ways."""
        numbers = math.prod(spec.shape)
        each = sum(math.prod(part.shape) for part in spec.factor(how, 1))
        few = _FEW // _thin(spec)
        densities = pattern.densities(self.densities, spec.shape)
        fixed = bool(pattern.densities((), spec.shape))
        shares = _SHARES if numbers <= _HUGE else (0.0, 0.3)
        if self.share is not None:
            shares = (self.share,)
        elif not self.ranks:
            shares = (0.0,)
        for share in shares:
            for total in _thinned(densities, few if share and self.share is None else 2 * few + 1):
                # Patterns with a density of their own keep it; the low-rank part is then beside it.
                yield int(share * total * numbers / each), total if fixed else round((1 - share) * total, 6)

    def _alone(self, spec: LayerSpec, how: Unfolding) -> list[int]:
        """Ranks on offer for low rank alone: any below the multiple that suits the device, multiples above."""
        each = sum(math.prod(part.shape) for part in spec.factor(how, 1))
        full = full_rank(spec, how)
        most = min(full, math.prod(spec.shape) // each)
        if self.share is not None or 0 not in self.densities or not most:
            return []
        step = self.multiple_of or rank_multiple(spec.device, spec.dtype, full)
        count, below = -(-self.ranks // _thin(spec)), 0.5 if math.prod(spec.shape) > _HUGE else 0.0
        ranks = set()
        for n in range(count):
            rank = most ** ((n + 1) / (count + below))
            small = self.multiple_of is None and rank < step
            ranks.add(max(1, round(rank)) if small else step * max(1, round(rank / step)))
        return sorted(rank for rank in ranks if rank <= full and self._pays(spec, how, rank, _ANY, 0.0))

    def _pays(self, spec: LayerSpec, how: Unfolding, rank: int, pattern: Pattern, density: float) -> bool:
        return pays(_structure(spec, how, rank, pattern, density, bias=spec.bias), (spec,))


def _structure(
    spec: LayerSpec, how: Unfolding, rank: int, pattern: Pattern, density: float, *, bias: bool
) -> Chain | Sum:
    """A pair, a sparse layer, or both added; the pair has the bias if there is one."""
    pair = spec.factor(how, rank, bias=bias) if rank else Chain(())
    if not pattern.kept(spec.shape, density):
        return pair
    sparse = Chain((spec.sparse(pattern, density, bias=bias and not rank),))
    return Sum((pair, sparse)) if rank else sparse


def _quick(layer: AdditiveLayer) -> AdditiveLayer:
    """What a layer is searched in: of a large one, float32."""
    return layer.single() if layer.target.numel() >= _SINGLE else layer


def _thin(spec: LayerSpec) -> int:
    """By how much the grid of a layer is coarser for its size."""
    numbers = math.prod(spec.shape)
    return 4 if numbers > _HUGE else 2 if numbers > _LARGE else 1


def _thinned(densities: tuple[float, ...], most: int) -> tuple[float, ...]:
    """Every second density until there are at most so many; the smallest stays, since 0 is low rank alone."""
    while len(densities) > most:
        densities = (*densities[:1], *densities[1::2])
    return densities
