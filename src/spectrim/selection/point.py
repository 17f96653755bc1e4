"""A network that a budget has led to: its plan, what it costs and how good it is, as plain values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import msgspec

from spectrim.errors import PlanError
from spectrim.network.files import converted, digest_of, read_document, record_of, write_text
from spectrim.selection.plan import LARGEST as LARGEST_PLAN
from spectrim.selection.plan import Plan

LARGEST = LARGEST_PLAN + 2**20
"""Bytes of the text of a point."""
POINT, PLAN = "point.json", "plan.json"


@dataclass(frozen=True)
class Judged:
    """How good a network is.

    Attributes
    ----------
    metric
        What ``evaluate`` returned; None without it, and where that was not a number.
    top1
        Share of samples for which the dense network and this one have their largest output at the same place; None for
        outputs that are no scores of classes.
    error
        Norm of the difference of both outputs over that of the dense network's; None where they cannot be compared.
    samples
        That the outputs were compared on.
    standard_error
        Of ``metric``, in its unit, if what ``evaluate`` returned knows it as :func:`spectrim.report.accuracy` does.
    """

    metric: float | None = None
    top1: float | None = None
    error: float | None = None
    samples: int = 0
    standard_error: float | None = None


@dataclass(frozen=True)
class Point:
    """A network that a budget has led to.

    Attributes
    ----------
    asked
        The budget in words, ``macs=50%``.
    plan
        What was chosen, with its costs and those of the dense network.
    carried_out
        How good the network is with its layers reconstructed, without training.
    tuned
        How good it is after training; None without.
    milliseconds
        Of the dense and the compressed network, run by turns: medians; empty if time was not asked for.
    seconds
        That the point took, training included.
    notes
        What a user should know of it.
    """

    asked: str
    plan: Plan
    carried_out: Judged = Judged()
    tuned: Judged | None = None
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def judged(self) -> Judged:
        """How good the finished network is."""
        return self.tuned or self.carried_out

    @property
    def costs(self) -> dict[str, float]:
        """Of the network, by cost; measured milliseconds are ``milliseconds``."""
        measured = {"milliseconds": self.milliseconds["compressed"]} if self.milliseconds else {}
        return {**self.plan.costs, **measured}

    @property
    def dense_costs(self) -> dict[str, float]:
        """The same of the dense network."""
        measured = {"milliseconds": self.milliseconds["dense"]} if self.milliseconds else {}
        return {**self.plan.dense_costs, **measured}

    @property
    def folder(self) -> str:
        """A name for the point that every file system takes: ``macs-50pct``."""
        return self.folder_of(self.asked)

    @staticmethod
    def folder_of(asked: str) -> str:
        """The name for a point of such a budget."""
        text = "".join(asked.split()).replace("%", "pct")
        return "".join(c if c.isascii() and (c.isalnum() or c == ".") else "-" for c in text)

    def trained(self, tuned: Judged, seconds: float) -> Point:
        """The point after training that took so many seconds."""
        return dataclasses.replace(self, tuned=tuned, seconds=self.seconds + seconds)

    def noted(self, note: str) -> Point:
        """The point with a note more, unless it is empty or there."""
        return self if not note or note in self.notes else dataclasses.replace(self, notes=(*self.notes, note))

    def mend(self, folder: str | Path) -> str:
        """Write ``plan.json`` where it is missing or damaged, and say what it was damaged by.

        One that was changed is left as it is, and of one that is missing nothing is said.

        Raises
        ------
        OSError
            Names the file if it cannot be written.
        """
        try:
            Plan.read(Path(folder) / PLAN)
        except (FileNotFoundError, PlanError) as error:
            self.plan.write(Path(folder) / PLAN)
            return f"{error.said}; it was written again" if isinstance(error, PlanError) else ""
        return ""

    def write(self, folder: str | Path) -> None:
        """Write ``point.json``, whole or not at all, and beside it its plan as ``plan.json``, which ``apply`` takes.

        ``point.json`` holds a digest of what it says, plan and figures.

        Raises
        ------
        OSError
            Names the file that cannot be written.
        """
        record = {name: getattr(self, name) for name in _FIELDS}
        text = msgspec.json.encode(record | {"plan": msgspec.Raw(self.plan.to_json(lines=False).encode())})
        text = msgspec.json.encode(sealed(msgspec.json.decode(text)))
        self.plan.write(Path(folder) / PLAN)
        write_text(Path(folder) / POINT, msgspec.json.format(text, indent=1).decode() + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> Point:
        """Read what :meth:`write` wrote.

        Raises
        ------
        OSError
            If there is no point.
        PlanError
            If the file is something else, was changed since, or holds no digest; the message names it.
        """

        def parse(text: bytes) -> Point:
            record = unsealed(text, "a point of a sweep", {*_FIELDS, "plan"})
            plan = Plan.from_json(msgspec.json.encode(record.get("plan")))
            return dataclasses.replace(converted(record | {"plan": _NO_PLAN}, cls, "a point of a sweep"), plan=plan)

        return read_document(Path(folder) / POINT, parse, LARGEST)


_FIELDS = tuple(each.name for each in dataclasses.fields(Point) if each.name != "plan")
# Plans read their own text, which says more of what is wrong with it.
_NO_PLAN: Mapping[str, Any] = {"entries": [], "costs": {}, "dense_costs": {}}
_DIGEST = "digest"


def standard_error(value: object) -> float | None:
    """The standard error of a metric, of one that knows it, as :class:`spectrim.report.Score` does."""
    error = getattr(value, "standard_error", None)
    return float(error) if isinstance(error, Real) and math.isfinite(error) else None


def unit_of(value: object) -> str:
    """The unit of a metric, of one that knows it, as :class:`spectrim.report.Score` does; else empty."""
    unit = getattr(value, "unit", "")
    return unit if isinstance(unit, str) else ""


def share_error(share: float, samples: int) -> float:
    """The standard error of a share of so many samples: ``sqrt(p (1 - p) / n)``.

    Where it is none or all of them, as if half a sample were not: that does not show that there is no error.
    """
    edge = 0.5 / samples
    p = min(max(share, edge), 1 - edge)
    return math.sqrt(p * (1 - p) / samples)


def finished_points(folder: str | Path) -> Iterable[Point]:
    """The points that a folder holds.

    Raises
    ------
    PlanError
        If a file of one is something else; the message names it.
    """
    return [Point.read(file.parent) for file in sorted(Path(folder).glob(f"*/{POINT}"))]


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of JSON values with a digest of them, for :func:`unsealed`."""
    return {**record, _DIGEST: digest_of(record)}


def unsealed(text: bytes, what: str, known: set[str] | None = None) -> dict[str, Any]:
    """The JSON object that a text is, as it was before it was sealed.

    Raises
    ------
    PlanError
        As :func:`spectrim.network.files.record_of`, and if it is not what its digest is of.
    """
    record = record_of(text, what, LARGEST, None if known is None else {*known, _DIGEST})
    digest = record.pop(_DIGEST, None)
    if digest is None:
        raise PlanError(f"not {what}: it holds no digest of what it says")
    if digest != sealed(record)[_DIGEST]:
        raise PlanError(f"not {what} as it was written: what it says does not match its digest")
    return record
