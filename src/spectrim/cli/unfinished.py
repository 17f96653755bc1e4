"""Runs that go on after they were stopped: the folder of a run, and what makes it this run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectrim.cli.common import Output, sentence
from spectrim.cli.references import UsageError
from spectrim.cli.values import check_results_folder
from spectrim.network.files import as_read, bytes_of, changed_values, discard, remove_abandoned, write_text
from spectrim.network.files import check_folder as check_files

_RECORD, _WEIGHTS = "run.json", "weights_sha256"
_DRAWN = ". A MODEL that draws new weights each time can only be gone on with by --weights"
_LARGEST = 64 << 20  # bytes of a record, which may hold a plan
UNFINISHED = "unfinished"
"""The folder of a run among its results, which goes when it is done."""
_RESULTS = (
    "model.safetensors", "plan.json", "report.html", "result.json", "ranks.json", "ranks.gif",
    "transformers/config.json", f"{UNFINISHED}/{_RECORD}",
)  # fmt: skip


def make_folder(out: Output, folder: Path, files: Sequence[str] = _RESULTS) -> Path:
    """Make a folder for results, and see that it takes these files, before there is anything that could be lost.

    It is removed again if the command fails before it has written anything.

    Raises
    ------
    OSError
        Names the folder.
    """
    check_results_folder(folder)
    try:
        out.made += [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(4096))
            os.fsync(file.fileno())
        remove_abandoned(folder)
    except OSError as error:
        why = f"nothing can be written there: {error.strerror or error}; name another place"
        raise OSError(error.errno or errno.EIO, why, str(folder)) from error
    try:
        return check_files(folder, files)
    except (NotADirectoryError, IsADirectoryError) as error:
        raise UsageError(f"results cannot go to {str(folder)!r}: {sentence(error)}") from error


@dataclass(frozen=True)
class RunFolder:
    """A folder with the checkpoints of one run and a record of what makes it."""

    folder: Path
    # Values that are kept as JSON. Two calls with equal records are one run.
    record: Mapping[str, Any]
    # How a value of the record is written on the command line, where that is not ``--`` and its name.
    spelled: Mapping[str, str] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)  # values that records of earlier versions lack
    # Names of lists to which a later call may add at the end, or of which it may leave some away there.
    growing: tuple[str, ...] = ()

    def claim(self) -> None:
        """Make the folder this run's, or see that it is so already. Without a checkpoint it is free for any run."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{str(self.folder)!r} is not a folder; checkpoints of a run are several files")
        file, now = self.folder / _RECORD, as_read(self.record)
        if self.folder.exists():
            for each in (self.folder, *(part for part in self.folder.iterdir() if part.is_dir())):
                remove_abandoned(each)
        if file.exists() and any(self.folder.rglob("*.safetensors")):
            then = {**self.usual, **self._read(file)}
            longest = {name: max(then[name], now[name], key=len) for name in self.growing}
            for name in self.growing:
                shared = min(len(then[name]), len(now[name]))
                then[name], now[name] = then[name][:shared], now[name][:shared]
            if changed := changed_values(then, now, self._spelled):
                drawn = now.get(_WEIGHTS) != then.get(_WEIGHTS) and now.get("weights") is None
                raise UsageError(
                    f"{str(self.folder)!r} holds another run: {'; '.join(changed)}. Give the same options to continue "
                    f"it, another folder, or delete this one{_DRAWN if drawn else ''}"
                )
            now |= longest
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(now, indent=1) + "\n")

    def _spelled(self, name: str) -> str:
        """How a value of the record is written on the command line."""
        return self.spelled.get(name, f"--{name.replace('_', '-')}")

    def known(self, name: str) -> Any:
        """What the run that is there was made with; None where there is none, or it does not say."""
        file = self.folder / _RECORD
        return self._read(file).get(name) if file.is_file() else None

    def remove(self) -> None:
        """Remove the folder of a run that is done, unless there is something in it that is not the run's."""
        remove_abandoned(self.folder)
        with contextlib.suppress(OSError):
            if {file.name for file in self.folder.iterdir()} <= _FILES:
                discard(self.folder)

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            found = json.loads(bytes_of(file, _LARGEST))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{str(file)!r} is no JSON ({error}); give another folder") from error
        if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in self.growing):
            raise UsageError(f"{str(file)!r} is no record of a run; give another folder")
        return found


ONE_SHOT, TUNING = "one-shot.safetensors", "tuning.safetensors"
# The last is there if a removal was stopped.
_FILES = {_RECORD, ONE_SHOT, TUNING, "learning.safetensors", "plan.json", ".writing"}
