"""Changing a model: replace modules, merge compressed ones back, count what it holds."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from spectrim.errors import PlanError, called_as
from spectrim.nn.copying import copy_model
from spectrim.nn.encoders import leave_fused_kernels
from spectrim.nn.layers import is_layer, paths_of
from spectrim.nn.modules import FactoredHead, FactoredTable, dense_layer
from spectrim.nn.parameters import parameters_of
from spectrim.nn.shipping import declare_ties, forget_layers, without_bias
from spectrim.nn.sparse.packed import masked_layers, stored_bytes
from spectrim.nn.standing import StandIn, fits, take_over
from spectrim.nn.stored import bytes_of_state
from spectrim.nn.traits import Traits

# Its place in 0.1, until 0.3.
from spectrim.nn.watch.norms import reestimate_batchnorm as reestimate_batchnorm


def replace_module(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Put one module in place of another under all its names, keeping the training mode and device.

    What stands for a layer, or is a plain one, takes over the layer's own object (:mod:`spectrim.nn.standing`), so that
    all who hold it have it; any other module is put in place of it. Raises PlanError for a name that is no module's.
    """
    taken_over = None
    for name in names:
        parent, _, leaf = name.rpartition(".")
        try:
            owner = model.get_submodule(parent)
            old = model.get_submodule(name)
        except AttributeError as error:
            raise PlanError(f"the model has no module {name!r}: {error}") from error
        if old is module or old is taken_over:
            continue  # another name of what is as it is to be
        module.train(old.training)
        for tensor in old.parameters():
            module.to(tensor.device)
            break
        if isinstance(module, StandIn):
            module.adopt(old)
        if fits(old, module):
            take_over(old, module)
            taken_over = old
        else:
            setattr(owner, leaf, module)
        if isinstance(owner, nn.TransformerEncoderLayer) and not is_layer(module):
            _leave_fused_kernels(model, owner)


def _leave_fused_kernels(model: nn.Module, layer: nn.TransformerEncoderLayer) -> None:
    """Have torch run an encoder layer module by module: its fused kernels read weights that a pair does not have."""
    layer.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(inner is layer for inner in encoder.layers):
            leave_fused_kernels(encoder)


@called_as("Write merge(model), or merge(model, batches); of a result, its .model", model=nn.Module)
def merge(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> nn.Module:
    """A copy of a compressed model with one dense layer in place of every compressed one.

    Low-rank pairs are multiplied out, what is added is added up, and what was left out is filled with zeros. Useful to
    compress again with another plan, or to hand the weights to code that expects the original layout. The result has
    the original's layers and computes what the compressed model computes, to float tolerance; layers that had no bias
    may have one, with the mean of what was left out.

    Parameters
    ----------
    calibration
        Batches. With them such biases are folded into the weights, so that the state fits the original architecture;
        the outputs are then as near to those of the dense model as before, and not the same
        (:mod:`spectrim.nn.folding`).
    forward
        Runs a model on a batch in another way.
    """
    merged = merged_at(model, stand_ins(model))
    bare = without_bias(model)
    spare = [name for name, m in merged.named_modules() if name in bare and getattr(m, "bias", None) is not None]
    if calibration is not None and spare:
        from spectrim.nn.folding import fold_biases

        fold_biases(merged, spare, calibration, forward=forward)
    return merged


def stand_ins(model: nn.Module) -> Mapping[StandIn, Sequence[str]]:
    """What stands for a layer, with its names; layers inside of others come after them."""
    return {module: names for module, names in paths_of(model).items() if isinstance(module, StandIn)}


def merged_at(model: nn.Module, chosen: Mapping[StandIn, Sequence[str]]) -> nn.Module:
    """A copy of a compressed model with one dense layer in place of each of these, some of :func:`stand_ins`."""
    merged = copy_model(model)
    if isinstance(merged, StandIn):
        return dense_layer(merged).train(model.training)
    traits = Traits.of(merged)
    tied = _tied_again(merged, {names[0] for names in chosen.values()})
    # Layers inside of others are merged before them.
    for names in reversed(list(chosen.values())):
        replace_module(merged, names, dense_layer(merged.get_submodule(names[0])))
    for table, head, bias in tied:
        layer: Any = merged.get_submodule(head)
        layer.weight, layer.bias = merged.get_submodule(table).weight, bias
    traits.give(merged)
    forget_layers(merged)
    declare_ties(merged)
    return merged


def _tied_again(model: nn.Module, chosen: Container[str]) -> list[tuple[str, str, nn.Parameter | None]]:
    """Tables and heads of one weight, by name, with the heads' biases, that are all to be merged."""
    tables = {id(m.second.weight): name for name, m in model.named_modules() if isinstance(m, FactoredTable)}
    heads = [(name, m) for name, m in model.named_modules() if isinstance(m, FactoredHead) and name in chosen]
    pairs = [(tables.get(id(m.first.weight), ""), name, m.second._parameters["bias"]) for name, m in heads]
    return [pair for pair in pairs if pair[0] in chosen]


def parameter_count(model: nn.Module) -> int:
    """Parameters, shared ones once; of sparse weights those inside the mask."""
    counts = {id(p): p.numel() for p in parameters_of(model)}
    for _, _, layer in masked_layers(model):
        counts[id(layer.layer.weight)] = int(layer.mask.sum())
    return sum(counts.values())


def size_in_bytes(model: nn.Module) -> int:
    """Bytes that a file takes for a model's state, shared tensors once; masks as packed positions.

    The header of the file, with names, shapes and the plan, comes on top.
    """
    parts = [(layer.layer.weight, layer.mask, stored_bytes(layer)) for _, _, layer in masked_layers(model)]
    whole = {id(tensor) for weight, mask, _ in parts for tensor in (weight, mask)}
    return bytes_of_state(model, whole) + sum(values + positions for _, _, (values, positions) in parts)
