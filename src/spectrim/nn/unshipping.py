"""A compressed model of transformers from its configuration: layers before the weights are loaded, and after."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import CheckpointError
from spectrim.network.files import digest_of
from spectrim.nn.channels.narrow import add_bias
from spectrim.nn.linears import rewrite
from spectrim.nn.modules import FactoredHead
from spectrim.nn.rebuilding import naming, rebuild
from spectrim.nn.shipping import (
    DIGEST,
    FORMAT_VERSION,
    carry,
    changed,
    declare_ties,
    module_of,
    renamed_entries,
    within,
)
from spectrim.nn.sparse.layers import Masked
from spectrim.nn.sparse.packed import masked_layers, read_mask, read_weight, stored_bytes
from spectrim.nn.standing import StandIn
from spectrim.selection.plan import Plan

PLACE = "quantization_config of config.json"


@dataclass(frozen=True)
class Built:
    """What was built for weights to be loaded into."""

    # Layers with a mask, and one for each that keeps as many entries as the layer's will.
    masks: Sequence[tuple[Masked, Tensor]]
    ties: Mapping[str, str]  # the first name of each shared tensor by the others


@dataclass(frozen=True)
class Unshipping:
    """What a configuration says of the compression of its model (:meth:`spectrim.nn.shipping.Saver.record`).

    What is wrong with it, or with the files that came with it, raises CheckpointError.
    """

    plans: tuple[Plan, ...]  # to be carried out, in order
    biases: tuple[str, ...] = ()  # layers with a bias that the architecture has none for
    linear: tuple[str, ...] = ()  # modules that nn.Linear layers stand for (spectrim.nn.linears)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Unshipping:
        """Read a record of a version that this library reads, whose layers are those that were saved."""
        with naming(PLACE):
            return cls._read(record)

    @classmethod
    def _read(cls, record: Mapping[str, Any]) -> Unshipping:
        version, plans = record.get("format_version"), record.get("plans")
        biases, linear = _names(record.get("biases")), _names(record.get("linear", []))
        if version != FORMAT_VERSION:
            raise CheckpointError(f"format version {version!r}; this library reads {FORMAT_VERSION!r}")
        if not isinstance(plans, list) or biases is None or linear is None:
            raise CheckpointError("plans and biases are not a list of plans and a list of names")
        if not plans and not biases and not linear:
            raise CheckpointError(
                "it has no plan, and the weights are of compressed layers: give the config.json that was saved with "
                "them"
            )
        layers = {name: record[name] for name in ("plans", "biases", "linear") if name in record}
        if record.get(DIGEST) not in (None, digest_of(dict(layers))):  # which folders of before have none of
            raise CheckpointError(
                "the layers that it names are not those that were saved with the weights, and others would have random "
                "ones: give the config.json as save_pretrained wrote it; to change a plan, carry it out on the dense "
                "model"
            )
        return cls(tuple(Plan.from_json(json.dumps(plan)) for plan in plans), biases, linear)

    def fitting(self, model: Any) -> Unshipping:
        """The same with the names that a model has for its layers.

        A model with a head holds the one without under a name of its own, and transformers loads either from the other.
        """
        names = [name for plan in self.plans for entry in plan for name in changed(entry)]
        rename = _renaming(model, [*names, *self.biases, *self.linear])
        biases, linear = (tuple(filter(None, map(rename, held))) for held in (self.biases, self.linear))
        return Unshipping(tuple(renamed_entries(plan, rename) for plan in self.plans), biases, linear)

    def build(self, model: Any) -> Built:
        """Give a dense model on the meta device the layers of the plans, in place, sparse weights as in files."""
        rewrite(model, self.linear)
        biased = {f"{name}.bias" for name in self.biases}
        modules = []
        with torch.device("cpu"), naming(PLACE):
            for plan in self.plans:
                modules += [_on_cpu(module_of(model, name)) for entry in plan for name in changed(entry)]
                rebuild(model, plan, biased)
            for name in self.biases:
                module = module_of(model, name)
                if not isinstance(module, StandIn):
                    add_bias(module, name)
        told = vars(model).get("all_tied_weights_keys") or {}
        for name, module in model.named_modules():
            if isinstance(module, FactoredHead) and f"{name}.bias" in told:
                # transformers ties after loading, and knows the layer's bias by the name it had.
                module.second.bias = model.get_parameter(told[f"{name}.bias"])
        masks = [(layer, layer.mask) for _, _, layer in masked_layers(model)]
        sizes = [stored_bytes(layer) for layer, _ in masks]
        ties = declare_ties(model)
        # Of the class, and of this model while it is loaded: what is tied is missing in no file.
        ignored = model._keys_to_ignore_on_load_missing
        model._keys_to_ignore_on_load_missing = {*(ignored or ()), *(f"^{re.escape(name)}$" for name in ties)}
        for module in filter(None, modules):
            module.to("meta")
        for (layer, _), (values, positions) in zip(masks, sizes, strict=True):
            weight: Any = layer.layer.weight
            layer.layer.weight = nn.Parameter(weight.new_empty(values // weight.element_size()))
            layer.mask = layer.mask.new_empty(positions, dtype=torch.uint8)
        return Built(masks, ties)

    def fill(self, model: Any, built: Built) -> None:
        """Tie shared tensors and open sparse weights after loading."""
        vars(model).pop("_keys_to_ignore_on_load_missing", None)
        # Some models of transformers tie in a way of their own, and nothing else.
        for name, source in built.ties.items():
            layer, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(layer), leaf, model.get_parameter(source))
        missing = [
            f"{name}.{local}"
            for name, module in model.named_modules()
            if isinstance(module, StandIn)
            for local, tensor in [*module.named_parameters(), *module.named_buffers()]
            if tensor.is_meta or not getattr(tensor, "_is_hf_initialized", False)
        ]
        if missing:
            raise CheckpointError(
                f"the files of the weights lack {len(missing)} tensors of compressed layers, first {missing[0]!r}: "
                "they are not those that were saved with this config.json"
            )
        for layer, kept in built.masks:
            values: Any = layer.layer.weight
            positions, layer.mask = layer.mask, kept
            try:
                mask = read_mask(layer, positions.cpu())
                weight = read_weight(layer, mask, values.detach().cpu())
            except (ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"the sparse weight of {layer.original.name!r} cannot be read: {error}"
                ) from error
            layer.layer.weight = nn.Parameter(weight.to(values.device))
            layer.mask = mask.to(values.device)
        for plan in self.plans:
            carry(model, plan)


def _names(value: Any) -> tuple[str, ...] | None:
    """A list of names, if it is one."""
    return tuple(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else None


def _on_cpu(module: nn.Module | None) -> nn.Module | None:
    """Of a module on the meta device: what has no values is no site."""
    return module if module is None else module.to_empty(device="cpu")


def _renaming(model: Any, names: Sequence[str]) -> Callable[[str], str | None]:
    prefix = f"{model.base_model_prefix}."
    if any(module_of(model, name) is not None for name in names):
        return str
    if hasattr(model, model.base_model_prefix):
        return prefix.__add__
    # Layers of the head stay behind.
    return within(prefix)
