"""Find the layers of a model that can be factorised, and say why the others cannot."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from spectrim.errors import UnsupportedLayerError, called_as, did_you_mean
from spectrim.linalg.packing import packed_bytes
from spectrim.linalg.patterns import Pattern
from spectrim.network.layer import LayerSpec, Lookup
from spectrim.network.sites import Layer, Sites, Skipped, Tied, tied_to
from spectrim.nn.parameters import parameters_of
from spectrim.nn.standing import LAYERS, StandIn
from spectrim.nn.stored import bytes_of_state
from spectrim.nn.unheld import stored, unheld

log = logging.getLogger(__name__)

Which = str | type | Callable[[str, nn.Module], bool]
"""Layers: a name pattern, a class of modules, or a function of a module's path and the module."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Layers that torch keeps the weight of with the inputs first.
_INPUTS_FIRST = (nn.Embedding, *_TRANSPOSED)
# Of a part of a compressed layer.
_MERGE = "To compress the layer again, compress spectrim.merge(model)"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    names = paths_of(model)
    tied = tied_weights(model)
    chains = {} if parts else {m: found for m in names if (found := _chain(m, names, tied))}
    inside = {part for found in chains.values() for part in found}
    # Quantised ones deserve a reason.
    own = {m for m in names if _is_quantised(m) or (isinstance(m, LAYERS) and not isinstance(m, StandIn))}
    layers = {m: n for m, n in names.items() if (m in own or m in chains) and m not in inside}
    wanted = _Wanted(_each(skip), _each(only))
    wanted.check([n for group in layers.values() for n in group])
    listing = _Listing(model, wanted, tied, _masks(model))
    listing.add_tied(layers)
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


@dataclass
class _Listing:
    """The layers of a model, sorted into what a choice can be made for and what is left alone."""

    model: nn.Module
    wanted: _Wanted
    tied: Mapping[int, list[str]]  # paths of the modules that hold each weight, for weights held by more than one
    masks: Mapping[nn.Module, tuple[Tensor, Pattern]]  # of the layers whose weight is sparse
    sites: list[Layer] = field(default_factory=list)
    skipped: dict[str, tuple[nn.Module | None, Skipped]] = field(default_factory=dict)
    untouched: list[LayerSpec] = field(default_factory=list)
    covered: set[int] = field(default_factory=set)  # parameters that are counted with the layers
    read_twice: dict[nn.Module, Tied] = field(default_factory=dict)

    def add_tied(self, layers: Mapping[nn.Module, tuple[str, ...]]) -> None:
        """Embeddings and linear layers that have one weight, two by two, where both can be a part of a site."""
        inside = {part for m in self.model.modules() if isinstance(m, StandIn) for part in m.modules()}
        holders: dict[int, list[nn.Module]] = {}
        for module in layers:
            weight = module._parameters.get("weight")
            if weight is not None and _is_plain(module) and module not in inside:
                holders.setdefault(id(weight), []).append(module)
        for key, modules in holders.items():
            found = _two_readers(modules)
            if found is None or len(self.tied.get(key, ())) != 2:
                continue
            # Both readers keep the parameters that they share, a bias that other modules hold among them.
            theirs = {id(p) for module in found for p in module.parameters()}
            apart = {held: names for held, names in self.tied.items() if held not in theirs}
            specs = [describe(module, layers[module]) for module in found]
            if any(
                _obstacle(self.model, module, layers[module], apart) or self.wanted.reason(module, layers[module], spec)
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
        self.covered.update(id(p) for p in module.parameters())
        if reason := self.wanted.reason(module, paths, site.spec):
            self.skipped |= {part.name: (None, Skipped(part.name, part.kind, reason)) for part in site.present}
            self.untouched += site.present
        else:
            self.sites.append(site)

    def add(self, module: nn.Module, paths: tuple[str, ...]) -> None:
        """A layer by itself."""
        sparse = f"sparse: its weight is zero outside a mask. {_MERGE}" if module in self.masks else None
        spec = describe(module, paths) if _is_plain(module) else None
        if spec is not None and module in self.masks:
            spec = _masked(spec, *self.masks[module])
        reason = sparse or _obstacle(self.model, module, paths, self.tied) or self.wanted.reason(module, paths, spec)
        if reason is None and spec is not None:
            self.sites.append(Layer(spec, *canonical(module)))
        else:
            kind = spec.kind if spec is not None else type(module).__name__
            self.skipped[paths[0]] = module, Skipped(paths[0], kind, reason or "not a plain layer")
            if spec is not None:
                self.untouched.append(self._as_left(module, spec))
        if spec is not None:
            self.covered.update(id(module._parameters.get(name)) for name in ("weight", "bias"))

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
        if not is_layer(part) or _obstacle_in_weight(part) or any(id(p) in tied for p in part.parameters()):
            return ()
    try:
        if held and standing:
            module.whole()
    except ValueError:
        return ()  # no one layer computes the same
    return held


def _holds_its_own(layer: nn.Module) -> bool:
    """Whether weight and bias are parameters of the layer, and not computed before every call."""
    wanted = {"weight"} if isinstance(layer, nn.Embedding) else {"weight", "bias"}
    return wanted <= layer._parameters.keys()


@torch.no_grad()
def _compressed_before(module: Any, paths: tuple[str, ...], parts: tuple[nn.Module, ...]) -> Layer:
    """The site of a layer that other layers stand for."""
    weight, bias = module.whole()
    present = tuple(describe(part, (f"{paths[0]}.{number}",)) for number, part in enumerate(parts))
    return Layer(describe(module, paths), weight.detach(), None if bias is None else bias.detach(), present=present)


def _elsewhere(
    model: nn.Module, covered: set[int], masks: Mapping[nn.Module, tuple[Tensor, Pattern]]
) -> tuple[int, int]:
    """Parameters outside the layers, and their bytes with those of what else files hold."""
    others = [p for p in parameters_of(model) if id(p) not in covered and not is_lazy(p)]
    # Masks are counted with their layers, as the bytes that files take for them.
    counted_masks = {id(mask) for mask, _ in masks.values()}
    return sum(p.numel() for p in others), bytes_of_state(model, covered | counted_masks)


@dataclass(frozen=True)
class _Wanted:
    """Which layers a user leaves alone, and which ones the user keeps to."""

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
        if spec is not None and (pointless := _pointless(spec)):
            return pointless
        if self.onlys and not any(_matches(which, paths, module) for which in self.onlys):
            return "not among the layers asked for"
        return None


def _close(pattern: str, paths: list[str]) -> str:
    """A question where a part of the model was meant, or a layer was misspelt."""
    if any(path.startswith(f"{pattern}.") for path in paths):
        return f" Did you mean '{pattern}.*'?"
    return did_you_mean(pattern, paths)


def check_model(model: object) -> None:
    """Raise TypeError for what is no module, UnsupportedLayerError for one whose numbers nothing may change."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}: expected a torch.nn.Module")
    made = next(
        (name for name, p in nn.Module.named_parameters(model) if not is_lazy(p) and p.is_inference()),
        None,
    )
    if made is not None:
        raise UnsupportedLayerError(
            f"{made!r} of the {type(model).__name__} was made in torch.inference_mode(), and can neither be changed "
            "nor give gradients: make the model outside of it, or take copy.deepcopy(model) outside of it"
        )


def describe(module: nn.Module, names: Iterable[str]) -> LayerSpec:
    """The numbers of a linear layer, convolution or embedding. Raises UnsupportedLayerError for any other module."""
    names = tuple(names)
    weight = _weight(module)
    assert isinstance(weight, Tensor)
    common: dict[str, Any] = {
        "names": names,
        "bias": getattr(module, "bias", None) is not None,
        "dtype": weight.dtype,
        "device": str(weight.device),
    }
    if isinstance(module, nn.Linear):
        return LayerSpec(in_channels=module.in_features, out_channels=module.out_features, **common)
    if isinstance(module, nn.Embedding):
        places = {"in_channels": module.num_embeddings, "out_channels": module.embedding_dim}
        return Lookup(padding_idx=module.padding_idx, **places, **common)
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        return LayerSpec(
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=_padding(module),
            dilation=tuple(module.dilation),
            output_padding=tuple(module.output_padding),
            groups=module.groups,
            transposed=isinstance(module, _TRANSPOSED),
            padding_mode=module.padding_mode,
            **common,
        )
    raise UnsupportedLayerError(
        f"{names[0]!r} is a {type(module).__name__}; expected nn.Linear, nn.Embedding or nn.Conv*"
    )


def _padding(module: Any) -> tuple[int, ...] | str:
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    return module.padding if isinstance(module.padding, str) else tuple(module.padding)


def canonical(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight as ``[g, o, i, *k]`` and bias, detached. Views where torch's layout allows it."""
    weight, bias = opened(module)
    return weight.detach(), None if bias is None else bias.detach()


def opened(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """As :func:`canonical`, with gradients."""
    weight = module.weight
    bias = getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    groups = getattr(module, "groups", 1)
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    if isinstance(module, _INPUTS_FIRST):
        grouped = grouped.transpose(1, 2)
    return grouped, bias if isinstance(bias, Tensor) else None


def paths_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """The names of each module, in order of registration."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name)
    return names


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's layers itself, and nothing that stands for one."""
    return type(module) in LAYERS


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a layer whose weight can be read as an ordinary tensor of numbers."""
    weight = _weight(module) if isinstance(module, LAYERS) else None
    return isinstance(weight, Tensor) and not is_lazy(weight) and weight.numel() > 0


def _weight(module: nn.Module) -> Any:
    """A layer's weight as evaluation reads it: in training, reading a spectral norm moves what it is computed from."""
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight
    parts = module.get_submodule("parametrizations")
    modes = [(part, part.training) for part in parts.modules()]
    try:
        parts.eval()
        with torch.no_grad():
            return module.weight
    finally:
        for part, mode in modes:
            part.training = mode


def _is_quantised(module: nn.Module) -> bool:
    home = type(module).__module__
    return "quantized" in home and hasattr(module, "weight") and not isinstance(module, nn.Sequential)


def _masks(model: nn.Module) -> dict[nn.Module, tuple[Tensor, Pattern]]:
    """Mask and pattern of the layers whose weight is sparse (:class:`spectrim.nn.sparse.layers.Masked`)."""
    found: dict[nn.Module, tuple[Tensor, Pattern]] = {}
    for module in model.modules():
        mask, kind, layer = (getattr(module, name, None) for name in ("mask", "pattern", "layer"))
        if isinstance(mask, Tensor) and isinstance(kind, Pattern) and isinstance(layer, nn.Module):
            found[layer] = mask, kind
    return found


def _masked(spec: LayerSpec, mask: Tensor, kind: Pattern) -> LayerSpec:
    pools, units, entries = kind.size(spec.shape)
    stored = int(mask.sum())
    return dataclasses.replace(
        spec, density=stored / mask.numel(), index_bytes=packed_bytes(pools * units, stored // entries)
    )


def tied_weights(model: nn.Module) -> dict[int, list[str]]:
    """Paths of the modules that hold each weight, for weights held by more than one module."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in holders.items() if len(names) > 1}


def _obstacle(model: nn.Module, module: nn.Module, paths: tuple[str, ...], tied: Mapping[int, list[str]]) -> str | None:
    """Why a layer cannot be factorised, or None."""
    if reason := _obstacle_in_weight(module) or _changes_forward(module) or _changes_rows(module):
        return reason
    if reason := _read_above(model, paths):
        return reason
    for name, tensor in module._parameters.items():
        if id(tensor) in tied:
            others = ", ".join(n or "the model itself" for n in tied[id(tensor)] if n not in paths)
            part = any(isinstance(above, StandIn) for above in _above(model, paths))
            return f"its {name} is tied to {others}. {_MERGE}" if part else tied_to(name, others)
    if module._modules:
        return f"it holds modules of its own ({', '.join(module._modules)}): move them to the module that holds it"
    return "the model itself is this layer: wrap it in nn.Sequential" if "" in paths else None


def _obstacle_in_weight(module: nn.Module) -> str | None:
    """Why the weight of a layer cannot be read as a plain tensor of numbers, or None."""
    if _is_quantised(module):
        return "quantised: the weight is not a floating-point matrix"
    if is_lazy(_weight(module)):
        return "lazy: run the model once so that its weight has a shape"
    # Weight and spectral normalisation of the older kind, and pruning masks, set the weight before every call.
    if parametrize.is_parametrized(module) or not _holds_its_own(module):
        return f"parametrised: remove the parametrisation first ({_removes(module)})"
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.dtype not in _DTYPES:
        return f"its weight is not a floating-point tensor ({getattr(weight, 'dtype', type(weight).__name__)})"
    # Quantised and distributed weights pass for floating-point ones by a tensor type of their own.
    if type(weight) not in (Tensor, nn.Parameter) or weight.layout != torch.strided:
        return (
            f"its weight is a {type(weight).__name__} of layout {weight.layout}, not a plain dense tensor: compress "
            "the network before it is sharded or quantised"
        )
    if not weight.numel():
        return "empty: it has no inputs or no outputs"
    return "its weight is on the meta device and has no values" if weight.is_meta else None


def _changes_forward(module: nn.Module) -> str | None:
    """Why a layer is not run as torch runs it, or None."""
    base = next(b for b in LAYERS if isinstance(module, b))
    if "forward" in vars(module) or any(
        getattr(type(module), name, None) is not getattr(base, name, None) for name in ("forward", "_conv_forward")
    ):
        name = type(module).__name__
        kind = f"{type(module).__module__}.{name}" if name == base.__name__ else name
        return f"{kind} overrides forward: put a plain nn.{base.__name__} in its place"
    return None


def _read_above(model: nn.Module, paths: Sequence[str]) -> str | None:
    """Why modules that hold a layer read its weight, or None."""
    for path in paths:
        parent = model.get_submodule(path.rpartition(".")[0]) if path else model
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight directly: compress spectrim.with_linear_layers(model)"
    if any(getattr(above, "reads_weights", False) for above in _above(model, paths)):
        return f"its weight is one part of a layer's. {_MERGE}"
    return None


def _above(model: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    """The modules that hold a layer, from the model on."""
    for path in paths:
        names = path.split(".")
        yield from (model.get_submodule(".".join(names[:n])) for n in range(len(names)))


def _changes_rows(module: nn.Module) -> str | None:
    """Why the rows of a table are not what is looked up, or not trained as they are; None if they are."""
    if not isinstance(module, nn.Embedding):
        return None
    if module.max_norm is not None:
        return "max_norm changes its rows when they are looked up, which those of a pair are not: scale them beforehand"
    if module.sparse or module.scale_grad_by_freq:
        return "its gradients are sparse or scaled by how often a row is asked for, which those of a pair are not"
    return None


def _removes(module: nn.Module) -> str:
    """The function of torch that takes a parametrisation away."""
    if parametrize.is_parametrized(module):
        return "torch.nn.utils.parametrize.remove_parametrizations"
    held = {*module._parameters, *module._buffers}
    if "weight_g" in held:
        return "torch.nn.utils.remove_weight_norm"
    if "weight_mask" in held:
        return "torch.nn.utils.prune.remove"
    if "weight_u" in held:
        return "torch.nn.utils.remove_spectral_norm"
    return "make its weight and bias parameters; compress what FSDP shards before that"


def _pointless(spec: LayerSpec) -> str | None:
    _, o, i, *_ = spec.shape
    if spec.groups > 1 and (i == 1 or o == 1):
        return "depthwise: each group has one channel, so there is no matrix to factor"
    return None


def _each(given: Which | Iterable[Which]) -> list[Which]:
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
