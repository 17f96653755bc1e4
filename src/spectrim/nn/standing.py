"""What stands in place of a layer: the layer's own object, still of its own type, that computes in another way.

Whoever holds a layer (its parent, a list, a closure's cell, a hook) goes on holding it, and whoever reads it is
answered: sizes, attributes and hooks stay, ``isinstance`` holds, and the weight is multiplied out where its numbers are
asked for.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from spectrim.errors import PlanError, ReadOnlyWeightError
from spectrim.network.layer import LayerSpec

LAYERS = (
    *(nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_EVERY_MODULE = frozenset(vars(nn.Module()))
_PARTS = ("_parameters", "_buffers", "_modules")
_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "num_embeddings", "embedding_dim")
# Names of what a stand-in has brought to the layer, among the attributes of that layer.
_BROUGHT = "_brought"


class StandIn(nn.Module):
    """Computes what a layer does, or nearly, from other numbers; ``original`` is the spec of that layer."""

    # TorchScript would compile properties and annotations.
    __jit_unused_properties__ = ("weight", "bias", "first", "second", "rank", "support", "kernel", "kernels")
    if TYPE_CHECKING:
        original: LayerSpec
    # The layer's own type, of what has taken a layer's place.
    _stands_for: type[nn.Module] | None = None
    # It has no numbers of its own for transformers to fill, which would ask for its product while parts lie packed.
    _is_hf_initialized = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # What a user's type does with types that are derived from it (registers, refuses) is not meant for these.
        if cls._stands_for is None:
            super().__init_subclass__(**kwargs)

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight ``[g, o, i, *k]``, multiplied out, and bias."""
        raise NotImplementedError

    def in_order(self) -> tuple[nn.Module, ...]:
        """The layers it is made of where they run one after the other and are all; none otherwise."""
        return ()

    def bias_parameter(self) -> nn.Parameter | None:
        """The layer's bias where one part has it as it is; None where there is none, or it is computed of several."""
        bias = self.bias
        return bias if isinstance(bias, nn.Parameter) else None

    def adopt(self, layer: nn.Module) -> None:
        """Take what is the layer's own still, before taking its place."""

    @property
    def weight(self) -> Tensor:
        """The layer's weight in torch's layout: read-only, and multiplied out only where its numbers are asked for."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return laid_out(self.whole()[0], self.original)
        return WholeWeight(self)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias: the parameter itself where one part has it."""
        return self.whole()[1]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Pruning of torch would keep the weight under another name.
        if name in ("weight", "bias", "weight_orig", "bias_orig"):
            raise _written(self, name.removesuffix("_orig"))
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if self._stands_for is None:
            return reduced
        # Types made while running cannot be found by their names.
        kind = next(k for k in type(self).__mro__[1:] if issubclass(k, StandIn))
        return (_made_again, (kind, self._stands_for), *reduced[2:])


class WholeWeight(Tensor):
    """The weight of a layer that is stored as other numbers.

    Shape, dtype and device are known, values are multiplied out when an operation reads them. It gives gradients to
    what it is made of, and cannot be written to.
    """

    layer: StandIn
    differentiable: bool
    # transformers leaves alone what says so when it fills the weights that a file did not have.
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, layer: StandIn, *, differentiable: bool = True) -> WholeWeight:
        spec = layer.original
        held = next(layer.parameters(), spec)
        g, o, i, *kernel = spec.shape
        shape = (g * o, i, *kernel) if not spec.transposed else (g * i, o, *kernel)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=held.dtype, device=held.device)  # type: ignore[attr-defined]

    def __init__(self, layer: StandIn, *, differentiable: bool = True) -> None:
        self.layer = layer
        self.differentiable = differentiable

    def multiplied_out(self) -> Tensor:
        """An ordinary tensor of the values."""
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return laid_out(self.layer.whole()[0], self.layer.original)

    def _hollow(self) -> Tensor:
        """A tensor of the same shape, dtype and device for what reads no number of it."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        me = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(me, WholeWeight):
            if aliases(func):
                return WholeWeight(me.layer, differentiable=False)
            if name == "requires_grad":
                return me.differentiable and any(p.requires_grad for p in me.layer.parameters())
            if name in _TOLD:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if _writes(name):
                raise _written(me.layer, "weight")
        if isinstance(kwargs.get("out"), WholeWeight):
            raise _written(kwargs["out"].layer, "weight")
        if name in (*_LIKE, *_AS):
            first = 1 if name in _AS else 0
            args = (*args[:first], *tree_map_only(WholeWeight, WholeWeight._hollow, args[first:]))
            kwargs = tree_map_only(WholeWeight, WholeWeight._hollow, kwargs)
        args, kwargs = tree_map_only(WholeWeight, WholeWeight.multiplied_out, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(WholeWeight, WholeWeight.multiplied_out, (args, kwargs or {}))
        return func(*args, **kwargs)


# What is told of a weight without its numbers.
_TOLD = frozenset(
    {
        *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "names", "grad", "grad_fn", "is_leaf"),
        *("is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized"),
        *("is_nested", "is_mkldnn", "retains_grad", "_backward_hooks", "_post_accumulate_grad_hooks"),
        *("size", "dim", "ndimension", "numel", "nelement", "element_size", "__len__", "stride", "storage_offset"),
        *("is_floating_point", "is_complex", "is_conj", "is_neg", "is_inference", "is_contiguous", "get_device"),
        *("requires_grad", "is_signed"),
    }
)
# What makes a tensor of the same kind as a weight, and what makes another tensor, its first argument, of that kind.
_LIKE = frozenset(
    {
        *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
        *("new", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
    }
)
_AS = frozenset({"to", "type_as", "view_as", "reshape_as", "expand_as"})
_IN_PLACE = frozenset(
    f"__i{name}__"
    for name in (
        *("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow"),
        *("and", "or", "xor", "lshift", "rshift"),
    )
)


def aliases(function: Any) -> bool:
    """Whether a function gives the same numbers under another name."""
    return _name(function) in ("data", "detach")


def read_of(function: Any, args: Any, kwargs: Any) -> Any:
    """The arguments of a function whose numbers it may read, and not shape, dtype, device and the like alone."""
    name = _name(function)
    if name in _TOLD or name in _LIKE or aliases(function):
        return ()
    return args[:1] if name in _AS else (args, kwargs)


def _name(function: Any) -> str:
    """Name of a function; of the getter of an attribute that of the attribute, of a setter with ``_``."""
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__"):
        return function.__self__.__name__ + ("" if name == "__get__" else "_")
    return name


def _writes(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    return name == "__setitem__" or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _written(layer: StandIn, name: str) -> ReadOnlyWeightError:
    return ReadOnlyWeightError(
        f"the {name} of layer {layer.original.name!r} ({layer.original.kind}) cannot be written: it is multiplied out "
        f"of {', '.join(n for n, _ in layer.named_parameters())}. Write to these, pass the layer by "
        "(tools that change layers by type: type(m) is nn.Linear; compression: skip=), or give the layer one weight "
        "again with spectrim.merge(model)"
    )


@functools.cache
def _standing(kind: type[StandIn], layer: type[nn.Module]) -> type[StandIn]:
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_stands_for": layer}
    return type(f"{kind.__name__}{layer.__name__}", (kind, layer), names)


def _made_again(kind: type[StandIn], layer: type[nn.Module]) -> StandIn:
    made = _standing(kind, layer)
    return made.__new__(made)


def fits(layer: nn.Module, module: nn.Module) -> bool:
    """Whether a module can take over a layer: as what stands for one, or as a plain layer of its kind."""
    own = getattr(layer, "_stands_for", None) or type(layer)
    kind = next((k for k in LAYERS if issubclass(own, k)), None)
    return kind is not None and (isinstance(module, StandIn) or type(module) is kind)


def _become(layer: nn.Module, own: type[nn.Module], stand_in: type[StandIn] | None) -> None:
    """Make a layer one of its own class that computes as a stand-in does, or none that does."""
    try:
        # Not by the layer's own way to set attributes, which may be anything.
        object.__setattr__(layer, "__class__", own if stand_in is None else _standing(stand_in, own))
    except TypeError as error:
        raise PlanError(
            f"nothing can stand in the place of a {own.__name__}, whose type allows no derived one ({error}): put a "
            "plain layer of torch there, or skip the layer"
        ) from error


def take_over(layer: nn.Module, module: nn.Module) -> None:
    """Have a layer compute as a module does, in place; or, for a plain layer of its kind, have it be that layer again.

    The module gives its parts and is not to be used any more. Raises PlanError if the layer has parts of its own under
    names that the module needs.
    """
    own = getattr(layer, "_stands_for", None) or type(layer)
    standing = isinstance(module, StandIn)
    state, brought = vars(layer), vars(layer).get(_BROUGHT, frozenset({"weight", "bias"}))
    kept = {part: {name: value for name, value in state[part].items() if name not in brought} for part in _PARTS}
    new = {name: value for name, value in vars(module).items() if name not in _EVERY_MODULE}
    if not standing:
        new = {name: value for name, value in new.items() if name in _SIZES}
    parts = [name for part in _PARTS for name in vars(module)[part]]
    taken = set(itertools.chain.from_iterable(kept.values())) | (state.keys() - set(_SIZES) - brought)
    clash = [name for name in [*parts, *new] if name in taken]
    if clash:
        raise PlanError(
            f"a {own.__name__} has a part {clash[0]!r} of its own, which a {type(module).__name__} in its place needs: "
            "rename it, or skip the layer"
        )
    _become(layer, own, type(module) if standing else None)
    for name in brought:
        state.pop(name, None)
    state.update(kept)
    for part in _PARTS:
        state[part].update(vars(module)[part])
    state.update(new)
    state["_load_state_dict_post_hooks"].update(vars(module)["_load_state_dict_post_hooks"])
    state.pop(_BROUGHT, None)
    if standing:
        state[_BROUGHT] = frozenset([*new, *parts])
    layer.train(layer.training)


def sized(layer: StandIn) -> None:
    """Have the sizes among a layer's attributes be those of what it stands for."""
    spec = layer.original
    for name, size in zip(_SIZES, (spec.in_channels, spec.out_channels) * 3, strict=True):
        if name in vars(layer):
            setattr(layer, name, size)


def as_containers(model: nn.Module) -> None:
    """Have what stands for layers be containers of their parts, in place, for tools that ask for types."""
    for module in model.modules():
        if getattr(type(module), "_stands_for", None):
            object.__setattr__(module, "__class__", type(module).__mro__[1])


def laid_out(weight: Tensor, spec: LayerSpec) -> Tensor:
    """A canonical ``[g, o, i, *k]`` in the layout of torch's layer."""
    moved = weight.transpose(1, 2) if spec.transposed else weight
    return moved.flatten(0, 1).contiguous() if spec.kernel else moved[0].contiguous()


def laid_open(weight: Tensor, spec: LayerSpec) -> Tensor:
    """Inverse of :func:`laid_out`."""
    opened = weight.reshape(spec.groups, weight.shape[0] // spec.groups, *weight.shape[1:])
    return opened.transpose(1, 2) if spec.transposed else opened
