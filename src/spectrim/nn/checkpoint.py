"""Save and load compressed models: one safetensors file with the plan in its metadata, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, overload, runtime_checkable

from torch import Tensor, nn

from spectrim.errors import CheckpointError, ProofError, called_as, first_few
from spectrim.network import tensor_files
from spectrim.network.choices import ChannelsChoice, SumChoice
from spectrim.network.coupling import IN
from spectrim.network.file_kinds import path_of
from spectrim.network.state_values import equal, is_ordinary, taken_apart
from spectrim.nn.build import skeleton
from spectrim.nn.headers import FORMAT as FORMAT
from spectrim.nn.headers import Header
from spectrim.nn.layers import is_layer, spec_of
from spectrim.nn.linears import rewrite
from spectrim.nn.matching import check_fits, pack_state, share_memory, unpack_layers, values_of
from spectrim.nn.rebuilding import check_dense, naming, rebuild
from spectrim.nn.shipping import carried_out, carry, compressed_in, earlier, remembered, rewritten
from spectrim.nn.sparse.packed import masked_in
from spectrim.nn.standing import StandIn
from spectrim.nn.stored import name_in
from spectrim.nn.traits import Traits
from spectrim.selection.plan import Entry, Plan

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
        What :func:`spectrim.apply` returned, fine-tuned or not, compiled or distributed; or a result, which has model
        and plan, and the path after it: ``save(result, path)``.
    plan
        The plan it was made by; the file says what its choices cost, also where it was edited. What was compressed
        before, and has been compressed again, is saved with the plans that were carried out before this one.

    Raises
    ------
    CheckpointError
        If the model is not what the plan makes, as the dense network, a merged one or that of another plan, if its
        state holds what is made of neither tensors nor numbers, or if a mask does not have the pattern and the density
        of the plan.
    OSError
        If the file cannot be written: there is no such folder, or it is full or read-only.
    TypeError
        For arguments of other types or in another order.
    ValueError
        If the name says that the file is another kind of thing: an exported program, as ``.pt2`` and ``.onnx`` do.
    """
    if path is None and isinstance(model, Compressed):
        model, plan, path = model.model, model.plan, cast(Path, plan)
    if not (isinstance(model, nn.Module) and isinstance(plan, Plan) and isinstance(path, str | os.PathLike)):
        raise TypeError(
            f"save got {', '.join(type(each).__name__ for each in (model, plan, path) if each is not None)}: write "
            "save(result, 'small.safetensors'), or save(model, plan, 'small.safetensors')"
        )
    model = compressed_in(model)
    _check_carried_out(model, plan)
    plan = carried_out(model, plan)
    tensors, metadata = _contents(model, (*earlier(model, plan), plan))
    tensor_files.write(path_of(path), tensor_files.plain(tensors), metadata)


def _contents(model: nn.Module, plans: Sequence[Plan]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of a file, with the plans in the order they were carried out."""
    state, values = _state(model)
    tensors, shared = tensor_files.owners(state)
    densities = {e.site: e.choice.density for p in plans for e in p if isinstance(e.choice, SumChoice)}
    packed = pack_state(model, tensors, state, lambda layer: densities.get(layer.original.name))
    return tensors, Header(plans, shared, packed, values, rewritten(model)).metadata()


def file_size(model: nn.Module) -> int:
    """Bytes of the file that a model is saved to: with the plans of one that was compressed, else of its tensors alone.

    Tensors that share memory count once, sparse weights as they are packed. Raises CheckpointError where :func:`save`
    would.
    """
    if plans := remembered(model):
        return tensor_files.size(*_contents(model, plans))
    state, _ = _apart(model.state_dict())
    tensors, _ = tensor_files.owners(state)
    pack_state(model, tensors, state)
    return tensor_files.size(tensors)


def check_size(model: nn.Module, limit: float) -> None:
    """Raise ProofError if the file that :func:`save` would write has more than so many bytes."""
    try:
        size = file_size(model)
    except CheckpointError:  # whoever saves it is told
        return
    if size > limit:
        tensors, _ = _apart(model.state_dict())
        own = {name for name, _ in (*nn.Module.named_parameters(model), *nn.Module.named_buffers(model))}
        most = max(tensors, key=lambda name: (name not in own, tensors[name].numel()))
        raise ProofError(
            f"the file of the compressed network would have {size:,} bytes, where the budget allows {limit:,.0f}: its "
            f"state_dict holds what does not become smaller with the layers, such as {most!r}. Leave that out of it "
            "where it is made of the weights, or raise the budget"
        )


def _check_carried_out(model: nn.Module, plan: Plan) -> None:
    """Raise CheckpointError where a plan puts parts in a layer's place and the layer is there itself, or none is."""
    modules = dict(model.named_modules(remove_duplicate=False))
    changed = [name for entry in plan if not entry.of_channels and entry.choice.is_parts for name in entry.sites]
    if changed and modules.keys().isdisjoint(changed):
        raise CheckpointError(
            f"the plan changes layer {changed[0]!r}, and the {type(model).__name__} has no layer of this name: save "
            "the model that compress or apply returned with the plan"
        )
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


def _tensors_of(model: nn.Module, entry: Entry) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a choice gives a dense model, at most, by their names."""
    choice = entry.choice
    if isinstance(choice, ChannelsChoice):
        # A layer that loses inputs may be given a bias.
        return {f"{place.module}.bias": (1,) for place in choice.lost if place.axis == IN}
    if choice.is_dense:
        return {}
    layers = [spec_of(model.get_submodule(name), (name,)) for name in entry.sites]
    made = zip(layers, skeleton(choice, layers), strict=True)
    return {f"{spec.name}.{key}": tuple(t.shape) for spec, new in made for key, t in new.state_dict().items()}


def header_bytes(model: nn.Module, plan: Plan | None = None) -> int:
    """Bytes of a file besides numbers, at most: names, shapes and, of one that :func:`save` writes, digests and plan.

    Of the dense model, compressed by the plan; without one, of the file that the model itself is saved to.
    """
    if plan is None and (plans := remembered(model)):
        stored, texts = _contents(model, plans)
        return tensor_files.size(stored, texts) - sum(tensor.nbytes for tensor in stored.values())
    held, records = _apart(model.state_dict())
    state = {name: tuple(tensor.shape) for name, tensor in held.items()}
    named = 0
    for entry in plan or ():
        new = _tensors_of(model, entry)
        state |= new
        if entry.members or isinstance(entry.choice, SumChoice):
            # Shared and packed tensors are named in tables, too.
            named += sum(2 * len(json.dumps(json.dumps(name))) + 4 for name in new)
    digits = len(str(sum(tensor.numel() * tensor.element_size() for tensor in held.values())))
    tensors = sum(
        len(json.dumps(name)) + len(_TENSOR) + 2 * digits + sum(len(str(size)) + 1 for size in shape)
        for name, shape in state.items()
    )
    if plan is None:
        return tensors + 16
    more = ([each.to_json(lines=False) for each in remembered(model)], records, rewritten(model))
    named += sum(len(json.dumps(json.dumps(table))) for table in more if table)
    return tensors + named + len(json.dumps(plan.to_json(lines=False))) + _TEXTS


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
    tensors, header = _read(path)
    with naming(path):
        model = rewrite(model, header.linear)
        traits = Traits.of(model)
        check_dense(model, header.plans[0])
        for plan in header.plans:
            rebuild(model, plan, tensors)
        present = model.state_dict()
        unpack_layers(
            {(weight, mask): layer for weight, mask, layer in masked_in(model, present)}, tensors, header.packed
        )
        share_memory(tensors, header.shared)
        values = values_of(present, tensors, header.values)
        check_fits(model, {name: value for name, value in present.items() if is_ordinary(value)}, tensors)
        # A copy, which says of which version of its modules it is.
        present.update(tensors | values)
        try:
            model.load_state_dict(present)
        except Exception as error:  # a model's own hooks may raise anything
            raise CheckpointError(
                f"the {type(model).__name__} does not load what its state_dict gives: {error}. Have its hooks, or its "
                "load_state_dict, take that"
            ) from error
    traits.give(model)
    for plan in header.plans:
        carry(model, plan)
    return model


def read_plan(path: str | Path, *, whole: bool = False) -> Plan:
    """The plan kept in a checkpoint, the last one; with ``whole`` its weights are read too, to see that they are whole.

    Raises
    ------
    CheckpointError
        As :func:`load`, as far as it is read.
    """
    return _read(path, weights=whole)[1].plans[-1]


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
    if empty := next((name for name, tensor in state.items() if tensor.is_meta), None):
        holder = dict(nn.Module.named_modules(model)).get(empty.rpartition(".")[0], model)
        raise CheckpointError(
            f"{type(holder).__name__}'s state {empty!r} is on the meta device and has no values to save: load them, or "
            "take what holds it away"
        )
    _check_parts(model, state)
    held = {(tensor.data_ptr(), tensor.shape) for tensor in state.values() if not nn.parameter.is_lazy(tensor)}
    own = ((n, p) for n, p in nn.Module.named_parameters(model) if n not in state and not nn.parameter.is_lazy(p))
    left = [name for name, parameter in own if (parameter.data_ptr(), parameter.shape) not in held]
    if left and not any(map(_loads_itself, nn.Module.modules(model))):
        raise CheckpointError(
            f"state_dict of the {type(model).__name__} leaves out {first_few([*map(repr, left)], 1)}, without which a "
            "file cannot be loaded again: give all parameters there, or put what is left out of it into a method of "
            "another name"
        )
    return state, records


def _check_parts(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a state leaves out what stands for a layer: no loading of the model's own knows that."""
    for path, layer in nn.Module.named_modules(model):
        for name, tensor in layer.state_dict(prefix=f"{path}.").items() if isinstance(layer, StandIn) else ():
            if is_ordinary(tensor) and name_in(state, name, tensor) is None:
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
    tensors = {name: value for name, value in state.items() if is_ordinary(value)}
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


def _read(given: str | Path, *, weights: bool = True) -> tuple[dict[str, Tensor], Header]:
    """Tensors, and what the file says of them."""
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
    with naming(path):
        return tensors, Header.of(metadata)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models hold the same tensors, bit for bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
