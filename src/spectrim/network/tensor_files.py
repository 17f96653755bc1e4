"""Tensors and texts in one safetensors file: written whole, and read only if not a bit has changed."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectrim.network.file_kinds import check_weights_name, head_of, in_utf8, no_file, not_safetensors, something_else
from spectrim.network.files import replacing

TENSORS, TEXTS = "tensors_sha256", "metadata_sha256"
"""Keys of the digests among the texts. Files written before version 0.2 have neither."""
_DIGEST = "0" * 64  # as long as one of SHA-256


_SAVED = "give the file that spectrim.save wrote; weights of torch.save go into the dense model, by load_state_dict"


class DamagedFileError(ValueError):
    """A file that cannot be read, or is not what was written."""


class NoFileError(DamagedFileError):
    """A folder, a pipe or a device, which nothing was read of."""


def write(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write tensors on the CPU and texts with their digests; raises ValueError for the name of a program."""
    check_weights_name(path)
    marked = {**texts, TENSORS: digest_of_tensors(tensors)}
    with replacing(path) as scratch:
        try:
            save_file(dict(tensors), scratch, {**marked, TEXTS: _digest_of_texts(marked)})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def size(tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that :func:`write` makes of tensors and texts; without texts, of one of the tensors alone.

    Exact but for few bytes where tensors of different types take as many bytes a number.
    """
    marked = {} if texts is None else {"__metadata__": {**texts, TENSORS: _DIGEST, TEXTS: _DIGEST}}
    listed: dict[str, Any] = {}
    end = 0
    # As they lie in the file, since offsets have more digits towards its end.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = re.sub("^(b?f|u|i|c)[a-z]+", r"\1", str(tensor.dtype).removeprefix("torch."))
        listed[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = len(json.dumps({**marked, **listed}, ensure_ascii=False, separators=(",", ":")).encode())
    return 8 + -(-header // 8) * 8 + end


def read(path: Path, *, weights: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts; without ``weights`` the texts alone.

    Raises FileNotFoundError if there is no such file, DamagedFileError if it is no safetensors file, or tensors or
    texts are not those of its digests, NoFileError if it is something else than a file.
    """
    if kind := no_file(path):
        raise NoFileError(f"it is {kind}")
    try:
        with in_utf8(path) as readable, safe_open(readable, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise DamagedFileError(_unread(path, error)) from error
    if TENSORS in texts or TEXTS in texts:
        if texts.get(TEXTS) != _digest_of_texts(texts):
            raise DamagedFileError("damaged: the texts beside its tensors are not those that were written")
        if weights and texts.get(TENSORS) != digest_of_tensors(tensors):
            raise DamagedFileError("damaged: its tensors are not those that were written")
    return tensors, texts


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """What tensors have in common that are the same numbers in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def owners(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, and names of those that are the same memory as another, with its name."""
    seen: dict[tuple[Any, ...], str] = {}
    shared = {
        name: first
        for name, tensor in state.items()
        if tensor.numel() and (first := seen.setdefault(memory_of(tensor), name)) != name
    }
    return {name: tensor for name, tensor in state.items() if name not in shared}, shared


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files hold them: channels-last ones in plain order; clones keep slices from dragging their base on."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _unread(path: Path, error: Exception) -> str:
    """Why a file cannot be read, with the cure: as its bytes show, else as its reader says."""
    try:
        head = head_of(path)
        why = something_else(head) or not_safetensors(path, head, _SAVED)
    except OSError:
        why = ""
    return why or f"not a readable safetensors file ({error}): write or copy it again"


def _digest_of_texts(texts: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, text in sorted(texts.items()):
        if name != TEXTS:
            for part in (name, text):
                encoded = part.encode()
                digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors on the CPU, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        digest.update(len(head).to_bytes(8, "big") + head)
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
