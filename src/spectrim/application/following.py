"""Steps carried out while the dense network and the one that is compressed run side by side."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from spectrim.application.steps import Step
from spectrim.application.work import Stop, Work
from spectrim.nn.watch.junctions import Junction, junctions
from spectrim.nn.watch.lockstep import Ended, lockstep
from spectrim.nn.watch.passes import waves
from spectrim.nn.watch.probe import Probe, probe
from spectrim.progress import Progress

log = logging.getLogger(__name__)


def follow(
    work: Work,
    steps: Sequence[Step],
    batches: Sequence[Any],
    memory: int,
    tell: Progress,
    sums: Mapping[str, Junction] | None = None,
) -> tuple[Ended, Ended] | None:
    """Carry out the steps while both networks run side by side, and give how their passes of one batch ended, if any.

    Batches whose activations do not fit in memory at once go one wave after the other: each fits every layer to what
    has been seen so far, beside layers that were fitted to the waves before. The ``sums`` behind layers may be known.
    """
    names = [step.layer.name for step in steps]
    if not batches or not names:
        return None
    ends = None
    like = Probe(names) if _small(work, memory) else probe(work.dense, names, batches[0], forward=work.feed)
    calls = {name: like.calls.get(name, 1) for name in names}
    again = _restarts(names, like)
    sums = junctions(work.dense, names, batches[0], forward=work.feed) if sums is None else sums
    sums = {name: sums[name] for name in names if name in sums}
    nbytes = [each.size * like.nbytes * 2 for each in work.split.samples]
    together = list(waves(enumerate(nbytes), memory))
    if len(together) > 1:
        log.info(
            "activations would take more than %d bytes: %d batches go in %d waves", memory, len(batches), len(together)
        )
    if again:
        log.debug("forward passes start again behind %s", ", ".join(sorted(again)))
    for number, wave in enumerate(together):
        first, last = wave[0], wave[-1] + 1
        log.debug("batches %d to %d", first + 1, last)
        part = work.split.part(first, last)
        with lockstep(
            work.dense, work.removal.model, calls, batches[first:last], forward=work.feed, places=like.places, sums=sums
        ) as hub:
            for done, step in enumerate(steps):
                _carry_out(work, step, Stop(hub.reach(step.layer.name), part))
                if step.layer.name in again:
                    hub.restart()
                tell("apply", number * len(steps) + done + 1, len(together) * len(steps))
            if number == len(together) - 1:
                ends = hub.ends(0)
        work.stop = None
    for name in names:
        # What was put in while both were in evaluation mode.
        work.removal.model.get_submodule(name).train(work.dense.get_submodule(name).training)
    return ends


def _carry_out(work: Work, step: Step, stop: Stop) -> None:
    """Fit a layer to what all passes show there, if they do, and put it in its place."""
    work.stop = stop
    observed = bool(stop.seen) and step.observable(work)
    step.put(work, work.observe(step.layer, sketch=step.sketches) if observed else step.layer, observed)
    work.left(step.layer)


def _small(work: Work, memory: int) -> bool:
    """Whether layers are called once and all that could be alive surely fits, so that nothing need be tried."""
    specs = [layer.spec for layer in work.removal.sites]
    samples = sum(each.size for each in work.split.samples)
    if work.removal.sites.keeps_state or any(len(spec.inputs) != 1 for spec in specs):
        return False
    outputs = [spec.out_channels * math.prod(spec.output_shape(spec.inputs[0])) * spec.dtype.itemsize for spec in specs]
    # Normalisation, activations, attention: what is beside the layers is of their size.
    return 2 * 8 * samples * sum(outputs) <= memory


def _restarts(names: Sequence[str], like: Probe) -> set[str]:
    """Layers, in the order they are fitted in, after which passes start again; none where no layer comes after."""
    place = {name: number for number, name in enumerate(names)}
    cuts, ends = set(), like.ends()
    so_far = -1
    for name in like.order:
        so_far = max(so_far, place[name])
        if name in ends and so_far + 1 < len(names):
            cuts.add(names[so_far])
    return cuts
