"""What is kept of a network while batches pass: statistics of its sites, and what runs beside them."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from spectrim.cost.counted import macs, parameters, size_bytes
from spectrim.errors import CalibrationError, ForwardError, SpectrimError, in_short
from spectrim.linalg.finite import all_finite
from spectrim.network.coupling import IN, Coupling
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer, Sites, Skipped, Tied
from spectrim.nn.flops import WorkCounter
from spectrim.nn.watch.nesting import dense, tensors
from spectrim.nn.watch.observe import Hook, on_each
from spectrim.nn.watch.readers import reading
from spectrim.nn.watch.responses import OtherWays, Responses
from spectrim.nn.watch.sampling import Extent, Sampling
from spectrim.nn.watch.state import State
from spectrim.nn.watch.streams import Streams
from spectrim.nn.watch.watchers import (
    NotFiniteError,
    Order,
    SameInputs,
    Shapes,
    TableWatcher,
    Watcher,
    too_wide,
)
from spectrim.nn.watch.ways import cure
from spectrim.nn.watch.writes import written

# Share of its work that what a layer's formula leaves of it may be by rounding.
_ROUNDING = 1e-9
_WRITTEN = (
    "forward writes into its weight or bias, which a pair of layers in its place does not have: write them once "
    "before compressing, and take that out of forward"
)
# Runs the model on a batch.
Call = Callable[[Any], Any]


class PassMaker:
    """How forward passes are made while a network is calibrated: as they are."""

    def make(self, call: Call, batch: Any) -> Any:
        """The output of a pass that is watched."""
        return call(batch)

    def behind(self, call: Call, batch: Any, *, first: bool) -> None:
        """What comes after it, of which nothing is watched."""


@dataclasses.dataclass(frozen=True)
class _Rest:
    """Layers that are no calibrated sites."""

    # Those that were called, and those that never were.
    running: tuple[LayerSpec, ...]
    idle: list[LayerSpec]
    skipped: tuple[Skipped, ...]  # why each was left alone
    uncalibrated: frozenset[str]  # names of sites that were not called, and of what never was

    def cuts_off(self, coupling: Coupling) -> str:
        """Why channels stay: a layer that holds some was not calibrated; else nothing."""
        off = any(side.name in self.uncalibrated for side in coupling.sides)
        return "a layer of theirs was not calibrated" if off else ""


@dataclasses.dataclass
class Watched:
    """What is kept of a network while batches pass."""

    sites: Sites
    # What is kept of the sites, of coupled channels and of layers left alone, by name.
    watchers: dict[str, Watcher]
    responses: dict[str, Responses]
    bystanders: dict[str, Shapes]
    seen: SameInputs
    run: Extent
    streams: Streams | None
    model: nn.Module
    # What of a batch the model is given, in words, and how passes are made.
    given: str
    passes: PassMaker
    ways: OtherWays  # of coupled channels
    order: Order = dataclasses.field(default_factory=Order)  # of the layers that are called
    # Samples and tokens so far, and whether a mask says which tokens there are.
    samples: int = 0
    tokens: int = 0
    masked: bool = False
    # MACs a sample of every module itself, from the first batch, and operations that could not be counted: by path, by
    # name.
    work: Mapping[str, float] = dataclasses.field(default_factory=dict)
    uncounted: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, sites: Sites, amount: Sampling, run: Extent, seed: int, given: str, passes: PassMaker, *,
        statistics: bool,
    ) -> Watched:  # fmt: skip
        readers = {side.name for coupling in sites.couplings for side in coupling.on(IN)}
        seen = SameInputs()
        streams = Streams() if statistics else None

        def watcher(site: Layer) -> Watcher:
            kind = TableWatcher if site.spec.looks_up else Watcher
            return kind(site, amount, run, streams, seed, seen, reads_channels=site.name in readers)

        watchers = {site.name: watcher(site) for site in sites.layers}
        for each in sites.tied:
            if wide := too_wide(each.head.spec):
                why = f"its weight is tied to {each.table.name}, and {wide}: skip both, or give one a copy of its own"
                watchers[each.head.name].refused = why
        specs = {site.name: site.spec for site in sites}
        responses = {c.name: Responses(c, specs, amount, run, seed) for c in sites.couplings if statistics}
        return cls(
            sites,
            watchers,
            responses,
            {spec.name: Shapes(spec) for spec in sites.untouched},
            seen,
            run,
            streams,
            model,
            given,
            passes,
            OtherWays(sites.couplings),
        )

    def hooks(self, model: nn.Module) -> Iterator[Hook]:
        for shapes in [*self.watchers.values(), *self.bystanders.values()]:
            yield Hook(model.get_submodule(shapes.spec.name), shapes.hook(self.order))
        for response in self.responses.values():
            for number, side in enumerate(response.sides):
                layer = model.get_submodule(self.watchers[side.name].spec.name)
                yield Hook(layer, response.hook(number), before=True)

    def looks(self, state: State) -> Iterator[Hook]:
        """Have what is kept amid the first pass be seen."""
        layers = ((name, self.model.get_submodule(shapes.spec.name)) for name, shapes in self.watchers.items())
        return on_each(layers, lambda *_: state.look())

    def see(self, run: Call, batch: Any, number: int, *, first: bool) -> None:
        """Run the model on a batch of that number; on the first one count what it computes beside the statistics."""
        samples = self.run.see(batch)
        self.order.start()
        size = samples.size
        for shapes in [*self.watchers.values(), *self.bystanders.values()]:
            shapes.start(number, samples, first=first)
        for response in self.responses.values():
            response.start(samples)
        if not first:
            output = self._run(run, batch, number)
            self.ways.later(self.order.called)
        else:
            # A weight that is multiplied out is another tensor each time.
            specs = [layer.spec for layer in self.sites.layers if not layer.present]
            with WorkCounter() as counter, reading(self.model, specs) as read:
                output = self._run(run, batch, number)
            self.ways.first(self.order.called)
            self.work = {path: work / size for path, work in counter.own_macs(self.model).items()}
            self.uncounted = counter.uncounted_in(self.model)
            own = {name: _WRITTEN for name, _ in written(self.model) if name in self.watchers}
            for name, reason in {**own, **read.refused}.items():
                self.watchers[name].refused = reason
        if inspect.isgenerator(output):
            raise CalibrationError(
                f"forward of the {type(self.model).__name__} yields, and runs where its values are asked for: pass "
                "forward=lambda model, batch: list(model(batch)), and whatever else the model takes"
            )
        found = [dense(tensor) for tensor in tensors(output)]
        if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in found):
            raise CalibrationError(
                f"the model's output holds NaN in calibration batch {number}, behind the last layer that was watched. "
                f"Check the weights there, the batch and the dtype.{_spoilt(self.model)}"
            )
        if self.streams is not None:
            self.streams.end_of_pass()
        self.samples += int(samples.filled.sum())
        self.tokens += 0 if samples.mask is None else int(samples.mask.sum())
        self.masked |= samples.mask is not None

    def _run(self, run: Call, batch: Any, number: int) -> Any:
        try:
            return self.passes.make(run, batch)
        except NotFiniteError as error:
            raise CalibrationError(f"{error}{_spoilt(self.model)}") from error
        except (SpectrimError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model may raise anything where it is given what it does not take
            if "torch.compile with fullgraph" in str(error):
                raise ForwardError(
                    f"{type(self.model).__name__} calls something in its forward that torch compiles (torch.cond, "
                    "while_loop, scan), where layers cannot be watched: write it as plain Python (if, for)"
                ) from error
            raise ForwardError(
                f"{type(self.model).__name__} raises {type(error).__name__} on calibration batch {number}, of which it "
                f"was given {self.given}: {in_short(error)}. {cure(error)}"
            ) from error

    def _reached(self) -> list[str]:
        """Sites that were called, in the order of execution; there must be some."""
        watchers = self.watchers
        reached = [name for name in self.order.names if name in watchers]
        if reached or not watchers:
            return reached
        refused = next(((name, each.refused) for name, each in watchers.items() if each.refused), None)
        if refused:
            raise CalibrationError(
                f"none of the {len(watchers)} sites was called; the first that is used is {refused[0]!r}: {refused[1]}"
            )
        raise CalibrationError(
            f"none of the {len(watchers)} sites was reached by the calibration batches; "
            f"the first is {next(iter(watchers))!r}. Is this the model that the sites were found in, and does it call "
            "its own layers? A closure, or a list of the class, calls another's: call them by attributes of the "
            "module and in the thread that runs the model"
        )

    def calibrated(self) -> Sites:
        """The sites with what was seen; those that no batch reached are skipped."""
        sites, watchers, reached = self.sites, self.watchers, self._reached()
        if self.masked and not self.tokens:
            raise CalibrationError(
                "the mask of the calibration batches leaves no token: it is zero where there is padding, and not where "
                "there is data; pass mask=, a function of the batch that gives it so"
            )
        names = {site.name for site in sites}
        layers = tuple(watchers[name].layer() for name in reached if name in names and not watchers[name].refused)
        tied = tuple(self._tied(each) for each in sites.tied if self._both(each))
        readers = (*layers, *itertools.chain.from_iterable(each.parts for each in tied))
        rest = self._rest(reached)
        running = [spec for layer in layers for spec in layer.running]
        running += [*(spec for each in tied for spec in each.layers), *rest.running]
        work = self._beside(running)
        couplings, cut_off = self._couplings(rest)
        pooled = {c.name: self.responses[c.name].pooled for c in couplings if c.name in self.responses}
        return dataclasses.replace(
            sites,
            sites=layers,
            tied=tied,
            skipped=(*rest.skipped, *cut_off),
            untouched=rest.running,
            other_parameters=sites.other_parameters + int(parameters(rest.idle)),
            other_bytes=sites.other_bytes + int(size_bytes(rest.idle)),
            other_macs=sum(work.values()),
            work=MappingProxyType(work),
            uncounted=MappingProxyType(dict(self.uncounted)),
            samples=self.samples,
            tokens=self.tokens,
            same_inputs=self.seen.together([layer.name for layer in layers]),
            loops=any(watchers[layer.name].loops for layer in readers),
            couplings=couplings,
            pooled=MappingProxyType(pooled),
        )

    def _beside(self, layers: Iterable[LayerSpec]) -> dict[str, float]:
        """MACs by the path of a module beside those of the layers.

        What a layer does in its own way, beyond its formula, is among them. What masks and shared factors leave out of
        a layer was counted of whole weights, and is no work.
        """
        known = {name: spec for spec in layers for name in spec.names}
        found = {path: work for path, work in self.work.items() if path not in known}
        for path, spec in known.items():
            work = self.work.get(path, 0.0)
            more = work - macs([spec])
            if spec.density == 1 and not spec.shared and more > _ROUNDING * work:
                found[path] = more
        return found

    def _couplings(self, rest: _Rest) -> tuple[tuple[Coupling, ...], list[Skipped]]:
        """Coupled channels that can go, and why others stay."""
        stay = {c.name: rest.cuts_off(c) or self.ways.why(c) for c in self.sites.couplings}
        cut_off = [Skipped(c.name, c.kind, stay[c.name]) for c in self.sites.couplings if stay[c.name]]
        return tuple(c for c in self.sites.couplings if not stay[c.name]), cut_off

    def _rest(self, reached: Collection[str]) -> _Rest:
        """The layers that are no calibrated sites."""
        sites, watchers = self.sites, self.watchers
        out = [site for site in sites if site.name not in reached or watchers[site.name].refused]
        apart = [each for each in sites.tied if not self._both(each)]
        rest = [spec.at(self.bystanders[spec.name].inputs) for spec in sites.untouched]
        for site in out:
            rest += site.with_layers([site.spec.at(watchers[site.name].inputs)]).running
        rest += [part.spec.at(watchers[part.name].inputs) for each in apart for part in each.parts]
        # Without an input shape a layer has no MACs and cannot be timed; what it stores counts all the same.
        idle = [spec for spec in rest if not spec.inputs]
        skipped = [Skipped(site.spec.name, site.spec.kind, watchers[site.name].obstacle()) for site in out]
        return _Rest(
            tuple(spec for spec in rest if spec.inputs),
            idle,
            (
                *with_stored([*sites.skipped, *skipped], idle),
                *with_stored((self._left_alone(reason) for each in apart for reason in each.untied()), idle),
            ),
            frozenset(spec.name for spec in (*(site.spec for site in out), *idle)),
        )

    def _both(self, tied: Tied) -> bool:
        """Whether both layers of one weight were called."""
        return all(part.name in self.order.names and not self.watchers[part.name].refused for part in tied.parts)

    def _tied(self, tied: Tied) -> Tied:
        """Layers of one weight with what was seen of each."""
        table, head = (self.watchers[part.name] for part in tied.parts)
        assert isinstance(table, TableWatcher)
        return dataclasses.replace(tied, table=table.layer(), head=head.layer(), asked=table.asked)

    def _left_alone(self, tied: Skipped) -> Skipped:
        """Why one of two layers of one weight is left alone: by what it is itself, or since they are tied."""
        return dataclasses.replace(tied, reason=self.watchers[tied.name].refused or tied.reason)


def with_stored(skipped: Iterable[Skipped], idle: Iterable[LayerSpec]) -> Iterator[Skipped]:
    """What was skipped, with what those of them store that no batch ran and that have no spec any more."""
    stored = {spec.name: {"parameters": parameters([spec]), "bytes": size_bytes([spec])} for spec in idle}
    for each in skipped:
        costs = stored.get(each.name, {})
        yield dataclasses.replace(
            each, costs={**each.costs, **{c: each.costs.get(c, 0.0) + v for c, v in costs.items()}}
        )


def _spoilt(model: nn.Module) -> str:
    """The first parameter or buffer of a model that holds NaN, Inf or a variance below zero, in a sentence."""
    for name, tensor in itertools.chain(nn.Module.named_parameters(model), nn.Module.named_buffers(model)):
        if tensor.is_floating_point() and not all_finite(tensor):
            return f" {name!r} holds NaN or Inf: mend it first."
        if name.endswith("running_var") and bool((tensor < 0).any()):
            return f" {name!r} holds variances below zero: mend it first."
    return ""
