"""Steps that several commands take."""

from __future__ import annotations

import contextlib
import dataclasses

from spectrim.cli.common import Output
from spectrim.cli.sharing import Wanted, offer
from spectrim.cli.subject import Subject
from spectrim.network.printing import reasons
from spectrim.network.sites import Sites
from spectrim.nn.watch.nesting import at_hand
from spectrim.pipeline.making import Making
from spectrim.preparation import Prepared, prepare
from spectrim.progress import Progress
from spectrim.selection.candidates import Candidates
from spectrim.tables import tabulate


def prepared(
    out: Output, work: Subject, sites: Sites, groups: Wanted = False, *, weigh: bool = False,
    known: Prepared | None = None, progress: Progress | None = None,
) -> Prepared:  # fmt: skip
    """Calibrate sites, time the network, and say which layers may share factors.

    Without calibration batches the example teaches the input shapes, and without that there are no MACs.

    Parameters
    ----------
    weigh
        Collect what an error at each layer does to the outputs, as :func:`spectrim.compress` does.
    known
        As for :func:`spectrim.preparation.prepare`.
    progress
        None for a bar of its own.
    """
    offer(sites, groups)  # what cannot be carried out is refused before the batches are read
    ready, calibrated = Prepared(sites), work.calibration is not None
    # Read once where networks are made: if a loader shuffles, the samples that are held out stay the same.
    batches = [work.example] if work.calibration is None else at_hand(work.calibration, alike=weigh)
    batches = batches if known is None or known.batches is None else known.batches
    with out.progress() if progress is None else contextlib.nullcontext(progress) as report:
        if calibrated or work.example is not None:
            ready = prepare(
                work.dense, sites, batches, statistics=calibrated, sensitivity=weigh and calibrated,
                latency=work.latency or False, sampling=work.sampling, progress=report, known=known,
            )  # fmt: skip
    return dataclasses.replace(ready, sites=offer(ready.sites, groups))


def table_of(out: Output, known: Prepared, making: Making) -> Candidates:
    """What methods offer for a network that is prepared."""
    with out.progress() as report:
        return tabulate(known.sites, making.methods, **dataclasses.replace(making, progress=report).priced(known))


def skipped_values(sites: Sites) -> list[dict[str, str]]:
    """What is left alone, as JSON values."""
    return [{"name": each.name, "kind": each.kind, "reason": each.reason} for each in sites.skipped]


def print_skipped(out: Output, sites: Sites) -> None:
    """All that is left alone, for people: every reason once, with the names that it is the reason for."""
    left = [(each.name, each.kind, each.reason) for each in sites.skipped]
    for said in reasons(left, "--json", most=len(left), names=len(left)):
        out.prose(said)
