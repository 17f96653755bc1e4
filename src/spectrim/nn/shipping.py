"""What a compressed model of transformers takes along, so that its own ``save_pretrained`` writes all of it.

transformers saves a model as its configuration and its tensors, and builds it again from the configuration alone. So
the plan goes into the configuration, tensors that layers share are declared, and sparse weights are packed, as in the
files of :mod:`spectrim.nn.checkpoint`. What reads it again is :mod:`spectrim.hf`. Nothing here imports transformers.
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from spectrim.errors import CheckpointError
from spectrim.network.choices import ChannelsChoice, SumChoice
from spectrim.network.coupling import IN
from spectrim.network.files import digest_of
from spectrim.nn.matching import pack_state
from spectrim.nn.sparse.layers import Masked
from spectrim.nn.standing import LAYERS, StandIn
from spectrim.nn.watch.ways import bare
from spectrim.selection.plan import Entry, Plan

METHOD = "spectrim"
FORMAT_VERSION = "1"
DIGEST = "layers_sha256"
"""Of what the configuration says of layers: with a layer cut out, transformers would go on with random weights."""
_TIED = "_tied_weights_keys"
# On a module: plans that were carried out on it, in order.
_PLANS = "_spectrim_plans"
# On a module of nn.Linear layers that stands where another kind was.
REWRITTEN = "_spectrim_rewritten"
NEEDS = (
    "write `import spectrim.hf` before from_pretrained (pip install spectrim): this model was compressed by Spectrim, "
    "which builds its layers"
)
"""Stands in the configuration where the name of the weights may, which transformers quotes when it cannot use it."""


def carry(model: nn.Module, plan: Plan) -> None:
    """Have a model of transformers, and those inside of a model, save the plan that was carried out on it, in place.

    Any other module remembers it alone. What an earlier plan left is saved as well.
    """
    vars(model)[_PLANS] = (*vars(model).get(_PLANS, ()), plan)
    take_along(model, plan)


def take_along(model: nn.Module, *done: Plan) -> None:
    """Have a model of transformers, and those inside of a model, save what differs from what their class makes."""
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    changed = bool(done or rewritten(model))
    for name, module in model.named_modules():
        if kind is not None and isinstance(module, kind) and changed:
            before = vars(module).get("save_pretrained")
            plans = before.plans if isinstance(before, Saver) else ()
            bare = before.bare if isinstance(before, Saver) else frozenset()
            own = [renamed_entries(plan, within(f"{name}.") if name else str) for plan in done]
            vars(module)["save_pretrained"] = Saver(module, (*plans, *own), bare | without_bias(module))
    declare_ties(model)


def rewritten(model: nn.Module) -> list[str]:
    """First names of modules that stand where another kind was (:mod:`spectrim.nn.linears`)."""
    return [name for name, module in model.named_modules() if REWRITTEN in vars(module)]


def compressed_in(model: nn.Module) -> nn.Module:
    """The network that was compressed: a model, or what it compiles or distributes where it was wrapped afterwards."""
    inside = bare(model)
    return inside if _PLANS in vars(inside) and _PLANS not in vars(model) else model


def remembered(model: nn.Module) -> tuple[Plan, ...]:
    """Plans that were carried out on parts of a model, and on itself, in order."""
    inside = [
        renamed_entries(each, lambda name, path=path: f"{path}.{name}")
        for path, module in model.named_modules()
        if path
        for each in vars(module).get(_PLANS, ())
    ]
    return (*inside, *vars(model).get(_PLANS, ()))


def earlier(model: nn.Module, plan: Plan) -> tuple[Plan, ...]:
    """Plans that were carried out before this one, in order; none where a model does not know of this one."""
    plans = remembered(model)
    return plans[: plans.index(plan)] if plan in plans else ()


def carried_out(model: nn.Module, plan: Plan) -> Plan:
    """The plan with the costs that were counted when it was carried out on a model, which knows its choices.

    Raises CheckpointError if another one was. Of a model that remembers none the plan is taken as it is.
    """
    plans = remembered(model)
    if not plans or plan in plans:
        return plan
    if same := next((each for each in reversed(plans) if not each.diff(plan)), None):
        return same
    site, done, given = plans[-1].diff(plan)[0]
    told = [f"{choice}" if choice is not None else "not named" for choice in (done, given)]
    raise CheckpointError(
        f"the plan is not the one that the model was made by: {site!r} is {told[0]} there, and {told[1]} in the plan. "
        "Give the plan that apply was given, or carry this one out"
    )


def forget_layers(model: nn.Module) -> None:
    """Leave, of the plans that modules remember, the channels that went: their layers have one weight again."""
    for module in model.modules():
        saver = vars(module).get("save_pretrained")
        if isinstance(saver, Saver):
            vars(module)["save_pretrained"] = replace(saver, plans=tuple(_channels_of(saver.plans)))
        if _PLANS in vars(module):
            vars(module)[_PLANS] = tuple(_channels_of(vars(module)[_PLANS]))


def _channels_of(plans: Sequence[Plan]) -> Iterator[Plan]:
    for plan in plans:
        entries = tuple(entry for entry in plan if isinstance(entry.choice, ChannelsChoice))
        if entries:
            yield replace(plan, entries=entries)


def is_shipped(model: nn.Module) -> bool:
    """Whether a model saves by itself what was done to it."""
    return isinstance(vars(model).get("save_pretrained"), Saver)


@dataclass(frozen=True, eq=False)
class Saver:
    """Stands as ``save_pretrained`` of a compressed model of transformers, and takes what that does."""

    model: Any
    plans: tuple[Plan, ...]  # carried out on it, in order
    bare: frozenset[str]  # layers that had no bias when they were replaced

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Save the model with its plans. What is in none of them raises CheckpointError, and nothing is written."""
        model, kind = self.model, type(self.model)
        record = self.record()
        # With adapters of its own loaded, a model saves those alone.
        if record is None or getattr(model, "_hf_peft_config_loaded", False):
            return kind.save_pretrained(model, *args, **options)
        call = inspect.signature(kind.save_pretrained).bind(model, *args, **options)
        state = call.arguments.get("state_dict")
        call.arguments["state_dict"] = self._packed(dict(model.state_dict() if state is None else state))
        # Names of former versions are for who reads those, and Trainer does not: resumed, it would pass them by.
        call.arguments.setdefault("save_original_format", False)
        config, model.config = model.config, _shipped(model.config, record)
        try:
            return kind.save_pretrained(*call.args, **call.kwargs)
        finally:
            model.config = config

    def record(self) -> dict[str, Any] | None:
        """What the configuration says of the compression; None where nothing is left of it, as after merging."""
        plans = [replace(plan, entries=tuple(filter(self._stands, plan))) for plan in self.plans]
        plans = [plan for plan in plans if plan.entries]
        biases = sorted({*self._spare_biases(), *self._biases_of_channels(plans)})
        self._check_planned(plans)
        linear = rewritten(self.model)
        if not plans and not biases and not linear:
            return None
        layers = {
            "plans": [json.loads(plan.to_json()) for plan in plans],
            "biases": biases,
            **({"linear": linear} if linear else {}),
        }
        return {"quant_method": METHOD, "format_version": FORMAT_VERSION, **layers, DIGEST: digest_of(dict(layers))}

    def _stands(self, entry: Entry) -> bool:
        """Whether the model is as an entry made it: channels stay away, and layers may have been merged."""
        if isinstance(entry.choice, ChannelsChoice):
            return True
        return not entry.choice.is_dense and any(isinstance(module_of(self.model, s), StandIn) for s in entry.sites)

    def _spare_biases(self) -> Iterator[str]:
        """Plain layers that got a bias and stand for themselves again."""
        for name in self.bare:
            module = module_of(self.model, name)
            if (
                isinstance(module, LAYERS)
                and not isinstance(module, StandIn)
                and getattr(module, "bias", None) is not None
            ):
                yield name

    def _biases_of_channels(self, plans: Sequence[Plan]) -> Iterator[str]:
        """Layers that may have got one with the mean of channels that went."""
        choices = [entry.choice for plan in plans for entry in plan]
        for choice in (choice for choice in choices if isinstance(choice, ChannelsChoice)):
            for place in choice.sides:
                if place.axis == IN and getattr(module_of(self.model, place.module), "bias", None) is not None:
                    yield place.module

    def _check_planned(self, plans: Sequence[Plan]) -> None:
        planned = {site for plan in plans for entry in plan for site in entry.sites}
        inside: set[nn.Module] = set()
        for name, module in self.model.named_modules():
            if name in planned:
                inside.update(module.modules())
            if isinstance(module, StandIn) and module not in inside:
                raise CheckpointError(
                    f"layer {name!r} of the {type(self.model).__name__} was compressed together with layers outside of "
                    "it, or by other means than a plan, so it cannot be saved alone: save the whole model, or save "
                    "spectrim.merge(model)"
                )

    def _packed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state with sparse weights as files hold them."""
        densities = {layer: density for plan in self.plans for layer, density in _sparse_parts(self.model, plan)}
        pack_state(self.model, state, state, densities.get)
        return state


def _shipped(config: Any, record: Mapping[str, Any]) -> Any:
    """A configuration that is written with what the model's layers need."""
    shipped = copy.copy(config)
    shipped.__class__ = type(type(config).__name__, (_Shipped, type(config)), {"record": record})
    return shipped


class _Shipped:
    """Of a configuration, while it is written. The weights' name is taken away again by what reads the record."""

    record: Mapping[str, Any]

    def to_diff_dict(self) -> dict[str, Any]:
        written = super().to_diff_dict()  # type: ignore[misc]
        return {**written, "quantization_config": dict(self.record), "transformers_weights": NEEDS}


def declare_ties(model: nn.Module) -> dict[str, str]:
    """Tell transformers which tensors compressed layers share, of which a file holds one; and no longer, once merged.

    What loads reads it of the model, which is told in full, and what saves of the layers, all but the first. Returns
    the first name of each tensor by the others.
    """
    ties: dict[str, str] = {}
    first: dict[Tensor, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        first.setdefault(tensor, name)
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            vars(module).pop(_TIED, None)
        if isinstance(module, StandIn):
            for local, tensor in module.named_parameters(remove_duplicate=False):
                source = first[tensor]
                if source != f"{name}.{local}":
                    ties[f"{name}.{local}"] = source
                    vars(module).setdefault(_TIED, {})[local] = source
    for name, module in model.named_modules():
        told = vars(module).get("all_tied_weights_keys")
        if told is not None:
            names = {n for n, _ in module.named_parameters(remove_duplicate=False)}
            prefix = f"{name}." if name else ""
            pairs = [(target.removeprefix(prefix), source.removeprefix(prefix)) for target, source in ties.items()]
            known = {target: source for target, source in told.items() if target in names}
            vars(module)["all_tied_weights_keys"] = {**dict(p for p in pairs if names.issuperset(p)), **known}
    return ties


def _sparse_parts(model: nn.Module, plan: Plan) -> Iterator[tuple[Masked, float]]:
    """Layers with a mask that a plan led to, and the density of each."""
    for entry in plan:
        if isinstance(entry.choice, SumChoice):
            site = module_of(model, entry.site)
            for module in () if site is None else site.modules():
                if isinstance(module, Masked):
                    yield module, entry.choice.density


def renamed_entries(plan: Plan, rename: Callable[[str], str | None]) -> Plan:
    """The entries of a plan whose modules all have a new name, with these."""
    return replace(plan, entries=tuple(e for e in (_moved(entry, rename) for entry in plan) if e is not None))


def _moved(entry: Entry, rename: Callable[[str], str | None]) -> Entry | None:
    names = {name: rename(name) for name in changed(entry)}
    others = {name: names.pop(name) for name in entry.choice.others}
    if None in names.values():
        return None
    new = {name: str(renamed) for name, renamed in names.items()}
    if isinstance(entry.choice, ChannelsChoice):
        sides = tuple(replace(place, module=new[place.module]) for place in entry.choice.sides)
        return replace(entry, choice=replace(entry.choice, sides=sides))
    members = tuple(new[site] for site in entry.members)
    site = entry.site if members else new[entry.site]
    return replace(entry, members=members, site=site, choice=entry.choice.renamed(others))


def changed(entry: Entry) -> tuple[str, ...]:
    """Names of what an entry changes."""
    return tuple(p.module for p in entry.choice.sides) if isinstance(entry.choice, ChannelsChoice) else entry.sites


def within(prefix: str) -> Callable[[str], str | None]:
    """Names inside of a module for its own; None for others."""
    return lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None


def without_bias(model: nn.Module) -> frozenset[str]:
    """Names of what stands for layers that have none."""
    return frozenset(name for name, m in model.named_modules() if isinstance(m, StandIn) and not m.original.bias)


def module_of(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
