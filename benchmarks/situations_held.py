"""Situations of kinds 1 and 2: layers reached by other ways than their names, and parents that read their layers."""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections import namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.situation_table import EITHER, REFUSED, Two, TwoConvolutions, images, situation, vectors

RUNS = "compressed: every holder of a layer comes to what stands in its place"
ANSWERS = "compressed: what stands for a layer answers for it"


@situation(1, RUNS)
class PlainList(Two):
    def begin(self) -> None:
        self.steps = [self.a, nn.ReLU(), self.b]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


@situation(1, RUNS)
class DictBehindTheModule(Two):
    first: nn.Module

    def begin(self) -> None:
        self.__dict__["first"] = self.a
        self.table = {"second": (self.b,)}

    def forward(self, x: Tensor) -> Tensor:
        return self.table["second"][0](F.relu(self.first(x)))


@situation(1, RUNS)
class BoundCall(Two):
    def begin(self) -> None:
        self.run = self.a.__call__

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.run(x)))


@situation(1, RUNS)
class PartialOfALayer(Two):
    def begin(self) -> None:
        self.run = functools.partial(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.run(x)))


@situation(1, RUNS)
class Closure(Two):
    def begin(self) -> None:
        self.run = lambda x: self.b(F.relu(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


@situation(1, RUNS)
class DefaultArgument(Two):
    def begin(self) -> None:
        def run(x: Tensor, layer: nn.Module = self.a) -> Tensor:
            return layer(x)

        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.run(x)))


@situation(
    1, "refused: a weak reference is the same in every copy, so that the copy calls the original", outcome=REFUSED
)
class WeakReference(Two):
    held: weakref.ref[nn.Module]

    def begin(self) -> None:
        self.__dict__["held"] = weakref.ref(self.a)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.held()
        assert layer is not None
        return self.b(F.relu(layer(x)))


@situation(1, "compressed, or refused: the patched forward is the layer's")
class PatchedForwardOfTheModel(Two):
    def begin(self) -> None:
        self.forward = types.MethodType(lambda self, x: self.b(F.gelu(self.a(x))), self)  # type: ignore[method-assign]


@situation(1, RUNS)
class LayersInADataclass(Two):
    def begin(self) -> None:
        self.steps = Steps(self.a, self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps.second(F.relu(self.steps.first(x)))


@dataclasses.dataclass
class Steps:
    first: nn.Module
    second: nn.Module


Pair = namedtuple("Pair", "first second")


@situation(1, RUNS)
class LayersInANamedTuple(Two):
    def begin(self) -> None:
        self.steps = Pair(self.a, self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps.second(F.relu(self.steps.first(x)))


@situation(1, RUNS)
class TwoNames(Two):
    def begin(self) -> None:
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.again(x)))


@situation(1, RUNS)
class ByNameFromAText(Two):
    def forward(self, x: Tensor) -> Tensor:
        for name in "ab":
            x = F.relu(getattr(self, name)(x))
        return x


@situation(1, RUNS)
class ByItsChildren(Two):
    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = F.relu(child(x))
        return x


@situation(1, RUNS)
class SlicedSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.body[3:](self.body[:3](x))


@situation(1, RUNS)
class ModulesByKey(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"in": nn.Linear(32, 64), "act": nn.GELU(), "out": nn.Linear(64, 32)})

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["out"](self.parts["act"](self.parts["in"](x)))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class Concat(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


@situation(2, "compressed: attributes that the graph is read from stay", images)
class GraphByAttributes(nn.Module):
    """Parsed as YOLO is: every layer has the numbers of where it reads (f) and where it stands (i)."""

    def __init__(self) -> None:
        super().__init__()
        layers = [Block(3, 16), Block(16, 24), Block(24, 24), Concat(), nn.Conv2d(48, 6, 1)]
        self.model = nn.Sequential(*layers)
        for number, (layer, source) in enumerate(zip(layers, (-1, -1, -1, [-1, 1], -1), strict=True)):
            layer.i, layer.f = number, source  # type: ignore[assignment]
        self.save = [1]

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor | None] = []
        for layer in self.model:
            if layer.f != -1:
                x = [x if each == -1 else kept[each] for each in layer.f]  # type: ignore[assignment]
            x = layer(x)
            kept.append(x if layer.i in self.save else None)
        return x


@situation(2, ANSWERS)
class ReadsWeight(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x.to(self.a.weight.dtype))).to(self.b.weight.device))


@situation(2, ANSWERS)
class ReadsSizes(Two):
    def forward(self, x: Tensor) -> Tensor:
        assert (self.a.in_features, self.b.out_features, len(self.b.weight), self.b.bias.numel()) == (32, 32, 32, 32)
        return self.b(F.relu(self.a(x)))


@situation(2, ANSWERS, images)
class ReadsKernel(TwoConvolutions):
    def features(self, x: Tensor) -> Tensor:
        pad = [each // 2 for each in self.a.kernel_size]
        assert (self.a.stride, self.a.padding, self.a.groups) == ((1, 1), tuple(pad), 1)
        return super().features(x)


@situation(2, ANSWERS)
class AsksIsinstance(Two):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = F.relu(layer(x)) if isinstance(layer, nn.Linear) else layer(x)
        return x


def _not_negative(dense: nn.Module, result: Any) -> str | None:
    with torch.no_grad():
        return "outputs below zero" if bool((result.model(vectors()[0]) < 0).any()) else None


@situation(
    2,
    "compressed without outputs below zero, or refused: the network asks for a type",
    outcome=EITHER,
    fault=_not_negative,
)
class AsksTypeIs(Two):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = F.relu(layer(x)) if type(layer) is nn.Linear else layer(x)
        return x


@situation(2, "refused: the network asks whether a layer has parts", outcome=REFUSED)
class AsksForParts(Two):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = layer(x) if list(layer.children()) else F.relu(layer(x))
        return x


class Scaled(nn.Linear):
    """Equalised learning rate: the weight times a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.5, self.bias)


class Normed(nn.Linear):
    """Calls what it inherits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.layer_norm(x, x.shape[-1:]))


@situation(2, "compressed or left alone: its forward is its own")
class SubclassThatScales(Two):
    def begin(self) -> None:
        self.a, self.c = Scaled(32, 64), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x) + self.c(x)))


@situation(2, "compressed or left alone: its forward is its own")
class SubclassThatNorms(Two):
    def begin(self) -> None:
        self.a, self.c = Normed(32, 64), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x) + self.c(x)))


class Named(nn.Linear):
    """A subclass that does nothing but say who it is."""

    def __init__(self, inputs: int, outputs: int, label: str) -> None:
        super().__init__(inputs, outputs)
        self.label = label


@situation(2, ANSWERS)
class SubclassWithAttributes(Two):
    def begin(self) -> None:
        self.a = Named(32, 64, "first")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) if self.a.label == "first" else x


def _hook_ran(dense: nn.Module, result: Any) -> str | None:
    seen = len(result.model.a._forward_hooks)
    return None if seen == len(dense.a._forward_hooks) else f"{seen} hooks are left"  # type: ignore[arg-type, union-attr]


@situation(2, "compressed: a hook that changes an answer goes on doing it", fault=_hook_ran)
def forward_hook() -> nn.Module:
    model = Two()
    model.a.register_forward_hook(_doubles)
    return model


def _doubles(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


@situation(2, "compressed: a hook that changes an input goes on doing it")
def forward_pre_hook() -> nn.Module:
    model = Two()
    model.b.register_forward_pre_hook(_tanh)
    return model


def _tanh(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].tanh(),)


@situation(2, "compressed: what a backward hook makes of gradients is theirs")
def backward_hook() -> nn.Module:
    model = Two()
    model.a.register_full_backward_hook(_halves)
    return model


def _halves(module: nn.Module, inputs: Any, outputs: Any) -> tuple[Any, ...]:
    return tuple(None if each is None else each / 2 for each in inputs)


@situation(2, "compressed: the layer whose weight is multiplied elsewhere is left alone")
class WeightMultipliedByTheParent(Two):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(F.relu(self.a(x))), self.a.weight)


@situation(8, "compressed: tied weights stay tied or are left alone", vectors)
class TiedAutoencoder(Two):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(F.relu(self.a(x))), self.b.weight.t())


@situation(1, "compressed: one layer called three times")
class CalledThreeTimes(Two):
    def begin(self) -> None:
        self.c = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        for _ in range(3):
            x = x + torch.tanh(self.c(x))
        return self.b(x)


class Tree(nn.Module):
    """Holds smaller ones of itself."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.branches = nn.ModuleList(Tree(depth - 1) for _ in range(2 if depth else 0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x))
        return x + sum(branch(x) for branch in self.branches)


@situation(1, RUNS)
def recursive_modules() -> nn.Module:
    return Tree(2)


@situation(1, "compressed, or refused: the graph module calls by name")
def traced_by_fx() -> nn.Module:
    return torch.fx.symbolic_trace(Two())


class Delegates(nn.Module):
    """Answers for what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


@situation(1, RUNS)
def wrapper_that_delegates() -> nn.Module:
    return Delegates(Two())
