"""What every plan starts from: a network found, coupled, calibrated, weighed, grouped and timed, once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

from torch import nn

from spectrim.cost.latency import Latency
from spectrim.errors import PlanError, SpectrimError
from spectrim.network.groups import group
from spectrim.network.sites import Sites
from spectrim.nn.agreement import check_comparable
from spectrim.nn.channels.graph import couple
from spectrim.nn.copying import check_copyable
from spectrim.nn.find import Which, find
from spectrim.nn.timing import as_timed, measure_latency, ready
from spectrim.nn.watch.batches import Feed, in_order
from spectrim.nn.watch.calibrate import calibrated, check_weights
from spectrim.nn.watch.nesting import begun
from spectrim.nn.watch.reconstruct import Split
from spectrim.nn.watch.sampling import Sampling
from spectrim.nn.watch.sensitivity import calibrated_and_weighed, weighed
from spectrim.progress import Progress, silent

log = logging.getLogger(__name__)


def check_options(
    groups: bool | Mapping[str, Sequence[str]] | None, latency: Latency | bool | None, guard: bool = False
) -> None:
    """Raise TypeError for options that cannot be meant, before any work."""
    if not isinstance(guard, bool):
        raise TypeError(
            f"guard is {guard!r}: expected True, which refuses what is measured slower than dense, or False"
        )
    if not isinstance(groups, (bool, Mapping, NoneType)):
        raise TypeError(f"groups is {groups!r}: expected True to find them, False, or a mapping of names to layers")
    if not isinstance(latency, (bool, Latency, NoneType)):
        raise TypeError(
            f"latency is {latency!r}: expected Latency(...), which says how time is measured; "
            "limits are the budget's, as in Budget(latency='3ms')"
        )


@dataclass(frozen=True)
class Prepared:
    """A dense network as plans are made for it."""

    sites: Sites  # calibrated, and weighed, coupled and grouped as asked for
    # That the sites were calibrated on, to be read as often as needed; None where no statistics were taken.
    batches: Iterable[Any] | None = None
    latency: Latency | None = None  # how time is measured; None if it is not
    example: Any = None  # a batch as the network is timed with: positional arguments or a dict of keyword arguments
    # Milliseconds of the dense network that tables are made and budgets are read with: those that an idle machine would
    # show, as for the layers.
    dense_latency: float | None = None
    # How many rows the statistics rest on, and which are data.
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)
    # What methods offer, as it becomes known.
    curves: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)


def sites_of(
    model: nn.Module, *, skip: Which | Iterable[Which] = (), only: Which | Iterable[Which] = (), parts: bool = False
) -> Sites:
    """As :func:`spectrim.find`, at least one; PlanError says why layers were skipped where there is none."""
    sites = find(model, skip=skip, only=only, parts=parts)
    if not sites.layers:
        reasons = "; ".join(f"{s.name or s.kind}: {s.reason}" for s in sites.skipped[:5])
        raise PlanError(
            f"{type(model).__name__} has no layer to compress ({reasons or 'it has no linear or conv layers'})"
        )
    return sites


def locate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    skip: Which | Iterable[Which] = (),
    only: Which | Iterable[Which] = (),
    channels: bool = False,
    parts: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Sites:
    """The sites of a model, at least one; with ``channels`` those that can be removed, traced with the first batch.

    ``parts`` as for :func:`spectrim.find`.

    Raises
    ------
    PlanError
        If there is nothing to compress; the message says why layers were skipped.
    UnsupportedLayerError
        If the model cannot be copied.
    CalibrationError
        If weights are missing, NaN or Inf, or channels are asked for and there is no batch.
    """
    sites = sites_of(model, skip=skip, only=only, parts=parts)
    check_copyable(model, (name for site in sites for name in site.spec.names[:1]))
    check_weights(model, sites)
    return couple(model, sites, begun(batches)[0], forward=forward) if channels else sites


def coupled(
    model: nn.Module,
    sites: Sites,
    batch: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    told: Callable[[str], None] = lambda why: log.info("no channels are removed: %s", why),
) -> Sites:
    """The sites with the channels that can be removed; as they are where these cannot be found, and why is told."""
    feed = Feed.of(forward)
    try:
        check_comparable(model, batch, feed)
        coupled_sites = couple(model, sites, batch, forward=feed)
    except (SpectrimError, ImportError) as error:
        told(str(error))
        return sites
    if not coupled_sites.couplings:
        reasons = [f"{each.name or each.kind}: {each.reason}" for each in coupled_sites.skipped[len(sites.skipped) :]]
        told("; ".join(reasons[:3]) or "no layer reads another")
    return coupled_sites


def prepare(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    *,
    statistics: bool = True,
    sensitivity: bool = True,
    groups: bool | Mapping[str, Sequence[str]] = False,
    latency: Latency | bool = False,
    dense_latency: float | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: Progress = silent,
    known: Prepared | None = None,
) -> Prepared:
    """Calibrate, weigh and group the sites of a dense network, and time the network.

    Parameters
    ----------
    sites
        From :func:`locate`.
    batches
        Read several times.
    statistics
        False to learn input shapes only, from the first batch.
    sensitivity
        Weigh errors by the gradients that reach each layer.
    groups
        Layers that may share factors: True finds them, a mapping names them.
    latency
        How time is measured; True measures on the model's device in its dtype, False measures no time.
    dense_latency
        Of the whole dense network, if it is known; else it is measured.
    sampling
        How many rows the statistics rest on, and which are data. Where channels can be removed the samples that fits
        hold out are left out: what reads channels makes up for those that go by the statistics alone.
    known
        From an earlier call with the same model, batches and options, before channels were coupled: how long the
        network takes is taken over.
    """
    feed = Feed.of(forward)
    if known is not None:
        found = prepare(
            model, sites, batches, statistics=statistics, sensitivity=sensitivity, groups=groups, sampling=sampling,
            forward=feed, progress=progress,
        )  # fmt: skip
        return replace(known, sites=found.sites, batches=found.batches, sampling=found.sampling, curves={})
    watched = functools.partial(progress, "calibrate")
    if sites.couplings and statistics:
        feed.decide(model, begun(batches)[0])
        sampling = replace(sampling, apart=Split.of(batches, sampling, layout=feed.layout).apart)
    if latency is True:
        spec = sites.layers[0].spec
        latency = Latency(device=spec.device, dtype=spec.dtype)
    example = None
    if latency is not False:
        example = one_batch(model, batches, latency.batch, feed)
        ready(as_timed(model, latency), example, latency.runtime)  # what cannot be run so is said before the work
    if sensitivity and statistics:
        sites = calibrated_and_weighed(model, sites, batches, sampling, feed, progress=watched)
    else:
        sites = calibrated(model, sites, batches, sampling, feed, statistics=statistics, progress=watched)
        sites = weighed(model, sites, batches, forward=feed) if sensitivity else sites
    if groups is not False:
        sites = group(sites, None if groups is True else groups)
    kept = batches if statistics else None
    if latency is False:
        return Prepared(sites, kept, sampling=sampling)
    if dense_latency is None:
        timings = measure_latency(
            {"dense": as_timed(model, latency)}, example, threads=latency.threads, runtime=latency.runtime
        )
        dense_latency = timings["dense"].quiet
    return Prepared(sites, kept, latency, example, dense_latency, sampling)


def one_batch(model: nn.Module, batches: Iterable[Any], size: int, feed: Feed | None = None) -> Any:
    """One batch of the size that latency is measured at."""
    feed = feed or Feed()
    _, first = next(in_order(model, batches, feed))
    feed.decide(model, first)
    args, kwargs = feed.arguments(model, feed.resized(first, size))
    return kwargs or args
