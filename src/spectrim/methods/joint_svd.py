"""Low rank with a factor that several layers share."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectrim.cost.counted import rank_multiple
from spectrim.errors import MissingMomentsError
from spectrim.linalg import bi_joint, joint, lowrank, response
from spectrim.linalg.bi_joint import Bilateral
from spectrim.linalg.bisection import last_integer
from spectrim.linalg.metric import SlicedMetric
from spectrim.linalg.unfold import Unfolding, unfolding, unfoldings_named
from spectrim.methods import statistics
from spectrim.methods.base import WEIGHT_ENERGY, Curve, Method, check_least, check_unfoldings, full_rank, pays
from spectrim.methods.joint_layers import JointLayers, compatible, pose
from spectrim.methods.statistics import Standard
from spectrim.network.choices import Choice, SharedChoice
from spectrim.network.factors import SharedBasis
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Group, Layer, Site
from spectrim.network.structure import Apart, Chain

_SHARES = ("left", "right", "both")
# Ranks of a curve that no single decomposition gives, and most rounds over both parts at each of them: what is stated
# is up to 0.13 above what is carried out with one round, 0.08 with two and 0.07 with three or four.
_KNOTS, _ROUNDS = 6, 3


@dataclass(frozen=True)
class JointSVD(Method):
    """Share factors among the layers of a group (Chen et al. 2021).

    ``share="right"`` solves ``min sum_n ||M_n - U_n V||^2`` (RJSVD: the second convolution is shared), ``"left"``
    solves ``min sum_n ||M_n - U V_n||^2`` (LJSVD: the first), and ``"both"`` alternates over ``U_n V + U V_n``
    (Bi-JSVD). The norm is that of the layers' responses if the site is calibrated, and that of the weights if not;
    every layer counts with the share of its energy that is lost. The paper's objective, in which squared norms add up
    as they are, is ``energy="plain"``.

    Attributes
    ----------
    share
        Which factor.
    proportion
        For ``"both"``: the left-shared part of the rank; 0.5 in the paper's default.
    unfoldings
        Names of the unfoldings to offer; all that fit the layers if None. The paper's is ``height-first``.
    multiple_of
        Offer ranks that are multiples of this; what suits the device and the layer's width if None.
    to_full_rank
        Offer also ranks at which the factors cost more than the layers.
    sweeps
        Most rounds of an alternation: over both parts (30 in the paper), and over the factors of a calibrated site.
    first
        Which part of ``"both"`` is fitted first: ``"left"`` as in the paper's code, or ``"right"`` as in its text.
    energy
        ``"equal"``: every layer counts with the share of its energy that is lost; ``"plain"``: squared norms add up, so
        that layers with large ones are kept better. Errors in the table are shares either way; those of plain ones are
        measured at a few ranks.

    Notes
    -----
    One eigendecomposition an unfolding gives the error of every rank for ``"right"`` and ``"left"``. Calibrated
    left-shared factors of layers that see different inputs, and spatial unfoldings, start from it; what is carried out
    is improved by turns and loses no more. For ``"both"`` a few ranks are on offer, each fitted from the one before.
    Layers whose outputs are weighed by sensitivity share one weight where they share the second factor.

    Where all layers see one input and share the first factor whole, it is computed once for all of them.
    """

    takes: ClassVar[type[Site]] = Group
    offers: ClassVar[type[Choice]] = SharedChoice

    share: str = "right"
    proportion: float = 0.5
    unfoldings: tuple[str, ...] | None = None
    multiple_of: int | None = None
    to_full_rank: bool = False
    sweeps: int = 30
    first: str = "left"
    energy: str = "equal"

    def __post_init__(self) -> None:
        check_unfoldings(self.unfoldings)
        if self.share not in _SHARES:
            raise ValueError(f"share is {self.share!r}; expected one of {', '.join(map(repr, _SHARES))}")
        if not 0 <= self.proportion <= 1:
            raise ValueError(f"proportion is {self.proportion!r}; expected a share from 0 (right) to 1 (left)")
        if self.first not in ("left", "right"):
            raise ValueError(f"first is {self.first!r}; expected 'left' or 'right'")
        if self.energy not in ("equal", "plain"):
            raise ValueError(f"energy is {self.energy!r}; expected 'equal' or 'plain'")
        check_least(self, 1, "multiple_of", "sweeps")

    @property
    def name(self) -> str:
        """The word plans use: the class and what is shared, so that several may stand in one table."""
        parts = f"JointSVD-{self.share}" + (f"-{self.proportion:g}" if self.share == "both" else "")
        return parts + ("-plain" if self._plain else "")

    @property
    def _plain(self) -> bool:
        return self.energy == "plain"

    @property
    def _left_share(self) -> float:
        """The part of the rank whose first factor is shared."""
        return {"left": 1.0, "right": 0.0}.get(self.share, self.proportion)

    def fits(self, site: Group) -> bool:
        """Several layers whose unfolded weights agree on the shared side."""
        return compatible(site.layers, self.share)

    def ranks(self, site: Group, how: Unfolding) -> range:
        """Ranks on offer: multiples, as long as the factors have fewer parameters or fewer MACs than the layers."""
        full = self.full_rank(site, how)
        spec = site.layers[0]
        # What suits one layer suits the group, whose pairs are as narrow.
        narrow = min(full_rank(layer, how) for layer in site.layers)
        step = self.multiple_of or rank_multiple(spec.device, spec.dtype, narrow)
        most = full if self.to_full_rank else self._break_even(site, how, full)
        return range(step, most + 1, step)

    def full_rank(self, site: Group, how: Unfolding) -> int:
        """Rank of the stack, at which every layer can be met exactly; for ``"both"`` the rank of one layer."""
        first, second = how.sizes(site.layers[0].kernel)
        rows = [spec.shape[2] * first for spec in site.layers]
        columns = [spec.shape[1] * second for spec in site.layers]
        if self.share == "right":
            return min(sum(rows), columns[0])
        if self.share == "left":
            return min(rows[0], sum(columns))
        return min(rows[0], columns[0])

    def choice(
        self, site: Group, how: Unfolding, rank: int, *, left_rank: int | None = None, bias: bool
    ) -> SharedChoice:
        """The choice of a rank; for ``"both"`` it is split by the proportion unless ``left_rank`` is given."""
        if left_rank is None:
            left_rank = round(self._left_share * rank)
        alike = len({_first_of(spec, how) for spec in site.layers}) == 1
        once = site.same_input and left_rank == rank and alike
        return SharedChoice(how.name, rank, left_rank, bias, once, method=self.name)

    def layers(self, site: Group, choice: SharedChoice) -> Apart:
        rank, left_rank = choice.rank, choice.left_rank
        chains: list[Chain] = []
        for number, spec in enumerate(site.layers):
            how = unfolding(spec.kernel, choice.unfolding)
            pair = spec.factor(how, rank, bias=choice.bias)
            if number:
                # Every direction of the rank has equally many numbers; the first layer has counted the shared ones.
                first, second = pair
                first = dataclasses.replace(first, shared=math.prod(first.shape) // rank * left_rank)
                second = dataclasses.replace(second, shared=math.prod(second.shape) // rank * (rank - left_rank))
                pair = Chain((second,)) if choice.once else dataclasses.replace(pair, specs=(first, second))
            chains.append(pair)
        return Apart(tuple(chains))

    def curve(self, site: Group) -> Curve:
        if not self.fits(site):
            return Curve((), (), WEIGHT_ENERGY)
        if len({part.calibrated for part in site.parts}) > 1:
            raise MissingMomentsError(f"group {site.name!r}: some of its layers are calibrated and some are not")
        unit = statistics.error_unit(site.parts[0]) if site.calibrated else WEIGHT_ENERGY
        biased = site.calibrated or any(spec.bias for spec in site.layers)
        curves: list[Curve] = []
        fit = self._measured if self._plain or self.share == "both" else self._lost
        for how in unfoldings_named(site.layers[0].kernel, self.unfoldings):
            ranks = self.ranks(site, how)
            shared = {"left": self.share != "right", "right": self.share != "left"}
            group = pose(site, how, **shared, plain=self._plain) if ranks else None
            if group is not None:
                offered, lost, energies = fit(group, list(ranks))
                choices = tuple(self.choice(site, how, rank, bias=biased) for rank in offered)
                errors = tuple(value / max(group.scale, 1e-300) for value in lost)
                spectra = {} if energies is None else {how.name: lowrank.profile(energies)}
                curves.append(Curve(choices, errors, unit, group.scale, spectra))
        return Curve.joined(unit, curves)

    def leanest(self, site: Group) -> Sequence[Choice]:
        if not self.fits(site):
            return []
        biased = site.calibrated or any(spec.bias for spec in site.layers)
        ranks = {how: self.ranks(site, how) for how in unfoldings_named(site.layers[0].kernel, self.unfoldings)}
        return [self.choice(site, how, least[0], bias=biased) for how, least in ranks.items() if least]

    def _lost(self, group: JointLayers, ranks: list[int]) -> tuple[list[int], list[float], Tensor | None]:
        """Ranks, what each loses, and the spectrum of the stack."""
        metrics, most = group.metrics, ranks[-1]
        if metrics is None:
            # Without metrics the error of every rank takes the spectrum alone, without a basis.
            energies = lowrank.energies(torch.cat(group.mixed, dim=-2 if self.share == "right" else -1))
            return ranks, (lowrank.tail_errors(energies) * float(energies.sum()))[ranks].tolist(), energies
        if self.share == "right":
            spectrum = joint.right_shared(group.mixed, metrics, most)
            energies, basis = spectrum.energies, spectrum.basis
            if group.own_roots:
                return ranks, _lost_by_own(group, metrics, basis)[ranks].tolist(), energies
            lefts = [m @ basis for m in group.mixed]
            exact = group.separates
        else:
            left, energies = joint.left_start(group.mixed, metrics, most)
            lefts = [left] * len(group.mixed)
            exact = group.separates and _alike(metrics)
        if exact:
            lost = lowrank.tail_errors(energies) * float(energies.sum())
        else:
            equations = [response.normal(*layer) for layer in zip(group.mixed, metrics, lefts, strict=True)]
            if self.share == "right":
                lost = functools.reduce(operator.add, equations).errors()
            else:
                lost = torch.stack([e.errors() for e in equations]).sum(0)
        return ranks, lost[ranks].tolist(), energies

    def _measured(self, group: JointLayers, ranks: list[int]) -> tuple[list[int], list[float], None]:
        """The same by fits of a few ranks: no decomposition has all of them, or what is minimised is not what is lost.

        Of plain energies a rank is carried out; both parts are fitted from those of the rank before.
        """
        knots = _knots(ranks)
        if self._plain:
            fits = (self._best(group, rank, round(self._left_share * rank), ranks) for rank in knots)
        else:
            fits = (_finished(group, state) for state in self._path(group, knots))
        return knots, [group.lost(fit.products()) for fit in fits], None

    def _path(self, group: JointLayers, knots: Sequence[int]) -> Iterator[Bilateral]:
        """Fits of both parts at ascending ranks, each from the one before."""
        state: Bilateral | None = None
        for rank in knots:
            left_rank = round(self._left_share * rank)
            state = self._both(group, left_rank, rank - left_rank, state, _ROUNDS)
            yield state

    def _both(
        self, group: JointLayers, left_rank: int, right_rank: int, start: Bilateral | None, rounds: int
    ) -> Bilateral:
        rounds, first = min(self.sweeps, rounds), self.first
        return bi_joint.bilateral(
            group.mixed, left_rank, right_rank, group.metrics, sweeps=rounds, first=first, start=start
        )

    def factorize(self, site: Group, choice: SharedChoice) -> SharedBasis:
        how = unfolding(site.layers[0].kernel, choice.unfolding)
        rank, left_rank = choice.rank, choice.left_rank
        group = pose(site, how, left=left_rank > 0, right=left_rank < rank, plain=self._plain)
        if group is None:
            site.parts[0].require("input", f"{self.name} ({how.name})")
            raise MissingMomentsError(f"group {site.name!r}: not all layers hold 'input' moments")
        state = self._best(group, rank, left_rank, list(self.ranks(site, how)))
        numbers = range(len(site.layers))
        own_lefts = [group.own_left(state.own_lefts[n], n) for n in numbers]
        own_rights = [group.own_right(state.own_rights[n], n) for n in numbers]
        shared_right = group.shared_right(state.shared_right)
        own_lefts, shared_right = _balanced(own_lefts, shared_right)
        mirrored, turned = _balanced([v.mT for v in own_rights], group.shared_left(state.shared_left).mT)
        shared_left, own_rights = turned.mT, [v.mT for v in mirrored]
        shifts: list[Tensor | None] = [None for _ in numbers]
        dtype = site.layers[0].dtype
        if choice.bias and group.seen is None:
            # What was announced and counted: every layer of the group has a bias.
            shifts = [torch.zeros(s.out_channels, dtype=dtype, device=s.device) for s in site.layers]
        elif choice.bias:
            for n in numbers:
                made = Bilateral((own_lefts[n],), shared_right, shared_left, (own_rights[n],))
                shifts[n] = group.shift(made.products()[0], n).to(dtype)
        return SharedBasis(
            tuple(u.to(dtype) for u in own_lefts),
            shared_right.to(dtype),
            shared_left.to(dtype),
            tuple(v.to(dtype) for v in own_rights),
            tuple(shifts),
            how,
            tuple(spec.shape[1:] for spec in site.layers),
            choice.once,
        )

    def _best(self, group: JointLayers, rank: int, left_rank: int, ranks: list[int]) -> Bilateral:
        """The factors of the mixed matrices at a rank, of those on offer: they lose no more than the curve says."""
        metrics, turns = group.metrics, min(self.sweeps, 4)
        if metrics is not None and left_rank == rank:
            # From where the curve started.
            left, _ = joint.left_start(group.mixed, metrics, left_rank)
            exact = group.separates and _alike(metrics)
            left, rights = joint.alternate_left(group.mixed, metrics, left, sweeps=0 if exact else turns)
            return dataclasses.replace(bi_joint.nothing(group.mixed), shared_left=left, own_rights=rights)
        # The way that the curve went.
        before = list(self._path(group, [knot for knot in _knots(ranks) if knot < rank])) if left_rank else []
        start = before[-1] if before else None
        stated = self._both(group, left_rank, rank - left_rank, start, _ROUNDS)
        improved = self._both(group, left_rank, rank - left_rank, stated, self.sweeps) if left_rank else stated
        # Improved is what the layers lose by a weight of the outputs, and by a metric, that are not their own.
        fits = (_finished(group, stated), _finished(group, improved, turns))
        return min(fits, key=lambda fit: group.lost(fit.products()))

    def refit(self, site: Layer, factors: SharedBasis, number: int) -> SharedBasis:
        """Fit the own factors of one layer anew, to other inputs and targets; the shared ones stay.

        Parameters
        ----------
        site
            The layer alone, with its new weight and bias, and ``input`` moments. Without a bias it gets none.
        number
            Of the layer in the group.
        """
        units = Standard.of(site)
        seen = units.patches(factors.how)
        if seen is None:
            site.require("input", f"refitting {self.name}")
            return factors
        matrix = units.matrix(factors.how)
        left_rank, right_rank = factors.ranks
        # A part of rank 0 may be as long as another layer.
        shared_left, v = factors.shared_left.double(), factors.own_rights[number].double()
        u, shared_right = factors.own_lefts[number].double(), factors.shared_right.double()
        if left_rank:
            shared_left, v = units.own_left(shared_left), units.own_right(v)
        if right_rank:
            u, shared_right = units.own_left(u), units.own_right(shared_right)
        # Only the first factor depends on how the outputs are weighed: the best second one is best for each of them.
        mixed_right = response.mix(shared_right, units.root)
        for _ in range(3 if left_rank and right_rank else 1):
            if right_rank:
                rest = matrix - shared_left @ v if left_rank else matrix
                u = _own_left(response.mix(rest, units.root), seen.metric, u, mixed_right)
            if left_rank:
                rest = matrix - u @ shared_right if right_rank else matrix
                v = response.refit(rest, seen.metric, shared_left)
        (made,) = Bilateral((u,), shared_right, shared_left, (v,)).products()
        missing = matrix - made
        dtype = factors.shared_right.dtype
        shift = None if site.biases[0] is None else units.shift(seen.shift(missing)).to(dtype)
        u, v = units.left(u) if right_rank else u, units.right(v) if left_rank else v

        def put(values: tuple[Any, ...], new: Tensor | None) -> tuple[Any, ...]:
            return (*values[:number], new, *values[number + 1 :])

        return dataclasses.replace(
            factors,
            own_lefts=put(factors.own_lefts, u.to(dtype)),
            own_rights=put(factors.own_rights, v.to(dtype)),
            shifts=put(factors.shifts, shift),
        )

    def _break_even(self, site: Group, how: Unfolding, full: int) -> int:
        """The largest rank at which the factors cost fewer parameters or fewer MACs than the layers."""
        biased = any(spec.bias for spec in site.layers)

        def worthwhile(rank: int) -> bool:
            return pays(self.layers(site, self.choice(site, how, rank, bias=biased)), site.layers)

        return last_integer(worthwhile, 0, full + 1)


def _finished(group: JointLayers, state: Bilateral, turns: int = 0) -> Bilateral:
    """Factors of both parts, or of a shared second one, fitted by what each layer sees and by its own outputs.

    Where the metric does not separate, turns improve a shared second factor that stands alone.
    """
    if group.metrics is not None and not group.separates:
        if state.shared_left.shape[-1]:
            layers = zip(group.mixed, group.metrics, state.own_lefts, strict=True)
            rights = [response.refit(m - u @ state.shared_right, a, state.shared_left) for m, a, u in layers]
            state = dataclasses.replace(state, own_rights=tuple(rights))
        else:
            lefts, right = joint.alternate_right(group.mixed, group.metrics, state.own_lefts, sweeps=turns)
            state = dataclasses.replace(state, own_lefts=lefts, shared_right=right)
    return _by_own_outputs(group, state)


def _by_own_outputs(group: JointLayers, state: Bilateral) -> Bilateral:
    """First factors of a shared second one, fitted again by each layer's own weight of its outputs.

    To share a second factor the layers share a weight of the outputs, their mean; what is lost is told by their own.
    """
    if not group.own_roots or group.metrics is None:
        return state
    lefts = list(state.own_lefts)
    for n, metric in enumerate(group.metrics if state.shared_right.shape[-2] else ()):
        rest = group.mixed[n]
        if state.shared_left.shape[-1]:
            rest = rest - state.shared_left @ state.own_rights[n]
        lefts[n] = _own_left(group.by_own(rest, n), metric, lefts[n], group.by_own(state.shared_right, n))
    return dataclasses.replace(state, own_lefts=tuple(lefts))


def _lost_by_own(group: JointLayers, metrics: Sequence[SlicedMetric], basis: Tensor) -> Tensor:
    """What second factors of rank ``0 .. R``, the first rows of a basis, lose by the layers' own weights.

    The best first factors are projections where the metric separates, and else lose no more.
    """
    lost = basis.new_zeros(basis.shape[-1] + 1)
    for n, metric in enumerate(metrics):
        matrix = group.by_own(group.mixed[n], n)
        # QR keeps the spans of leading columns.
        rows, _ = torch.linalg.qr(group.by_own(basis.mT, n).mT)
        total = float(response.total_energy(matrix, metric).sum())
        lost = lost + total * response.product_errors(matrix @ rows, rows.mT, metric, total, matrix)
    return lost


def _own_left(rest: Tensor, metric: SlicedMetric, left: Tensor, right: Tensor) -> Tensor:
    """First factor of one layer for a given second one, exactly where the metric separates.

    After fewer steps rounding still decides how far the others have come.
    """
    if metric.separates:
        return torch.linalg.lstsq(right.mT, rest.mT).solution.mT
    return response.refit_first([rest], [metric], left, [right], steps=48)


def _knots(ranks: list[int]) -> list[int]:
    """A few of the ranks, the largest among them."""
    return ranks[::-1][:: max(1, -(-len(ranks) // _KNOTS))][::-1]


def _first_of(spec: LayerSpec, how: Unfolding) -> LayerSpec:
    """The first layer of a pair, as far as it can be another layer's too."""
    first, _ = spec.factor(how, 1)
    return dataclasses.replace(first, names=("",), inputs=())


def _alike(values: tuple[SlicedMetric, ...]) -> bool:
    return all(value is values[0] for value in values)


def _balanced(lefts: list[Tensor], right: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same products, with a shared factor as long in every direction as the others are on average."""
    rows = [left.shape[-2] for left in lefts]
    root = len(lefts) ** 0.5
    stacked, right = lowrank.balance(torch.cat(lefts, dim=-2) / root, right)
    return list((stacked * root).split(rows, dim=-2)), right
