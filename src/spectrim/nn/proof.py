"""Proof of what is delivered: the finished network is run, and what it does is held against what was planned."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.cost.counted import macs, parameters
from spectrim.cost.whole import Layered, Network, Picks
from spectrim.errors import ProofError, SpectrimError, first_few
from spectrim.network.sites import Sites
from spectrim.nn.copying import MEANS, cannot_run
from spectrim.nn.counting import counting
from spectrim.nn.merge_proof import alike, check_merged
from spectrim.nn.modes import said_of_training
from spectrim.nn.standing import LAYERS
from spectrim.nn.surgery import parameter_count
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.junctions import Junction, scanned
from spectrim.nn.watch.lockstep import Ended
from spectrim.nn.watch.nesting import output_tensors, tensors
from spectrim.nn.watch.observe import observe, on_each, on_few

log = logging.getLogger(__name__)

# Layers that run once a batch, whatever the samples, have rows that are no whole number a sample, and are counted so.
_ROWS = 0.01
# What is called with inputs of several sizes is counted at one of mean sides, which are whole numbers.
_MEAN_SIDES = 0.1
COPIES = (
    "a global variable, a weak reference or a list of a closure goes on holding them in every copy. Call the layers "
    "by attributes of the module that holds them"
)
NOT_RUN = (
    "the finished network was not run: nothing shows that it can be, nor that what was replaced is called. Give the "
    "calibration batches too"
)
DIFFERS = (
    "the model gives other outputs each time that it runs on one batch, as where it reads a clock or goes on counting: "
    "what is said of how outputs agree holds for passes that differ, and layers are fitted to such; take that off it"
)


@dataclass(frozen=True)
class Expected:
    """What a network should be once a plan is carried out, counted from its layers."""

    layers: tuple[str, ...]  # names of all that could be replaced
    changed: tuple[str, ...]  # and of those that are
    dense: Mapping[str, float]  # costs: parameters, and MACs of one sample if sites have been run
    planned: Mapping[str, float]
    removes: bool  # whether channels are gone

    @classmethod
    def of(
        cls, sites: Sites, picks: Picks, groups: Mapping[str, Sequence[str]], methods: Sequence[Layered]
    ) -> Expected:
        """Of a plan's choices, by the names of sites, of groups with their members, and of coupled channels."""
        costs = {"parameters": parameters, **({"macs": macs} if sites.seen else {})}
        network = Network(dataclasses.replace(sites, groups=MappingProxyType(dict(groups))), costs, methods)
        couplings = {coupling.name for coupling in sites.couplings}
        changed = [
            layer
            for name, choice in picks.items()
            if name not in couplings and not choice.is_dense
            for layer in groups.get(name, (name, *choice.others))
        ]
        layers = tuple(layer.name for layer in sites.layers)
        return cls(layers, tuple(changed), network.cost(), network.cost(picks), bool(couplings & picks.keys()))


@dataclass(frozen=True)
class PassRecord:
    """What one forward pass of a network did."""

    calls: Counter[str]  # by the layer
    macs: float  # of a sample
    outputs: Sequence[Tensor]  # all tensors it gave
    rounded: float  # MACs of a sample by which a count at mean sides may be off
    shapes: Mapping[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)  # of what layers were given


@dataclass(frozen=True)
class Proof:
    """Two networks side by side on one batch, and what is to become of the small one."""

    dense: nn.Module
    small: nn.Module  # a copy of it, in which layers are replaced as time goes on
    expected: Expected
    batch: Any  # None if there is none, by which nothing is proved
    feed: Feed

    def __call__(self, ends: Sequence[Ended] | None = None) -> Iterator[str]:
        """Run both networks, compare what the small one does with what was planned, and yield notes.

        Every replaced layer is called, as often as the dense one; parameters and MACs are as counted; the outputs have
        the shapes of the dense ones and are numbers; merged, the network computes the same. Of layers that are dear to
        multiply out some outputs are (:mod:`spectrim.nn.merge_proof`). The cost is one forward pass of each network,
        some of single samples, and of multiplying out about a quarter of a pass or a billion MACs. What asks for its
        mode is tried in training mode too, for a note.

        ``ends`` are of passes of both that went side by side while layers were replaced. Where these called every layer
        once, and one sample takes the finished network what was planned, neither is run on the batch again. Raises
        ProofError for what does not hold, with the layer, the reason and what to do.
        """
        if self.batch is None:
            yield NOT_RUN
            return
        stored, planned = parameter_count(self.small), round(self.expected.planned["parameters"])
        if stored != planned:
            raise ProofError(f"the compressed network holds {stored:,} parameters where its plan counts {planned:,}")
        one = None if ends is None else self._one_sample()
        seen = None if ends is None or one is None else _known(one, self.expected, ends)
        before, now = seen or (self._run(self.dense, self.batch), self._run_small())
        yield from self._calls(before, now)
        yield from _work(self.expected, before, now)
        yield from _outputs(self.expected, before, now)
        work = before.macs * self.feed.layout.size(self.batch)
        yield from check_merged(self.small, self.batch, self.feed, work, None if one is None else one.outputs)
        yield from said_of_training(self.dense, self.small, self.batch, self.feed)

    def _run(self, model: nn.Module, batch: Any) -> PassRecord:
        shapes: dict[str, list[Any]] = defaultdict(list)

        def seen(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            shapes[name].append(next((tuple(t.shape) for t in tensors((args, kwargs))), ()))

        hooks = on_each([(name, model.get_submodule(name)) for name in self.expected.layers], seen, before=True)
        with counting(model) as work, observe(model, hooks, forward=self.feed) as running:
            outputs = output_tensors(running(batch))
        calls = Counter({name: len(each) for name, each in shapes.items()})
        each_sample = work.macs / self.feed.layout.size(batch)
        several_sizes = any(len(set(each)) > 1 for each in shapes.values())
        rounded = _MEAN_SIDES * each_sample if several_sizes else 0.0
        return PassRecord(calls, each_sample, outputs, rounded, shapes)

    def _run_small(self) -> PassRecord:
        try:
            return self._run(self.small, self.batch)
        except Exception as error:
            names = first_few([*map(repr, self.expected.changed)])
            causes = {
                f"What reads or calls replaced layers ({names}) misses what it needs; skip those with skip=": names,
                "Something reads channels that are gone; skip= the layers before it": self.expected.removes,
            }
            cause = ". Or: ".join(words for words, there in causes.items() if there)
            raise ProofError(
                f"the compressed {type(self.dense).__name__} cannot be run: {type(error).__name__}: {error}. {cause}"
            ) from error

    def _one_sample(self) -> PassRecord | None:
        """What the finished network does with the first sample of the batch; nothing if it does not take one."""
        try:
            return self._run(self.small, self.feed.resized(self.batch, 1))
        except Exception as error:  # the whole batch tells what is wrong
            log.info("one sample cannot be run, a whole batch is: %s", error)
            return None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Tell what is raised while layers are replaced as a fault of the network, if it cannot be run as it is."""
        try:
            yield
        except SpectrimError:
            raise
        except Exception:
            self._run_small()
            raise

    def _calls(self, before: PassRecord, now: PassRecord) -> Iterator[str]:
        """Whether every replaced layer was called, and all as often as in the dense network."""
        lost = [name for name in self.expected.changed if before.calls[name] and not now.calls[name]]
        if lost and not self._goes_other_ways(lost):
            raise ProofError(
                f"layer {lost[0]!r} was replaced, and is not called any more ({len(lost)} such layers): the network "
                f"reaches it in another way than by its name; {COPIES}, or skip={lost[0]!r}"
            )
        others = [name for name in before.calls if now.calls[name] != before.calls[name]]
        if others:
            yield (
                f"{len(others)} layers are called another number of times than in the dense network, which goes other "
                f"ways for other inputs: {first_few([*map(repr, others)])}. A sample of this batch takes "
                f"{now.macs:,.0f} MACs"
            )

    def _goes_other_ways(self, names: Sequence[str]) -> bool:
        """Whether some layers are called for some samples and not for others, as those of a mixture of experts."""
        seen: set[tuple[int, ...]] = set()
        for number in range(min(8, self.feed.layout.size(self.batch))):
            try:
                calls = self._run(self.dense, self.feed.layout.picked(self.batch, torch.tensor([number]))).calls
            except Exception:
                return False
            seen.add(tuple(calls[name] for name in names))
        return len(seen) > 1 or any(0 in each for each in seen)

    def check_copy(self) -> tuple[Mapping[str, Junction] | None, tuple[str, ...]]:
        """Raise ProofError if the copy calls layers of the model itself, or computes something else than it does.

        What is done to such a copy would not matter, or not show what it does to the model. The run also shows the sums
        behind the copy's layers, which are given; None where they could not be looked for. Notes are given beside them.
        """
        if self.batch is None:
            return None, ()
        model, copied, kind = self.dense, self.small, type(self.dense).__name__
        for name in self.expected.changed:
            if copied.get_submodule(name) is model.get_submodule(name):
                raise ProofError(
                    f"copy.deepcopy of the {kind} gives layer {name!r} itself and no copy of it, so that compressing "
                    "it would change the original: see its __deepcopy__"
                )
        strays: list[str] = []
        originals = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
        hooks = [*on_each(originals, lambda name, *_: strays.append(name), before=True)]
        sums: dict[str, Junction] = {}
        answers: list[Tensor] = []

        def run(part: Any) -> None:
            strays.clear()
            with observe(copied, hooks, forward=self.feed) as running:
                answers[:] = output_tensors(running(part))

        def seen(part: Any) -> None:
            with scanned(copied, [name for name, _ in originals], sums):
                run(part)

        found: Mapping[str, Junction] | None = None
        try:
            with contextlib.suppress(Exception):  # what cannot be watched so may be run all the same
                part = on_few(seen, self.batch, self.feed)
                found = sums
            if found is None:
                part = on_few(run, self.batch, self.feed)
        except Exception as error:
            raise cannot_run(model, error) from error
        if strays:
            raise ProofError(
                f"a copy of the {kind} calls layer {strays[0]!r} of the original, so that it cannot be replaced: "
                f"{COPIES}, or skip={strays[0]!r}"
            )
        return found, tuple(self._answers(answers, part))

    def _answers(self, answers: Sequence[Tensor], part: Any) -> Iterator[str]:
        """Whether the model repeats itself, and if so, whether these answers of its copy are its own."""
        with observe(self.dense, forward=self.feed) as running:
            wanted, again = (output_tensors(running(part)) for _ in range(2))
        if not all(map(alike, wanted, again)):
            yield DIFFERS
        elif not all(map(alike, wanted, answers)):
            raise ProofError(
                f"a copy of the {type(self.dense).__name__} computes something else than the model does. {MEANS}"
            )


def _known(one: PassRecord, expected: Expected, ends: Sequence[Ended]) -> tuple[PassRecord, PassRecord] | None:
    """What both networks did side by side, if one sample shows that the finished network does as planned."""
    once = Counter(dict.fromkeys(expected.changed, 1))
    told = expected.dense.get("macs")
    if told is None or any(each.calls[name] != 1 for each in (one, *ends) for name in once):
        return None
    planned = math.isclose(one.macs, expected.planned["macs"], rel_tol=_ROWS, abs_tol=0.5)
    if not planned or any(t.is_floating_point() and bool(t.isnan().any()) for t in one.outputs):
        return None
    first, last = (output_tensors(end.output) for end in ends)
    return PassRecord(once, told, first, 0.0), PassRecord(once, one.macs, last, 0.0)


def _work(expected: Expected, before: PassRecord, now: PassRecord) -> Iterator[str]:
    """Whether the MACs of the finished network are those that were planned."""
    told = expected.dense.get("macs")
    if told is None or now.calls != before.calls:
        return
    if not math.isclose(before.macs, told, rel_tol=_ROWS, abs_tol=before.rounded):
        yield (
            f"the MACs of the finished network were not checked: a sample of this batch takes {before.macs:,.0f} in "
            f"the dense network, one of the calibration's first batch {told:,.0f}"
        )
        return
    others = [name for name, each in before.shapes.items() if each != now.shapes[name] and not expected.removes]
    if others:
        yield (
            f"the MACs of the finished network were not checked: layers get other numbers of rows than in the dense "
            f"network, which picks them by what it computes: {first_few([*map(repr, others)])}"
        )
    elif not math.isclose(now.macs, expected.planned["macs"], rel_tol=_ROWS, abs_tol=before.rounded):
        names = first_few([*map(repr, expected.changed)])
        cause = (
            f"is the weight of a replaced layer ({names}) read by its parent, and so multiplied out in every pass, or "
            "does the network walk its modules and run the parts of a layer too? skip= that layer"
            if names
            else "something reads how many channels there were; skip= the layers before it"
        )
        raise ProofError(
            f"the compressed network takes {now.macs:,.0f} MACs a sample where its plan counts "
            f"{expected.planned['macs']:,.0f}: {cause}"
        )


def _outputs(expected: Expected, before: PassRecord, now: PassRecord) -> Iterator[str]:
    """Whether the outputs are numbers, of the shapes of the dense ones."""
    wanted, given = ([tuple(t.shape) for t in seen.outputs] for seen in (before, now))
    if wanted != given:
        if expected.removes and [shape[1:] for shape in wanted] != [shape[1:] for shape in given]:
            raise ProofError(f"without some channels the network gives outputs of shapes {given}, where {wanted} came")
        yield f"outputs have other shapes than the dense network's, {given} for {wanted}, and were not compared"
    for a, b in zip(before.outputs, now.outputs, strict=False):
        if b.is_floating_point() and bool(a.isfinite().all()) and bool(b.isnan().any()):
            raise ProofError("the compressed network gives NaN where the dense one gives numbers")
