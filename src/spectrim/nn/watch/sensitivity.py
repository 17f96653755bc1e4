"""How much a layer's errors matter: gradients that reach its outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import CalibrationError, ForwardError, SpectrimError, called_as, first_few
from spectrim.linalg.moments import Moments, Squares
from spectrim.network.sites import Layer, Sites, Tied
from spectrim.nn.contiguity import contiguous_where_needed
from spectrim.nn.parameters import parameters_of
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.calibrate import calibrated, check_weights
from spectrim.nn.watch.gradients import FEWEST, Gradients, GradientWatch
from spectrim.nn.watch.layout import Mask, Where
from spectrim.nn.watch.nesting import begun, checked_batches
from spectrim.nn.watch.observe import observe
from spectrim.nn.watch.positions import Positions
from spectrim.nn.watch.samples import first_batches, spread
from spectrim.nn.watch.sampling import Extent, Sampling
from spectrim.nn.watch.watched import Call, PassMaker
from spectrim.progress import Steps

log = logging.getLogger(__name__)


@called_as("Write sensitivity(model, sites, batches), with the sites of calibrate", model=nn.Module, sites=Sites)
def sensitivity(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    *,
    samples: int = 512,
    rows: int | None = None,
    mask: Mask = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    axis: Where = None,
    seed: int = 0,
) -> Sites:
    """Weigh every site's output channels by what an error there does to the network's output.

    An error ``e`` in a layer's response moves the network's output ``z`` by ``J e``. Drawing ``v`` from a standard
    normal, the gradient of ``v . z`` at the response is ``J^T v``, and its second moment ``G`` gives the expected
    squared movement ``e^T G e``: the Gauss-Newton approximation of a squared error on the outputs. Summed over sites
    and positions, such errors share one unit, so that a table may trade one site against another. No labels are used.

    Parameters
    ----------
    sites
        Calibrated with the same model.
    batches
        Of which ``samples`` samples are taken, chosen by their contents from the whole run where a list or loader says
        how long it is: neither cut nor order makes a difference. Else the first batches that hold as many, and where
        the model refuses a part of a batch, whole batches spread over the run.
    rows
        Output positions that are taken over the whole run, an equal part of each sample; by default 16 times the
        number of a layer's output channels, and at least 4,096.
    mask
        Which tokens are data, as for :func:`spectrim.calibrate`: directions are zero at outputs of padding, and its
        gradients count nowhere.
    axis
        Where a batch's samples are: what other verbs call ``samples``, which is a number of them here.

    Returns
    -------
    Sites
        Every layer with ``gradient`` moments added. The model, its gradients and its mode are as before.

    Raises
    ------
    CalibrationError
        If no gradient reaches a site, or gradients are NaN or Inf; the message names the layer.
    """
    found = _gradients(model, sites, batches, samples, rows, Feed.of(forward, axis, mask), seed)
    if found.error is not None:
        raise ForwardError(found.reason) from found.error
    if found.reason:
        raise CalibrationError(found.reason)
    for name, moments in found.moments.items():
        if not moments.count:
            raise CalibrationError(
                f"no gradient reached layer {name!r} in {found.samples} samples: the model's output does not depend on "
                "it. Skip it, or do without sensitivity."
            )
        if not moments.is_finite():
            raise CalibrationError(f"the gradients that reach layer {name!r} hold NaN or Inf")
    return _with_gradients(sites, found.moments)


def weighed(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    *,
    samples: int = 512,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Sites:
    """The same as far as gradients can be had; ``notes`` of the sites say where they cannot, and why.

    Errors of layers that none reaches count as if losing a layer's whole response mattered as much as it does, in the
    median, at the others. Where none reaches any, errors are not weighed at all.
    """
    return with_weights(sites, _gradients(model, sites, batches, samples, None, Feed.of(forward), 0))


def calibrated_and_weighed(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    amount: Sampling,
    feed: Feed,
    *,
    progress: Steps,
    samples: int = 512,
) -> Sites:
    """As :func:`calibrate` and then :func:`weighed`, where both watch the same forward passes.

    The first batch is run for each of them: what a pass computes is counted without gradients, and whether there are
    gradients is known then. Where a later pass fails with them, which it may not without, both begin again, apart.
    Of a run of more than ``samples`` samples, those that are chosen are run once more.
    """
    try:
        with _weights_apart(model):
            shared = _Shared(model, sites, batches, samples, feed)
            found = calibrated(model, sites, batches, amount, feed, progress=progress, passes=shared)
        if shared.found is not None:
            return with_weights(found, shared.found)
    except _Refused as error:
        log.info("sites are calibrated and weighed in passes of their own: %s", error)
        found = calibrated(model, sites, batches, amount, feed, progress=progress)
    return weighed(model, found, batches, samples=samples, forward=feed)


def with_weights(sites: Sites, found: Gradients) -> Sites:
    """Calibrated sites with the gradients that could be had; ``notes`` say where they could not."""
    moments = found.moments.items()
    usable = {name: m for name, m in moments if m.count and m.is_finite() and float(m.mean_squares.sum()) > 0}
    without = [layer.name for layer in sites.layers if layer.name not in usable]
    if not without:
        return _with_gradients(sites, usable)
    names = first_few([*map(repr, without)], 5)
    reason = found.reason or (
        "no gradient reaches them, or one that is zero or not finite: the way to the output is cut by a layer without "
        "gradients, no_grad, detach, or a selection"
    )
    if not usable:
        note = f"errors are not weighed by what they do to the model's output: {reason}"
        return dataclasses.replace(sites, notes=(*sites.notes, note))
    note = (
        f"errors of {len(without)} of {len(sites.layers)} layers ({names}) are not weighed by gradients, but as in the "
        f"median of the others: {reason}"
    )
    known = [(layer, usable[layer.name]) for layer in sites if layer.name in usable]
    weights = [_energy(layer, gradient.second_moment) for layer, gradient in known if isinstance(gradient, Moments)]
    typical = statistics.median(weights) if weights else 1.0
    assumed: dict[str, Moments | Squares] = {
        layer.name: _even(layer, typical)
        for layer in (*sites, *(each.table for each in sites.tied))
        if layer.name in without
    }
    assumed |= {each.head.name: _even_head(each, typical) for each in sites.tied if each.head.name in without}
    return dataclasses.replace(_with_gradients(sites, usable | assumed), notes=(*sites.notes, note))


def _gradients(
    model: nn.Module, sites: Sites, batches: Iterable[Any], samples: int, rows: int | None, feed: Feed, seed: int
) -> Gradients:
    """Run batches forwards and backwards. The model, its gradients and its mode are as before."""
    first, stream = begun(checked_batches(batches))
    check_weights(model, sites)
    feed.decide(model, first)
    positions = Positions.of(model, first, feed)
    run = Extent(batches, feed.layout)
    there = run.samples

    def taken(parts: Iterable[Any], run: Extent) -> Gradients:
        watch = GradientWatch(model, sites, rows, run, samples, seed, positions)
        with _weights_apart(model), observe(model, forward=feed) as call:
            for part in parts:
                watch.see(call, part)
                if watch.reason:
                    break
        return watch.found

    if there is None:
        return taken(first_batches(stream, samples, feed.layout), run)
    found = taken(spread(stream, samples, feed.layout), run)
    if found.error is None or there <= samples:
        return found
    log.info("gradients are taken of whole batches, since the model refuses a part of one: %s", found.error)
    apart = itertools.islice(batches, 0, None, max(1, there // samples))
    return taken(first_batches(apart, samples, feed.layout), Extent(batches, feed.layout))


@contextlib.contextmanager
def _weights_apart(model: nn.Module) -> Iterator[None]:
    """Gradients of weights are not asked for, and would take as long as those of what passes."""
    before = [(p, p.requires_grad, p.grad) for p in parameters_of(model)]
    try:
        with contiguous_where_needed(model):
            for parameter, _, _ in before:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


class _Refused(SpectrimError):
    """A forward pass fails with gradients."""


class _Shared(PassMaker):
    """Passes that a network is calibrated by and that gradients go back through, as long as there are any."""

    def __init__(self, model: nn.Module, sites: Sites, batches: Iterable[Any], samples: int, feed: Feed) -> None:
        self._of = model, sites, batches, samples, feed
        self._watch: GradientWatch | None = None

    @property
    def found(self) -> Gradients | None:
        """None where the run is not known to be of so few samples."""
        return None if self._watch is None else self._watch.found

    def make(self, call: Call, batch: Any) -> Any:
        watch = self._watch
        if watch is None or watch.reason:
            return call(batch)
        output = watch.see(call, batch, again=False)
        if watch.error is not None or watch.fails_in_place:
            raise _Refused(watch.reason) from watch.error
        return output

    def behind(self, call: Call, batch: Any, *, first: bool) -> None:
        if not first:
            return
        # How the model is fed is decided by now.
        model, sites, batches, samples, feed = self._of
        run = Extent(batches, feed.layout)
        if run.samples is not None and run.samples <= samples:
            positions = Positions.of(model, batch, feed)
            self._watch = GradientWatch(model, sites, None, run, samples, 0, positions)
            self._watch.see(call, batch)


def _with_gradients(sites: Sites, moments: Mapping[str, Moments | Squares]) -> Sites:
    def of(layer: Layer) -> Layer:
        statistics = dataclasses.replace(layer.statistics, gradient=moments[layer.name])
        return dataclasses.replace(layer, statistics=statistics)

    tied = (
        dataclasses.replace(each, table=of(each.table), weights=moments[each.head.name].mean_squares[0])
        for each in sites.tied
    )
    return dataclasses.replace(sites, sites=tuple(map(of, sites)), tied=tuple(tied))


def _even_head(tied: Tied, total: float) -> Squares:
    """Gradients that are alike at all outputs of a head, by which losing the whole response matters so much."""
    head = tied.head
    weight, inputs = head.weight[0].double(), head.statistics.input
    energy = float(weight.square().sum() if inputs is None else (weight @ inputs.covariance[0] * weight).sum())
    even = Squares(1, head.spec.out_channels, head.weight.device)
    even.update(torch.full((1, 1, head.spec.out_channels), math.sqrt(total / energy) if energy > 0 else 1.0))
    return even


def _energy(layer: Layer, gradient: Tensor | None = None) -> float:
    """Energy of a layer's responses about their mean, weighed by a moment ``[g, o, o]`` if there is one."""
    inputs, outputs = layer.statistics.input, layer.statistics.output
    g, o, *_ = layer.spec.shape
    if outputs is not None:
        covariance = outputs.covariance
    elif inputs is not None:
        weight = layer.weight.double().reshape(g, o, -1)
        covariance = weight @ inputs.covariance.double() @ weight.mT
    else:
        return 1.0
    return float((covariance * (torch.eye(o).to(covariance) if gradient is None else gradient)).sum())


def _even(layer: Layer, total: float) -> Moments:
    """Moments of gradients that are alike at all outputs, by which losing the whole response matters so much."""
    g, o, *_ = layer.spec.shape
    even = Moments(g, o, layer.weight.device)
    energy = _energy(layer)
    size = total / energy if energy > 0 and total > 0 else 1.0
    even.count = FEWEST
    even.scatter += torch.eye(o).to(even.scatter) * size * even.count
    return even
