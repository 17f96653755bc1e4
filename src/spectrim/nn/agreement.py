"""How far two networks' outputs agree, without labels."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import CalibrationError, SpectrimError, called_as
from spectrim.nn.copying import cannot_run
from spectrim.nn.watch.batches import Feed, Forward, begins_alike
from spectrim.nn.watch.layout import Layout, Mask, Where, samples_first
from spectrim.nn.watch.masks import mask_of
from spectrim.nn.watch.nesting import begun, compared, named_logits, output_tensors, transformed
from spectrim.nn.watch.observe import observe
from spectrim.nn.watch.positions import Positions
from spectrim.nn.watch.samples import first_batches, spread
from spectrim.nn.watch.state import as_used, evaluating, kept, settings_kept

log = logging.getLogger(__name__)

# Samples that outputs are compared on.
_SAMPLES = 512
# Bytes of outputs that are remembered for the next network.
_REMEMBERED = 1 << 27
# Log of the chance of what one network alone calls impossible, whose divergence would be infinite.
_IMPOSSIBLE = math.log(1e-10)


@dataclass(frozen=True)
class Agreement:
    """How far a compressed network's outputs are from the dense network's, without labels.

    Attributes
    ----------
    samples
        That both were run on.
    error
        Norm of the difference over the norm of the dense outputs; a label counts as a vector with a one at its place.
    top1
        Share of rows whose largest output is at the same place, or of equal labels where all outputs are labels (whole
        numbers, true or false); None for outputs that are neither labels nor scores of classes.
    held_out
        Whether the layers were not fitted to these samples; where channels went they were, by statistics of all.
    worst
        The error of the output that is furthest off, where there are several: in ``error`` the largest ones weigh most.
    divergence
        Kullback-Leibler divergence of the classes' probabilities from the dense network's, in nats, a mean over rows;
        None for outputs that are no scores of classes.
    parts
        What each sample adds to the divergence, or to the squared error where there is none, times the number of
        samples: their mean is what is lost. Empty where outputs do not have the samples first.
    """

    samples: int
    error: float
    top1: float | None = None
    held_out: bool = True
    divergence: float | None = None
    worst: float | None = None
    parts: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @property
    def agreed(self) -> float:
        """Share of samples whose class is the dense network's; 1 - relative error for outputs that are no scores."""
        return 1 - self.error if self.top1 is None else self.top1

    @property
    def standard_error(self) -> float | None:
        """How far the divergence, else the relative error, is off by chance, typically; None for too few samples."""
        if len(self.parts) < 2:
            return None
        spread = float(torch.tensor(self.parts, dtype=torch.float64).std()) / math.sqrt(len(self.parts))
        # The error is the root of the mean.
        return spread if self.divergence is not None else spread / (2 * self.error) if self.error else 0.0

    def like(self, other: Agreement) -> bool:
        """Whether two networks that ran on the same samples lose no more one than the other, within standard error.

        The error is that of the mean difference, sample by sample: what is hard for one network is for the other.
        """
        if len(self.parts) != len(other.parts) or len(self.parts) < 2:
            return False
        differences = torch.tensor(self.parts, dtype=torch.float64) - torch.tensor(other.parts, dtype=torch.float64)
        return abs(float(differences.mean())) <= float(differences.std()) / math.sqrt(len(differences))

    def __str__(self) -> str:
        which = "held-out calibration samples" if self.held_out else "calibration samples"
        same = "" if self.top1 is None else f"the same class comes first in {self.top1:.2%}, and "
        worst = "" if self.worst is None else f", one of several by {self.worst:.2%}"
        return f"on {self.samples:,} {which} {same}outputs differ from the dense network's by {self.error:.2%}{worst}"


def check_comparable(model: nn.Module, batch: Any, feed: Feed) -> None:
    """Raise CalibrationError if the shapes of a model's outputs depend on values: networks cannot be compared by them.

    So do those of non-maximum suppression. A batch of the same shape is tried: upside down, or backwards.
    """
    feed.decide(model, batch)
    other = transformed(batch, lambda x: -x if x.is_floating_point() else x.flip(-1) if x.dim() > 1 else x)
    shapes = []
    with observe(model, forward=feed) as running:
        for part in (batch, other):
            try:
                shapes.append([tuple(t.shape) for t in output_tensors(running(part))])
            except Exception:  # not every model takes any numbers; the batch itself is tried by calibration
                return
    if shapes[0] != shapes[1]:
        raise CalibrationError(
            f"the shapes of the outputs depend on values, as behind non-maximum suppression: {shapes[0][:3]} and "
            f"{shapes[1][:3]} for batches of one shape, so that plans cannot be compared by them. Give one method, or "
            "pass forward=, a function (model, batch) that returns what comes before the selection"
        )


@called_as("Write agreement(dense, small, batches); of a result, its .model", dense=nn.Module, small=nn.Module)
def agreement(
    dense: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
    held: Sequence[Tensor] = (),
    *,
    mask: Mask = None,
    forward: Forward | None = None,
    samples: Where = None,
) -> Agreement | None:
    """How far a compressed network's outputs are from the dense network's, without labels.

    The report of :func:`spectrim.compress` tells it of the network that it returned; call this after training.

    Parameters
    ----------
    dense, small
        Run in evaluation mode without gradients, and left as found.
    batches
        Of inputs; 512 samples at most are used, chosen by their contents from all. Better of samples that nothing was
        fitted to.
    held
        Which samples of every batch to take, ``[size]`` for each; all if none are named. Where a model refuses a part
        of a batch, or answers for it otherwise, it is run on the whole one.
    mask
        Tells padding from data; see :func:`spectrim.calibrate`.
    forward
        Runs a model on a batch in another way.
    samples
        Where a batch's samples are; see :func:`spectrim.calibrate`.

    Returns
    -------
    Agreement
        Relative error of the outputs, and of scores of classes how often the same comes first; None where outputs
        differ in shape or are zero.
    """
    feed = Feed.of(forward, samples, mask)
    try:
        return _agreement(dense, small, batches, held, feed, parted=True)
    except SpectrimError:
        raise
    except Exception as error:  # a model may refuse other numbers of samples than its batches have
        log.info("outputs are compared on whole batches, since the model does not take a part of one: %s", error)
        return _agreement(dense, small, batches, held, feed, parted=False)


def _agreement(
    dense: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
    held: Sequence[Tensor],
    feed: Feed,
    *,
    parted: bool,
) -> Agreement | None:
    tally = _Tally()
    first, stream = begun(batches)
    feed.decide(dense, first)
    positions, layout = Positions.of(dense, first, feed), feed.layout
    among = held if any(bool(each.any()) for each in held) else ()
    cut = spread(stream, _SAMPLES, layout, held) if parted else first_batches(stream, _SAMPLES, layout)
    held_out = bool(among)
    with observe(dense, forward=feed) as wanted, observe(small, forward=feed) as given:
        if parted:
            _check_parted(wanted, first, cut, layout)
        for batch, these in zip(cut, itertools.repeat(None) if parted or not among else among, strict=False):
            a, b, part, size = wanted(batch), given(batch), batch, layout.size(batch)
            if these is not None:
                index = these.nonzero().flatten()
                held_out &= all(layout.axis_of(each, size) is not None for each in output_tensors(a))
                a, b = (layout.of_samples(each, index, size) for each in (a, b))
                part, size = layout.picked(batch, index), len(index)
            if size:
                tally.add(a, b, positions, mask_of(part, size, layout), size, turned=layout.is_turned(part, size))
    return tally.agreement(held_out=held_out)


def _check_parted(running: Callable[[Any], Any], batch: Any, parts: Iterable[Any], layout: Layout) -> None:
    """Raise ValueError where a model answers otherwise for as many samples as a part has than in a whole batch."""
    few = next((layout.size(part) for part in parts), 0)
    if 0 < few != layout.size(batch) and not begins_alike(running, batch, layout.resized(batch, few)):
        raise ValueError(f"outputs of {few} samples are others than those of a batch that begins with them")


@dataclass
class _Tally:
    """Adds up over batches what two networks' outputs have in common."""

    samples: int = 0
    missed: dict[int, float] = field(default_factory=lambda: defaultdict(float))  # by the place among the outputs
    energy: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    same: int = 0
    rows: int = 0
    nats: float | None = None  # none of outputs that are no scores
    comparable: bool = True
    squares: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)

    def add(
        self, wanted: Any, given: Any, positions: Positions, data: Tensor | None, samples: int, *, turned: bool = False
    ) -> None:  # fmt: skip
        named = wanted if isinstance(wanted, Tensor) and wanted.dim() == 2 else named_logits(wanted)
        pairs = list(zip(output_tensors(wanted), output_tensors(given), strict=False))
        self.comparable &= all(a.shape == b.shape for a, b in pairs)
        labels = not any(_is_amount(a) for a, _ in pairs)
        self.samples += samples
        self.squares.append(torch.zeros(samples, dtype=torch.float64))
        self.divergences.append(torch.zeros(samples, dtype=torch.float64))
        for place, (a, b) in enumerate(pairs):
            if a.shape != b.shape or not (labels or _is_amount(a)):
                continue
            scores = named is not None and (a is named or (len(pairs) == 1 and a.dim() == named.dim()))
            scores &= a.is_floating_point()
            a, b = (samples_first(each, samples, turned) for each in (a, b))
            a, b, owner = _without_padding(a, b, positions.of_output(place, a, data))
            self._add(place, a, b, owner, labels=labels, scores=scores and a.dim() > 1 and a.shape[-1] > 1)

    def _add(self, place: int, a: Tensor, b: Tensor, owner: Tensor, *, labels: bool, scores: bool) -> None:
        """Add one output of a batch, at this place among all, whose rows are of these samples."""
        wide, other = _as_vectors(a, b) if labels else compared(a, b)
        missed = (wide - other).square()
        self.missed[place] += float(missed.sum())
        self.energy[place] += float(wide.square().sum())
        ordered = bool(len(owner)) and int(owner.max()) < len(self.squares[-1])
        if ordered:
            self.squares[-1].index_add_(0, owner, missed.reshape(len(owner), -1).sum(1).cpu())
        if labels:
            self.same += int((a == b).sum())
            self.rows += a.numel()
        elif scores:
            self.same += int((a.argmax(-1) == b.argmax(-1)).sum())
            nats = _divergences(a, b)
            self.nats = (self.nats or 0.0) + float(nats.sum())
            self.rows += a[..., 0].numel()
            if ordered:
                self.divergences[-1].index_add_(0, owner, nats.reshape(len(owner), -1).sum(1).cpu())

    def agreement(self, *, held_out: bool) -> Agreement | None:
        missed, energy = sum(self.missed.values()), sum(self.energy.values())
        if not self.comparable or not energy:
            return None
        shares = [self.missed[place] / whole for place, whole in self.energy.items() if whole]
        told = Agreement(
            self.samples, math.sqrt(missed / energy), self.same / self.rows if self.rows else None, held_out,
            worst=math.sqrt(max(shares)) if len(shares) > 1 else None,
        )  # fmt: skip
        if self.nats is None:
            return replace(told, parts=_shares(self.squares, missed, energy))
        parts = _shares(self.divergences, self.nats, self.rows)
        return replace(told, divergence=self.nats / self.rows, parts=parts)


def _is_amount(output: Tensor) -> bool:
    """Whether numbers of an output can be nearly right, as those of images in bytes are: others are labels."""
    return output.is_floating_point() or output.dtype == torch.uint8


def _as_vectors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as numbers that are as far apart as vectors with a one at each label's place."""
    ones = torch.ones(a.shape, dtype=torch.float64, device=a.device)
    return ones, ones + math.sqrt(2) * (a != b)


def _without_padding(a: Tensor, b: Tensor, data: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of two outputs where tokens are data, if they are of tokens as ``data``, and the sample that each is of."""
    owner = torch.arange(len(a) if a.dim() else 0)
    if data is None:
        return a, b, owner
    return a[data.to(a.device)], b[data.to(b.device)], owner.unsqueeze(1).expand(a.shape[:2])[data.cpu()]


def _divergences(wanted: Tensor, given: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each row of scores from the wanted one, in nats."""
    p, q = wanted.double().log_softmax(-1), given.double().log_softmax(-1)
    # What has no chance adds nothing, and a row in which nothing has any, or something all, tells nothing.
    apart = (p - q.masked_fill(q.isneginf(), _IMPOSSIBLE)).masked_fill(p.isneginf(), 0)
    return (p.exp() * apart).sum(-1).masked_fill(_tells_nothing(wanted) | _tells_nothing(given), 0)


def _tells_nothing(scores: Tensor) -> Tensor:
    """Rows of scores that are no chances."""
    return scores.isneginf().all(-1) | scores.isposinf().any(-1)


def _shares(of_samples: Sequence[Tensor], whole: float, unit: float) -> tuple[float, ...]:
    """What samples add to a mean, so many times as there are samples; empty where they do not add up to it."""
    values = torch.cat([*of_samples])
    told = math.isclose(float(values.sum()), whole, rel_tol=1e-6, abs_tol=1e-12)
    return tuple((values * (len(values) / unit)).tolist()) if told else ()


@dataclass
class DenseOutputs:
    """What a dense network answers on some samples, for others to be compared with; padding is left out.

    The samples are chosen by their contents, once; of batches that the network refuses in part they are the first ones.
    Its outputs are remembered as far as they take little memory, so that it runs once.
    """

    model: nn.Module
    batches: Iterable[Any]
    samples: int = 512
    forward: Forward | None = None
    _positions: Positions = field(default=Positions(), init=False, repr=False)
    _parts: list[Any] = field(default_factory=list, init=False, repr=False)
    _known: list[list[Tensor]] = field(default_factory=list, init=False, repr=False)

    @torch.no_grad()
    def missed(self, other: nn.Module) -> float:
        """Share of the energy of the network's outputs that another one misses."""
        feed = Feed.of(self.forward)
        missed = energy = 0.0
        means: dict[Any, tuple[int, Any]] = {}
        with evaluating(self.model, other), kept(self.model), kept(other):
            for number, batch in enumerate(self._chosen(feed)):
                size = feed.layout.size(batch)
                wanted = self._outputs(number, batch, feed)
                try:
                    given = output_tensors(feed(other, batch))
                except Exception as error:
                    raise cannot_run(self.model, error) from error
                data, turned = mask_of(batch, size, feed.layout), feed.layout.is_turned(batch, size)
                for place, (a, b) in enumerate(zip(wanted, given, strict=True)):
                    a, b = (samples_first(each, size, turned) for each in (a, b))
                    a, b = compared(*_without_padding(a, b, self._positions.of_output(place, a, data))[:2])
                    missed += float((a - b).square().sum())
                    # Around the mean of all samples, however they are cut into batches.
                    rows, mean = len(a) if a.dim() else 1, a.mean(0)
                    before, known = means.get(key := (place, mean.shape), (0, mean))
                    apart = (mean - known) * (rows / (before + rows))
                    energy += float((a - mean).square().sum() + (mean - known).mul(apart).sum() * before)
                    means[key] = before + rows, known + apart
        return missed / max(energy, 1e-300)

    def _chosen(self, feed: Feed) -> list[Any]:
        if not self._parts:
            first, stream = begun(self.batches)
            feed.decide(self.model, first)
            self._positions = Positions.of(self.model, first, feed)
            self._parts = spread(stream, self.samples, feed.layout)
            try:
                self._outputs(0, self._parts[0], feed)
                _check_parted(functools.partial(feed, self.model), first, self._parts, feed.layout)
            except Exception as error:  # a model may refuse other numbers of samples than its batches have
                log.info("outputs are compared on whole batches, since the model refuses a part of one: %s", error)
                self._known = []
                self._parts = list(first_batches(self.batches, self.samples, feed.layout))
        return self._parts

    def _outputs(self, number: int, batch: Any, feed: Feed) -> list[Tensor]:
        if number < len(self._known):
            return self._known[number]
        found = [tensor.clone() for tensor in output_tensors(feed(self.model, batch))]
        held = sum(tensor.nbytes for tensors in (*self._known, found) for tensor in tensors)
        if number == len(self._known) and held <= _REMEMBERED:
            self._known.append(found)
        return found


def output_error(
    dense: nn.Module,
    compressed: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int = 512,
    mask: Mask = None,
    forward: Forward | None = None,
) -> float:
    """Share of the energy of a network's outputs that a compressed copy misses, on some samples; padding left out."""
    return DenseOutputs(dense, batches, samples, Feed.of(forward, mask=mask)).missed(compressed)


def metric_of(evaluate: Callable[[nn.Module], Any], model: nn.Module, whose: str) -> float:
    """What a user's metric is of a model, in evaluation mode and without gradients; it may be NaN or infinite.

    Modes, hooks and flags that the function sets on the model do not stay. What is no number raises TypeError, for
    ``whose``.
    """
    with settings_kept(model), as_used(model):
        value: Any = evaluate(model)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float):
        return value  # a score knows how many samples it was measured on
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"evaluate returned {value!r:.80} for {whose}: expected one number, as an accuracy")
    return float(value)
