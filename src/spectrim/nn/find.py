"""Find the layers of a model that can be factorised, and say why the others cannot."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spectrim.errors import CalibrationError, UnsupportedLayerError, called_as, did_you_mean
from spectrim.linalg.packing import packed_bytes
from spectrim.linalg.patterns import Pattern
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer, Sites, Skipped, Tied
from spectrim.nn.layers import canonical, is_layer, is_plain, is_quantised, paths_of, spec_of, tied_weights
from spectrim.nn.loose_weights import stored, unheld
from spectrim.nn.obstacles import MERGE, obstacle, obstacle_in_weight, pointless
from spectrim.nn.parameters import asked, parameters_of
from spectrim.nn.standing import LAYERS, StandIn
from spectrim.nn.stored import bytes_of_state

log = logging.getLogger(__name__)
_ANEW = "Find and calibrate the sites in the model that is compressed"
describe = spec_of  # as it was imported from here in 0.1, until 0.3


@called_as("find takes the model, and skip= and only= by name; batches go to calibrate(model, sites, batches)")
def find(
    model: nn.Module, *, skip: Which | Iterable[Which] = (), only: Which | Iterable[Which] = (), parts: bool = False
) -> Sites:
    """List the linear layers, convolutions and embeddings of a model as sites.

    Parameters
    ----------
    model
        Any module. It is not changed; the sites hold detached views of its weights.
    skip, only
        Layers to leave alone, and layers to keep to: shell-style name patterns (``"layer1.*"``, ``"fc"``), module
        types, or predicates ``(name, module) -> bool``. A name pattern that matches no layer is an error.
    parts
        In a network that was compressed before, the layers of a pair or chain are sites by themselves. By default it is
        one site: the layer that it stands for, whose weight is their product and which costs what they cost.

    Returns
    -------
    Sites
        One site a layer, in order of registration, and every layer left out with the reason; so is every other module
        that holds matrices (bags of embeddings, recurrent layers, parameters that ``forward`` multiplies itself). A
        module that is registered under several names is one site; an embedding and a linear layer that have one weight
        are one together (``sites.tied``).

    Raises
    ------
    TypeError
        If the model is no module, or layers are chosen by anything else.
    ValueError
        If a name pattern matches no layer; the message lists the layers.
    """
    check_model(model)
    masks = _masks(model)
    names = paths_of(model)
    # Who calls a sparse layer calls what masks it, which multiplies by itself.
    names |= {layer: names[masked] for layer, (masked, _, _) in masks.items()}
    tied = tied_weights(model)
    chains = {} if parts else {m: found for m in names if (found := _chain(m, names, tied))}
    inside = set(chain.from_iterable(chains.values()))
    # Quantised ones deserve a reason.
    own = {m for m in names if is_quantised(m) or (isinstance(m, LAYERS) and not isinstance(m, StandIn))}
    layers = {m: n for m, n in names.items() if (m in own or m in chains) and m not in inside}
    wanted = Wanted(each_of(skip), each_of(only))
    wanted.check([*chain.from_iterable(layers.values())])
    listing = _Listing(model, wanted, tied, masks)
    listing.add_tied(layers)
    listing.add_sides(names)
    for module, paths in layers.items():
        if module in listing.read_twice:
            continue
        if module in chains:
            listing.add_chain(module, paths, chains[module])
        else:
            listing.add(module, paths)
    found = listing.sites_of(layers)
    log.info("%s: %d layers to choose at, %d left alone", type(model).__name__, len(found), len(found.skipped))
    for left in found.skipped:
        log.debug("left alone: %s (%s): %s", left.name, left.kind, left.reason)
    return found


def misfit(model: nn.Module, sites: Sites) -> str:
    """Why a model has no such layers as sites have; empty if it has."""
    there = dict(model.named_modules(remove_duplicate=False))
    for site in sites.layers:
        if site.name not in there:
            return f"the model has no layer {site.name!r}. {_ANEW}"
        for what, present, known in _tensors_of(there[site.name], site):
            if present is None or known is None:
                if present is not known:
                    return f"layer {site.name!r} has a {what} in one of model and sites alone. {_ANEW}"
            elif present.shape != known.shape or present.dtype != known.dtype:
                here, of_sites = (f"{each.dtype} of shape {list(each.shape)}" for each in (present, known))
                return f"the {what} of layer {site.name!r} is {here} and in the sites {of_sites}. {_ANEW}"
    return ""


def elsewhere(model: nn.Module, sites: Sites) -> str:
    """Why sites are not those of a model, so that what is worked out would be for other weights; empty if they are."""
    if why := misfit(model, sites):
        return why
    there = dict(model.named_modules(remove_duplicate=False))
    for site in sites.layers:
        for what, present, known in _tensors_of(there[site.name], site):
            if present is None or known is None or present.data_ptr() == known.data_ptr():
                continue
            if not torch.equal(present.to(known.device), known):
                return (
                    f"the {what} of layer {site.name!r} has other numbers in the sites, as of another checkpoint or "
                    f"from before a training. {_ANEW}"
                )
    return ""


def _tensors_of(module: nn.Module, site: Layer) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Weight and bias of a plain layer, each as it is there and as its site holds it; none of any other module."""
    if is_plain(module):
        yield from zip(("weight", "bias"), canonical(module), (site.weight, site.bias), strict=True)


@dataclass
class _Listing:
    """The layers of a model, sorted into what a choice can be made for and what is left alone."""

    model: nn.Module
    wanted: Wanted
    tied: Mapping[int, list[str]]  # paths of the modules that hold each weight, for weights held by more than one
    masks: Masks  # of the layers whose weight is sparse
    sites: list[Layer] = field(default_factory=list)
    skipped: dict[str, tuple[nn.Module | None, Skipped]] = field(default_factory=dict)
    untouched: list[LayerSpec] = field(default_factory=list)
    covered: set[int] = field(default_factory=set)  # parameters that are counted with the layers
    read_twice: dict[nn.Module, Tied] = field(default_factory=dict)

    def add_tied(self, layers: Mapping[nn.Module, tuple[str, ...]]) -> None:
        """Embeddings and linear layers that have one weight, two by two, where both can be a part of a site."""
        for found in self._pairs_of_readers(layers):
            # Both readers keep the parameters that they share, a bias that other modules hold among them.
            theirs = {id(p) for module in found for p in module.parameters()}
            apart = {held: names for held, names in self.tied.items() if held not in theirs}
            specs = [spec_of(module, layers[module]) for module in found]
            if any(
                obstacle(self.model, module, layers[module], apart) or self.wanted.reason(module, layers[module], spec)
                for module, spec in zip(found, specs, strict=True)
            ):
                continue
            specs[1] = dataclasses.replace(specs[1], shared=specs[1].stored)
            table, head = (Layer(spec, *canonical(module)) for module, spec in zip(found, specs, strict=True))
            self.read_twice |= dict.fromkeys(found, Tied(table, head))
            self.covered |= theirs

    def add_chain(self, module: nn.Module, paths: tuple[str, ...], parts: tuple[nn.Module, ...]) -> None:
        """A layer that other layers stand for."""
        site = _compressed_before(module, paths, parts)
        # What a class of the user's own adds to its layers is counted with what no layer holds, as before.
        self.covered.update(id(p) for part in parts for p in part.parameters())
        if reason := self.wanted.reason(module, paths, site.spec):
            self.skipped |= {part.name: (None, Skipped(part.name, part.kind, reason)) for part in site.present}
            self.untouched += site.present
        else:
            self.sites.append(site)

    def add_sides(self, names: Mapping[nn.Module, tuple[str, ...]]) -> None:
        """What multiplies by parts of a weight, some of which other layers have too: these are listed by themselves."""
        for module in (m for m in names if asked(m, "reads_weights")):
            spec: Any = asked(module, "original")
            if all(module is not masked for masked, _, _ in self.masks.values()) and isinstance(spec, LayerSpec):
                path = names[module][0]
                self.skipped[path] = None, Skipped(path, spec.kind, f"its weight lies in several parts. {MERGE}")
                self.untouched.append(
                    dataclasses.replace(spec, names=names[module], bias=False, shared=math.prod(spec.shape))
                )

    def add(self, module: nn.Module, paths: tuple[str, ...]) -> None:
        """A layer by itself."""
        sparse = f"sparse: its weight is zero outside a mask. {MERGE}" if module in self.masks else None
        spec = spec_of(module, paths) if is_plain(module) else None
        if spec is not None and module in self.masks:
            spec = _masked(spec, *self.masks[module][1:])
        reason = sparse or obstacle(self.model, module, paths, self.tied) or self.wanted.reason(module, paths, spec)
        if reason is None and spec is not None:
            self.sites.append(Layer(spec, *canonical(module)))
        else:
            kind = spec.kind if spec is not None else type(module).__name__
            self.skipped[paths[0]] = module, Skipped(paths[0], kind, reason or "not a plain layer")
            if spec is not None:
                self.untouched.append(self._as_left(module, spec))
        if spec is not None:
            self.covered.update(id(module._parameters.get(name)) for name in ("weight", "bias"))

    def _pairs_of_readers(self, layers: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Embeddings and linear layers, each of which hold one weight that nothing else has."""
        inside = {part for m in self.model.modules() if isinstance(m, StandIn) for part in m.modules()}
        holders: dict[int, list[nn.Module]] = {}
        for module in layers:
            weight = module._parameters.get("weight")
            if weight is not None and is_plain(module) and module not in inside:
                holders.setdefault(id(weight), []).append(module)
        for key, modules in holders.items():
            found = _two_readers(modules)
            if found is not None and len(self.tied.get(key, ())) == 2:
                yield found

    def _as_left(self, module: nn.Module, spec: LayerSpec) -> LayerSpec:
        """The numbers of a layer that is left alone, as far as they are its own."""
        # What a weight is computed from, and a weight shared with another layer, is counted elsewhere.
        weight = module._parameters.get("weight")
        counted = weight is not None and id(weight) not in self.covered
        # So is a bias that is computed from something, kept as a buffer, or shared.
        bias = module._parameters.get("bias")
        biased = bias is not None and id(bias) not in self.covered
        return dataclasses.replace(spec, bias=biased, shared=0 if counted else math.prod(spec.shape))

    def tied_sites(self) -> tuple[Tied, ...]:
        """Each once, in order of registration."""
        return tuple({id(each): each for each in self.read_twice.values()}.values())

    def sites_of(self, layers: Mapping[nn.Module, tuple[str, ...]]) -> Sites:
        """All of them, with what is no layer and holds matrices."""
        numbers, size = _elsewhere(self.model, self.covered, self.masks)
        left = [self._with_costs(module, told) for module, told in self.skipped.values()]
        return Sites(
            tuple(self.sites), (*left, *unheld(self.model, layers, self.covered)), tuple(self.untouched),
            other_parameters=numbers, other_bytes=size, tied=self.tied_sites(),
        )  # fmt: skip

    def _with_costs(self, module: nn.Module | None, told: Skipped) -> Skipped:
        if module is None or module in self.masks:
            return told
        # What the weight is computed from is counted among the other parameters.
        return dataclasses.replace(told, costs=stored(module.parameters(), self.covered))


def _two_readers(modules: Sequence[nn.Module]) -> tuple[nn.Module, nn.Module] | None:
    """A table and a linear layer, if these are one each."""
    tables = [module for module in modules if isinstance(module, nn.Embedding)]
    heads = [module for module in modules if isinstance(module, nn.Linear)]
    return (tables[0], heads[0]) if len(tables) == len(heads) == 1 and len(modules) == 2 else None


def _chain(
    module: Any, names: Mapping[nn.Module, tuple[str, ...]], tied: Mapping[int, list[str]]
) -> tuple[nn.Module, ...]:
    """The plain layers that stand for a layer, one after the other and nobody else's; none for any other module."""
    # What is part of a sum stands for no layer by itself.
    standing = isinstance(module, StandIn) and isinstance(module, LAYERS) and "" not in names[module]
    held = module.in_order() if standing else ()
    for part in held:
        if not is_layer(part) or obstacle_in_weight(part) or any(id(p) in tied for p in part.parameters()):
            return ()
    try:
        if held and standing:
            module.whole()
    except ValueError:
        return ()  # no one layer computes the same
    return held


@torch.no_grad()
def _compressed_before(module: Any, paths: tuple[str, ...], parts: tuple[nn.Module, ...]) -> Layer:
    """The site of a layer that other layers stand for."""
    weight, bias = module.whole()
    present = tuple(spec_of(part, (f"{paths[0]}.{number}",)) for number, part in enumerate(parts))
    return Layer(spec_of(module, paths), weight.detach(), None if bias is None else bias.detach(), present=present)


def _elsewhere(model: nn.Module, covered: set[int], masks: Masks) -> tuple[int, int]:
    """Parameters outside the layers, and their bytes with those of what else files hold."""
    others = [p for p in parameters_of(model) if id(p) not in covered and not is_lazy(p)]
    # Masks are counted with their layers, as the bytes that files take for them.
    counted_masks = {id(mask) for _, mask, _ in masks.values()}
    return sum(p.numel() for p in others), bytes_of_state(model, covered | counted_masks)


def check_model(model: object) -> None:
    """Raise TypeError for what is no module, UnsupportedLayerError for one whose numbers nothing may change."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model is a {type(model).__name__}: expected a torch.nn.Module, and batches after it; of a result it "
            "is result.model"
        )
    made = next(
        (name for name, p in nn.Module.named_parameters(model) if not is_lazy(p) and p.is_inference()),
        None,
    )
    if made is not None:
        raise UnsupportedLayerError(
            f"{made!r} of the {type(model).__name__} was made in torch.inference_mode(), and can neither be changed "
            "nor give gradients: make the model outside of it, or take copy.deepcopy(model) outside of it"
        )


def check_loaded(model: nn.Module) -> None:
    """Raise CalibrationError for parameters and buffers on the meta device, which have shapes and no numbers.

    Those that accelerate loads when their module is called are there by then.
    """
    for name, module in model.named_modules():
        if asked(module, "_hf_hook") is not None:
            continue
        held = [("weight", each) for each in module._parameters.items()]
        held += [("buffer", each) for each in module._buffers.items()]
        for kind, (key, tensor) in held:
            if tensor is not None and tensor.is_meta and not is_lazy(tensor):
                raise CalibrationError(
                    f"{type(model).__name__}'s {kind} {f'{name}.{key}'.lstrip('.')!r} is on the meta device and has no "
                    "numbers: load them first"
                )


Masks = Mapping[nn.Module, tuple[nn.Module, Tensor, Pattern]]
"""Of each layer whose weight is sparse what holds it (:class:`spectrim.nn.sparse.layers.Masked`), mask and pattern."""


def _masks(model: nn.Module) -> Masks:
    found: dict[nn.Module, tuple[nn.Module, Tensor, Pattern]] = {}
    for module in model.modules():
        mask, kind, layer = (asked(module, name) for name in ("mask", "pattern", "layer"))
        if isinstance(mask, Tensor) and isinstance(kind, Pattern) and isinstance(layer, nn.Module):
            found[layer] = module, mask, kind
    return found


def _masked(spec: LayerSpec, mask: Tensor, kind: Pattern) -> LayerSpec:
    pools, units, entries = kind.size(spec.shape)
    stored = int(mask.sum())
    return dataclasses.replace(
        spec, density=stored / mask.numel(), index_bytes=packed_bytes(pools * units, stored // entries)
    )


Which = str | type | Callable[[str, nn.Module], bool]
"""Layers: a name pattern, a class of modules, or a function of a module's path and the module."""


@dataclass(frozen=True)
class Wanted:
    """What is left alone, and what is kept to."""

    skips: list[Which]
    onlys: list[Which]

    def check(self, paths: list[str]) -> None:
        """Raise ValueError for a name pattern that matches no layer."""
        for pattern in [*self.skips, *self.onlys]:
            if isinstance(pattern, str) and not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                raise ValueError(
                    f"the name pattern {pattern!r} matches no layer; layers are: {', '.join(paths) or 'none'}. "
                    f"For all layers of a part write 'part.*'.{_close(pattern, paths)}"
                )

    def reason(self, module: nn.Module, paths: tuple[str, ...], spec: LayerSpec | None) -> str | None:
        """Why a layer that could be factorised is left alone, or None."""
        # First: a depthwise layer is left out in any case, but only on request does it keep its channels.
        if any(_matches(which, paths, module) for which in self.skips):
            return "skipped on request"
        if spec is not None and (why := pointless(spec)):
            return why
        if self.onlys and not any(_matches(which, paths, module) for which in self.onlys):
            return "not among the layers asked for"
        return None


def _close(pattern: str, paths: list[str]) -> str:
    """A question where a part of the model was meant, or a layer was misspelt."""
    if any(path.startswith(f"{pattern}.") for path in paths):
        return f" Did you mean '{pattern}.*'?"
    return did_you_mean(pattern, paths)


def each_of(given: Which | Iterable[Which]) -> list[Which]:
    several = [given] if isinstance(given, (str, type, nn.Module)) or not isinstance(given, Iterable) else list(given)
    for which in several:
        if isinstance(which, nn.Module) or not (isinstance(which, (str, type)) or callable(which)):
            raise TypeError(
                f"cannot choose layers by {' '.join(repr(which).split())[:80]}: expected a name pattern such as "
                "'layer1.*', a module type, or a function (name, module) -> bool"
            )
    return several


def _matches(which: Which, paths: tuple[str, ...], module: nn.Module) -> bool:
    if isinstance(which, str):
        return any(fnmatch.fnmatchcase(path, which) for path in paths)
    if isinstance(which, type):
        return isinstance(module, which)
    return any(which(path, module) for path in paths)
