"""The folder of a sweep: what it is of, and its points, written as soon as they are there and read again."""

from __future__ import annotations

import json
import logging
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.errors import CheckpointError, PlanError
from spectrim.network.files import as_read, check_folder, make_parents, read_document, remove_abandoned, write_text
from spectrim.nn.checkpoint import read_plan
from spectrim.nn.watch.samples import read_again
from spectrim.selection.front import SUMMARY, read_summary
from spectrim.selection.point import LARGEST, PLAN, POINT, Point, sealed, unsealed

log = logging.getLogger(__name__)

MODEL, TUNING = "model.safetensors", "tuning.safetensors"
"""Weights of a point, and the checkpoint of its training."""
_RUN, _FORMER = "run.json", "former.safetensors"
_CONTENTS = "the calibration data"
_WEIGHTS = "the digest of the weights"
_USUAL = {"runtime": "eager", "--runtime": "eager", "positions": None}  # of which folders from before say nothing
# How folders from before sets of methods competed, which sweeps do not know, call what is the default.
_METHOD, _FORMERLY = "--method", {"auto": "low-rank"}
_UNKNOWN = "give another folder, or delete the folders of points and that file to sweep anew"
_RANDOM = (
    "the calibration data are other samples in every reading, so that it is not known whether they are those of the "
    "points that were there"
)


@dataclass(frozen=True)
class SweepFolder:
    """A folder that holds points of one sweep."""

    path: Path

    def claim(
        self, asked: Iterable[str], options: Mapping[str, Any], weights: str, contents: Callable[[], str]
    ) -> tuple[str, ...]:
        """Make the folder that of this sweep, or see that it is so already; notes on what cannot be seen.

        Parameters
        ----------
        asked
            Budgets in words.
        options, weights
            What else makes the sweep, and the digest of the network's weights.
        contents
            Reads the calibration data for their digest.

        Raises
        ------
        CheckpointError
            Says what differs.
        """
        check_folder(self.path, files_of(asked)).mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.path)
        then = self._then()
        now, alike = read_again(then.get(_CONTENTS), contents)
        random = alike and then.get(_CONTENTS, now) != now
        self.record({**options, _WEIGHTS: weights, _CONTENTS: then[_CONTENTS] if random else now})
        notes = [_RANDOM] if random else []
        try:
            read_summary(self.path)
        except FileNotFoundError:
            pass
        except PlanError as error:
            notes.append(f"{error.said}; it was written again")
        return tuple(logged(note) for note in notes)

    def record(self, values: Mapping[str, Any]) -> None:
        """Add to what the folder is known to hold. What is asked for since, such as training, is no other sweep.

        Raises
        ------
        CheckpointError
            Says what was another value.
        """
        then, now = self._then(), as_read(values)
        was = _USUAL | then if then else {}
        was |= {_METHOD: [_FORMERLY.get(each, each) for each in was[_METHOD]]} if _METHOD in was else {}
        changed = [name for name in now if name in was and not _same(was[name], now[name])]
        if changed:
            told = "; ".join(f"{name} was {_short(was[name])} and is {_short(now[name])}" for name in changed)
            drawn = ". A model that draws new weights each time must be given saved ones" if _WEIGHTS in changed else ""
            raise CheckpointError(
                f"{str(self.path)!r} holds another sweep: {told}. Give the same arguments to go on, or another folder"
                f"{drawn}"
            )
        write_text(self.path / _RUN, json.dumps(sealed({**then, **now}), indent=1) + "\n")

    def _then(self) -> dict[str, Any]:
        """What the folder is known to hold."""
        try:
            return read_document(self.path / _RUN, lambda text: unsealed(text, "the record of a sweep"), LARGEST)
        except FileNotFoundError:
            points = sorted(self.path.glob(f"*/{POINT}"))
            if not points:
                return {}
            raise CheckpointError(
                f"{self.path / _RUN} is missing, which says what sweep {points[0]} is of: {_UNKNOWN}"
            ) from None
        except PlanError as error:
            raise CheckpointError(f"{error.said}. {_UNKNOWN[0].upper()}{_UNKNOWN[1:]}") from error

    def place(self, point: Point) -> Path:
        """The folder of a point."""
        return self.path / point.folder

    def keep(self, point: Point) -> None:
        """Write a point."""
        make_parents(self.place(point) / POINT)
        point.write(self.place(point))

    def read(self, words: str) -> tuple[Point | None, str]:
        """The point that is there, and what was damaged; weights that were beside a damaged point are put aside."""
        place = self.path / Point.folder_of(words)
        try:
            point = Point.read(place)
            if point.asked == words:
                mended = point.mend(place)
                return point, logged(mended) if mended else ""
            why = f"{place} holds a point for {point.asked}"
        except FileNotFoundError:
            return None, ""
        except PlanError as error:
            why = error.said
        if (place / MODEL).exists():
            os.replace(place / MODEL, place / _FORMER)
            why += f"; the weights that were beside it are now {_FORMER}"
        return None, logged(f"{why}; the point was made again")

    def damage(self, point: Point) -> str | None:
        """Why the weights of a point are to be written, which is empty where there are none; None if they are there."""
        place = self.place(point)
        if not (place / MODEL).exists():
            return ""
        try:
            plan = read_plan(place / MODEL, whole=True)
        except CheckpointError as error:
            return logged(f"{error}; the weights were made again")
        return None if plan == point.plan else logged(f"{place / MODEL} was of another plan, and was made again")


def files_of(asked: Iterable[str]) -> list[str]:
    """Files of a sweep in its folder, as far as budgets say which, the one that is written first before the others."""
    points = [f"{Point.folder_of(words)}/{name}" for words in asked for name in (POINT, PLAN, MODEL, TUNING)]
    return [_RUN, SUMMARY, *points]


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


def logged(note: str) -> str:
    """A note, which is logged as well."""
    log.warning("%s", note)
    return note


def _same(then: Any, now: Any) -> bool:
    """Whether two values of a record are the same; a metric may differ by rounding."""
    if isinstance(then, float) and isinstance(now, float):
        return math.isclose(then, now, rel_tol=1e-3)
    return then == now
