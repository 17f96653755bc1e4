"""What compression did, in numbers and words, and the result that carries it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from spectrim.application import Applied
from spectrim.errors import CheckpointError, first_few
from spectrim.network.choices import ChannelsChoice
from spectrim.network.printing import Grid, Printed, amount, cost_name, count, reasons, share, total
from spectrim.network.sites import Sites
from spectrim.nn.agreement import Agreement, agreement
from spectrim.nn.checkpoint import file_size
from spectrim.nn.timing import Speed, Timing
from spectrim.nn.watch.calibrate import few_rows
from spectrim.nn.watch.reconstruct import Errors
from spectrim.nn.watch.sampling import Sampling
from spectrim.search.arms import Tried, arms_grid
from spectrim.search.judge import Verdict
from spectrim.search.measured import asked_time, is_late
from spectrim.search.tolerance import Tolerance
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.selection.printed import plan_grid

log = logging.getLogger(__name__)


# Nine in ten runs that take more than others by this share are told to be disturbed.
_SPREAD = 0.25
# Modules that do something else in training mode.
_OTHERWISE = (_DropoutNd, _BatchNorm)
# Layers that a printed result has at most.
_LAYERS = 16


@dataclass(frozen=True)
class Report(Printed):
    """What compression did, in numbers and words. ``print(report)`` and notebooks show it as a table.

    Attributes
    ----------
    plan
        With the counted costs before and after.
    skipped
        ``(layer, kind, reason)`` of every layer left alone.
    samples
        Calibration samples.
    measured
        Milliseconds of the dense and the compressed network, measured side by side, if latency was asked for.
    stored
        Bytes of the files of the dense and the compressed network, header and plan included; none of what no file can
        hold.
    notes
        What a user should know, such as a model measured slower than dense.
    fits
        What layers that were reconstructed miss of the dense network's answers, by the layer.
    held_out
        Samples that they were not fitted to.
    agreement
        How far the outputs are from the dense network's on these samples; None where they cannot be compared. It is
        that of the model as it was returned: after training call :func:`spectrim.agreement` again.
    verdict
        What the network lost by ``evaluate``, or by its outputs, where either was asked for.
    tolerance
        What it may lose, if that was stated.
    arms
        What became of each set of methods that competed, with ``methods="auto"``.
    """

    plan: Plan
    skipped: tuple[tuple[str, str, str], ...]
    samples: int
    measured: Mapping[str, Timing] = field(default_factory=dict)
    stored: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fits: Mapping[str, Errors] = field(default_factory=dict)
    held_out: int = 0
    agreement: Agreement | None = None
    verdict: Verdict | None = None
    tolerance: Tolerance | None = None
    arms: tuple[Tried, ...] = ()

    @property
    def speed(self) -> Speed | None:
        """How the measured times compare, round by round; None if there are none."""
        if not self.measured:
            return None
        unchanged = all(entry.choice.is_dense for entry in self.plan)
        how = Speed.of_equals if unchanged else Speed.of
        return how(self.measured["dense"], self.measured["compressed"])

    @property
    def runtime(self) -> str:
        """What ran the networks that were measured."""
        return str(self.plan.facts.get("runtime", "eager"))

    def rows(self) -> list[dict[str, Any]]:
        """Costs of the whole network as plain values, one dict a cost, those that the budget limits first.

        Returns
        -------
        list of dict
            ``cost``; ``dense`` and ``compressed``, in the cost's own unit; ``ratio`` of the two; ``measured``, whether
            it was measured of the finished networks, and not counted.
        """
        plan = self.plan
        order = [cost for cost in dict.fromkeys([*plan.budget, *plan.dense_costs]) if cost in plan.dense_costs]
        counted = {cost: (plan.dense_costs[cost], plan.costs[cost]) for cost in order}
        found: dict[str, Mapping[str, float]] = {"bytes": self.stored} if self.stored else {}
        if self.measured:
            found["measured ms"] = {name: timing.quiet for name, timing in self.measured.items()}
        costs = counted | {cost: (values["dense"], values["compressed"]) for cost, values in found.items()}
        return [
            {
                "cost": cost, "dense": dense, "compressed": small, "ratio": dense / small if small else math.nan,
                "measured": cost in found,
            }
            for cost, (dense, small) in costs.items()
        ]  # fmt: skip

    _records = rows

    def _grid(self) -> Grid:
        lines = []
        for row in self.rows():
            timed = row["cost"] == "measured ms"
            unit = "latency" if timed else row["cost"]
            fewer = str(self.speed) if timed else f"{row['ratio']:.2f}x"
            name = cost_name(row["cost"]) + (f", {self.runtime}" if timed else "")
            lines.append(
                [name, *(amount(unit, row[key]) for key in ("dense", "compressed")),
                 share(row["compressed"], row["dense"]), fewer]
            )  # fmt: skip
        return Grid(["", ">dense", ">compressed", ">of dense", ">ratio"], lines, notes=(*self._done(), *self._left()))

    @property
    def competed(self) -> Grid:
        """What became of the sets of methods that competed, as a table for people; without rows if none did."""
        return arms_grid(self.arms, next(iter([*self.plan.budget, *self.plan.dense_costs]), ""))

    def __str__(self) -> str:
        return "\n\n".join(each.text() for each in (self._grid(), self.competed) if each.rows)

    def _repr_html_(self) -> str:
        return "".join(each.html() for each in (self._grid(), self.competed) if each.rows)

    def _done(self) -> Iterator[str]:
        """What was done, in sentences."""
        removals = [entry.choice for entry in self.plan if isinstance(entry.choice, ChannelsChoice)]
        layers = sum(len(entry.sites) for entry in self.plan if not entry.of_channels)
        yield f"{self.plan.changed:,} of {layers:,} layers changed, {self.samples:,} calibration samples"
        for unit in ("channel", "head"):
            if narrowed := [choice for choice in removals if choice.unit == unit]:
                gone = sum(choice.gone for choice in narrowed)
                yield f"{count(gone, unit)} removed from {count(len(narrowed), 'group')}"
        if shared := [entry for entry in self.plan if entry.members]:
            many = sum(len(entry.members) for entry in shared)
            yield f"{many} layers share factors in {count(len(shared), 'group')}"
        if self.held_out and self.fits:
            fitted, unseen = (
                sum(values) / len(values)
                for values in ([e.fitted for e in self.fits.values()], [e.held_out or 0.0 for e in self.fits.values()])
            )
            yield (
                f"reconstructed layers miss {fitted:.2%} of their dense answers on the samples they were fitted to, "
                f"{unseen:.2%} on {self.held_out:,} held out"
            )
        yield from self.sentences

    def _left(self) -> Iterator[str]:
        return reasons(self.skipped, "report.skipped")

    def __repr__(self) -> str:
        costs = [total(cost, dense, self.plan.costs[cost]) for cost, dense in self.plan.dense_costs.items()]
        return f"Report({'; '.join(costs)})"

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was lost, how far outputs agree with dense ones, whether a latency budget is met, and the notes."""
        # A tolerance of agreement has said it.
        told = self.agreement is None or (self.tolerance is not None and self.tolerance.min_agreement is not None)
        agreed = () if told else (str(self.agreement),)
        return (*self._tolerated(), *agreed, *self._time_asked_for(), *self.notes)

    def _tolerated(self) -> Iterator[str]:
        """Whether the tolerance is met, or what the metric is."""
        verdict = self.verdict
        if verdict is not None and self.tolerance is not None:
            yield self.tolerance.said(verdict)
        elif verdict is not None and verdict.metric is not None:
            yield f"{verdict.name} {verdict.metric:.6g}, {verdict.dense:.6g} for the dense network"

    def _time_asked_for(self) -> Iterator[str]:
        """Whether a latency budget is met by the measured times, and what a busy machine has to do with it."""
        wanted = asked_time(self.plan, self.measured)
        if wanted is None:
            return
        small = self.measured["compressed"]
        share = wanted / self.measured["dense"].quiet
        met = "is NOT met" if is_late(self.plan, self.measured) else "is met"
        batch = self.plan.facts.get("batch", 1)
        said = (
            f"the latency budget {met}: {small.quiet:.3f} ms measured, {wanted:.3f} ms ({share:.0%} of dense) asked "
            f"for, with {count(batch, 'sample')} a batch (latency=Latency(batch=...), --batch)"
        )
        if small.p90 > small.quiet * (1 + _SPREAD):
            said += (
                f"; the machine was busy: nine in ten runs took up to {small.p90:.3f} ms and half of them up to "
                f"{small.p50:.3f} ms, so measure again when it is idle"
            )
        yield said


@dataclass(frozen=True)
class Result(Printed):
    """What :func:`compress` returns. ``print(result)`` and notebooks show what was done, to the network and its layers.

    Attributes
    ----------
    model
        The compressed model, a new module of plain layers.
    plan
        One choice a site.
    report
        Costs before and after, skipped layers, measured times.
    candidates
        The table, to select from again under another budget.
    sites
        The calibrated sites, to apply another plan.
    """

    model: nn.Module
    plan: Plan
    report: Report
    candidates: Candidates
    sites: Sites

    def reporting(self, **changes: Any) -> Self:
        """The same result with other values in its report."""
        return dataclasses.replace(self, report=dataclasses.replace(self.report, **changes))

    def rows(self) -> list[dict[str, Any]]:
        """What happened to every layer, as plain values: :meth:`spectrim.Plan.rows`."""
        return self.plan.rows()

    _records = rows

    def _grid(self) -> Grid:
        return self.report._grid()

    def _layers(self) -> Grid:
        """The layers, the middle of many folded."""
        grid = plan_grid(self.plan, _LAYERS, "result.rows()")
        return dataclasses.replace(grid, title="", notes=())

    def __str__(self) -> str:
        return f"{self.report}\n\n{self._layers().text()}"

    def _repr_html_(self) -> str:
        return f"{self.report._repr_html_()}{self._layers().html()}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {self.plan!r})"


def reported(
    model: nn.Module,
    small: nn.Module,
    sites: Sites,
    plan: Plan,
    done: Applied,
    batches: Iterable[Any] | None,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    forward: Callable[[nn.Module, Any], Any] | None = None,
    measured: Mapping[str, Timing] = MappingProxyType({}),
    notes: Sequence[str] = (),
    trained: bool = False,
) -> Report:
    """What a plan that was carried out did; where there are batches, how far the outputs agree.

    Of a network that was trained since, no samples are held out; where channels went neither, unless the statistics,
    by which what reads those that are left makes up for the others, were taken without them.
    """
    held_out = () if trained else done.held
    agreed = None if batches is None else agreement(model, small, batches, held_out, forward=forward)
    if agreed is not None and not sampling.apart and any(isinstance(entry.choice, ChannelsChoice) for entry in plan):
        agreed = dataclasses.replace(agreed, held_out=False)
    notes = (
        *sites.notes, *few_rows(sites), *uncounted_work(sites), *_said_of_mode(small), *notes, *_said_of_layers(done),
        *done.notes,
    )  # fmt: skip
    for note in notes:
        log.warning("%s", note)
    skipped = tuple((s.name, s.kind, s.reason) for s in sites.skipped)
    report = Report(
        plan, skipped, sites.samples, measured, _stored(model, small), notes, done.errors, done.held_out, agreed
    )
    for said in report._time_asked_for():
        log.info("%s", said)
    return report


def _stored(model: nn.Module, small: nn.Module) -> dict[str, int]:
    """Bytes of the files of both networks; nothing where one cannot be saved, as whoever saves it is told."""
    try:
        return {"dense": file_size(model), "compressed": file_size(small)}
    except CheckpointError:
        return {}


def _said_of_mode(small: nn.Module) -> Iterator[str]:
    """That a network is in training mode, as the dense one was, where it answers otherwise in it."""
    if small.training and any(isinstance(each, _OTHERWISE) for each in small.modules()):
        yield (
            "the model is in training mode, as it was given, in which it drops values or normalizes by the batch: call "
            "result.model.eval() before it is used"
        )


def uncounted_work(sites: Sites) -> Iterator[str]:
    """What a user should know of operations whose work is in no cost."""
    if not sites.uncounted:
        return
    named = [f"{name} in {path or 'the model itself'}" for name, path in sites.uncounted.items()]
    yield f"not counted in the MACs, since there is no formula for it: {first_few(named, 5)}"


def _said_of_layers(done: Applied) -> Iterator[str]:
    """What a user should know of layers that could not be reconstructed."""
    if done.unseen:
        yield (
            f"{len(done.unseen)} layers were not fitted to what the layers before them deliver, since no forward pass "
            f"stopped at them in both networks: {first_few(done.unseen, 5)}"
        )
