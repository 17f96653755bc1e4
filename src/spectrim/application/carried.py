"""A plan carried out: checked, step by step, proved."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.application.steps import Step, ordered, put_tied
from spectrim.application.work import Stop, Work
from spectrim.errors import PlanError
from spectrim.methods import Method, as_methods, from_record
from spectrim.network.choices import ChannelsChoice
from spectrim.network.sites import Sites
from spectrim.nn.build import skeleton
from spectrim.nn.channels.removal import Removal
from spectrim.nn.find import elsewhere
from spectrim.nn.parameters import parameters_of
from spectrim.nn.proof import Expected, Proof
from spectrim.nn.restated import restated
from spectrim.nn.shipping import carry
from spectrim.nn.traits import Traits
from spectrim.nn.watch.batches import Feed, in_order, one_by_one
from spectrim.nn.watch.junctions import Junction, junctions
from spectrim.nn.watch.lockstep import Ended, lockstep
from spectrim.nn.watch.nesting import checked_batches, copied_batches, noise, reads_once
from spectrim.nn.watch.norms import reestimate_batchnorm
from spectrim.nn.watch.observe import observe
from spectrim.nn.watch.passes import waves
from spectrim.nn.watch.probe import Probe, probe
from spectrim.nn.watch.reconstruct import Errors, Split
from spectrim.nn.watch.sampling import Sampling
from spectrim.progress import Progress, reports, told
from spectrim.selection.plan import Entry, Plan

log = logging.getLogger(__name__)

# Bytes of activations that wait for a layer to be fitted.
MEMORY = 4 << 30


@dataclass(frozen=True)
class Applied:
    """A plan carried out.

    Attributes
    ----------
    model
        The new model.
    errors
        What layers that were fitted to their present inputs miss of the dense answers, by the layer.
    unseen
        Layers that no forward pass stopped at in both networks: they were factorised as they were calibrated.
    held
        Which samples of every batch were held out.
    notes
        What could not be proved of the new model (:mod:`spectrim.nn.proof`), and why.
    """

    model: nn.Module
    errors: Mapping[str, Errors] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    held: tuple[Tensor, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def held_out(self) -> int:
        """Samples that were not fitted, to tell how far layers may go from their dense weights."""
        return sum(int(each.sum()) for each in self.held)


@reports
def carry_out(
    model: nn.Module,
    sites: Sites,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    methods: Method | Sequence[Method] | None = None,
    reconstruct: bool = True,
    batchnorm: bool | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    memory: int = MEMORY,
    progress: Progress | bool | None = None,
) -> Applied:
    """As :func:`spectrim.apply`, which gives the model alone, with what was learned on the way.

    Without batches the new model is run on noise of the shapes that the sites were calibrated with, if they were.
    """
    _check_call(batches, memory)
    feed, makers = Feed.of(forward), _makers(plan, methods)
    _check(plan, sites)
    if why := elsewhere(model, sites):
        raise PlanError(why)
    removed = {e.site: e.choice.kept for e in plan if isinstance(e.choice, ChannelsChoice)}
    removal = Removal.of(model, sites, removed)
    entries = [entry for entry in plan if entry.site not in _channels(removal.sites)]
    _check_shapes(entries, removal.sites)
    groups = {entry.site: entry.members for entry in plan if entry.members}
    expected = Expected.of(sites, {entry.site: entry.choice for entry in plan}, groups, tuple(makers.values()))
    first = _noise(model, sites, feed) if batches is None else next(in_order(model, batches, feed))[1]
    if first is not None:
        feed.decide(model, first)
    proof = Proof(model, removal.model, expected, first, feed)
    sums, doubts = proof.check_copy()
    removal.cut()
    work = Work(model, removal, batches is not None and reconstruct, feed)
    put_tied(work, entries, makers)
    steps, ends, held_out = ordered(work, entries, makers), None, ()
    if batches is not None and work.follows:
        batches = copied_batches(batches)
        apart, held_out = _split(work, batches, sampling)
        with proof.watching():
            ends = follow(work, steps, apart, memory, told(progress), sums)
    else:
        _put_apart(work, steps, told(progress))
    if batches is not None and (not work.follows if batchnorm is None else batchnorm):
        with proof.watching():
            reestimate_batchnorm(removal.model, batches, forward=feed, memory=memory)
        ends = None
    Traits.of(model).give(removal.model)
    plan, edited = restated(plan, sites, tuple(makers.values()))
    carry(removal.model, plan)
    unseen = tuple(s.layer.name for s in steps if work.split.samples and s.layer.name not in work.reached)
    return Applied(removal.model, work.errors, unseen, held_out, (*edited, *doubts, *proof(ends)))


def _noise(model: nn.Module, sites: Sites, feed: Feed) -> Any:
    """A batch of noise as the sites were calibrated on batches; None where there were none, or the model takes none."""
    if sites.shaped is None:
        return None
    batch = noise(sites.shaped, next((p.device for p in parameters_of(model)), torch.device("cpu")))
    try:
        feed.decide(model, batch)
        with observe(model, forward=feed) as running:
            running(batch)
    except Exception as error:  # indices, lengths and the like are no noise
        log.info("the model takes no noise: %s", error)
        return None
    return batch


def _check_call(batches: Iterable[Any] | None, memory: int) -> None:
    """Raise unless the batches can be read again and the memory is a number of bytes."""
    if isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0:
        raise ValueError(f"memory is {memory!r}: expected a positive int of bytes, such as 4 << 30 for 4 GiB")
    if batches is not None and reads_once(checked_batches(batches)):
        raise PlanError("batches are read several times; pass a list or a DataLoader, not an iterator")


def _split(work: Work, batches: Sequence[Any], sampling: Sampling) -> tuple[Sequence[Any], tuple[Tensor, ...]]:
    """Choose the samples that layers are fitted to: the batches as they run, and what is held out of those given."""
    feed, loops = work.feed, work.removal.sites.loops
    # A pass that loops over its samples would stop at the first of them, or come to layers with dense ones before.
    apart = one_by_one(work.dense, batches, feed) if loops else batches
    work.split = Split.of(apart, sampling, layout=feed.layout)
    return apart, torch.cat(work.split.held).split([feed.layout.size(batch) for batch in batches])


def _put_apart(work: Work, steps: Sequence[Step], tell: Progress) -> None:
    """Put what takes the place of each layer as it was calibrated, whatever the others deliver."""
    for done, step in enumerate(steps):
        step.put(work, step.layer, False)
        tell("apply", done + 1, len(steps))


def _check_shapes(entries: Sequence[Entry], sites: Sites) -> None:
    """Raise what building raises for choices that do not fit their layers, before any work."""
    for entry in entries:
        if not entry.choice.is_dense:
            skeleton(entry.choice, [sites.layer(name).spec for name in entry.sites])


def _check(plan: Plan, sites: Sites) -> None:
    """Raise PlanError unless the plan is for these sites."""
    names = [name for entry in plan for name in entry.sites]
    missing = [e.site for e in plan if isinstance(e.choice, ChannelsChoice) and e.site not in _channels(sites)]
    if missing:
        raise PlanError(
            f"the plan removes channels {missing[0]!r}, which the sites do not have"
            + ("" if sites.couplings else "; find them with couple(model, sites, example) first")
        )
    known = {layer.name for layer in sites.layers} | _channels(sites)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise PlanError(
            f"the plan names sites that the model does not have: {', '.join(map(repr, unknown))}; "
            "give the network that it was made for, or plan this one anew"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(f"the plan names sites more than once: {', '.join(map(repr, twice))}")


def _channels(sites: Sites) -> set[str]:
    return {coupling.name for coupling in sites.couplings}


def _makers(plan: Plan, methods: Method | Sequence[Method] | None) -> dict[str, Method]:
    makers = {method.name: method for method in as_methods(methods or ())}
    for entry in plan:
        choice, name = entry.choice, entry.choice.method
        if choice.is_dense:
            continue
        if name not in makers and name not in plan.methods:
            raise PlanError(f"site {entry.site!r} uses method {name!r}, which the plan does not describe")
        if name not in makers:
            makers[name] = from_record(plan.methods[name])
        if not isinstance(choice, makers[name].offers):
            kinds = f"{makers[name].offers.kind!r} choices, not {choice.kind!r} ones"
            raise PlanError(f"site {entry.site!r}: method {name} carries out {kinds}")
    return makers


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
            work.dense, work.removal.model, calls, batches[first:last], forward=work.feed, places=like.places,
            sets_up=like.sets_up, sums=sums,
        ) as hub:  # fmt: skip
            for done, step in enumerate(steps):
                _take(work, step, Stop(hub.reach(step.layer.name), part))
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


def _take(work: Work, step: Step, stop: Stop) -> None:
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
