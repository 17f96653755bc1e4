"""Watch a model on calibration batches: input shapes, and streamed moments of what every site sees."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from spectrim.errors import CalibrationError, called_as
from spectrim.linalg.moments import Moments
from spectrim.network.sites import Layer, Sites
from spectrim.nn.find import check_loaded, elsewhere
from spectrim.nn.watch.batches import Feed, in_order
from spectrim.nn.watch.layout import Mask, Where
from spectrim.nn.watch.masks import unread
from spectrim.nn.watch.nesting import begun, checked_batches, without_numbers
from spectrim.nn.watch.observe import hooked, observe
from spectrim.nn.watch.sampling import GUESSED, Extent, Sampling
from spectrim.nn.watch.state import State
from spectrim.nn.watch.watched import PassMaker, Watched
from spectrim.nn.watch.watchers import Watcher
from spectrim.progress import Steps, reports_steps, told

log = logging.getLogger(__name__)
# Sizes of samples are alike where the smallest is this share of the largest, and numbers of rows as well.
_ALIKE = 0.9
# Rows a number below which errors on other data are much larger than those on the rows.
ENOUGH = 4


@reports_steps
@called_as("Write calibrate(model, find(model), batches)", model=nn.Module, sites=Sites)
def calibrate(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    *,
    rows: int | str | None = "auto",
    positions: int | None = None,
    mask: Mask = None,
    statistics: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    samples: Where = None,
    progress: Steps | bool | None = None,
    seed: int = 0,
) -> Sites:
    """Run a model on calibration batches once and keep what the methods need to know of each site.

    For every layer the centred second moment and mean of its input patches are streamed in float64 (``input``), so
    that memory does not depend on the number of samples. Convolutions whose patches are longer than 1,152 numbers keep
    one such moment for the slices of each unfolding (``slices``) and one of the outputs (``output``),
    linear layers with more than 2,048 inputs that of the outputs and a sketch of that of the inputs (``sketch``).
    Coupled channels (:func:`spectrim.couple`) get moments of their pooled responses, and convolutions that read them
    but keep no moment of whole patches one of the channels at single positions (``channels``).

    Parameters
    ----------
    model
        Run in evaluation mode without gradients; its mode and hooks are left as found.
    sites
        From :func:`spectrim.find`.
    batches
        Tensors, mappings of keyword arguments, or tuples ``(inputs, targets, ...)``; see
        :func:`spectrim.nn.watch.batches.arguments`. Read once.
    rows
        Input patches that each site's statistics rest on, over the whole run: a number, of which every sample gives an
        equal part, at least one; None for all; or ``"auto"`` for 12 times the length of a patch, and more where they
        are cheap beside the forward pass. How samples are cut into batches, and their order, make no difference but
        that of rounding.
    positions
        Patches of each sample, in place of ``rows``.
    mask
        Which tokens are data, ``(samples, positions)`` and not zero there, or how many tokens each sample has, the
        first ones: the name of a tensor of the batch or a function of the batch. Of masks between positions
        (``(samples, ..., positions, positions)``) a token is data that any position attends to; one that is added to
        scores of attention takes padding away by a large number below zero; one whose name ends in
        ``key_padding_mask`` is zero where a token is data, as torch's layers take it. By default ``attention_mask``,
        else what ends so, by the names of a mapping or of the model's parameters. What is padding counts in no
        statistic, and the model is given zeros for NaN and Inf in it.
    statistics
        False to learn input shapes only, from the first batch.
    forward
        Runs the model on a batch in another way.
    samples
        Where a batch's samples are: the axis of the inputs that they lie on, such as 1 where time comes first, or a
        function that counts those of a batch. By default the first axis, or the entries of a list of images.
    progress
        True for a bar, or a function called with the number of batches done and their total, if known.

    Returns
    -------
    Sites
        In order of execution, with the layers that see one and the same tensor. Sites that no batch reached, or that
        are called with more than their input, are moved to ``skipped`` with that reason. ``notes`` say what
        batches were taken for where that is not plain.

    Raises
    ------
    CalibrationError
        No batches or an empty one, no site reached, NaN or Inf in a layer's weights or in what it sees (the message
        names the layer and the batch), layers that have no weights yet, or batches that cannot be fed to the model.
    ValueError
        For ``rows`` or ``positions`` of another kind.
    """
    return calibrated(
        model, sites, batches, Sampling(rows, positions), Feed.of(forward, samples, mask), statistics=statistics,
        progress=told(progress), seed=seed,
    )  # fmt: skip


def calibrated(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    amount: Sampling,
    feed: Feed,
    *,
    statistics: bool = True,
    progress: Steps,
    seed: int = 0,
    passes: PassMaker = PassMaker(),  # noqa: B008 (holds nothing)
) -> Sites:
    """As :func:`calibrate`, by passes that something else may have a part in."""
    try:
        length = len(checked_batches(batches))
    except TypeError:
        length = None
    check_weights(model, sites)
    (_, first), stream = begun(in_order(model, batches, feed))
    keeps, sizes = False, set[int]()
    feed.decide(model, first)
    run = Extent(batches, feed.layout, amount.apart)
    watch = Watched.of(model, sites, amount, run, seed, feed.words, passes, statistics=statistics)
    with observe(model, forward=feed) as call:
        state = State(model)
        for index, (number, batch) in enumerate(stream):
            with hooked((*watch.hooks(model), *(() if index else watch.looks(state)))):
                watch.see(call, batch, number, first=not index)
            sizes.add(feed.layout.numbers(batch))
            keeps = keeps if index else state.keeps or bool(state.holding())
            passes.behind(call, batch, first=not index)
            progress(index + 1, length)
            if not statistics:
                break
    found = watch.calibrated()
    found = dataclasses.replace(
        found,
        keeps_state=keeps,
        shaped=without_numbers(first),
        notes=(
            *found.notes,
            *feed.notes,
            *_of_sizes(sizes, feed.layout.numbers(first)),
            *unread(first, feed.layout),
            *_unmasked(watch.watchers),
            *_alike(watch.watchers, found.samples),
            *run.said_of_samples(found.samples),
        ),
    )
    log.info("calibrated %d layers on %d samples", len(found), found.samples)
    for note in found.notes:
        log.info("%s", note)
    return found


def check_weights(model: nn.Module, sites: Sites) -> None:
    """Raise CalibrationError for what no data mends: layers without weights yet, or others, or with NaN or Inf."""
    lazy = next((name for name, m in model.named_modules() if getattr(m, "has_uninitialized_params", bool)()), None)
    if lazy is not None:
        raise CalibrationError(
            f"layer {lazy!r} ({type(model.get_submodule(lazy)).__name__}) has no weights yet: run the model once on a "
            "batch, which gives lazy layers their shapes"
        )
    check_loaded(model)
    sites.check_finite()
    if why := elsewhere(model, sites):
        raise CalibrationError(why)


def _of_sizes(sizes: Collection[int], first: int) -> Iterator[str]:
    """What a user should know of samples that differ in size."""
    if min(sizes) < _ALIKE * max(sizes):
        which = "the largest" if first == max(sizes) else "those of the first batch"
        yield (
            f"samples differ in size, from {min(sizes):,} to {max(sizes):,} numbers each: MACs and milliseconds are "
            f"those of one of {first:,}, {which}"
        )


def _unmasked(watchers: Mapping[str, Watcher]) -> Iterator[str]:
    """What a user should know of layers that see positions of which the mask does not say whether they are padding."""
    rows = {name: each.unmasked for name, each in watchers.items() if each.unmasked}
    if rows:
        name, count = next(iter(rows.items()))
        yield (
            f"padding counts as data in {len(rows)} of {len(watchers)} layers, first in {name!r}: it is given "
            f"{count:,} positions of a sample, of which the mask does not say what is padding, as behind a pooling or "
            "a stride. Calibrate on samples of one length, or put those of like length together, so that there is "
            "little padding"
        )


def _alike(watchers: Mapping[str, Watcher], samples: int) -> Iterator[str]:
    """What a user should know of layers whose rows are many and tell little, since those of a sample are alike."""
    worth = {name: (each.alike.independent, each.numbers) for name, each in watchers.items() if each.alike.count}
    many = {name: each for name, each in worth.items() if watchers[name].alike.count >= ENOUGH * each[1]}
    short = {
        name: worth / numbers
        for name, (worth, numbers) in many.items()
        if worth < min(ENOUGH * numbers, _ALIKE * watchers[name].alike.count)
    }
    if short and samples >= GUESSED:
        name = min(short, key=short.__getitem__)
        yield (
            f"{samples} calibration samples are few: their rows are so alike in {len(short)} of {len(watchers)} layers "
            f"that less is known than their numbers say, most in {name!r}, whose {watchers[name].alike.count:,} rows "
            f"tell as much as {many[name][0]:,.0f} independent ones, for {many[name][1]} outputs. Errors on other data "
            "may be twice those that are stated; calibrate on a few hundred samples"
        )


def few_rows(sites: Sites) -> Iterator[str]:
    """What a user should know of layers whose moments rest on too few rows for their length, and what to do."""
    known = [(layer, moments) for layer in sites if (moments := _shortest(layer)) is not None]
    short = [(layer, moments) for layer, moments in known if moments.count < ENOUGH * moments.mean.shape[1]]
    if known and sites.samples < GUESSED:
        yield (
            f"{sites.samples} calibration samples are too few: the network may be worthless on other data, however "
            "well its outputs agree on these. Calibrate on a hundred or more; without data, weights alone choose "
            "better: find(model), tabulate(sites, WeightSVD()), select, apply"
        )
    if not short:
        return
    layer, moments = min(short, key=lambda pair: pair[1].count / pair[1].mean.shape[1])
    there = sites.samples * max(1, layer.spec.rows)
    cure = "ask for more with rows= or positions=" if there > 1.5 * moments.count else "calibrate on more samples"
    yield (
        f"the statistics of {len(short)} of {len(sites)} layers rest on too few rows, fewest in {layer.name!r}: "
        f"{moments.count:,} rows for vectors of {moments.mean.shape[1]:,} numbers, where {ENOUGH} rows a number are "
        f"enough; {cure}"
    )


def _shortest(layer: Layer) -> Moments | None:
    """Of the moments that a layer's errors are stated by, the one with fewest rows for its length."""
    kept = layer.statistics
    moments = [each for each in (kept.input, *kept.slices.values(), kept.output) if each is not None]
    return min(moments, key=lambda each: each.count / each.mean.shape[1], default=None)
