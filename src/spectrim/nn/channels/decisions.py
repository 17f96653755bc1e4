"""What a network decides by: numbers that are compared, or of which it is asked which is the largest.

Where one of them is made of several channels, as their mean is, without some of these the network is asked of another
number, and may go another way. On few samples and random weights the answer may be the same all the same, and with it
all outputs: so the numbers are looked at, and not what became of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectrim.nn.dispatch import Uncompiled
from spectrim.nn.watch.nesting import tensors

# The share of truths, or of places, that rounding of the numbers behind them may change.
_ROUNDED = 1e-3
Alike = Callable[[Tensor, Tensor], bool]
"""Whether two tensors of one shape are the same floating-point numbers, but for rounding."""

# The operation behind ``if`` and ``float`` of a tensor.
_READ = "_local_scalar_dense"
# Names in torch of operations that may give the same of different numbers, by what they are in words.
_OPERATIONS = {
    "a comparison": "eq ne lt le gt ge equal allclose any all",
    "a choice of the largest": "argmax argmin argsort sort topk kthvalue max min",
    "a choice of one of them": "median nanmedian mode",
    "a choice by their values": "bucketize searchsorted nonzero multinomial bernoulli",
    "a number that Python reads": _READ,
    "rounding": "sign sgn signbit round floor ceil trunc heaviside floor_divide",
    "a limit": "relu clamp clamp_min clamp_max hardtanh threshold maximum minimum",
    "a gate": "hardsigmoid hardswish hardshrink softshrink sigmoid tanh",
}
_WORDS = {name: words for words, names in _OPERATIONS.items() for name in names.split()}


@dataclass(frozen=True)
class Decision:
    """One such operation, as it was carried out."""

    name: str  # torch's
    numbers: tuple[Tensor, ...]  # that it was given
    answers: tuple[Tensor, ...]  # of what it gave, those that are no floating-point numbers: truths, places

    @property
    def words(self) -> str:
        return _WORDS[self.name]

    @property
    def form(self) -> tuple[object, ...]:
        return self.name, *(tuple(each.shape) for each in self.numbers)

    def is_other(self, than: Decision, alike: Alike) -> bool:
        """Whether it is made by other numbers.

        Numbers of another shape are channels, of which some are missing: they count where they are made one.
        """
        pairs = list(zip(self.numbers, than.numbers, strict=False))
        if any(a.shape == b.shape and not _same(a, b, alike) for a, b in pairs):
            return True
        if all(a.shape == b.shape for a, b in pairs):
            return False
        answers = [(a, b) for a, b in zip(self.answers, than.answers, strict=False) if a.shape == b.shape]
        # Of truths that are all alike, as that nothing is NaN, no removal makes something else.
        mixed = any(_is_mixed(a) or _is_mixed(b) for a, b in pairs)
        return bool(answers) and (mixed or any(not bool((a == b).all()) for a, b in answers))


def _same(a: Tensor, b: Tensor, alike: Alike) -> bool:
    if a.is_floating_point() or a.is_complex():
        return alike(a, b)
    return not a.numel() or float((a != b).double().mean()) <= _ROUNDED


def _is_mixed(truths: Tensor) -> bool:
    return not truths.is_floating_point() and bool((truths != 0).any()) and not bool((truths != 0).all())


class Decisions(Uncompiled, TorchDispatchMode):
    """Keeps all decisions of a pass, of tensors of so many numbers at ``most``."""

    def __init__(self, most: float = math.inf) -> None:
        super().__init__()
        self.made: list[Decision] = []
        self._most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "_opname", "").removesuffix("_")
        if name not in _WORDS:
            return func(*args, **kwargs)
        # Before it runs, since it may write into them.
        numbers = self._copies((args, kwargs))
        result = func(*args, **kwargs)
        answers = (each for each in self._copies(result) if not each.is_floating_point())
        self.made.append(Decision(name, numbers, tuple(answers)))
        return result

    def _copies(self, held: Any) -> tuple[Tensor, ...]:
        return tuple(each.detach().clone() for each in tensors(held) if each.numel() <= self._most)


def ways(made: Sequence[Decision], samples: int) -> list[tuple[str, frozenset[bool]]]:
    """How a pass with so many samples decided where it was asked as a whole, or sample by sample.

    What is asked of each position or channel, as a mask is, is no way that a network goes.
    """
    truths = [(each.name, [*each.answers, *(each.numbers if each.name == _READ else ())]) for each in made]
    return [
        (name, frozenset(bool(truth) for truth in answer.flatten()))
        for name, answers in truths
        for answer in answers
        if answer.dtype is torch.bool and 0 < answer.numel() <= samples
    ]


def other_decision(made: Sequence[Decision], narrowed: Sequence[Decision], alike: Alike) -> Decision | None:
    """The first decision of a narrowed network by other numbers than those ``made`` with all channels, if there is one.

    Code that goes through channels or heads one by one decides for some of them only: there each has to be among them.
    """
    if len(made) == len(narrowed):
        return next((b for a, b in zip(made, narrowed, strict=True) if a.name == b.name and a.is_other(b, alike)), None)
    of_form: dict[tuple[object, ...], list[Decision]] = {}
    for each in made:
        of_form.setdefault(each.form, []).append(each)
    for each in narrowed:
        others = of_form.get(each.form, [])
        if others and all(other.is_other(each, alike) for other in others):
            return each
    return None
