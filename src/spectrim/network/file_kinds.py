"""What lies at a path, and what a file is by its first bytes and its header: seen without torch, and with the cure."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AGAIN = "copy it again, or save it again"
_HEAD = 512
# Names of files that hold a program, which the weights of a model are not.
_PROGRAMS = {".pt2": "export_program", ".onnx": "export_onnx"}
_NO_FILE = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
_NO_FILE |= {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def path_of(path: Any, what: str = "path") -> Path:
    """What was given as a path, where a file can have it.

    Raises TypeError if it is of another type, ValueError if it is empty, or holds what no name of a file does; the
    message quotes it.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(f"{what} is {path!r:.80}: expected a path, as a text or a pathlib.Path")
    try:
        why = "it is empty" if not text else "no path holds a NUL" if b"\0" in os.fsencode(text) else ""
    except UnicodeEncodeError:
        why = "no path holds half of a pair of surrogates"
    if why:
        raise ValueError(f"{what} is {text!r:.80}: {why}; give the path that was meant")
    return Path(path)


def check_weights_name(path: Path) -> None:
    """Raise ValueError for the name of a file of weights that says that it is an exported program."""
    writer = _PROGRAMS.get(path.suffix.lower())
    if writer is not None:
        raise ValueError(
            f"{str(path)!r} is to hold weights and a plan, in the format of safetensors, and its name says an exported "
            f"program: give a name ending in .safetensors; {writer}(model, example, path) writes programs"
        )


def no_file(path: Path) -> str:
    """What lies there that is no file: a folder, a pipe, a device; empty for a file, and where there is nothing."""
    try:
        return _NO_FILE.get(stat.S_IFMT(path.stat().st_mode), "")
    except (OSError, ValueError):
        return ""


@contextmanager
def in_utf8(path: Path) -> Iterator[Path]:
    """The path of a file for readers that take UTF-8 alone: a link to it where its name is other bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / "file"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def head_of(path: Path) -> bytes:
    """First bytes of a file."""
    with path.open("rb") as file:
        return file.read(_HEAD)


def something_else(head: bytes) -> str:
    """Why a file that begins so is none of weights at all."""
    if not head:
        return f"it is empty: {AGAIN}"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS and not the file: fetch that with git lfs pull"
    if head.lstrip()[:1] == b"<":
        return "it is a web page and not the file: fetch that"
    return ""


def is_saved(head: bytes) -> bool:
    """Whether a file begins as those of ``torch.save`` do: as a zip archive, or as a pickle.

    The length that a safetensors file begins with may begin with the byte of a pickle, too.
    """
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[4:9] != b"\0\0\0\0{")


def not_safetensors(path: Path, head: bytes, instead: str) -> str:
    """Why a file is not as safetensors are: the size of a header, the header, and as many bytes as that says.

    ``instead`` is the cure for a file of ``torch.save``.
    """
    if path.suffix.lower() in _PROGRAMS and head[8:9] != b"{":
        return "it is an exported program: give the file of weights that save wrote, or compress"
    if is_saved(head):
        return f"torch.save wrote it: {instead}"
    length, size = int.from_bytes(head[:8], "little"), path.stat().st_size
    if head[8:9] != b"{" or length > min(size, 100_000_000):
        return f"it is no safetensors file, or it is damaged: {AGAIN}"
    try:
        held = header_of(path)
        ends = [int(each["data_offsets"][1]) for name, each in held.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        return f"the list of its tensors is damaged: {AGAIN}"
    wanted = 8 + length + max(ends, default=0)
    return "" if wanted == size else f"it should have {wanted:,} bytes and has {size:,}: {AGAIN}"


def header_of(path: Path) -> Any:
    """What a safetensors file says of its tensors, which is JSON behind its length in eight bytes."""
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))
