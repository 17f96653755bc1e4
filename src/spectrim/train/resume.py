"""Training checkpoints: one safetensors file, replaced as a whole, readable after a kill at any moment."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.errors import CheckpointError
from spectrim.network.files import replacing

FORMAT = 1
_KEY = "spectrim_training"


def write(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Replace the checkpoint at ``path``.

    The file is written beside it, flushed to the disk, and renamed. Whenever the process dies, ``path`` is the old
    checkpoint or the new one, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with replacing(path) as scratch:
        save_file(flat, scratch, {_KEY: json.dumps({"format": FORMAT, **record})})
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a checkpoint.

    Raises
    ------
    CheckpointError
        If the file is damaged or is not a training checkpoint of this format.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the training checkpoint cannot be read ({error}). It is truncated or no safetensors file; "
            "delete it to start from the beginning"
        ) from error
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path}: a safetensors file, but not a training checkpoint (no {_KEY!r} in its metadata). "
            "Give fine_tune another path for checkpoint"
        )
    record = json.loads(metadata[_KEY])
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: training checkpoint of format {record.get('format')!r}, expected {FORMAT}")
    return tensors, record


def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix/``, without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + "/")}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def load_model(model: nn.Module, stored: Mapping[str, Tensor], source: str) -> None:
    """Copy stored tensors into a model.

    Raises
    ------
    CheckpointError
        If names or shapes differ; says which.
    """
    own = model_tensors(model)
    wrong = [f"{n} is missing in it" for n in own if n not in stored]
    wrong += [f"{n} is not in the model" for n in stored if n not in own]
    wrong += [
        f"{n} is {tuple(stored[n].shape)} in it and {tuple(own[n].shape)} in the model"
        for n in own
        if n in stored and own[n].shape != stored[n].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{source}: belongs to another model than this {type(model).__name__}: {'; '.join(wrong[:3])}{more}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of an optimizer as tensors ``index/name`` and JSON values.

    Raises
    ------
    TypeError
        If the state holds anything else, which no checkpoint could restore.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value
            elif value is None or isinstance(value, bool | int | float | str):
                values[f"{index}/{name}"] = value
            else:
                raise TypeError(
                    f"{type(optimizer).__name__} keeps {name!r} as {type(value).__name__}; a training checkpoint "
                    "holds tensors, numbers and text. Train without checkpoint or with another optimizer"
                )
    groups = [{k: v for k, v in g.items() if isinstance(v, bool | int | float)} for g in state["param_groups"]]
    return tensors, {"values": values, "groups": groups}


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Put back what :func:`optimizer_tensors` returned, in the memory format of the parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in itertools.chain(tensors.items(), record["values"].items()):
        index, name = key.split("/", 1)
        parameter = parameters[int(index)]
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    current = optimizer.state_dict()
    groups = [own | stored for own, stored in zip(current["param_groups"], record["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
