"""Save and load compressed models: one safetensors file with the plan in its metadata, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spectrim.errors import CheckpointError, PlanError
from spectrim.nn.build import skeleton
from spectrim.nn.find import find
from spectrim.nn.surgery import replace_module
from spectrim.plan import Plan

FORMAT = "spectrim"
FORMAT_VERSION = "1"


def save(model: nn.Module, plan: Plan, path: str | Path) -> None:
    """Write a compressed model's weights and its plan to one safetensors file.

    Tensors that share memory are stored once. The file is written beside its final place and moved there, so that a
    crash leaves no half-written checkpoint.

    Parameters
    ----------
    model
        What :func:`spectrim.apply` returned, fine-tuned or not.
    plan
        The plan it was made by.
    """
    tensors, shared = _stored(model.state_dict())
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "plan": plan.to_json(),
        "shared": json.dumps(shared, sort_keys=True),
    }
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, scratch, metadata)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Rebuild a compressed model from the original constructor's model and a checkpoint.

    Parameters
    ----------
    model
        A freshly made dense model of the original architecture; its weights do not matter. It is changed in place
        and must not be used if this function raises.
    path
        Written by :func:`save`. The file may come from anyone: nothing in it is executed.

    Returns
    -------
    nn.Module
        ``model`` with its layers replaced as the plan says and all weights loaded, cast to the dtype and on the
        device that the model has.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged or not a Spectrim checkpoint, or belongs to another architecture; the message
        names the first layer or tensor that does not fit.
    """
    tensors, plan, shared = _read(Path(path))
    _rebuild(model, plan, path)
    state = model.state_dict()
    for name, source in shared.items():
        if source not in tensors:
            raise CheckpointError(f"{path}: tensor {name!r} shares {source!r}, which the file does not hold")
        tensors[name] = tensors[source]
    _check(state, tensors, path)
    _check_shared(state, tensors, path)
    model.load_state_dict(tensors)
    return model


def read_plan(path: str | Path) -> Plan:
    """The plan kept in a checkpoint, without its weights."""
    return _read(Path(path), weights=False)[1]


def _stored(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, and names of those that are the same memory as another."""
    owners: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"state {name!r} is a {type(tensor).__name__}; only tensors can be saved")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in owners:
            shared[name] = owners[key]
        else:
            owners[key] = name
            # Channels-last weights are stored in plain order; clones keep slices from dragging their base along.
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, shared


def _read(path: Path, *, weights: bool = True) -> tuple[dict[str, Tensor], Plan, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or "plan" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not a Spectrim checkpoint (it holds no plan)")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {metadata.get('format_version')!r}; this library reads {FORMAT_VERSION!r}"
        )
    try:
        plan = Plan.from_json(metadata["plan"])
    except PlanError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        shared = json.loads(metadata.get("shared", "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the table of shared tensors cannot be read: {error}") from error
    if not isinstance(shared, dict) or not all(isinstance(v, str) for v in shared.values()):
        raise CheckpointError(f"{path}: the table of shared tensors is not a table of names")
    return tensors, plan, shared


def _rebuild(model: nn.Module, plan: Plan, path: str | Path) -> None:
    sites = find(model)
    for entry in plan:
        if entry.choice.is_dense:
            continue
        for name in entry.sites:
            if name not in sites:
                reasons = {skipped.name: skipped.reason for skipped in sites.skipped}
                why = reasons.get(name, "this model does not have it")
                raise CheckpointError(f"{path}: the plan changes layer {name!r}, but {why}")
        layers = [sites[name].spec for name in entry.sites]
        try:
            modules = skeleton(entry.choice, layers)
        except PlanError as error:
            raise CheckpointError(f"{path}: {error}") from error
        for spec, module in zip(layers, modules, strict=True):
            replace_module(model, spec.names, module)


def _check(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str | Path) -> None:
    missing = [name for name in state if name not in tensors]
    surplus = [name for name in tensors if name not in state]
    if missing or surplus:
        raise CheckpointError(
            f"{path}: belongs to another architecture: {len(missing)} tensors missing"
            f"{f' (first {missing[0]!r})' if missing else ''}, {len(surplus)} unknown"
            f"{f' (first {surplus[0]!r})' if surplus else ''}"
        )
    for name, tensor in state.items():
        given = tensors[name]
        if given.shape != tensor.shape:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {tuple(given.shape)}, the model's has {tuple(tensor.shape)}"
            )
        if given.dtype != tensor.dtype and not (given.is_floating_point() and tensor.is_floating_point()):
            raise CheckpointError(f"{path}: tensor {name!r} is {given.dtype}, the model's is {tensor.dtype}")


def _check_shared(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """What is one tensor in the model must be one in the file, or equal: only the last would be kept."""
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not tensor.numel() or tensor.is_meta:
            continue
        owner = owners.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
        if tensors[name] is not tensors[owner] and not torch.equal(tensors[name], tensors[owner]):
            raise CheckpointError(
                f"{path}: tensors {owner!r} and {name!r} are one in this model and differ in the file"
            )


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models hold the same tensors, bit for bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
