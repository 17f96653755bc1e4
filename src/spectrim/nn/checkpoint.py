"""Save and load compressed models: one safetensors file with the plan in its metadata, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, overload, runtime_checkable

import msgspec
import torch
from torch import Tensor, nn

from spectrim.errors import CheckpointError, PlanError, called_as
from spectrim.network import tensor_files
from spectrim.network.choices import ChannelsChoice, SumChoice
from spectrim.network.coupling import IN
from spectrim.network.file_kinds import path_of
from spectrim.network.sites import Sites
from spectrim.network.state_values import alike, equal, is_plain, put_together, taken_apart
from spectrim.nn.build import skeleton
from spectrim.nn.channels.narrow import add_bias, reshape
from spectrim.nn.find import find
from spectrim.nn.layers import describe, is_layer
from spectrim.nn.linears import rewrite
from spectrim.nn.packing import pack_state
from spectrim.nn.shipping import carry, earlier, remembered, rewritten
from spectrim.nn.sparse.layers import Masked, Slim
from spectrim.nn.sparse.packed import masked_in, read_mask, read_weight
from spectrim.nn.standing import StandIn, Traits
from spectrim.nn.stored import name_in
from spectrim.nn.surgery import replace_module
from spectrim.selection.plan import Plan

T = TypeVar("T")

FORMAT = "spectrim"
FORMAT_VERSION = "1"
PACKED_VERSION = "2"
"""Of files that hold sparse weights packed."""
AGAIN_VERSION = "3"
"""Of files with plans before the last, quantised weights, or modules that nn.Linear layers stand for.

All others are of version 1.
"""

# Of a header: what is written of a tensor beside its name and numbers, and of texts beside the plan and tables.
_TENSOR = ':{"dtype":"F8_E4M3","shape":[],"data_offsets":[,]},'
_LOADING = "_load_from_state_dict"
_TEXTS = 640
_PACKED = (
    ". A quantised layer has packed it: compress the network before it is quantised, and quantise what comes of that"
)
_NESTED = ". Have state_dict give tensors by their names alone, and the rest as numbers, texts or lists of these"


@runtime_checkable
class Compressed(Protocol):
    """What a compression returns: a model and the plan that made it."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def plan(self) -> Plan: ...


@overload
def save(model: nn.Module, plan: Plan, path: str | Path) -> None: ...
@overload
def save(result: Compressed, path: str | Path, /) -> None: ...
def save(model: nn.Module | Compressed, plan: Plan | str | Path, path: str | Path | None = None) -> None:
    """Write a compressed model's weights and its plan to one safetensors file.

    Tensors that share memory are stored once. Of a sparse weight (:class:`~spectrim.nn.sparse.layers.Masked`) the file
    holds the values inside the mask, in one row under the name of the weight, and the packed positions under the name
    of the mask, so that it is as large as its plan says. The file is written beside its final place and moved there, so
    that a crash leaves no half-written checkpoint. Digests of tensors and texts lie among its texts.

    Parameters
    ----------
    model
        What :func:`spectrim.apply` returned, fine-tuned or not; or a result, which has model and plan, and the path
        after it: ``save(result, path)``.
    plan
        The plan it was made by. What was compressed before, and has been compressed again, is saved with the plans that
        were carried out before this one.

    Raises
    ------
    CheckpointError
        If the model is not what the plan makes, as the dense network or a merged one, if its state holds what is made
        of neither tensors nor numbers, or if a mask does not have the pattern and the density of the plan.
    OSError
        If the file cannot be written: there is no such folder, or it is full or read-only.
    TypeError
        For arguments of other types or in another order.
    """
    if path is None and isinstance(model, Compressed):
        model, plan, path = model.model, model.plan, cast(Path, plan)
    if not (isinstance(model, nn.Module) and isinstance(plan, Plan) and isinstance(path, str | os.PathLike)):
        raise TypeError(
            f"save got {', '.join(type(each).__name__ for each in (model, plan, path) if each is not None)}: write "
            "save(result, 'small.safetensors'), or save(model, plan, 'small.safetensors')"
        )
    _check_carried_out(model, plan)
    state, values = _state(model)
    tensors, shared = tensor_files.owners(state)
    before, linear = earlier(model, plan), rewritten(model)
    densities = {e.site: e.choice.density for p in (*before, plan) for e in p if isinstance(e.choice, SumChoice)}
    packed = pack_state(model, tensors, state, lambda layer: densities.get(layer.original.name))
    metadata = {
        "format": FORMAT,
        "format_version": AGAIN_VERSION if before or values or linear else PACKED_VERSION if packed else FORMAT_VERSION,
        "plan": plan.to_json(lines=False),
        "shared": json.dumps(shared, sort_keys=True),
    }
    if packed:
        metadata["packed"] = json.dumps(packed)
    if before:
        metadata["earlier"] = _listed(before)
    if values:
        metadata["values"] = json.dumps(values)
    if linear:
        metadata["linear"] = json.dumps(linear)
    tensor_files.write(path_of(path), tensor_files.plain(tensors), metadata)


def _check_carried_out(model: nn.Module, plan: Plan) -> None:
    """Raise CheckpointError where a plan puts parts in a layer's place and the layer is there itself."""
    modules = dict(model.named_modules(remove_duplicate=False))
    # Of layers that are not there, and of what does not fit them, loading tells.
    present = [entry for entry in plan if modules.keys() >= set(entry.sites)]
    for name, choice in ((name, entry.choice) for entry in present for name in entry.sites):
        layer = modules[name]
        if choice.is_parts and is_layer(layer):
            raise CheckpointError(
                f"layer {name!r} is a plain {type(layer).__name__}, and the plan makes it {choice}: save the model "
                "that compress or apply returned with the plan; a dense or merged one needs no plan (torch.save, or "
                "safetensors.torch.save_model)"
            )


def check_savable(model: nn.Module) -> None:
    """Raise CheckpointError, as :func:`save` would, if the state of a model holds what no file can: before any work."""
    _state(model)


def header_bytes(model: nn.Module, plan: Plan | None = None) -> int:
    """Bytes of a file besides numbers, at most: names, shapes and, of one that :func:`save` writes, digests and plan.

    Of the dense model, compressed by the plan; without one, of a file of its tensors alone.
    """
    held, records = _apart(model.state_dict())
    state = {name: tuple(tensor.shape) for name, tensor in held.items()}
    named = 0
    for entry in plan or ():
        choice = entry.choice
        if isinstance(choice, ChannelsChoice):
            # A layer that loses inputs may be given a bias.
            state |= {f"{place.module}.bias": (1,) for place in choice.lost if place.axis == IN}
        elif not choice.is_dense:
            layers = [describe(model.get_submodule(name), (name,)) for name in entry.sites]
            for spec, module in zip(layers, skeleton(choice, layers), strict=True):
                new = {f"{spec.name}.{key}": tuple(t.shape) for key, t in module.state_dict().items()}
                state |= new
                if entry.members or isinstance(choice, SumChoice):
                    # Shared and packed tensors are named in tables, too.
                    named += sum(2 * len(json.dumps(json.dumps(name))) + 4 for name in new)
    digits = len(str(sum(tensor.numel() * tensor.element_size() for tensor in held.values())))
    tensors = sum(
        len(json.dumps(name)) + len(_TENSOR) + 2 * digits + sum(len(str(size)) + 1 for size in shape)
        for name, shape in state.items()
    )
    if plan is None:
        return tensors + 16
    before = remembered(model)
    more = (_listed(before), json.dumps(records), json.dumps(rewritten(model)))
    named += sum(len(json.dumps(text)) for text in more if len(text) > 2)
    return tensors + named + len(json.dumps(plan.to_json(lines=False))) + _TEXTS


def _listed(plans: Sequence[Plan]) -> str:
    return json.dumps([plan.to_json(lines=False) for plan in plans])


@called_as(
    "Write load(make_model(), path), with a new dense model of the same architecture",
    model=nn.Module,
    path=(str, os.PathLike),
)
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
        If the file is missing, damaged (a bit is not what was written) or not a Spectrim checkpoint, or belongs to
        another architecture; the message names the first layer or tensor that does not fit.
    """
    tensors, plans, tables = _read(path)
    model = rewrite(model, tables.linear)
    traits = Traits.of(model)
    _check_dense(model, plans[0], path)
    for plan in plans:
        rebuild(model, plan, tensors, path)
    present = model.state_dict()
    packed = {(weight, mask): layer for weight, mask, layer in masked_in(model, present)}
    _unpack(packed, tensors, tables.packed, path)
    for name, source in tables.shared.items():
        if source not in tensors:
            raise CheckpointError(f"{path}: tensor {name!r} shares {source!r}, which the file does not hold")
        tensors[name] = tensors[source]
    values = _values(present, tensors, tables.values, path)
    state = {name: value for name, value in present.items() if is_plain(value)}
    _check(state, tensors, path)
    _check_shared(state, tensors, path)
    _check_channels(model, tensors, path)
    # A copy, which says of which version of its modules it is.
    present.update(tensors | values)
    try:
        model.load_state_dict(present)
    except Exception as error:  # a model's own hooks may raise anything
        raise CheckpointError(
            f"{path}: the {type(model).__name__} does not load what its state_dict gives: {error}. Have its hooks, or "
            "its load_state_dict, take that"
        ) from error
    traits.give(model)
    for plan in plans:
        carry(model, plan)
    return model


def rebuild(model: nn.Module, plan: Plan, names: Container[str], path: str | Path) -> None:
    """Give a dense model the layers and shapes of a plan, in place; tensors of these ``names`` are to be loaded.

    Raises CheckpointError, with the ``path`` where the plan stands and the first layer that it does not fit.
    """
    sites = find(model)
    if any(name not in sites for entry in plan for name in entry.sites if not entry.of_channels):
        # Before version 0.3 what was compressed again were the layers of a pair.
        sites = find(model, parts=True)
    _narrow(model, plan, names, path)
    _rebuild(model, sites, plan, path)


def read_plan(path: str | Path, *, whole: bool = False) -> Plan:
    """The plan kept in a checkpoint, the last one; with ``whole`` its weights are read too, to see that they are whole.

    Raises
    ------
    CheckpointError
        As :func:`load`, as far as it is read.
    """
    return _read(path, weights=whole)[1][-1]


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a model, apart, with all its parameters in it, unless the model loads in a way of its own."""
    try:
        given = model.state_dict()
    except Exception as error:  # a model's own hooks may raise anything
        raise CheckpointError(
            f"state_dict of the {type(model).__name__} raises {type(error).__name__}: {error}. Have it and its hooks "
            "take the names that are there: what stands for a layer has other tensors"
        ) from error
    state, records = _apart(given)
    _check_parts(model, state)
    held = {(tensor.data_ptr(), tensor.shape) for tensor in state.values() if not nn.parameter.is_lazy(tensor)}
    own = ((n, p) for n, p in nn.Module.named_parameters(model) if n not in state and not nn.parameter.is_lazy(p))
    left = [name for name, parameter in own if (parameter.data_ptr(), parameter.shape) not in held]
    if left and not any(map(_loads_itself, nn.Module.modules(model))):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(
            f"state_dict of the {type(model).__name__} leaves out {left[0]!r}{more}, without which a file cannot be "
            "loaded again: give all parameters there, or put what is left out of it into a method of another name"
        )
    return state, records


def _check_parts(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a state leaves out what stands for a layer: no loading of the model's own knows that."""
    for path, layer in nn.Module.named_modules(model):
        for name, tensor in layer.state_dict(prefix=f"{path}.").items() if isinstance(layer, StandIn) else ():
            if is_plain(tensor) and name_in(state, name, tensor) is None:
                raise CheckpointError(
                    f"state_dict of the {type(model).__name__} leaves out {name!r} of what stands for layer {path!r}: "
                    "have its hooks leave that in, or skip= the layer"
                )


def _loads_itself(module: nn.Module) -> bool:
    """Whether a module may have made up what its state leaves out once it is loaded."""
    kind = type(module)
    own = any(getattr(kind, name) is not getattr(nn.Module, name) for name in ("load_state_dict", _LOADING))
    return (own and not kind.__module__.startswith(("torch.", "spectrim."))) or bool(module._load_state_dict_pre_hooks)


def _apart(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Plain tensors, and records of all other values, which are made of some of them."""
    tensors = {name: value for name, value in state.items() if is_plain(value)}
    records: dict[str, Any] = {}
    for name, value in state.items():
        if name not in tensors:
            try:
                records[name], parts = taken_apart(name, value)
            except TypeError as error:
                cure = _PACKED if "ScriptObject" in str(error) else _NESTED
                raise CheckpointError(f"state {name!r} holds a {error}; only tensors can be saved{cure}") from error
            tensors |= parts
    return tensors, records


@dataclass(frozen=True)
class _Tables:
    """What a file says of its tensors."""

    shared: dict[str, str]  # owners of tensors that are the same memory, by their names
    packed: list[tuple[str, str]]  # names ``[weight, mask]`` of what is packed
    values: dict[str, Any]  # records of what is no plain tensor
    linear: list[str]  # modules that nn.Linear layers stand for (spectrim.nn.linears)


def _read(given: str | Path, *, weights: bool = True) -> tuple[dict[str, Tensor], list[Plan], _Tables]:
    """Tensors, plans in the order they were carried out, and tables."""
    try:
        path = path_of(given)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        tensors, metadata = tensor_files.read(path, weights=weights)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except tensor_files.NoFileError as error:
        inside = sorted(path.glob("*.safetensors"))
        cure = f"write {inside[0]}" if inside else "give the file that save wrote"
        raise CheckpointError(f"{path}: {error}: {cure}") from error
    except tensor_files.DamagedFileError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if metadata.get("format") != FORMAT or "plan" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not a Spectrim checkpoint (it holds no plan)")
    version = metadata.get("format_version")
    if version not in (FORMAT_VERSION, PACKED_VERSION, AGAIN_VERSION):
        raise CheckpointError(
            f"{path}: format version {version!r}; this library reads {FORMAT_VERSION!r}, {PACKED_VERSION!r} and "
            f"{AGAIN_VERSION!r}"
        )
    return tensors, _plans(metadata, path, again=version == AGAIN_VERSION), _tables(metadata, path, version)


def _plans(metadata: Mapping[str, str], path: Path, *, again: bool) -> list[Plan]:
    listed = again and "earlier" in metadata
    before = _table(metadata, "earlier", path, list[str], "a list of plans") if listed else []
    try:
        return [Plan.from_json(text) for text in (*before, metadata["plan"])]
    except PlanError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _tables(metadata: Mapping[str, str], path: Path, version: str) -> _Tables:
    again = version == AGAIN_VERSION
    shared, values, packed, linear = {}, {}, [], []
    if "shared" in metadata:
        shared = _table(metadata, "shared", path, dict[str, str], "a table of names")
    if again and "values" in metadata:
        values = _table(metadata, "values", path, dict[str, Any], "a table of records")
    if again and "linear" in metadata:
        linear = _table(metadata, "linear", path, list[str], "a list of names")
    if version == PACKED_VERSION or (again and "packed" in metadata):
        packed = _table(metadata, "packed", path, list[tuple[str, str]], "a table of pairs of names")
    return _Tables(shared, packed, values, linear)


def _table(metadata: Mapping[str, str], name: str, path: Path, kind: type[T], what: str) -> T:
    try:
        return msgspec.convert(json.loads(metadata[name]), kind)
    except KeyError:
        raise CheckpointError(f"{path}: the table of {name} tensors is missing") from None
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: the table of {name} tensors is not {what}: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the table of {name} tensors cannot be read: {error}") from error


def _narrow(model: nn.Module, plan: Plan, names: Container[str], path: str | Path) -> None:
    """Give modules the shapes that a removal of channels left."""
    lost: dict[tuple[str, str], int] = {}
    try:
        for entry in plan:
            if isinstance(entry.choice, ChannelsChoice):
                for place in entry.choice.lost:
                    lost[place.module, place.axis] = lost.get((place.module, place.axis), 0) + place.entries
        for (name, axis), count in lost.items():
            if count:
                reshape(model, name, axis, count)
        for name, axis in lost:
            if axis == IN and f"{name}.bias" in names:
                add_bias(model.get_submodule(name), name)
    except (PlanError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_dense(model: nn.Module, plan: Plan, path: str | Path) -> None:
    """Raise CheckpointError if a layer of the first plan has been compressed already."""
    modules = dict(model.named_modules())
    for name in (name for entry in plan if not entry.choice.is_dense for name in entry.sites):
        if isinstance(modules.get(name), StandIn):
            raise CheckpointError(f"{path}: the plan changes layer {name!r}, but {_absent(model, name)}")


def _absent(model: nn.Module, name: str) -> str:
    """Why there is no such layer to change."""
    if isinstance(dict(model.named_modules()).get(name), StandIn):
        return "it is compressed already in this model: load into the network as it was before any compression"
    return "this model does not have it"


def _rebuild(model: nn.Module, sites: Sites, plan: Plan, path: str | Path) -> None:
    for entry in plan:
        if entry.choice.is_dense or isinstance(entry.choice, ChannelsChoice):
            continue
        for name in entry.sites:
            if name not in sites:
                reasons = {skipped.name: skipped.reason for skipped in sites.skipped}
                why = reasons.get(name, _absent(model, name))
                raise CheckpointError(f"{path}: the plan changes layer {name!r}, but {why}")
        # As narrow as they are now: a grouped layer that is left one channel a group is a site no longer.
        layers = [describe(model.get_submodule(name), sites.layer(name).spec.names) for name in entry.sites]
        try:
            modules = skeleton(entry.choice, layers)
        except PlanError as error:
            raise CheckpointError(f"{path}: {error}") from error
        for spec, module in zip(layers, modules, strict=True):
            replace_module(model, spec.names, module)


def _unpack(
    layers: dict[tuple[str, str], Masked],
    tensors: dict[str, Tensor],
    packed: Sequence[tuple[str, str]],
    path: str | Path,
) -> None:
    """Put whole weights and masks in place of packed ones, by their names."""
    for weight, mask in packed:
        # A pair that comes twice has left the table.
        layer = layers.pop((weight, mask), None)
        if layer is None:
            raise CheckpointError(
                f"{path}: packs {weight!r} and {mask!r}, which are not weight and mask of a sparse layer of the plan"
            )
        name = mask
        try:
            tensors[mask] = read_mask(layer, tensors[mask])
            name = weight
            tensors[weight] = read_weight(layer, tensors[mask], tensors[weight])
        except KeyError:
            raise CheckpointError(f"{path}: the packed tensor {name!r} is missing") from None
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: the packed tensor {name!r} cannot be read: {error}") from error


def _values(
    state: Mapping[str, Any], tensors: dict[str, Tensor], records: Mapping[str, Any], path: str | Path
) -> dict[str, Any]:
    """What is no plain tensor; those that it is made of are taken out."""
    missing = [name for name, value in state.items() if not is_plain(value) and name not in records]
    if missing:
        raise CheckpointError(
            f"{path}: belongs to another architecture: its {missing[0]!r} is not the "
            f"{type(state[missing[0]]).__name__} that the model holds"
        )
    found: dict[str, Any] = {}
    parts: set[str] = set()
    for name, record in records.items():
        try:
            found[name], used = put_together(record, tensors)
        except ValueError as error:
            raise CheckpointError(f"{path}: {name!r}: {error}") from error
        if name not in state or not alike(found[name], state[name]):
            raise CheckpointError(f"{path}: belongs to another architecture: {name!r} is another value in the model")
        parts |= used
    for name in parts:
        del tensors[name]
    return found


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
                f"{path}: was made for another architecture, or is damaged: tensor {name!r} has shape "
                f"{tuple(given.shape)}, the model's has {tuple(tensor.shape)}"
            )
        if given.dtype != tensor.dtype and not (given.is_floating_point() and tensor.is_floating_point()):
            raise CheckpointError(f"{path}: tensor {name!r} is {given.dtype}, the model's is {tensor.dtype}")


def _check_shared(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """What is one tensor in the model must be one in the file, or equal: only the last would be kept."""
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not tensor.numel() or tensor.is_meta:
            continue
        owner = owners.setdefault(tensor_files.memory_of(tensor), name)
        if tensors[name] is not tensors[owner] and not torch.equal(tensors[name], tensors[owner]):
            raise CheckpointError(
                f"{path}: tensors {owner!r} and {name!r} are one in this model and differ in the file"
            )


def _check_channels(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """The channels that thinner layers see must be there: they are read by number."""
    for name, module in model.named_modules():
        if isinstance(module, Slim):
            g, _, i, *_ = module.original.shape
            key = f"{name}.channels"
            numbers = tensors[key].reshape(g, -1).long()
            first = i * torch.arange(g).unsqueeze(1)
            inside = (numbers >= first) & (numbers < first + i)
            if not bool(inside.all()) or not bool((numbers.diff(dim=1) > 0).all()):
                raise CheckpointError(
                    f"{path}: tensor {key!r} does not name different input channels of {module.original.kind}, "
                    f"ascending from 0 to {module.original.in_channels - 1}, the same number in each group"
                )


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models hold the same tensors, bit for bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
