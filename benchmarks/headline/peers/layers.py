"""What the decompositions of the peers share: the layers of a network, what thin ones cost, and the choice of ranks."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from benchmarks.headline.network import run_on
from spectrim.nn.checkpoint import file_size
from spectrim.nn.counting import counting

Cost = Literal["macs", "bytes"]
# What each further tensor takes in the header of a file, about.
_NAMED = 100


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer with the positions that its input and output have, as (height, width)."""

    name: str
    module: Any
    entering: tuple[int, int]
    leaving: tuple[int, int]

    @property
    def pixels(self) -> int:
        return self.leaving[0] * self.leaving[1]

    def cost(self, cost: Cost) -> int:
        """Of its weight."""
        return self.module.weight.numel() * (4 if cost == "bytes" else self.pixels)


@dataclass(frozen=True)
class Option:
    """A rank that a layer may have, the share of its energy that is lost, and (weights, positions) of its parts."""

    rank: int
    error: float
    parts: tuple[tuple[int, int], ...]

    def cost(self, cost: Cost) -> int:
        if cost == "bytes":
            return sum(4 * weights for weights, _ in self.parts) + _NAMED * len(self.parts)
        return sum(weights * positions for weights, positions in self.parts)


class Decomposition(ABC):
    """A way to put thin layers in a layer's place."""

    def watch(self, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any]) -> None:  # noqa: B027
        """See the data, if they are needed."""

    @abstractmethod
    def options(self, layer: Layer) -> list[Option]:
        """By rank."""

    @abstractmethod
    def made(self, layer: Layer, rank: int) -> nn.Module:
        """The thin layers."""


Allocation = Callable[[Mapping[str, Sequence[Option | None]], Mapping[str, int], Cost, float], dict[str, Option | None]]


def decomposed(
    dense: nn.Module, batches: Sequence[Any], example: Any, cost: Cost, limit: float, *,
    how: Decomposition, ranks: Allocation,
) -> nn.Module:  # fmt: skip
    """A copy of a network that costs no more than the limit, by thin layers where they cost less."""
    layers = layers_of(dense, example)
    how.watch(dense, layers, batches)
    options: dict[str, list[Option | None]] = {}
    whole = {layer.name: layer.cost(cost) for layer in layers}
    for layer in layers:
        options[layer.name] = [o for o in how.options(layer) if o.cost(cost) < whole[layer.name]] + [None]
    fixed = measured(dense, example, cost) - sum(whole.values())
    least = fixed + sum(min(price(option, whole[name], cost) for option in some) for name, some in options.items())
    if least > limit:
        raise ValueError(f"it reaches {least:,.0f} {cost} at the least; {limit:,.0f} were asked for")
    chosen = ranks(options, whole, cost, limit - fixed)
    model = copy.deepcopy(dense)
    for layer in layers:
        if (option := chosen[layer.name]) is not None:
            put(model, layer.name, how.made(layer, option.rank))
    return model


def price(option: Option | None, whole: int, cost: Cost) -> int:
    """What an option costs; the dense layer where it is None."""
    return whole if option is None else option.cost(cost)


def uniform(
    options: Mapping[str, Sequence[Option | None]], whole: Mapping[str, int], cost: Cost, limit: float
) -> dict[str, Option | None]:
    """Every layer keeps the same share of its cost, the largest that the limit leaves."""

    def kept(share: float) -> dict[str, Option | None]:
        found = {}
        for name, some in options.items():
            fitting = [option for option in some if price(option, whole[name], cost) <= share * whole[name]]
            found[name] = max(fitting or some[:1], key=lambda option: price(option, whole[name], cost))
        return found

    return _bisected(kept, whole, cost, limit, highest_fits=False)


def lagrangian(
    options: Mapping[str, Sequence[Option | None]], whole: Mapping[str, int], cost: Cost, limit: float
) -> dict[str, Option | None]:
    """Of every layer the option with the least ``error + multiplier x cost``, for the least multiplier that does."""
    total = sum(whole.values())

    def kept(multiplier: float) -> dict[str, Option | None]:
        def worth(name: str, option: Option | None) -> float:
            lost = 0.0 if option is None else option.error
            return lost + multiplier * price(option, whole[name], cost) / total

        return {name: min(some, key=lambda option: worth(name, option)) for name, some in options.items()}

    return _bisected(kept, whole, cost, limit, high=1e6, highest_fits=True)


def _bisected(
    kept: Callable[[float], dict[str, Option | None]], whole: Mapping[str, int], cost: Cost, limit: float, *,
    high: float = 1.0, highest_fits: bool,
) -> dict[str, Option | None]:  # fmt: skip
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        fits = sum(price(option, whole[name], cost) for name, option in kept(middle).items()) <= limit
        low, high = (low, middle) if fits == highest_fits else (middle, high)
    return kept(high if highest_fits else low)


def measured(model: nn.Module, example: Any, cost: Cost) -> float:
    """Multiply-accumulates of one run, or bytes of the file of weights."""
    if cost == "bytes":
        return file_size(model)
    with counting(model) as work:
        run_on(model, example)
    return work.macs


def layers_of(model: nn.Module, example: Any) -> list[Layer]:
    """Convolutions without groups and linear layers; but for those of pictures and of fewer than 16 outputs."""
    found: list[Layer] = []

    def watcher(name: str) -> Callable[[Any, Any, Tensor], None]:
        def see(module: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.Linear):
                places = [(1, tensor[0].numel() // tensor.shape[-1]) for tensor in (given[0], output)]
            else:
                places = [(tensor.shape[2], tensor.shape[3]) for tensor in (given[0], output)]
            found.append(Layer(name, module, *places))

        return see

    hooks = [m.register_forward_hook(watcher(name)) for name, m in model.named_modules() if _fits(m)]
    run_on(model, example)
    for hook in hooks:
        hook.remove()
    return found


def _fits(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.in_channels > 3 and module.out_channels >= 16
    return isinstance(module, nn.Linear) and module.out_features >= 16


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a module in another's place."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
