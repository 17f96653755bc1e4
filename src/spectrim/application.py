"""The verb apply: a plan carried out on a model."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from spectrim.errors import PlanError
from spectrim.methods import Method, as_methods, from_record
from spectrim.network.choices import ChannelsChoice, Choice
from spectrim.network.coupling import IN
from spectrim.network.factors import Factors, LowRank, SharedBasis
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Group, Layer, Sites
from spectrim.nn.build import build, skeleton
from spectrim.nn.channels.removal import Removal
from spectrim.nn.modules import Factored
from spectrim.nn.proof import Expected, check_copy, prove
from spectrim.nn.shipping import carry
from spectrim.nn.standing import Traits
from spectrim.nn.surgery import replace_module
from spectrim.nn.watch.batches import Feed, one_by_one
from spectrim.nn.watch.calibrate import in_full
from spectrim.nn.watch.junctions import junctions
from spectrim.nn.watch.layout import Where
from spectrim.nn.watch.lockstep import Seen, lockstep
from spectrim.nn.watch.nesting import begun, checked_batches, listed, reads_once
from spectrim.nn.watch.norms import reestimate_batchnorm
from spectrim.nn.watch.passes import waves
from spectrim.nn.watch.probe import Probe, probe
from spectrim.nn.watch.reconstruct import Errors, Joint, Split, refit_second
from spectrim.nn.watch.sampling import Mask
from spectrim.progress import Progress, reports, told
from spectrim.selection.plan import Entry, Plan

log = logging.getLogger(__name__)

# Bytes of activations that wait for a layer to be fitted.
MEMORY = 4 << 30


@reports
def apply(
    model: nn.Module,
    sites: Sites,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    methods: Method | Sequence[Method] | None = None,
    reconstruct: bool = True,
    batchnorm: bool | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    samples: Where = None,
    rows: int | str | None = "auto",
    mask: Mask = None,
    memory: int = MEMORY,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """Carry out a plan on a copy of the model.

    Parameters
    ----------
    model
        The dense model that the sites were found in; it is left untouched.
    sites
        From :func:`spectrim.calibrate` for methods that use activations; with couplings (:func:`spectrim.couple`) for
        plans that remove channels.
    plan
        From :func:`spectrim.select`, or read from a file.
    batches
        Calibration batches, read several times. Needed for reconstruction and for BatchNorm.
    methods
        The methods the plan names, for methods of your own that a plan file cannot make again.
    reconstruct
        Factorise the layers in order of execution, each for the inputs that its already compressed predecessors
        deliver and the responses of the dense model; both are run side by side, once. A part of the samples is held
        out: a layer goes only as far from its dense weight as they agree. Without it every layer is factorised on its
        own.
    batchnorm
        Re-estimate BatchNorm statistics on the batches. By default where there was no reconstruction: factors fitted
        on their own shift the statistics, reconstructed ones have been fitted to them.
    forward
        Runs a model on a batch in another way.
    samples
        Where a batch's samples are; see :func:`spectrim.calibrate`.
    rows
        Positions that a layer is fitted at, over all batches: a number, None for all, or ``"auto"`` for enough for the
        length of its patches.
    mask
        Tells padding from data: the name of a batch's entry or a function of the batch, which gives ``[batch,
        positions]``; ``attention_mask`` by default.
    memory
        Bytes that activations of both networks may take while they wait for a layer. Batches beyond it go in waves,
        each beside layers that were fitted to the waves before.

    Returns
    -------
    nn.Module
        A new model of plain layers. The same plan, weights and batches give the same bits.

    Raises
    ------
    PlanError
        If the plan names a site the model does not have, or batches that can be read once only are given.
    """
    return carry_out(
        model, sites, plan, batches, methods=methods, reconstruct=reconstruct, batchnorm=batchnorm, forward=forward,
        samples=samples, rows=rows, mask=mask, memory=memory, progress=progress,
    ).model  # fmt: skip


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
    samples: Where = None,
    rows: int | str | None = "auto",
    mask: Mask = None,
    memory: int = MEMORY,
    progress: Progress | bool | None = None,
) -> Applied:
    """As :func:`apply`, which gives the model alone, with what was learned on the way."""
    feed = Feed.of(forward, samples)
    if batches is not None and reads_once(checked_batches(batches)):
        raise PlanError("batches are read several times; pass a list or a DataLoader, not an iterator")
    makers = _makers(plan, methods)
    _check(plan, sites)
    removed = {e.site: e.choice.kept for e in plan if isinstance(e.choice, ChannelsChoice)}
    removal = Removal.of(model, sites, removed)
    entries = [entry for entry in plan if entry.site not in _channels(removal.sites)]
    for entry in entries:
        if not entry.choice.is_dense:
            skeleton(entry.choice, [removal.sites.layer(name).spec for name in entry.sites])
    groups = {entry.site: entry.members for entry in plan if entry.members}
    expected = Expected.of(sites, {entry.site: entry.choice for entry in plan}, groups, tuple(makers.values()))
    first = None if batches is None else begun(batches)[0]
    if first is not None:
        feed.decide(model, first)
        check_copy(model, removal.model, expected, first, feed)
    work = _Work(model, removal, batches is not None and reconstruct, feed)
    held: tuple[Tensor, ...] = ()
    steps = _steps(work, entries, makers)
    if batches is not None and work.follows:
        batches = listed(batches)
        # A pass that loops over its samples would stop at the first of them, or come to layers with dense ones before.
        apart = one_by_one(model, batches, feed) if sites.loops else batches
        work.split = Split.of(apart, rows=rows, mask=mask, layout=feed.layout)
        _follow(work, steps, apart, memory, told(progress))
        held = Split.of(batches, mask=mask, layout=feed.layout).held if sites.loops else work.split.held
    else:
        for done, step in enumerate(steps):
            step.put(work, step.layer, False)
            told(progress)("apply", done + 1, len(steps))
    if batches is not None and (not work.follows if batchnorm is None else batchnorm):
        reestimate_batchnorm(removal.model, batches, forward=feed, memory=memory)
    Traits.of(model).give(removal.model)
    carry(removal.model, plan)
    names = [step.layer.name for step in steps] if work.split.samples else []
    unseen = tuple(name for name in names if name not in work.reached)
    notes = () if first is None else tuple(prove(model, removal.model, expected, first, forward=feed))
    return Applied(removal.model, work.errors, unseen, held, (*_edited(plan, expected), *notes))


def _edited(plan: Plan, expected: Expected) -> Iterator[str]:
    """What a plan says it costs, where its choices cost something else."""
    for cost, value in expected.planned.items():
        told = plan.costs.get(cost, value)
        if not math.isclose(told, value, rel_tol=1e-6, abs_tol=0.5):
            yield (
                f"the plan says {told:,.0f} {cost}, its choices come to {value:,.0f}: was it edited, or made for other "
                "inputs?"
            )


def _follow(
    work: _Work,
    steps: Sequence[_Step],
    batches: Sequence[Any],
    memory: int,
    tell: Progress,
) -> None:
    """Carry out the steps while both networks run side by side.

    Batches whose activations do not fit in memory at once go one wave after the other: each fits every layer to what
    has been seen so far, beside layers that were fitted to the waves before.
    """
    names = [step.layer.name for step in steps]
    if not batches or not names:
        return
    like = Probe(names) if _small(work, memory) else probe(work.dense, names, batches[0], forward=work.feed)
    calls = {name: like.calls.get(name, 1) for name in names}
    again = _restarts(names, like)
    sums = junctions(work.dense, names, batches[0], forward=work.feed)
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
                work.stop = Stop(hub.reach(step.layer.name), part)
                observed = bool(work.stop.seen) and step.observable(work)
                step.put(work, work.observe(step.layer) if observed else step.layer, observed)
                work.left(step.layer)
                if step.layer.name in again:
                    hub.restart()
                tell("apply", number * len(steps) + done + 1, len(together) * len(steps))
        work.stop = None
    for name in names:
        # What was put in while both were in evaluation mode.
        work.removal.model.get_submodule(name).train(work.dense.get_submodule(name).training)


def _small(work: _Work, memory: int) -> bool:
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


@dataclass(frozen=True)
class Stop:
    """What all passes show at the layer they stop at, of the samples of these batches."""

    seen: Sequence[Seen]
    split: Split


@dataclass
class _Work:
    """A network that is compressed layer by layer, beside the dense one that it is fitted to.

    Attributes
    ----------
    follows
        Whether layers are fitted to what the compressed ones before them deliver.
    split
        The samples that they are fitted to.
    stop
        Where both networks are, while they run.
    joints
        Moments by the layer, as long as more batches come; those of the second layers of pairs by their own names.
    errors
        What was learned on the way: see :class:`Applied`.
    reached
        Layers that passes of both networks have stopped at.
    """

    dense: nn.Module
    removal: Removal
    follows: bool
    feed: Feed
    split: Split = field(default_factory=lambda: Split.of(()))
    stop: Stop | None = None
    joints: dict[str, Joint] = field(default_factory=dict)
    errors: dict[str, Errors] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)

    def narrows(self, layer: Layer) -> bool:
        """Whether a layer has lost channels."""
        return layer.name in self.removal.changed

    def observe(self, layer: Layer) -> Layer:
        """A layer as it is to be fitted: the inputs it is given now, and what the dense one answers."""
        assert self.stop is not None
        sketch = layer.statistics.input is None and not in_full(layer.spec)
        joint = self.joints.get(layer.name)
        if joint is None:
            outputs = self.removal.outputs(layer.name)
            joint = self.joints[layer.name] = Joint.of(layer, sketch=sketch, outputs=outputs)
        joint.add(self.stop.seen, self.stop.split)
        return joint.layer(layer)

    def put(self, layer: Layer, module: nn.Module, factors: Factors, *, observed: bool) -> None:
        """Put a module in place of a layer. One fitted to nothing that was observed has its second factor fitted."""
        if self.stop is not None and self.stop.seen and not observed and _owns_second(factors):
            assert isinstance(module, Factored)
            second = f"{layer.name}.1"
            joint = refit_second(module, layer, self.stop.seen, self.stop.split, self.joints.get(second))
            if joint is not None:
                self.joints[second] = joint
        replace_module(self.removal.model, layer.spec.names, module)

    def left(self, layer: Layer) -> None:
        """Both networks go on from a layer: what it was fitted to is dropped unless more batches come."""
        assert self.stop is not None
        if self.stop.seen:
            self.reached.add(layer.name)
        joint = self.joints.get(layer.name)
        errors = joint and joint.errors(self.removal.model.get_submodule(layer.name))
        if errors:
            self.errors[layer.name] = errors
        if len(self.stop.split.samples) == len(self.split.samples):
            self.joints.clear()


class _Step(Protocol):
    """What is done at one layer when its turn comes."""

    changes: ClassVar[bool]

    @property
    def layer(self) -> Layer: ...

    def observable(self, work: _Work) -> bool:
        """Whether the layer can be fitted to its present inputs."""
        ...

    def put(self, work: _Work, layer: Layer, observed: bool) -> None:
        """Fit and build what takes the place of the layer, as it was observed or calibrated, and put it there."""
        ...


@dataclass(frozen=True)
class _Dense:
    """The layer stays; its weight and bias may be fitted anew."""

    changes: ClassVar[bool] = False
    layer: Layer

    def observable(self, work: _Work) -> bool:
        return self.layer.statistics.input is not None or work.narrows(self.layer)

    def put(self, work: _Work, layer: Layer, observed: bool) -> None:
        work.removal.write(layer)


@dataclass(frozen=True)
class _Alone:
    """A choice for this layer."""

    changes: ClassVar[bool] = True
    layer: Layer
    method: Method
    choice: Choice

    def observable(self, work: _Work) -> bool:
        return self.layer.statistics.input is not None or self.method.reads_sketches or work.narrows(self.layer)

    def put(self, work: _Work, layer: Layer, observed: bool) -> None:
        narrowed, spare = work.narrows(layer), None
        if (observed or narrowed) and not _biased(self.method.layers(layer, self.choice)):
            spare, layer = layer.bias, dataclasses.replace(layer, bias=None)
        factors = self.method.factorize(layer, self.choice)
        (module,) = build(factors, layer.layers, layer.biases)
        work.put(layer, module, factors, observed=observed or narrowed)
        if narrowed:
            work.removal.settle(layer.name, spare)


@dataclass
class _Shared:
    """A choice for a group: its modules are made together, and fitted when the turn of each comes."""

    group: Group
    method: Method
    choice: Choice

    @cached_property
    def biased(self) -> bool:
        return _biased(self.method.layers(self.group, self.choice))

    @cached_property
    def factors(self) -> Factors:
        return self.method.factorize(self.group, self.choice)

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        return build(self.factors, self.group.layers, self.group.biases)

    def refit(self, layer: Layer, number: int) -> None:
        """Fit what one layer has of its own to its inputs and targets; the shared parameters stay the same objects."""
        module = self.modules[number]
        self.factors = self.method.refit(layer, self.factors, number)
        biases = [layer.bias if n == number else bias for n, bias in enumerate(self.group.biases)]
        module.load_state_dict(build(self.factors, self.group.layers, biases)[number].state_dict())


@dataclass(frozen=True)
class _Member:
    """A choice for a group that the layer is the ``number``-th of."""

    changes: ClassVar[bool] = True
    layer: Layer
    shared: _Shared
    number: int

    def observable(self, work: _Work) -> bool:
        return self.layer.statistics.input is not None

    def put(self, work: _Work, layer: Layer, observed: bool) -> None:
        if observed:
            self.shared.refit(layer if self.shared.biased else dataclasses.replace(layer, bias=None), self.number)
        work.put(layer, self.shared.modules[self.number], self.shared.factors, observed=observed)


def _biased(layers: Iterable[LayerSpec]) -> bool:
    """Whether a choice was counted with a bias; without one it gets none, or it would cost more than its plan."""
    return any(spec.bias for spec in layers)


def _owns_second(factors: Factors) -> bool:
    """Whether the second layer of a pair is the layer's own and may be fitted to it alone."""
    return isinstance(factors, LowRank) or (isinstance(factors, SharedBasis) and not factors.ranks[1])


def _steps(work: _Work, entries: Iterable[Entry], makers: Mapping[str, Method]) -> list[_Step]:
    """What is done, in order of execution. Where it follows, also at dense layers whose bias can correct the mean.

    Only those after the first changed layer: before it, nothing has moved.
    """
    sites, removal = work.removal.sites, work.removal
    planned: dict[str, _Step] = {}
    for entry in entries:
        planned |= _planned(sites, entry, makers)
    steps: list[_Step] = []
    moved = False
    for layer in sites:
        # A plan may name the channels alone; the layers that lose some are left dense then.
        step = planned.get(layer.name, _Dense(layer) if work.narrows(layer) else None)
        if step is None:
            continue
        biased = layer.spec.bias or (removal.changed and removal.corrects(layer.name))
        correctable = work.follows and biased and layer.statistics.input is not None
        reads = (layer.name, IN) in removal.axes
        if step.changes or (work.follows and reads) or (moved and correctable):
            steps.append(step)
        moved |= step.changes or reads
    return steps


def _planned(sites: Sites, entry: Entry, makers: Mapping[str, Method]) -> dict[str, _Step]:
    """The steps that one entry of a plan asks for, by the name of the layer."""
    layers = [sites.layer(name) for name in entry.sites]
    if entry.choice.is_dense:
        return {layer.name: _Dense(layer) for layer in layers}
    method = makers[entry.choice.method]
    if not entry.members:
        return {layer.name: _Alone(layer, method, entry.choice) for layer in layers}
    shared = _Shared(sites.together(entry.site, entry.members), method, entry.choice)
    return {layer.name: _Member(layer, shared, number) for number, layer in enumerate(layers)}


def _channels(sites: Sites) -> set[str]:
    return {coupling.name for coupling in sites.couplings}


def _check(plan: Plan, sites: Sites) -> None:
    """Raise PlanError unless the plan is for these sites."""
    names = [name for entry in plan for name in entry.sites]
    missing = [e.site for e in plan if isinstance(e.choice, ChannelsChoice) and e.site not in _channels(sites)]
    if missing:
        raise PlanError(
            f"the plan removes channels {missing[0]!r}, which the sites do not have"
            + ("" if sites.couplings else "; find them with couple(model, sites, example) first")
        )
    known = {site.name for site in sites} | _channels(sites)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise PlanError(f"the plan names sites that the model does not have: {', '.join(map(repr, unknown))}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(f"the plan names sites more than once: {', '.join(map(repr, twice))}")


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
