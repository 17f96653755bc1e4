"""Fit a layer to what the dense network answers there, for what it is given once its predecessors have changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import CalibrationError
from spectrim.linalg.finite import all_finite
from spectrim.linalg.moments import Paired
from spectrim.linalg.pooled import discounted, larger, larger_apart, pooled
from spectrim.linalg.regression import Covariances, Equations, Unseen, scarcity, towards
from spectrim.linalg.sketch import Sketch
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer, Statistics
from spectrim.nn.layers import canonical, spec_of
from spectrim.nn.modules import Chained, Factored, make_layer, whole
from spectrim.nn.watch.junctions import MadeUp
from spectrim.nn.watch.keys import ranked
from spectrim.nn.watch.layout import Layout
from spectrim.nn.watch.lockstep import Seen
from spectrim.nn.watch.patches import outputs_at, patches_at
from spectrim.nn.watch.samples import Samples
from spectrim.nn.watch.sampling import Extent, Sampling, choose, leading
from spectrim.nn.watch.watchers import in_full

# Rows wanted for every number of the patch, over the whole run.
FLOOR = 32
# More where they are cheap: share of a layer's own MACs that the moments of rows may cost.
EFFORT = 0.25
# Share of the samples that is not fitted, to tell how far to go.
HELD_OUT = 0.125
# Samples that tell something, where there are three times as many.
ENOUGH = 4
# Samples that were calibrated on and are not given, of which the means are held against those of samples that are.
AGAINST = 64
# Variance below which answers of float32 do not vary, in squares of their mean.
_ROUNDING = 1e-12
# Directions of a sketch.
SKETCH = 1024


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of a run, batch by batch, and which of them are not fitted."""

    run: Extent  # what is known of all of them
    samples: tuple[Samples, ...]  # of every batch
    held: tuple[Tensor, ...]  # ``[size]`` of every batch: those that are held out
    total: int  # samples of the whole run, equal ones counted once
    # Rows wanted at a layer over the whole run (None for all, ``"auto"`` for enough for its patches), or positions of
    # each sample.
    amount: Sampling = field(default_factory=Sampling)

    @classmethod
    def of(
        cls,
        batches: Iterable[Any],
        amount: Sampling = Sampling(),  # noqa: B008 (frozen)
        *,
        held_out: float = HELD_OUT,
        layout: Layout = Layout(),  # noqa: B008 (frozen)
    ) -> Split:
        """Hold out a share of the samples, of a few a third; of one or two none.

        Which ones depends on what is in them, not on their order.
        """
        run = Extent(batches, layout)
        samples = tuple(run.see(batch) for batch in batches)
        every = torch.cat([each.filled for each in samples]) if samples else torch.zeros(0, dtype=torch.bool)
        keys, bits = (
            torch.cat([getattr(each, name) for each in samples])[every] if samples else torch.zeros(0)
            for name in ("keys", "bits")
        )
        different = torch.where(bits == 0, torch.arange(len(bits)), bits)
        ordered = different[ranked(keys, different)].unique_consecutive()
        count = max(round(held_out * len(ordered)), min(ENOUGH, len(ordered) // 3)) if held_out else 0
        held = torch.zeros(len(every), dtype=torch.bool)
        held[every] = torch.isin(different, ordered[:count])
        return cls(run, samples, held.split([each.size for each in samples]), len(ordered), amount)

    @property
    def held_out(self) -> int:
        """Samples that are not fitted."""
        return int(sum(int(held.sum()) for held in self.held))

    @property
    def apart(self) -> frozenset[int]:
        """What samples held out are told apart by, for :class:`Sampling`; none where one of them cannot be told."""
        pairs = zip(self.samples, self.held, strict=True)
        bits = frozenset(bit for samples, held in pairs for bit in samples.bits[held].tolist())
        return frozenset() if 0 in bits else bits

    def shares(self, calibrated: int) -> tuple[float, float]:
        """Of so many samples that were calibrated on those that are fitted, and what their mean counts.

        Against it stand the samples that are not given, as they were calibrated, but no more than :data:`AGAINST`.
        """
        if not calibrated:
            return 1.0, 1.0
        absent = min(max(calibrated - self.total, 0), AGAINST)
        fitted = self.total * (1 - self.held_out / max(sum(int(each.filled.sum()) for each in self.samples), 1))
        return min(1.0, fitted / calibrated), self.total / max(self.total + absent, 1)

    def part(self, first: int, last: int) -> Split:
        """Some of the batches, with as many rows of each sample."""
        return dataclasses.replace(self, samples=self.samples[first:last], held=self.held[first:last])

    def positions(self, spec: LayerSpec, shape: Sequence[int], size: int) -> int | None:
        """Rows to take of each sample of a batch that a layer sees as this shape."""
        d, o = spec.features, spec.out_channels // spec.groups
        cheap = EFFORT * (leading(spec, tuple(shape))[1] / size) * d * o / (d + o) ** 2
        return self.amount.positions_in(self.run, lambda: max(self.run.positions(FLOOR * (d + o)), round(cheap)))


class Joint:
    """What a layer is given beside what it is to answer: moments, and as they are the rows of samples held out."""

    def __init__(
        self,
        spec: LayerSpec,
        centre: Tensor,
        scale: Tensor,
        *,
        sketch: bool = False,
        outputs: Tensor | None = None,
        shares: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        g, o, *_ = spec.shape
        self.spec = spec  # the layer as it is in the compressed network
        # ``[g, d]``, about the mean and the spread of its inputs: the units in which they are small numbers.
        self.centre, self.scale = centre, scale
        self.outputs = outputs  # output channels of the dense layer that it still has, ascending; None for all
        self.shares = shares  # from :meth:`Split.shares`: what is not fitted counts as it was calibrated
        d, device = spec.features, centre.device
        self.fitted = Sketch(g, d + o, size=SKETCH, device=device) if sketch else Paired(g, d + o, d, device)
        self._squares = torch.zeros_like(centre, dtype=torch.float64)
        self._fourths = torch.zeros_like(self._squares)
        self._held: list[tuple[Tensor, Tensor]] = []
        self._samples = self._distinct = 0

    @classmethod
    def of(
        cls,
        site: Layer,
        *,
        sketch: bool = False,
        outputs: Tensor | None = None,
        shares: tuple[float, float] = (1.0, 1.0),
    ) -> Joint:
        """For a layer as it was calibrated."""
        spec, known = site.spec, site.statistics.input
        dtype = site.weight.dtype if site.weight.dtype == torch.float64 else torch.float32
        shape = (spec.groups, spec.features)
        centre, scale = (make(shape, dtype=dtype, device=site.weight.device) for make in (torch.zeros, torch.ones))
        if known is not None:
            spread = known.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
            centre, scale = known.mean.to(centre), torch.where(spread > 0, spread, 1.0).to(scale)
        return cls(spec, centre, scale, sketch=sketch, outputs=outputs, shares=shares)

    @staticmethod
    def bytes_of(spec: LayerSpec) -> int:
        """Of the moments for a layer."""
        return 8 * spec.groups * (spec.features + spec.shape[1]) ** 2

    def add(
        self, seen: Iterable[Seen], split: Split, seed: int = 0, given: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        """Take the rows of what was seen; ``given`` makes the layer's input of what was seen."""
        for each in seen:
            samples, held = split.samples[each.batch], split.held[each.batch]
            for number, (x, y) in enumerate(zip(each.inputs, each.targets, strict=False)):
                x = given(x)
                # Where the dense network took another way, no row answers another.
                if not self._answers(x, y):
                    continue
                positions = split.positions(self.spec, x.shape, samples.size)
                chosen = choose(self.spec, tuple(x.shape), positions, samples, seed + number)
                out = held[chosen.sample]
                rows = self._rows(x, y, torch.cat([chosen.index[~out], chosen.index[out]]))
                fitted = len(out) - int(out.sum())
                if fitted:
                    self._fit(rows[:, :fitted])
                if fitted < len(out):
                    self._held.append((rows[:, fitted:].clone(), chosen.sample[out] + self._samples))
            self._samples += samples.size
        self._distinct = min(self._samples, split.total)

    def _fit(self, rows: Tensor) -> None:
        self.fitted.update(rows)
        squares = rows[..., : self.spec.features].sub(self.centre.unsqueeze(1)).div_(self.scale.unsqueeze(1)).square_()
        self._squares += squares.sum(1)
        self._fourths += squares.square_().sum(1)

    def _answers(self, x: Tensor, y: MadeUp) -> bool:
        spec = self.spec
        if spec.is_linear:
            return x.shape[:-1] == y.shape[:-1]
        axes = len(spec.kernel)
        return x.shape[: -axes - 1] == y.shape[: -axes - 1] and spec.output_shape(tuple(x.shape[-axes:])) == tuple(
            y.shape[-axes:]
        )

    def _rows(self, x: Tensor, y: MadeUp, index: Tensor) -> Tensor:
        patches, wanted = patches_at(self.spec, x, index), y.at(lambda each: outputs_at(self.spec, each, index))
        if self.outputs is not None:
            left = (self.outputs.to(wanted.device) % wanted.shape[2]).reshape(len(wanted), 1, -1)
            wanted = torch.take_along_dim(wanted, left, 2)
        d = self.spec.features
        dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
        rows = patches.new_empty(*patches.shape[:2], d + wanted.shape[2], dtype=dtype)
        rows[..., :d].unflatten(2, patches.shape[2:]).copy_(patches)
        rows[..., d:].copy_(wanted)
        return rows

    @property
    def unseen(self) -> Unseen | None:
        """The rows held out, around the means of the others; None if there are none."""
        if not self._held:
            return None
        rows = torch.cat([rows for rows, _ in self._held], dim=1)
        rows -= self.fitted.mean.to(rows.dtype).unsqueeze(1)
        d = self.spec.features
        return Unseen(rows[..., :d], rows[..., d:], torch.cat([sample for _, sample in self._held]))

    def layer(self, site: Layer) -> Layer:
        """The layer as it should be factorised: weight ``W*``, its bias, and moments of what it is given."""
        d, fitted, unseen = self.spec.features, self.fitted, self.unseen
        if not fitted.count:  # the networks never gave it as many rows as each other
            return site
        if not (fitted.is_finite() and (unseen is None or all_finite(unseen.inputs, unseen.answers))):
            raise CalibrationError(f"layer {site.name!r} sees NaN or Inf in the reconstruction batches")
        g, o, *_ = self.spec.shape
        fitted_share, share = self._counted(site)
        moments = Equations.of(fitted, d) if isinstance(fitted, Sketch) else self._covariances(fitted, site, share)
        scarce = scarcity(fitted.count, self._squares, self._fourths)
        weight = dense = site.weight.reshape(g, o, d).double()
        # With one or two samples nothing tells how far to go.
        if self._distinct > 2:
            weight = towards(dense, moments, scarce, unseen, _units(site))
        if site.statistics.input is None:
            weight = torch.lerp(dense, weight, share / self.shares[1])
        mean = fitted.mean
        if unseen is not None:
            # A mean is not fitted to noise: it is that of all samples.
            away = torch.cat([unseen.inputs, unseen.answers], dim=2)
            mean = mean + away.sum(1, dtype=torch.float64) / (fitted.count + away.shape[1])
        bias = self._bias(site, weight, mean, share).reshape(-1)
        weight = weight.to(site.weight.dtype).reshape(site.weight.shape)
        return dataclasses.replace(
            site, weight=weight, bias=bias, statistics=self._known(site.statistics, mean[:, :d], fitted_share)
        )

    def _counted(self, site: Layer) -> tuple[float, float]:
        """The shares, smaller where what is given is of another kind than what was calibrated."""
        known, fitted, d = site.statistics, self.fitted, self.spec.features
        times = 1.0
        if self.shares[1] < 1 and isinstance(fitted, Paired) and known.input is not None:
            times = larger(fitted.inputs, known.input)
        elif self.shares[1] < 1 and known.input is None and known.output is not None:
            times = larger_apart(fitted.mean[:, d:], fitted.variance[:, d:], known.output)
        fitted_share, mean_share = (discounted(share, times) for share in self.shares)
        return fitted_share, mean_share

    def _covariances(self, fitted: Paired, site: Layer, share: float) -> Covariances:
        """Those of samples that are given, and for this share of them of others as calibrated, which miss nothing."""
        given, known = Covariances.of(fitted), site.statistics.input
        if known is None or share >= 1:
            return given
        calibrated = known.covariance
        weight = site.weight.reshape(given.cross.shape).double()
        inputs, cross = torch.lerp(calibrated, given.inputs, share), torch.lerp(weight @ calibrated, given.cross, share)
        return dataclasses.replace(given, inputs=inputs, cross=cross)

    def _bias(self, site: Layer, weight: Tensor, mean: Tensor, share: float) -> Tensor:
        """What brings the mean answer to the dense one; of samples that are not given it stays as it was calibrated."""
        d, known = self.spec.features, site.statistics.input
        bias = mean[:, d:] - torch.einsum("god,gd->go", weight, mean[:, :d])
        calibrated = torch.zeros_like(bias) if site.bias is None else site.bias.double().reshape(bias.shape)
        inputs = mean[:, :d] if known is None else known.mean
        moved = weight - site.weight.reshape(weight.shape).double()
        return torch.lerp(calibrated - torch.einsum("god,gd->go", moved, inputs), bias, share)

    def _known(self, statistics: Statistics, mean: Tensor, share: float) -> Statistics:
        """What was calibrated, with what is given now in place of what calibration held of all inputs together."""
        fitted = self.fitted
        if isinstance(fitted, Sketch):
            name, inputs = "sketch", fitted.take(torch.arange(mean.shape[1], device=mean.device).expand(len(mean), -1))
        elif statistics.input is None and not in_full(self.spec):
            # Methods are not to take apart in full what calibration gave them in slices.
            return statistics
        else:
            name, inputs = "input", fitted.inputs
        inputs.mean = mean.clone()
        if name == "input" and statistics.input is not None:
            inputs = pooled(inputs, statistics.input, share)
        return dataclasses.replace(statistics, **{name: inputs})

    def errors(self, module: nn.Module) -> Errors | None:
        """What a module in place of the layer misses of the answers; None where it cannot be told."""
        if isinstance(self.fitted, Sketch) or not self.fitted.count:
            return None
        try:
            weight, bias = whole(module)
        except (AttributeError, AssertionError, ValueError):
            return None
        if weight.shape[:3] != self.spec.shape[:3] or weight.numel() != torch.Size(self.spec.shape).numel():
            return None
        d, unseen = self.spec.features, self.unseen
        w = weight.double().reshape(*weight.shape[:2], d)
        covariance, mean = self.fitted.covariance, self.fitted.mean
        away = mean[:, d:] - torch.einsum("god,gd->go", w, mean[:, :d])
        away = away if bias is None else away - bias.double().reshape(away.shape)
        energy = self.fitted.variance[:, d:].sum()
        # Of answers that do not vary, as for samples that are all the same, rounding is all that would be told.
        if energy <= _ROUNDING * mean[:, d:].square().sum():
            return None
        crossed = w @ covariance[:, :d] - 2 * covariance[:, d:]
        missed = energy + (crossed * w).sum() + away.square().sum()
        fitted = float(missed.clamp_min(0) / energy)
        if unseen is None:
            return Errors(fitted, None)
        left = unseen.answers - unseen.inputs @ w.to(unseen.inputs.dtype).mT + away.to(unseen.inputs.dtype).unsqueeze(1)
        lost, whole_of = (float(rows.double().square().sum()) for rows in (left, unseen.answers))
        return Errors(fitted, lost / max(whole_of, 1e-300))


def _units(site: Layer) -> Tensor:
    """What outputs are multiplied by to count as they do for the network's, ``[g, o]``: the size of their gradients."""
    ones, gradient = site.weight.new_ones(site.spec.shape[:2], dtype=torch.float64), site.statistics.gradient
    size = ones if gradient is None else gradient.mean_squares.sqrt()
    return size / most if float(most := size.max()) > 0 else ones


@dataclass(frozen=True)
class Errors:
    """Share of the energy of a layer's dense answers that is missed.

    Attributes
    ----------
    fitted
        On the samples that the layer was fitted to.
    held_out
        On those that were held out; None if there were none.
    """

    fitted: float
    held_out: float | None


def refit_last(
    chain: Factored | Chained,
    layer: Layer,
    seen: Sequence[Seen],
    split: Split,
    joint: Joint | None = None,
    *,
    shares: tuple[float, float] = (1.0, 1.0),
) -> Joint | None:
    """Fit the last layer of a pair or chain, and its bias, to the dense layer's answers. It is changed in place.

    For layers whose patches are too long to hold their second moment: what comes to the last layer is short. Those
    without a bias are left alone, since the mean could not be kept.

    Parameters
    ----------
    joint
        Moments of batches seen before, of the same last layer.
    shares
        From :meth:`Split.shares`.
    """
    *before, last = chain
    spec = spec_of(last, tuple(f"{name}.{len(before)}" for name in layer.spec.names))
    weight, bias = canonical(last)
    if bias is None:
        return None
    # Its outputs are those of the layer.
    part = Layer(spec, weight, bias, statistics=Statistics(output=layer.statistics.output))
    joint = joint or Joint.of(part, shares=shares)
    with torch.no_grad():
        joint.add(seen, split, given=lambda x: functools.reduce(lambda value, made: made(value), before, x))
    if not joint.fitted.count:
        return joint
    fitted = joint.layer(part)
    chain[len(before)] = make_layer(spec, fitted.weight, fitted.bias).train(last.training)
    return joint
