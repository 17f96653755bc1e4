"""Proof of what is delivered: the finished network is run, and what it does is held against what was planned."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.cost.counted import macs, parameters
from spectrim.cost.whole import Layered, Network, Picks
from spectrim.errors import ProofError, SpectrimError
from spectrim.network.sites import Sites
from spectrim.nn.copying import copy_model
from spectrim.nn.counting import counting
from spectrim.nn.modes import said_of_training
from spectrim.nn.parameters import parameters_of
from spectrim.nn.standing import LAYERS, StandIn
from spectrim.nn.surgery import merged_at, parameter_count, stand_ins
from spectrim.nn.watch.batches import Feed, Forward
from spectrim.nn.watch.junctions import Junction, scanned
from spectrim.nn.watch.lockstep import Ended
from spectrim.nn.watch.nesting import compared, output_tensors, tensors
from spectrim.nn.watch.observe import observe, on_each, on_few

log = logging.getLogger(__name__)

# Layers that run once a batch, whatever the samples, have rows that are no whole number a sample, and are counted so.
_ROWS = 0.01
# What is called with inputs of several sizes is counted at one of mean sides, which are whole numbers.
_MEAN_SIDES = 0.1
# Difference of outputs that rounding explains, as a share of them.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-2}
_ROUNDING_OF_FEW_BITS = 0.1
# Multiplying out layers may take this share of a forward pass of the batch, or so many MACs, which are soon done.
_MULTIPLIED, _SOON = 0.25, 1e9
_COPIES = (
    "a function or closure that was made with the original's layers goes on calling them in every copy. Call the "
    "layers by attributes of the module that holds them"
)


@dataclass(frozen=True)
class Expected:
    """What a network should be once a plan is carried out, counted from its layers.

    Attributes
    ----------
    changed
        Names of the layers that are replaced.
    dense, planned
        Costs of the dense network and of the planned one: parameters, and MACs of one sample if sites have been run.
    removes
        Whether channels are gone.
    """

    changed: tuple[str, ...]
    dense: Mapping[str, float]
    planned: Mapping[str, float]
    removes: bool

    @classmethod
    def of(
        cls, sites: Sites, picks: Picks, groups: Mapping[str, Sequence[str]], methods: Sequence[Layered]
    ) -> Expected:
        """Of a plan's choices, by the names of sites, of groups with their members, and of coupled channels."""
        run = all(site.spec.inputs for site in sites)
        costs = {"parameters": parameters, **({"macs": macs} if run else {})}
        network = Network(dataclasses.replace(sites, groups=MappingProxyType(dict(groups))), costs, methods)
        couplings = {coupling.name for coupling in sites.couplings}
        changed = [
            layer
            for name, choice in picks.items()
            if name not in couplings and not choice.is_dense
            for layer in groups.get(name, (name, *choice.others))
        ]
        return cls(tuple(changed), network.cost(), network.cost(picks), bool(couplings & picks.keys()))


@dataclass(frozen=True)
class Seen:
    """What one forward pass of a network did.

    Attributes
    ----------
    calls
        By the layer.
    macs
        Of a sample.
    outputs
        All tensors it gave.
    rounded
        MACs of a sample by which a count at mean sides may be off.
    """

    calls: Counter[str]
    macs: float
    outputs: Sequence[Tensor]
    rounded: float


def check_copy(
    model: nn.Module, copied: nn.Module, expected: Expected, batch: Any, feed: Feed
) -> Mapping[str, Junction] | None:
    """Raise ProofError if a copy of a model calls layers of the model itself: nothing done to the copy would matter.

    The run that shows it also shows the sums behind the layers of a copy that has all channels, which are given; None
    where they could not be looked for.
    """
    names, removes = expected.changed, expected.removes
    shared = [name for name in names if copied.get_submodule(name) is model.get_submodule(name)]
    if shared:
        raise ProofError(
            f"copy.deepcopy of the {type(model).__name__} gives layer {shared[0]!r} itself and no copy of it, so that "
            "compressing it would change the original: see its __deepcopy__"
        )
    strays: list[str] = []
    originals = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    hooks = [*on_each(originals, lambda name, *_: strays.append(name), before=True)]

    sums: dict[str, Junction] = {}

    def run(part: Any) -> None:
        strays.clear()
        with observe(copied, hooks, forward=feed) as running:
            running(part)

    def seen(part: Any) -> None:
        with scanned(copied, [name for name, _ in originals], sums):
            run(part)

    found: Mapping[str, Junction] | None = None
    try:
        if not removes:
            with contextlib.suppress(Exception):  # what cannot be watched so may be run all the same
                on_few(seen, batch, feed)
                found = sums
        if found is None:
            on_few(run, batch, feed)
    except Exception as error:
        raise ProofError(
            f"a copy of the {type(model).__name__} cannot be run, which the model can: {type(error).__name__}: {error}"
            + (". Something reads how many channels there were; skip= the layers before it" if removes else "")
        ) from error
    if strays:
        raise ProofError(
            f"a copy of the {type(model).__name__} calls layer {strays[0]!r} of the original, so that it cannot be "
            f"replaced: {_COPIES}, or skip={strays[0]!r}"
        )
    return found


def prove(
    dense: nn.Module,
    small: nn.Module,
    expected: Expected,
    batch: Any,
    *,
    forward: Forward | None = None,
    ends: Sequence[Ended] | None = None,
) -> Iterator[str]:
    """Run both networks on one batch, and compare what the small one does with what was planned.

    Every replaced layer is called, as often as the dense one; parameters and MACs are as counted; the outputs have the
    shapes of the dense ones and are numbers; merged, the network computes the same. Where multiplying out all layers
    is dear, the cheapest are, and one of each kind at least. The cost is one forward pass of each network, some of
    single samples, and of multiplying out a quarter of a pass or a billion MACs. What asks for its mode is tried in
    training mode too, for a note.

    Parameters
    ----------
    ends
        Of passes of both that went side by side while layers were replaced. Where these called every layer once, and
        one sample takes the finished network what was planned, neither is run on the batch again.

    Yields
    ------
    str
        What a user should know: what could not be checked, and why.

    Raises
    ------
    ProofError
        For what does not hold. The message names the layer, the reason and what to do.
    """
    feed = Feed.of(forward).decide(dense, batch)
    stored = parameter_count(small)
    if stored != round(expected.planned["parameters"]):
        raise ProofError(
            f"the compressed network holds {stored:,} parameters where its plan counts "
            f"{round(expected.planned['parameters']):,}"
        )
    one = None if ends is None else _one_sample(small, expected, batch, feed)
    seen = None if ends is None or one is None else _known(one, expected, ends)
    before, now = seen or (
        _run(dense, batch, expected.changed, feed), _run_small(dense, small, expected.changed, batch, feed)
    )  # fmt: skip
    yield from _calls(dense, before, now, batch, feed)
    yield from _work(expected, before, now)
    yield from _outputs(expected, before, now)
    most = max(_SOON, _MULTIPLIED * before.macs * feed.layout.size(batch))
    yield from _merged(small, batch, feed, most, None if one is None else one.outputs)
    yield from said_of_training(dense, small, batch, feed)


def _one_sample(small: nn.Module, expected: Expected, batch: Any, feed: Feed) -> Seen | None:
    """What the finished network does with the first sample of a batch; nothing if it does not take one."""
    try:
        return _run(small, feed.resized(batch, 1), expected.changed, feed)
    except Exception as error:  # the whole batch tells what is wrong
        log.info("one sample cannot be run, a whole batch is: %s", error)
        return None


def _known(one: Seen, expected: Expected, ends: Sequence[Ended]) -> tuple[Seen, Seen] | None:
    """What both networks did side by side, if one sample shows that the finished network does as planned."""
    once = Counter(dict.fromkeys(expected.changed, 1))
    told = expected.dense.get("macs")
    if told is None or any(Counter({name: end.calls[name] for name in once}) != once for end in ends):
        return None
    planned = math.isclose(one.macs, expected.planned["macs"], rel_tol=_ROWS, abs_tol=0.5)
    if one.calls != once or not planned or any(t.is_floating_point() and bool(t.isnan().any()) for t in one.outputs):
        return None
    first, last = (output_tensors(end.output) for end in ends)
    return Seen(once, told, first, 0.0), Seen(once, one.macs, last, 0.0)


def _run(model: nn.Module, batch: Any, names: Sequence[str], feed: Feed) -> Seen:
    shapes: dict[str, list[Any]] = defaultdict(list)

    def seen(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        shapes[name].append(next((tuple(t.shape) for t in tensors((args, kwargs))), ()))

    hooks = on_each([(name, model.get_submodule(name)) for name in names], seen, before=True)
    with counting(model) as work, observe(model, hooks, forward=feed) as running:
        outputs = output_tensors(running(batch))
    calls = Counter({name: len(each) for name, each in shapes.items()})
    each_sample = work.macs / feed.layout.size(batch)
    several_sizes = any(len(set(each)) > 1 for each in shapes.values())
    return Seen(calls, each_sample, outputs, _MEAN_SIDES * each_sample if several_sizes else 0.0)


def _run_small(dense: nn.Module, small: nn.Module, names: Sequence[str], batch: Any, feed: Feed) -> Seen:
    try:
        return _run(small, batch, names, feed)
    except Exception as error:
        cause = (
            f"What reads or calls the replaced layers ({_some(names)}) does not find what it needs; skip those with "
            "skip="
            if names
            else "Something reads channels that are gone; skip= the layers before it"
        )
        raise ProofError(
            f"the compressed {type(dense).__name__} cannot be run: {type(error).__name__}: {error}. {cause}"
        ) from error


@contextlib.contextmanager
def watching(dense: nn.Module, small: nn.Module, expected: Expected, batch: Any, feed: Feed) -> Iterator[None]:
    """Tell what is raised while layers are replaced as a fault of the network, if it cannot be run as it is then."""
    try:
        yield
    except SpectrimError:
        raise
    except Exception:
        _run_small(dense, small, expected.changed, batch, feed)
        raise


def _calls(dense: nn.Module, before: Seen, now: Seen, batch: Any, feed: Feed) -> Iterator[str]:
    """Whether every replaced layer was called as often as the dense one."""
    lost = [name for name in before.calls if not now.calls[name]]
    if lost and not _goes_other_ways(dense, lost, batch, feed):
        raise ProofError(
            f"layer {lost[0]!r} was replaced, and is not called any more ({len(lost)} such layers): the network "
            f"reaches it in another way than by its name; {_COPIES}, or skip={lost[0]!r}"
        )
    others = [name for name in before.calls if now.calls[name] != before.calls[name]]
    if others:
        yield (
            f"{len(others)} layers are called another number of times than in the dense network, which goes other ways "
            f"for other inputs: {_some(others)}"
        )


def _goes_other_ways(dense: nn.Module, names: Sequence[str], batch: Any, feed: Feed) -> bool:
    """Whether some layers are called for some samples and not for others, as those of a mixture of experts."""
    seen: set[tuple[int, ...]] = set()
    size = feed.layout.size(batch)
    for number in range(min(8, size)):
        try:
            calls = _run(dense, feed.layout.picked(batch, torch.tensor([number])), names, feed).calls
        except Exception:
            return False
        seen.add(tuple(calls[name] for name in names))
    return len(seen) > 1 or any(0 in each for each in seen)


def _work(expected: Expected, before: Seen, now: Seen) -> Iterator[str]:
    """Whether the MACs of the finished network are those that were planned."""
    told = expected.dense.get("macs")
    if told is None or now.calls != before.calls:
        return
    if not math.isclose(before.macs, told, rel_tol=_ROWS, abs_tol=before.rounded):
        yield (
            f"the MACs of the finished network were not checked: a sample of this batch takes {before.macs:,.0f} in "
            f"the dense network, one of the calibration's first batch {told:,.0f}"
        )
    elif not math.isclose(now.macs, expected.planned["macs"], rel_tol=_ROWS, abs_tol=before.rounded):
        raise ProofError(
            f"the compressed network takes {now.macs:,.0f} MACs a sample where its plan counts "
            f"{expected.planned['macs']:,.0f}: is the weight of a replaced layer ({_some(tuple(now.calls))}) read by "
            "its parent, and so multiplied out in every pass, or does the network walk its modules and run the parts "
            "of a layer too? skip= that layer"
        )


def _outputs(expected: Expected, before: Seen, now: Seen) -> Iterator[str]:
    """Whether the outputs are numbers, of the shapes of the dense ones."""
    wanted, given = ([tuple(t.shape) for t in seen.outputs] for seen in (before, now))
    if wanted != given:
        if expected.removes and [shape[1:] for shape in wanted] != [shape[1:] for shape in given]:
            raise ProofError(f"without some channels the network gives outputs of shapes {given}, where {wanted} came")
        yield f"outputs have other shapes than the dense network's, {given} for {wanted}, and were not compared"
    for a, b in zip(before.outputs, now.outputs, strict=False):
        if b.is_floating_point() and bool(a.isfinite().all()) and bool(b.isnan().any()):
            raise ProofError("the compressed network gives NaN where the dense one gives numbers")


def _merged(small: nn.Module, batch: Any, feed: Feed, most: float, known: Sequence[Tensor] | None) -> Iterator[str]:
    """Whether the network computes the same with one weight in place of layers that stand for others.

    ``most`` limits the MACs of multiplying them out; what the network gives for the first sample may be ``known``.
    """
    every = stand_ins(small)
    if not every:
        return
    chosen = _cheap(every, most)
    precise = _precise(small)
    try:
        whole = merged_at(precise, chosen)
    except ValueError as error:
        yield f"the network was not compared with what merge makes of it: {error}"
        return
    if len(chosen) < len(every):
        left = [names[0] for layer, names in every.items() if layer not in chosen]
        yield (
            f"{len(left)} of {len(every)} replaced layers were not merged for the proof, as multiplying them out takes "
            f"more than {_MULTIPLIED:.0%} of a forward pass of the batch ({_some(left)}); others of their kinds were"
        )
    try:
        try:
            outputs = _answers(precise, whole, batch, feed, known if precise is small else None)
        except Exception:  # it casts to few bits by itself
            if precise is small:
                raise
            outputs = _answers(small, merged_at(small, chosen), batch, feed)
    except Exception as error:
        raise ProofError(
            f"merged, the compressed {type(small).__name__} cannot be run: {type(error).__name__}: {error}. It asks "
            "what its layers are; ask isinstance, or skip= the layers concerned"
        ) from error
    for a, b, again in zip(*outputs, strict=False):
        if not a.is_floating_point() or a.shape != b.shape or a.shape != again.shape:
            continue
        gap, noise = _gap(a, b), _gap(a, again)
        if bool(gap > _rounding(a) + 2 * noise):
            raise ProofError(
                f"merged, the compressed {type(small).__name__} computes something else (by "
                f"{float(gap / a.double().norm()):.2g} of "
                "its outputs): it asks what its layers are, such as type(layer) is nn.Linear, their children, names or "
                "number of parameters. Ask isinstance, or skip= the layers concerned"
            )


def _cheap(layers: Mapping[StandIn, Sequence[str]], most: float) -> Mapping[StandIn, Sequence[str]]:
    """Those that are multiplied out with the fewest MACs, in all at most so many, and one of each kind at least."""
    left, kinds, chosen = most, set[tuple[type, str]](), set[StandIn]()
    for layer in sorted(layers, key=_multiplying):
        kind = (type(layer), layer.original.kind)
        left -= _multiplying(layer)
        if left >= 0 or kind not in kinds:
            kinds.add(kind)
            chosen.add(layer)
    return {layer: names for layer, names in layers.items() if layer in chosen}


def _multiplying(layer: StandIn) -> float:
    """MACs of multiplying out what stands for a layer, as if it were a pair of all its numbers."""
    rows = layer.weight.shape[0]
    columns = math.prod(layer.weight.shape[1:])
    return rows * columns * sum(p.numel() for p in layer.parameters()) / (rows + columns)


def _answers(
    small: nn.Module, whole: nn.Module, batch: Any, feed: Feed, known: Sequence[Tensor] | None = None
) -> list[Sequence[Tensor]]:
    """Outputs of a network, of what it is merged to, and of the network again if these two are not alike.

    For the first sample, where both take one; what the network gives for it may be ``known``.
    """
    outputs: list[Sequence[Tensor]] = []

    def answered(model: nn.Module, part: Any) -> Sequence[Tensor]:
        with observe(model, forward=feed) as running:
            return output_tensors(running(part))

    def run(part: Any) -> None:
        one = known if feed.layout.size(part) == 1 else None
        outputs[:] = [answered(small, part) if one is None else one, answered(whole, part)]
        # What draws random numbers differs from itself.
        outputs.append(outputs[0] if all(map(_alike, *outputs)) else answered(small, part))

    on_few(run, batch, feed)
    return outputs


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    if a.shape != b.shape or not a.is_floating_point():
        return True
    return bool(_gap(a, b) <= _rounding(a))


def _gap(a: Tensor, b: Tensor) -> Tensor:
    a, b = compared(a, b)
    return (a - b).norm()


def _rounding(a: Tensor) -> Tensor:
    """The difference from an output that rounding explains."""
    size = a.double().masked_fill(a.isinf(), 0).norm()
    return _ROUNDING.get(a.dtype, _ROUNDING_OF_FEW_BITS) * size


def _precise(model: nn.Module) -> nn.Module:
    """A copy that rounds less, of a model of few bits: what is rounded twice is not what its layers are asked."""
    kinds = {p.dtype for p in parameters_of(model) if p.is_floating_point()}
    return copy_model(model).float() if kinds and kinds <= {torch.bfloat16, torch.float16} else model


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
