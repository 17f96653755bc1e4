"""Dense and compressed side by side: score, parameters, MACs, file size, peak memory, latency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn

from spectrim.errors import ForwardError, SpectrimError, called_as, in_short
from spectrim.network.printing import Grid, Printed
from spectrim.network.printing import show as show
from spectrim.nn.agreement import metric_of
from spectrim.nn.surgery import parameter_count
from spectrim.nn.timing import Runtime, Speed, Timing, Told, measure_latency, peak_memory, runtime_of, same_layers
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.state import evaluating, kept
from spectrim.report.machine import machine_facts
from spectrim.report.measures import Evaluate, Score, counted_macs, file_size, inputs

if TYPE_CHECKING:
    from spectrim.report.side_by_side import SideBySide

Better = Literal["higher", "lower"]
_MEDIAN = "latency p50"
HEADS = ("", ">dense", ">compressed", ">change")
"""Of the table of a comparison."""


@dataclass(frozen=True)
class Line:
    """One measured number of one model."""

    metric: str  # what was measured
    unit: str  # ``%``, ``MAC``, ``B``, ``ms`` or nothing
    value: float  # in that unit
    better: Better = "lower"  # which way is good

    @property
    def text(self) -> str:
        return show(self.value, self.unit)


@dataclass(frozen=True)
class Measurements:
    """What was measured of one model, and on what."""

    lines: tuple[Line, ...]
    batch: int = 1
    facts: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values. Numbers are in the unit of each row, not rounded."""
        rows = [{"metric": line.metric, "unit": line.unit, "value": line.value} for line in self.lines]
        return {"batch": self.batch, "rows": rows, "facts": dict(self.facts)}


@dataclass(frozen=True)
class Measure:
    """One line of a comparison.

    Attributes
    ----------
    metric, unit
        As in :class:`Line`.
    dense, compressed
        The values.
    better
        Which way is good.
    speed
        Of a time, how the two compare round by round; the interval is that of the median.
    """

    metric: str
    unit: str
    dense: float
    compressed: float
    better: Better = "lower"
    speed: Speed | None = None

    @property
    def _rounds(self) -> Speed | None:
        """How the times compare round by round, of the median, which that is about."""
        return self.speed if self.metric == _MEDIAN else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the median time, the ratios between which it lies, run beside run."""
        return (self._rounds.low, self._rounds.high) if self._rounds else None

    @property
    def ratio(self) -> float:
        """Dense over compressed; of the median time that of the rounds, run beside run. NaN where compressed is 0."""
        if self._rounds:
            return self._rounds.ratio
        return self.dense / self.compressed if self.compressed else float("nan")

    @property
    def change(self) -> str:
        """The difference of a score in points, the ratio of a cost, of times that do not surely differ words."""
        if self.speed is not None:
            return self.speed.words_of(self.ratio)
        if self.better == "higher":
            points = " points" if self.unit == "%" else ""
            return f"{self.compressed - self.dense:+.2f}{points}"
        return f"{self.ratio:.2f}x" if self.compressed else "-"

    @property
    def standard_error(self) -> float:
        """Of the difference of two scores, in points, as of separate samples; NaN where their number is not known.

        Both networks answer for the same samples, so that this is an upper bound.
        """
        return math.hypot(Score(self.dense).standard_error, Score(self.compressed).standard_error)

    @property
    def is_noise(self) -> bool:
        """Whether two scores differ by no more than the standard error of their difference; not if it is not known."""
        return self.better == "higher" and abs(self.compressed - self.dense) <= self.standard_error

    @property
    def uncertainty(self) -> str:
        """Of the median time, between which ratios it lies, run beside run; of a score, its standard error."""
        if self.interval:
            return "{:.2f}-{:.2f}x".format(*self.interval)
        return (
            ""
            if self.better == "lower" or math.isnan(self.standard_error)
            else f"standard error {self.standard_error:.2f}"
        )

    @property
    def spread(self) -> str:
        """The same in brackets, and whether the difference is within it."""
        return f" ({'within noise, ' * self.is_noise}{self.uncertainty})" if self.uncertainty else ""

    def show(self, value: float) -> str:
        """A value in this line's unit, for people."""
        return show(value, self.unit)


@dataclass(frozen=True)
class Comparison(Printed):
    """The lines of a comparison, and what they were measured on."""

    rows: tuple[Measure, ...]
    batch: int = 1
    facts: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> Measure:
        for row in self.rows:
            if row.metric == metric:
                return row
        raise KeyError(f"no metric {metric!r}; there are {', '.join(repr(r.metric) for r in self.rows)}")

    def __contains__(self, metric: object) -> bool:
        return any(row.metric == metric for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON values. Numbers are in the unit of each row, not rounded."""
        return {
            "batch": self.batch,
            "rows": [
                {
                    "metric": r.metric,
                    "unit": r.unit,
                    "dense": r.dense,
                    "compressed": r.compressed,
                    "ratio": r.ratio if r.compressed else None,
                    **({"spread": list(r.interval)} if r.interval else {}),
                    **({"differs": r.speed.differs} if r.speed else {}),
                    **({} if math.isnan(r.standard_error) else {"standard_error": r.standard_error}),
                }
                for r in self.rows
            ],
            "facts": dict(self.facts),
        }

    def to_rows(self) -> list[tuple[str, str, str, str]]:
        """``(metric, dense, compressed, change)`` as text; what ran the networks is named beside their times."""
        runtime = self.facts.get("runtime")
        names = {r: f"{r.metric}, {runtime}" if runtime and r.unit == "ms" else r.metric for r in self.rows}
        return [(names[r], r.show(r.dense), r.show(r.compressed), r.change + r.spread) for r in self.rows]

    def to_text(self) -> str:
        """A plain aligned table."""
        return str(self)

    def _grid(self) -> Grid:
        return Grid(HEADS, self.to_rows())

    def _records(self) -> list[dict[str, Any]]:
        return self.to_dict()["rows"]

    def __repr__(self) -> str:
        return f"Comparison({', '.join(f'{row.metric}: {row.change}' for row in self.rows)})"


@overload
def compare(
    dense: nn.Module, compressed: nn.Module, example: Any, *, evaluate: Evaluate | None = None, score: str = "accuracy",
    repeats: int = 30, threads: int | None = None, runtime: Runtime | str = "eager",
    progress: Told = None,
) -> Comparison: ...  # fmt: skip
@overload
def compare(
    dense: nn.Module, compressed: Mapping[str, nn.Module], example: Any, *, evaluate: Evaluate | None = None,
    score: str = "accuracy", repeats: int = 30, threads: int | None = None, runtime: Runtime | str = "eager",
    progress: Told = None,
) -> SideBySide: ...  # fmt: skip
@called_as(
    "Write compare(dense, compressed, example), with one batch of inputs",
    dense=nn.Module,
    compressed=(nn.Module, Mapping),
)
def compare(
    dense: nn.Module,
    compressed: nn.Module | Mapping[str, nn.Module],
    example: Any,
    *,
    evaluate: Evaluate | None = None,
    score: str = "accuracy",
    repeats: int = 30,
    threads: int | None = None,
    runtime: Runtime | str = "eager",
    progress: Told = None,
) -> Comparison | SideBySide:
    """Measure a model, or several by their names, beside the dense one.

    Parameters
    ----------
    dense, compressed
        Left as found.
    example
        A batch as the models take it, or ``(inputs, targets)``; MACs are given a sample, memory and latency for the
        whole batch.
    evaluate
        Gives the score of a model, higher is better, a percentage. Without it there is no such row.
    score
        What ``evaluate`` measures.
    repeats
        Timed runs of each model, taken in turns; 0 leaves latency out.
    threads
        Of the CPU while latency is measured; None leaves the number as it is.
    runtime
        What runs the models while latency is measured, as for :class:`spectrim.Latency`.
    progress
        True for a bar, or a function called with the timed repeats done and their number.

    Returns
    -------
    Comparison or SideBySide
        Rows ``accuracy`` (or ``score``), ``parameters``, ``MACs``, ``file size``, ``peak memory``, ``latency p50`` and
        ``latency p90``. Of sparse weights the entries that are stored count as parameters and MACs, and the file holds
        them packed. Memory and latency are those of the model as it is run: see
        :func:`spectrim.nn.sparse.kernels.choose_kernels`. All models are timed in turns.
    """
    others = {"compressed": compressed} if isinstance(compressed, nn.Module) else dict(compressed)
    for name, other in others.items():
        if not isinstance(other, nn.Module):
            raise TypeError(f"{name!r} is a {type(other).__name__}: expected a model; of a result it is result.model")
    if not others or "dense" in others:
        raise ValueError(
            f"the models to compare are named {', '.join(map(repr, others)) or 'nothing'}: give at least one, and "
            "another name than 'dense', which is the first model's"
        )
    clock = {"repeats": repeats, "threads": threads, "runtime": runtime, "progress": progress}
    lines, timings = _measure({"dense": dense, **others}, example, evaluate, score, clock)
    samples, facts = _samples(dense, example), _facts(threads, runtime)
    comparisons = {}
    for name, model in others.items():
        how = Speed.of_equals if same_layers(dense, model) else Speed.of
        speed = how(timings["dense"], timings[name]) if timings else None
        rows = tuple(
            Measure(
                before.metric, before.unit, before.value, after.value, before.better,
                speed if before.unit == "ms" else None,
            )
            for before, after in zip(lines["dense"], lines[name], strict=True)
        )  # fmt: skip
        comparisons[name] = Comparison(rows, samples, facts)
    if isinstance(compressed, nn.Module):
        return comparisons["compressed"]
    from spectrim.report.side_by_side import SideBySide

    return SideBySide(comparisons)


def measure(
    model: nn.Module,
    example: Any,
    *,
    evaluate: Evaluate | None = None,
    score: str = "accuracy",
    repeats: int = 30,
    threads: int | None = None,
    runtime: Runtime | str = "eager",
    progress: Told = None,
) -> Measurements:
    """Measure one model; see :func:`compare` for parameters and rows."""
    clock = {"repeats": repeats, "threads": threads, "runtime": runtime, "progress": progress}
    lines, _ = _measure({"model": model}, example, evaluate, score, clock)
    return Measurements(lines["model"], _samples(model, example), _facts(threads, runtime))


def _samples(model: nn.Module, example: Any) -> int:
    return Feed().decide(model, example).layout.size(example)


def _measure(
    models: Mapping[str, nn.Module],
    example: Any,
    evaluate: Evaluate | None,
    score: str,
    clock: Mapping[str, Any],
) -> tuple[dict[str, tuple[Line, ...]], Mapping[str, Timing]]:
    lines: dict[str, list[Line]] = {}
    for name, model in models.items():
        _check_runs(name, model, example)
    for name, model in models.items():
        lines[name] = [
            *([] if evaluate is None else [Line(score, "%", Score(metric_of(evaluate, model, f"{name!r}")), "higher")]),
            Line("parameters", "", float(parameter_count(model))),
            Line("MACs", "MAC", counted_macs(model, example)),
            Line("file size", "B", float(file_size(model))),
            Line("peak memory", "B", float(peak_memory(model, inputs(model, example)))),
        ]
    timings: Mapping[str, Timing] = {}
    if clock["repeats"] > 0:
        # One call for all models: they take turns, so that a busy moment hits each of them.
        first = next(iter(models.values()))
        timings = measure_latency(models, inputs(first, example), **clock)
        for name, timing in timings.items():
            lines[name] += [Line(_MEDIAN, "ms", timing.p50), Line("latency p90", "ms", timing.p90)]
    return {name: tuple(measured) for name, measured in lines.items()}, timings


def _check_runs(name: str, model: nn.Module, example: Any) -> None:
    """Raise ForwardError, which names the model, where it cannot be run on the example: before anything is measured."""
    try:
        with evaluating(model), kept(model):
            Feed()(model, example)
    except (SpectrimError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may raise anything
        raise ForwardError(
            f"{name!r} ({type(model).__name__}) raises {type(error).__name__} on the example: {in_short(error)}. All "
            "models that are compared take the same batch: give one that fits them"
        ) from error


def _facts(threads: int | None, runtime: Runtime | str) -> dict[str, str]:
    facts = {**machine_facts(), **({"threads": str(threads)} if threads is not None else {})}
    return facts | {name: str(value) for name, value in runtime_of(runtime).facts().items()}
