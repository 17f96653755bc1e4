"""Random numbers that a model draws while it runs, as those that hide patches, sample latents or always drop out do.

Whatever was drawn before, a model and a copy of it draw the same for the same batch: else what one gives could not be
compared with what the other gives, nor could a layer be fitted to it. What others draw goes on as if no model had run.
"""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.nn.watch.nesting import tensors
from spectrim.nn.watch.outside import COMMON, GENERATORS, is_own, outside, own_object

# Numbers of a tensor that tell its batch from others.
_FEW = 64
_DEPTH = 5  # of lists, mappings and objects that generators are looked for in
# What holds none, and is met most.
_PLAIN = frozenset({int, float, bool, str, type(None), Tensor, nn.Parameter})


class _Kind(NamedTuple):
    """How generators of a type are asked where they stand, put there and begun by a seed."""

    state: Callable[[Any], Any]
    put: Callable[[Any, Any], object]
    seed: Callable[[Any, int], object]


def _put_bits(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


_KINDS: dict[type, _Kind] = {
    torch.Generator: _Kind(torch.Generator.get_state, torch.Generator.set_state, torch.Generator.manual_seed),
    random.Random: _Kind(random.Random.getstate, random.Random.setstate, random.Random.seed),
    np.random.RandomState: _Kind(
        lambda generator: generator.get_state(legacy=False), np.random.RandomState.set_state, np.random.RandomState.seed
    ),
    np.random.Generator: _Kind(
        lambda generator: generator.bit_generator.state,
        _put_bits,
        lambda generator, seed: _put_bits(generator, type(generator.bit_generator)(seed).state),
    ),
}


@dataclass(frozen=True, eq=False)
class Chance:
    """Where generators stand: those of torch, Python and numpy that belong to the process, and others."""

    states: tuple[tuple[Any, Any], ...]

    @classmethod
    def now(cls, others: Iterable[Any] = ()) -> Chance:
        return cls(tuple((each, _kind(each).state(each)) for each in (*_generators(), *others)))

    def put_back(self) -> None:
        for generator, state in self.states:
            _kind(generator).put(generator, state)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Random numbers are drawn as from then on, and afterwards as if none had been."""
        with draws_kept():
            self.put_back()
            yield


@contextlib.contextmanager
def draws_kept(others: Iterable[Any] = ()) -> Iterator[None]:
    """The generators of the process, and others, are as before on leaving."""
    before = Chance.now(others)
    try:
        yield
    finally:
        before.put_back()


def _generators() -> tuple[Any, ...]:
    python, of_numpy = random.random.__self__, np.random.random.__self__  # type: ignore[attr-defined]
    return torch.default_generator, *torch.cuda.default_generators, python, of_numpy


def _kind(generator: Any) -> _Kind:
    return next(kind for each, kind in _KINDS.items() if isinstance(generator, each))


def generators_of(model: nn.Module) -> tuple[Any, ...]:
    """The generators that a model's modules hold, in lists, mappings and objects, too, or that its functions name."""
    own = [module for module in nn.Module.modules(model) if is_own(type(module))]
    kinds = dict.fromkeys(kind for module in own for kind in type(module).__mro__ if is_own(kind))
    held = [value for each in (*own, *kinds) for key, value in vars(each).items() if key not in COMMON]
    found = {id(each): each for value in (*held, *outside(model).values()) for each in _inside(value, _DEPTH)}
    return tuple(found.values())


def _inside(value: Any, depth: int) -> Iterator[Any]:
    """The generators in a value, beside those that ask the machine and cannot be begun again."""
    if type(value) in _PLAIN or not depth:
        return
    if isinstance(value, GENERATORS):
        yield from () if isinstance(value, random.SystemRandom) else (value,)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _inside(part, depth - 1)
    elif isinstance(value, dict) or own_object(value) is value is not None:
        yield from _inside(list((value if isinstance(value, dict) else vars(value)).values()), depth - 1)


def seed_of(batch: Any) -> int:
    """A number made of what a batch holds."""
    seed = 0
    for tensor in tensors(batch):
        if tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta):
            step = max(1, tensor.numel() // _FEW)
            few = tensor.detach().take(torch.arange(0, tensor.numel(), step, device=tensor.device))
            numbers = torch.view_as_real(few.resolve_conj()) if few.is_complex() else few
            seed = zlib.crc32(numbers.double().cpu().numpy().tobytes(), seed)
    return seed


@contextlib.contextmanager
def drawn_from(seed: int, others: Iterable[Any] = ()) -> Iterator[None]:
    """Random numbers are drawn as after this seed, by the process and by others, and afterwards as if none had been."""
    every = (*_generators(), *others)
    with draws_kept(others):
        for generator in every:
            _kind(generator).seed(generator, seed)
        yield
