"""Random numbers that a model draws while it runs, as those that hide patches, sample latents or always drop out do.

Whatever was drawn before, a model and a copy of it draw the same for the same batch: else what one gives could not be
compared with what the other gives, nor could a layer be fitted to it. What others draw goes on as if no model had run.
"""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectrim.nn.watch.nesting import tensors

# Numbers of a tensor that tell its batch from others.
_FEW = 64


@dataclass(frozen=True, eq=False)
class Chance:
    """Where the generators of torch, Python and numpy stand, which belong to the process."""

    states: tuple[Tensor, ...]
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> Chance:
        states = tuple(each.get_state() for each in _generators())
        return cls(states, random.getstate(), np.random.get_state(legacy=False))

    def put_back(self) -> None:
        for generator, state in zip(_generators(), self.states, strict=False):
            generator.set_state(state)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Random numbers are drawn as from then on, and afterwards as if none had been."""
        with draws_kept():
            self.put_back()
            yield


@contextlib.contextmanager
def draws_kept() -> Iterator[None]:
    """The generators of the process are as before on leaving."""
    before = Chance.now()
    try:
        yield
    finally:
        before.put_back()


def _generators() -> tuple[torch.Generator, ...]:
    return (torch.default_generator, *torch.cuda.default_generators)


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
def drawn_from(seed: int) -> Iterator[None]:
    """Random numbers are drawn as after this seed, and afterwards as if none had been."""
    with draws_kept():
        for generator in _generators():
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield
