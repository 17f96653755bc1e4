"""Files that are there whole or not at all, whenever a process dies and whatever the disk says.

What cannot be written raises OSError, which names the file and says what is in the way: there is no such folder, or it
is full or read-only, or the file is protected, or it is none. A path that no file can have raises TypeError or
ValueError.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from spectrim.errors import PlanError
from spectrim.network.file_kinds import no_file, path_of

Document = TypeVar("Document")

SPELLED = "backslashreplace"
"""How what is no UTF-8, as the name of a file may be, is written: as JSON and Python spell it."""
_END = ".spectrim"
_LOCK = ".writing"
_CURE = "give the file that was meant, copy it again, or make it again with the call that wrote it"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file of the same name to be written in place of another one, which takes its place at the end.

    It lies in a folder of its own beside ``path``, so that readers see the old file or the new one, never a part, and a
    writer may leave further files there, which go along before it. The folder is locked while it is in use and removed
    after an error; what writers that were killed have left beside ``path`` is removed as well. Links are followed.
    """
    target = Path(os.path.realpath(path_of(path)))
    try:
        if kind := no_file(target):
            number = errno.EISDIR if kind == "a folder" else errno.EINVAL
            raise OSError(number, f"it is {kind}: give the name of a file", str(target))
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        remove_abandoned(target.parent)
        with _scratch(target) as folder:
            written = folder / target.name
            yield written
            _flush(written)
            # As of the file it replaces, or of any new one: safetensors would leave it to its owner alone.
            like = target if target.exists() else folder / _LOCK
            os.chmod(written, stat.S_IMODE(like.stat().st_mode))
            for beside in folder.iterdir():
                if beside.name not in (_LOCK, target.name):
                    os.replace(beside, target.parent / beside.name)
            os.replace(written, target)
            _flush(target.parent)
    except OSError as error:
        why = error.strerror or str(error)
        if isinstance(error, FileNotFoundError | NotADirectoryError) and not target.parent.is_dir():
            why = _no_folder(target) or f"there is no folder {str(target.parent)!r}"
        raise OSError(error.errno or errno.EIO, f"cannot be written: {why}", str(path)) from error


def default_cache() -> Path:
    """``$SPECTRIM_CACHE``, or ``spectrim`` in the user's cache directory."""
    if chosen := os.environ.get("SPECTRIM_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spectrim"


def read_document(path: str | Path, parse: Callable[[bytes], Document], largest: int, cure: str = _CURE) -> Document:
    """What a file says, by a function that refuses more than ``largest`` bytes; no more than one above them are read.

    Raises
    ------
    PlanError
        As ``parse``; the message names the file, and says what can be done.
    """
    try:
        return parse(bytes_of(path, largest))
    except PlanError as error:
        raise PlanError(f"{path}: {error.said}", cure) from error


def bytes_of(path: str | Path, largest: int) -> bytes:
    """What a file holds, or as much of it as shows that it is more than ``largest`` bytes.

    Raises OSError if it cannot be read, or is a folder, a pipe, which would be waited for, or a device.
    """
    if kind := no_file(path_of(path)):
        number = errno.EISDIR if kind == "a folder" else errno.EINVAL
        raise OSError(number, f"it is {kind}: give the name of a file", str(path))
    with open(path, "rb") as file:
        return file.read(largest + 1)


def record_of(text: str | bytes, what: str, largest: int, known: set[str] | None = None) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises PlanError if it is another text or too long, or has other fields than those that are known, where they are
    named, TypeError if it is no text.
    """
    import msgspec

    if not isinstance(text, str | bytes):
        raise TypeError(f"{what} is read from its text, not from {text!r:.80}: a file is read by read(path)")
    if len(text) > largest:
        raise PlanError(f"not {what}: more than {largest:,} bytes")
    # Which editors put before a text.
    text = text.removeprefix("\ufeff") if isinstance(text, str) else text.removeprefix(b"\xef\xbb\xbf")
    try:
        record = msgspec.json.decode(text, type=dict[str, Any])
        json.loads(text, object_pairs_hook=each_once)
    except (msgspec.MsgspecError, UnicodeError, ValueError, RecursionError) as error:
        named = f"; it is the name of a file, which read({text!r}) reads" if str(text).endswith(".json") else ""
        raise PlanError(f"not {what}: {error}{named}") from error
    if known is not None and (unknown := sorted(set(record) - known)):
        raise PlanError(f"not {what}: it has no field {unknown[0]!r}")
    return record


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its fields, for ``object_pairs_hook``: ValueError if it has one twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(f"it has {twice!r} twice")
    return found


def digest_of(values: object) -> str:
    """SHA-256 of JSON values, whatever their order in a file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def changed_values(then: Mapping[str, Any], now: Mapping[str, Any], spelled: Callable[[str], str] = str) -> list[str]:
    """What two records of a run say differently, in words: of each name of the present one that it was and is."""
    return [f"{spelled(k)} was {then.get(k)!r} and is {v!r}" for k, v in now.items() if then.get(k) != v]


def as_read(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it is read again once it is written as JSON; what is neither JSON nor UTF-8 is text."""
    return json.loads(json.dumps(dict(record), default=str, ensure_ascii=False).encode(errors="replace"))


def converted(record: Mapping[str, Any], kind: type[Document], what: str) -> Document:
    """A record as an object of a type.

    Raises
    ------
    PlanError
        Says which field is missing or of another type.
    """
    import msgspec

    try:
        return msgspec.convert(record, kind)
    except msgspec.MsgspecError as error:
        raise PlanError(f"not {what}: {error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all; a pipe or a device (``/dev/stdout``) is written as it is."""
    stream = no_file(path_of(path)) not in ("", "a folder")
    with contextlib.nullcontext(Path(path)) if stream else replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors=SPELLED)


def make_parents(path: Path) -> None:
    """Make the folder that a file will lie in."""
    try:
        path_of(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {_no_folder(path) or error.strerror}", str(path)) from error


def _no_folder(path: Path) -> str:
    """Which of the folders that a file would lie in is a file itself; empty where none is."""
    file = next((each for each in path.parents if each.is_file()), None)
    return f"{str(file)!r} is a file, no folder" if file else ""


def check_place(path: str | Path) -> None:
    """See that a file can be written, before the work whose end it is to hold; nothing is."""
    with contextlib.suppress(_NothingWritten), replacing(path):
        raise _NothingWritten


def check_folder(folder: str | Path, files: Sequence[str]) -> Path:
    """See that files, also in folders of it, can be written to a folder that need not be there yet; nothing is."""
    place = there = path_of(folder, "folder")
    for file in (place / name for name in reversed(files)):
        there = next(each for each in (*file.parents, Path()) if os.path.lexists(each))
        if not there.is_dir():
            said = "there is a file where a folder is to be: give another folder, or move it away"
            raise NotADirectoryError(errno.ENOTDIR, said, str(there))
        if kind := no_file(file):
            said = f"there is {kind} where a file is to be: give another folder, or move it away"
            raise OSError(errno.EISDIR, said, str(file))
    check_place(there / files[0])
    return place


class _NothingWritten(Exception):
    """Leaves a scratch folder without a file."""


def remove_abandoned(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder; those that are at work are left alone.

    Every write does so beside its file. Who finds a file finished and writes nothing calls it: the writer may have been
    killed when the file was in its place already.
    """
    entries: list[Path] = []
    with contextlib.suppress(OSError):
        entries += folder.iterdir()
    for found in entries:
        if found.name.startswith(".") and found.name.endswith(_END):
            # One that is on its way to being locked is empty: its writer sees that it is gone, and makes another.
            with contextlib.suppress(OSError):
                found.rmdir()
            with contextlib.suppress(OSError), open(found / _LOCK, "rb+") as lock:
                if _locked(lock):
                    _remove(found)


def discard(folder: Path) -> None:
    """Remove a folder of files in one step for all who look: if the process dies, the rest counts as abandoned."""
    (folder / _LOCK).touch()
    gone = folder.with_name(f".{folder.name}.{os.getpid()}{_END}")
    os.replace(folder, gone)
    _remove(gone)


def _remove(folder: Path) -> None:
    """Remove a scratch folder, its lock last: what is left of it if the process dies is found again."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == _LOCK):
        file.unlink()
    folder.rmdir()


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A folder beside a file that is locked, and removed on leaving."""
    lock, folder = _locked_folder(target)
    try:
        yield folder
    finally:
        if os.name != "posix":
            lock.close()  # what is open cannot be removed there
        with contextlib.suppress(OSError):
            _remove(folder)
        lock.close()


def _locked_folder(target: Path) -> tuple[IO[bytes], Path]:
    while True:
        # Names may be as long as the file system takes them: only their beginning is told.
        folder = Path(tempfile.mkdtemp(_END, f".{target.name[:40]}.", target.parent))
        try:
            lock = open(folder / _LOCK, "wb+")  # noqa: SIM115 (closed by who asked)
        except FileNotFoundError:
            continue  # taken for abandoned before it was locked, and removed
        # The folder is there still when it is locked: from now on nobody removes it.
        if _locked(lock) and (folder / _LOCK).exists():
            return lock, folder
        lock.close()


def _locked(file: IO[Any]) -> bool:
    """Lock a file until it is closed or the process dies, unless another one holds the lock."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _flush(path: Path) -> None:
    """See that a file or a folder is on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)
