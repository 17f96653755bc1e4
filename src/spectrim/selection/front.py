"""What a sweep over budgets found, a point a budget: plain values that can be printed, drawn, written and read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from spectrim.network.file_kinds import path_of
from spectrim.network.files import converted, make_parents, read_document, record_of, write_text
from spectrim.network.printing import Grid, Printed, amount, cost_name, count, flat, listed
from spectrim.selection.plan import Plan
from spectrim.selection.point import LARGEST, POINT, Judged, Point, finished_points, share_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Better = Literal["higher", "lower"]
SUMMARY = "sweep.json"
_FRONT = "*"
# What networks are judged by without a metric: the first that all points have.
_SAME, _DIFFER = "same class first", "outputs differ"
_SHORT = {_SAME: "same class\nfirst", _DIFFER: "outputs\ndiffer"}


@dataclass(frozen=True)
class Sweep(Printed):
    """Networks of several sizes from one calibration. ``print(sweep)`` and notebooks show a table, a line a network.

    It has a length, can be iterated and is indexed by number, the largest network first.

    Attributes
    ----------
    points
        Sorted by :attr:`cost`, the dearest first.
    cost
        That the budgets limit first.
    dense
        What ``evaluate`` returned for the dense network; None without it.
    better
        Which way of the metric is good.
    metric
        What it is called.
    unmet
        Budgets that cannot be met, in words, and why.
    made_by
        Carries a plan out again, for :meth:`result`; None of a sweep that was read from files.
    notes
        What a user should know of all points.
    unit
        Of the metric, ``%`` for :func:`spectrim.report.accuracy`; empty where it is not known.
    dense_error
        Standard error of ``dense``, in its unit; None where it is not known.

    Examples
    --------
    >>> print(sweep)  # doctest: +SKIP
    >>> small = sweep.result(-1).model  # doctest: +SKIP
    """

    points: tuple[Point, ...]
    cost: str
    dense: float | None = None
    better: Better = "higher"
    unmet: Mapping[str, str] = field(default_factory=dict)
    metric: str = "metric"
    made_by: Callable[[Plan], Any] | None = field(default=None, compare=False, repr=False)
    notes: tuple[str, ...] = ()
    unit: str = ""
    dense_error: float | None = None

    def __post_init__(self) -> None:
        dearest = sorted(self.points, key=lambda point: -point.costs[self.cost])
        object.__setattr__(self, "points", tuple(dearest))

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __getitem__(self, number: int) -> Point:
        if isinstance(number, int) and not -len(self) <= number < len(self):
            there = f"0 to {len(self) - 1}, or -1 for the smallest network" if self.points else "none"
            raise IndexError(f"no point {number!r} of a sweep with {count(len(self), 'point')}: there are {there}")
        return self.points[number]

    def result(self, number: int) -> Any:
        """The :class:`spectrim.Result` of a point, its network carried out again without training.

        Raises
        ------
        ValueError
            If the sweep was read from files, which hold no network.
        IndexError
            For a number that no point has.
        """
        plan = self[number].plan
        if self.made_by is None:
            raise ValueError(
                "this sweep was read from files and has no network: call sweep(..., folder=) with the network and its "
                "batches, which reads the same points, or give the plan of a point to spectrim.apply"
            )
        return self.made_by(plan)

    @property
    def judged_by(self) -> str:
        """What networks are compared by: :attr:`metric`, ``same class first`` (a share) or ``outputs differ``."""
        if self.dense is not None:
            return self.metric
        shares = [point.judged.top1 for point in self.points]
        # Shares that are all the same tell nothing.
        return _SAME if shares and None not in shares and len(set(shares)) >= min(2, len(shares)) else _DIFFER

    def quality(self, judged: Judged) -> float:
        """How good a network is in what is compared, in percent where it is a share; NaN where it is not known."""
        by = self.judged_by
        shares = {_SAME: judged.top1, _DIFFER: judged.error}
        value = shares.get(by, judged.metric)
        if value is None:
            return math.nan
        return 100 * value if by in shares else value

    def uncertainty(self, judged: Judged) -> float:
        """The standard error of :meth:`quality`; NaN where it is not known, as for how far outputs differ."""
        by = self.judged_by
        if by == _SAME and judged.top1 is not None and judged.samples:
            return 100 * share_error(judged.top1, judged.samples)
        known = judged.standard_error if self.dense is not None else None
        return math.nan if known is None else known

    @property
    def itself(self) -> Judged:
        """The dense network, judged as the others are."""
        return Judged(self.dense, 1.0, 0.0, standard_error=self.dense_error)

    @property
    def judged_in(self) -> str:
        """The unit of :meth:`quality`; empty where it is not known."""
        return "%" if self.dense is None else self.unit

    @property
    def higher_is_better(self) -> bool:
        return self.better == "higher" if self.dense is not None else self.judged_by == _SAME

    def front(self, cost: str | None = None) -> tuple[Point, ...]:
        """The points that no other one beats: none is as cheap and as good, and cheaper or better.

        Parameters
        ----------
        cost
            By default that which the budgets limit; also ``milliseconds`` where time was measured.

        Raises
        ------
        ValueError
            For a cost that the points do not have.
        """
        cost = self.cost if cost is None else cost
        if not all(cost in point.costs for point in self.points):
            known = ", ".join(self.points[0].costs) if self.points else "none"
            raise ValueError(f"no cost {cost!r} at every point; there are {known}")
        sign = 1 if self.higher_is_better else -1
        known = [point for point in self.points if not math.isnan(self.quality(point.judged))]
        # Few samples make shares that are often equal: then the outputs themselves decide.
        ties = [p.judged.error or 0.0 if self.judged_by == _SAME else 0.0 for p in known]
        at = [(p.costs[cost], (-sign * self.quality(p.judged), tie)) for p, tie in zip(known, ties, strict=True)]
        return tuple(
            point
            for point, mine in zip(known, at, strict=True)
            if not any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for other in at)
        )

    def rows(self) -> list[dict[str, Any]]:
        """The points as plain values, one dict a point.

        Returns
        -------
        list of dict
            ``asked``; each cost by its name and, with ``_dense``, of the dense network; ``metric``, ``top1``, ``error``
            and ``samples`` as in :class:`Judged`; the same after training with ``tuned_`` before them, None without;
            ``on_front``; ``seconds``.
        """
        best = self.front()
        return [
            {
                "asked": point.asked,
                **flat(point.costs, point.dense_costs),
                **dataclasses.asdict(point.carried_out),
                **{f"tuned_{name}": value for name, value in dataclasses.asdict(point.tuned or Judged()).items()},
                "on_front": point in best,
                "seconds": point.seconds,
            }
            for point in self.points
        ]

    _records = rows

    def plot(self, cost: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Draw how good the networks are against what they cost, the front as a line.

        Parameters
        ----------
        cost
            By default that which the budgets limit; also ``milliseconds``.
        ax
            Axes of matplotlib to draw on; new ones of a new figure if None.

        Raises
        ------
        ModuleNotFoundError
            Without matplotlib.
        ValueError
            For a cost that the points do not have.
        """
        from spectrim.selection.figures import points

        return points(self, self.cost if cost is None else cost, ax=ax)

    @property
    def shown_costs(self) -> list[str]:
        """The costs that tables have a column for."""
        limited = [cost for point in self.points for cost in point.plan.budget]
        wanted = dict.fromkeys([self.cost, *limited, "macs", "parameters", "milliseconds"])
        return [cost for cost in wanted if self.points and all(cost in point.costs for point in self.points)]

    def texts(self, judged: Judged | None) -> list[str]:
        """How good a network is, for people: a cell for each of :attr:`measures`."""
        if judged is None:
            return [""] * len(self.measures)
        cells = {
            self.metric: "" if judged.metric is None else f"{judged.metric:#.4g}{self.unit}",
            _SAME: "" if judged.top1 is None else f"{judged.top1:.2%}",
            _DIFFER: "" if judged.error is None else f"{judged.error:.2%}",
        }
        return [cells[name].replace("%", " %") for name in self.measures]

    @property
    def measures(self) -> list[str]:
        """What tables tell of how good networks are: what they are compared by, and how far outputs differ."""
        if self.dense is not None:
            return [self.metric]
        parts = {_SAME: lambda judged: judged.top1, _DIFFER: lambda judged: judged.error}
        known = [name for name, of in parts.items() if all(of(point.carried_out) is not None for point in self.points)]
        return known or [_DIFFER]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and cells for people: a line a point, below that of the dense network."""
        tuned, shown = any(point.tuned is not None for point in self.points), self.shown_costs
        best = self.front() if self.points else ()
        lines = []
        if self.points:
            dense = self.points[0].dense_costs
            cells = [_amount(cost, dense[cost]) for cost in shown]
            lines.append(["dense", *cells, *self.texts(self.itself), *([""] if tuned else [])])
        for point in self.points:
            cells = [
                f"{_amount(cost, point.costs[cost])}, {100 * point.costs[cost] / point.dense_costs[cost]:.0f} %"
                for cost in shown
            ]
            after = self.texts(point.tuned)[:1] if tuned else []
            name = f"{point.asked} *" if point in best else point.asked
            lines.append([name, *cells, *self.texts(point.carried_out), *after])
        return self._heads(tuned), lines

    def _heads(self, tuned: bool) -> list[str]:
        ran = {str(point.plan.facts.get("runtime", "")) for point in self.points} - {""}
        clock = ",\n".join(["ms measured", *sorted(ran)])
        costs = [clock if cost == "milliseconds" else cost_name(cost) for cost in self.shown_costs]
        measures = [_SHORT.get(name, name) for name in self.measures]
        # What networks are compared by; another column would not fit 80.
        after = [f">{measures[0]},\nfine-tuned"] if tuned else []
        return ["budget", *(f">{name}" for name in (*costs, *measures)), *after]

    @property
    def sentences(self) -> tuple[str, ...]:
        """What is to be said of all points."""
        said = []
        samples = max((point.carried_out.samples for point in self.points), default=0)
        if self.dense is not None:
            said.append(f"{self.metric}: {self.better} is better")
            if untold := [point.asked for point in self.points if point.judged.metric is None]:
                said.append(f"{self.metric} is no finite number with {listed(untold, len(self))}: not on the front")
        elif samples:
            said.append(f"outputs are compared with the dense network's on {samples:,} held-out samples")
        unsure = [self.uncertainty(point.judged) for point in self.points]
        if (most := max((each for each in unsure if not math.isnan(each)), default=0.0)) > 0:
            points = " points" if self.judged_in == "%" else ""
            said.append(
                f"{self.judged_by} has a standard error of up to {most:.2g}{points}: on other samples it would "
                "differ by about so much"
            )
        if self.dense is None and any(point.tuned is not None for point in self.points):
            said.append("after fine-tuning on samples that may be among those that were trained on")
        said += self.notes
        return (*said, *self._noted(), *(f"the budget {asked} is left out: {why}" for asked, why in self.unmet.items()))

    def _noted(self) -> Iterator[str]:
        """Notes of the points. Of those that differ in what follows their first words that of the smallest network."""
        alike: dict[tuple[str, int], dict[str, str]] = {}
        for point in self.points:
            heads = [note.partition(": ")[0] for note in point.notes]
            for number, (head, note) in enumerate(zip(heads, point.notes, strict=True)):
                alike.setdefault((head, heads[:number].count(head)), {})[point.asked] = note
        for (head, _), of in alike.items():
            smallest, note = list(of.items())[-1]
            if len(set(of.values())) > 1:
                note = f"{head}; with {smallest}{note.removeprefix(head)}"
            yield note if len(of) == len(self) else f"with {listed(list(of), len(of))}: {note}"

    def _grid(self) -> Grid:
        heads, lines = self.table()
        words = [(_FRONT, "on the front: no other network is as cheap and as good"), ("%", "of the dense network")]
        title = f"{count(len(self), 'network')}, {count(len(self.front()), 'network')} on the front"
        return Grid(heads, lines, title=title, notes=self.sentences, words=words)

    def __repr__(self) -> str:
        return f"Sweep({count(len(self), 'point')} of {cost_name(self.cost)}, judged by {self.judged_by})"

    def record(self) -> dict[str, Any]:
        """All but the points and the network, as JSON values."""
        return {name: getattr(self, name) for name in _Read.__struct_fields__}

    def write(self, folder: str | Path) -> None:
        """Write ``sweep.json`` and a folder a point, into a folder that there is.

        Raises
        ------
        OSError
            Names the file that cannot be written.
        """
        place = path_of(folder, "folder")
        for point in self.points:
            make_parents(place / point.folder / POINT)
            point.write(place / point.folder)
        self.write_summary(folder)

    def write_summary(self, folder: str | Path) -> None:
        """Write ``sweep.json`` alone, where points have been written already.

        Raises
        ------
        OSError
            Names the file if it cannot be written.
        """
        write_text(Path(folder) / SUMMARY, json.dumps(self.record(), indent=1) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> Sweep:
        """Read what a sweep has written to a folder, as far as it has come.

        Raises
        ------
        OSError
            If there is no sweep.
        PlanError
            If a file is something else; the message names it.
        """

        return read_summary(folder).sweep(finished_points(folder))


class _Read(msgspec.Struct):
    """What a file says of a sweep: a callable has no place in it."""

    cost: str
    better: Better
    dense: float | None = None
    unmet: dict[str, str] = {}
    metric: str = "metric"
    notes: tuple[str, ...] = ()
    unit: str = ""
    dense_error: float | None = None

    def sweep(self, points: Iterable[Point]) -> Sweep:
        return Sweep(tuple(points), **{name: getattr(self, name) for name in self.__struct_fields__})


def read_summary(folder: str | Path) -> _Read:
    """What a folder says of a sweep, points left out.

    Raises
    ------
    OSError
        If there is no sweep.
    PlanError
        If the file is something else; the message names it.
    """

    def parse(text: bytes) -> _Read:
        return converted(record_of(text, "a sweep", LARGEST, set(_Read.__struct_fields__)), _Read, "a sweep")

    return read_document(path_of(folder, "folder") / SUMMARY, parse, LARGEST)


def _amount(cost: str, value: float) -> str:
    return f"{value:.3g}" if cost == "milliseconds" else amount(cost, value)
