"""Proof that a compressed network and what merge makes of it compute the same, at a small share of a forward pass.

Layers that are soon multiplied out are merged whole. Of a dear one some outputs are, by the same code: in the merged
network it is a plain layer to all who ask, which answers as before, and those outputs are compared on the spot.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import ProofError
from spectrim.network.layer import LayerSpec
from spectrim.nn.copying import copy_model
from spectrim.nn.layers import spec_of
from spectrim.nn.modules import Chained, Factored, dense_layer, make_layer, whole
from spectrim.nn.parameters import parameters_of
from spectrim.nn.sparse.layers import Cropped, Masked, Slim, Summed
from spectrim.nn.standing import StandIn, fits, take_over
from spectrim.nn.surgery import merged_at, replace_module, stand_ins
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.nesting import compared, output_tensors
from spectrim.nn.watch.observe import Hook, observe, on_few

# Difference of outputs that rounding explains, as a share of them.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-2}
_ROUNDING_OF_FEW_BITS = 0.1
# Multiplying out layers whole may take this share of a forward pass of the batch, or so many MACs, which are soon done.
_MULTIPLIED, _SOON = 0.25, 1e9
# Outputs of each group that are multiplied out of a layer that is dear.
_OUTPUTS = 8
# Passes of one sample that show whether outputs jump.
_DRAWS = 3


def check_merged(
    small: nn.Module, batch: Any, feed: Feed, work: float, known: Sequence[Tensor] | None = None
) -> Iterator[str]:
    """Whether a network computes the same with one weight in place of layers that stand for others.

    A forward pass of the batch is so much ``work`` in MACs, and what the network gives for its first sample may be
    ``known``. Yields what was not compared, and why. Raises ProofError if the merged network cannot be run or computes
    something else.
    """
    every = stand_ins(small)
    if not every:
        return
    soon, dear = _shared_out(every, max(_SOON, _MULTIPLIED * work))
    precise = compared_with = _precise(small)
    try:
        merged = _Merged.of(precise, soon, dear)
    except ValueError as error:
        yield f"the network was not compared with what merge makes of it: {error}"
        return
    try:
        try:
            outputs = _answers(precise, merged, batch, feed, known if precise is small else None)
        except Exception:  # it casts to few bits by itself
            if precise is small:
                raise
            compared_with, merged = small, _Merged.of(small, soon, dear)
            outputs = _answers(small, merged, batch, feed)
    except Exception as error:
        raise ProofError(
            f"merged, the compressed {type(small).__name__} cannot be run: {type(error).__name__}: {error}. It asks "
            "what its layers are; ask isinstance, or skip= the layers concerned"
        ) from error
    for part in merged.parts:
        part.check()
    for a, b, again in zip(*outputs, strict=False):
        if not a.is_floating_point() or a.shape != b.shape or a.shape != again.shape:
            continue
        gap, noise = _gap(a, b), _gap(a, again)
        if bool(gap > _rounding(a) + 2 * noise):
            if _jumps(compared_with, batch, feed):
                yield from _one_by_one(compared_with, batch, feed)
                return
            raise ProofError(
                f"merged, the compressed {type(small).__name__} computes something else (by "
                f"{float(gap / a.double().norm()):.2g} of "
                "its outputs): it asks what its layers are, such as type(layer) is nn.Linear, their children, names or "
                "number of parameters. Ask isinstance, or skip= the layers concerned"
            )


@dataclass(frozen=True)
class _Merged:
    """A merged network, and the layers of it that are merged in part."""

    model: nn.Module
    parts: Sequence[_InPart]

    @classmethod
    def of(
        cls, model: nn.Module, soon: Mapping[StandIn, Sequence[str]], dear: Mapping[StandIn, Sequence[str]]
    ) -> _Merged:
        """Of a model, or of a copy whose layers have the same names. Raises ValueError if a layer cannot be merged."""
        merged = merged_at(model, soon) if soon else copy_model(model)
        return cls(merged, [_InPart.put(merged, names) for names in dear.values()])


@dataclass
class _InPart:
    """A layer of which some outputs are merged, held against what stands for it at every call."""

    stand_in: StandIn
    plain: nn.Module  # the layer with one weight for these outputs
    outputs: Tensor
    # By how much they differ, and what rounding explains.
    gaps: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def put(cls, model: nn.Module, names: Sequence[str]) -> _InPart:
        """Have a layer of a model be a plain one that answers as before."""
        layer: Any = model.get_submodule(names[0])
        # Copies hold the parts that the layer is about to lose.
        stand_in, plain = copy.copy(layer), copy.copy(layer)
        groups, out = layer.original.shape[:2]
        kept = torch.linspace(0, out - 1, min(_OUTPUTS, out)).round().long()
        narrow = dense_layer(some_outputs(layer, kept))
        if fits(plain, narrow):
            take_over(plain, narrow)
        else:
            plain = narrow
        replace_module(model, names, _unfilled(layer.original, narrow))
        part = cls(stand_in, plain, (kept + out * torch.arange(groups).unsqueeze(1)).flatten())
        model.get_submodule(names[0]).forward = part
        return part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not the modules, whose hooks are those of the layer, which is being called.
        y, some = self.stand_in.forward(*args, **kwargs), self.plain.forward(*args, **kwargs)
        picked = y.index_select(-1 - len(self.stand_in.original.kernel), self.outputs.to(y.device))
        # Outputs of nearly nothing are rounded as the others are.
        explained = max(_rounding(picked), _rounding(y) * math.sqrt(picked.numel() / max(y.numel(), 1)))
        self.gaps.append((_gap(picked, some), explained))
        return y

    def check(self) -> None:
        """Raise ProofError for what rounding does not explain."""
        for gap, explained in self.gaps:
            if bool(gap > explained):
                spec = self.stand_in.original
                raise ProofError(
                    f"merged, layer {spec.name!r} ({spec.kind}) computes something else than what stands for it (by "
                    f"{float(gap / explained):.2g} times what rounding explains): skip={spec.name!r}"
                )


def _unfilled(spec: LayerSpec, like: Any) -> nn.Module:
    """A plain layer of no numbers, of the dtype and on the device of another one, with a bias if that has one."""
    bias, weight = getattr(like, "bias", None), like.weight
    layer: Any = make_layer(replace(spec, bias=bias is not None, dtype=weight.dtype, device="meta"))
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(weight.new_zeros(()).expand(parameter.shape)))
    return layer


@singledispatch
def some_outputs(layer: nn.Module, kept: Tensor) -> nn.Module:
    """A layer that has some of the outputs of another one and can be merged, of which merging it asks as much.

    ``kept`` are numbers of outputs in every group. This is of a plain layer, or one whose weight is laid out and not
    multiplied out.
    """
    weight, bias = whole(layer)
    kept = kept.to(weight.device)
    spec: Any = getattr(layer, "original", None) or spec_of(layer, ("part",))
    some = None if bias is None else bias.reshape(len(weight), -1)[:, kept].flatten()
    spec = replace(spec, out_channels=len(weight) * len(kept), bias=bias is not None, dtype=weight.dtype)
    return make_layer(replace(spec, device=str(weight.device)), weight[:, kept], some)


@some_outputs.register(Factored)
@some_outputs.register(Chained)
def _(layer: StandIn, kept: Tensor) -> nn.Module:
    name, last = list(layer.named_children())[-1]
    return _with_parts(layer, kept, {name: some_outputs(last, kept)})


@some_outputs.register
def _(layer: Summed, kept: Tensor) -> nn.Module:
    return _with_parts(layer, kept, {name: some_outputs(part, kept) for name, part in layer.named_children()})


def _with_parts(layer: StandIn, kept: Tensor, parts: Mapping[str, nn.Module]) -> nn.Module:
    other = copy.copy(layer)
    vars(other)["_modules"] = {**layer._modules, **parts}
    other.original = replace(layer.original, out_channels=layer.original.groups * len(kept))
    return other


def _shared_out(
    every: Mapping[StandIn, Sequence[str]], most: float
) -> tuple[Mapping[StandIn, Sequence[str]], Mapping[StandIn, Sequence[str]]]:
    """Layers that are merged with the fewest MACs, in all at most so many, with those inside of them; and the others.

    Of what is inside of one of the others nothing is told.
    """
    inside = {part for layer in every for part in layer.modules() if part is not layer}
    outer = sorted((layer for layer in every if layer not in inside), key=_multiplying)
    sums = itertools.accumulate(map(_multiplying, outer))
    soon = {part for layer, needed in zip(outer, sums, strict=True) if needed <= most for part in layer.modules()}
    dear = {layer: every[layer] for layer in outer if layer not in soon}
    return {layer: names for layer, names in every.items() if layer in soon}, dear


@singledispatch
def _multiplying(layer: StandIn) -> float:
    """MACs of multiplying out what stands for a layer, as if it were a pair of all its numbers."""
    rows = layer.weight.shape[0]
    columns = math.prod(layer.weight.shape[1:])
    return rows * columns * sum(p.numel() for p in layer.parameters()) / (rows + columns)


@_multiplying.register(Masked)
@_multiplying.register(Slim)
@_multiplying.register(Cropped)
@_multiplying.register(Summed)
def _(layer: StandIn) -> float:
    """Its weight is laid out of those of its parts, or added up."""
    return sum(_multiplying(part) for part in layer.children() if isinstance(part, StandIn))


def _answers(
    small: nn.Module, merged: _Merged, batch: Any, feed: Feed, known: Sequence[Tensor] | None = None
) -> list[Sequence[Tensor]]:
    """Outputs of a network, of what it is merged to, and of the network again if these two are not alike.

    For the first sample, where both take one; what the network gives for it may be ``known``.
    """
    outputs: list[Sequence[Tensor]] = []

    def answered(model: nn.Module, part: Any) -> Sequence[Tensor]:
        with observe(model, forward=feed) as running:
            return output_tensors(running(part))

    def run(part: Any) -> None:
        one = known if feed.layout.size(part) == 1 else None
        outputs[:] = [answered(small, part) if one is None else one, answered(merged.model, part)]
        # What draws random numbers differs from itself.
        outputs.append(outputs[0] if all(map(alike, *outputs)) else answered(small, part))

    on_few(run, batch, feed)
    return outputs


def _jumps(small: nn.Module, batch: Any, feed: Feed) -> bool:
    """Whether outputs move far where rounding moves those of layers, as boxes do that are sorted by their scores."""
    draws = torch.Generator().manual_seed(0)

    def rounded(_: nn.Module, __: Any, ___: Any, y: Tensor) -> Tensor:
        size = 16 * torch.finfo(y.dtype).eps * y.norm() / math.sqrt(max(y.numel(), 1))
        return y + size * torch.randn(y.shape, generator=draws).to(y)

    hooks = [Hook(layer, rounded) for layer in stand_ins(small)]
    far: list[bool] = []

    def run(part: Any) -> None:
        with observe(small, forward=feed) as running:
            before = output_tensors(running(part))
        with observe(small, hooks, forward=feed) as running:
            after = [output_tensors(running(part)) for _ in range(_DRAWS)]
        far[:] = [a.shape != b.shape or not alike(a, b) for each in after for a, b in zip(before, each, strict=False)]

    on_few(run, batch, feed)
    return any(far)


def _one_by_one(small: nn.Module, batch: Any, feed: Feed) -> Iterator[str]:
    """Hold each layer against its merged one where the network's outputs tell nothing."""
    merged = _Merged.of(small, *_shared_out(stand_ins(small), -1.0))
    _answers(small, merged, batch, feed)
    for part in merged.parts:
        part.check()
    yield (
        "the network was compared with what merge makes of it layer by layer alone: its outputs jump where rounding "
        "moves what its layers give"
    )


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    if a.shape != b.shape or not a.is_floating_point():
        return True
    return bool(_gap(a, b) <= _rounding(a))


def _gap(a: Tensor, b: Tensor) -> Tensor:
    a, b = compared(a, b)
    return (a - b).norm()


def _rounding(a: Tensor) -> Tensor:
    """The difference from an output that rounding explains."""
    size = a.double().masked_fill(a.isinf(), 0).norm()
    return _ROUNDING.get(a.dtype, _ROUNDING_OF_FEW_BITS) * size


def _precise(model: nn.Module) -> nn.Module:
    """A copy that rounds less, of a model of few bits: what is rounded twice is not what its layers are asked."""
    kinds = {p.dtype for p in parameters_of(model) if p.is_floating_point()}
    return copy_model(model).float() if kinds and kinds <= {torch.bfloat16, torch.float16} else model
