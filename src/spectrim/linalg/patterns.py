"""Which entries of a weight may stay: sparsity patterns, and the best entries of a pattern for given scores.

A pattern cuts a canonical weight ``[g, o, i, *k]`` into *units* that are kept or dropped as a whole, and the units into
*pools* that each keep the same number. Keeping the units of the largest scores is the Euclidean projection onto the
pattern, when the scores are squares.

| name | a unit | a pool |
|---|---|---|
| ``unstructured`` | one entry | the layer |
| ``rows`` | one entry | the weights of one output |
| ``2:4``, ``4:8``, ... | one entry | four (eight) neighbours in an output's row, of which two (four) stay |
| ``4x4``, ``1x8``, ... | a block of outputs x inputs, at one kernel position | the layer |
| ``channels`` | all that one input channel is multiplied by | the group |
| ``taps-1x3@1x0``, ... | one kernel position; those that stay are a box of this size at this corner | the layer |
"""

from __future__ import annotations

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectrim.linalg.unfold import Unfolding, fold, unfold


@dataclass(frozen=True)
class Pattern(ABC):
    """Base of the patterns. Shapes are canonical, ``(g, o, i, *k)``."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The word plans use; :func:`pattern` reads it."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can have the pattern."""
        return True

    @abstractmethod
    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """``(pools, units a pool, entries a unit)``; the product is the number of entries."""

    def open(self, weight: Tensor) -> Tensor:
        """The entries of a weight as ``[pools, units, entries]``, in their own order if a pattern says nothing else."""
        return weight.reshape(self.size(weight.shape))

    def close(self, opened: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of :meth:`open`."""
        return opened.reshape(tuple(shape))

    def kept(self, shape: Sequence[int], density: float) -> int:
        """Units that stay in each pool at a density."""
        units = self.size(shape)[1]
        return min(units, max(0, round(density * units)))

    def stored(self, shape: Sequence[int], density: float) -> int:
        """Entries that stay at a density."""
        pools, _, entries = self.size(shape)
        return pools * self.kept(shape, density) * entries

    def densities(self, wanted: Iterable[float], shape: Sequence[int]) -> tuple[float, ...]:
        """The densities that the pattern offers, where these are wanted."""
        return tuple(wanted)

    def keep(self, scores: Tensor, density: float) -> Tensor:
        """Mask ``[g, o, i, *k]`` of the entries that stay: the units of the largest sums of scores in each pool."""
        return self.chosen(scores, density, largest)

    def shares(self, scores: Tensor, density: float) -> Tensor:
        """How much of each entry stays, continuous in the scores, which are squares (:func:`ramp`)."""
        return self.chosen(scores, density, ramp)

    def chosen(self, scores: Tensor, density: float, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """What is chosen of the units of each pool by their sums of scores, for their entries ``[g, o, i, *k]``."""
        shape = tuple(scores.shape)
        opened = self.open(scores)
        units = choose(opened.sum(-1) if opened.shape[2] > 1 else opened.squeeze(2), self.kept(shape, density))
        return self.close(units.unsqueeze(-1).expand(opened.shape), shape)

    def unfolded(self, how: Unfolding, shape: Sequence[int]) -> Pattern:
        """The pattern of a weight of that shape that is held as ``[g, (o, k_rest), (i, k_S)]``."""
        return _Unfolded(self, how, tuple(shape))

    def units(self, mask: Tensor) -> Tensor:
        """A mask's units as one flat row of flags, pool after pool. A unit with any entry is there as a whole."""
        return self.open(mask).any(-1).reshape(-1)

    def expand(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of :meth:`units`: the mask ``[g, o, i, *k]``."""
        pools, count, entries = self.size(shape)
        return self.close(units.reshape(pools, count, 1).expand(pools, count, entries), shape)


@dataclass(frozen=True)
class _Unfolded(Pattern):
    """A pattern of a weight that is held as rows ``(o, k_rest)`` over ``(i, k_S)``."""

    pattern: Pattern
    how: Unfolding
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.pattern.name

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        return self.pattern.size(self.shape)

    def kept(self, shape: Sequence[int], density: float) -> int:
        return self.pattern.kept(self.shape, density)

    def chosen(self, scores: Tensor, density: float, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        return unfold(self.pattern.chosen(fold(scores.mT, self.how, self.shape[1:]), density, choose), self.how).mT


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any entries of the layer."""

    @property
    def name(self) -> str:
        return "unstructured"

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        return 1, math.prod(shape), 1

    def unfolded(self, how: Unfolding, shape: Sequence[int]) -> Pattern:
        return self


@dataclass(frozen=True)
class EvenRows(Pattern):
    """The same number of entries for every output."""

    @property
    def name(self) -> str:
        return "rows"

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        return shape[0] * shape[1], math.prod(shape[2:]), 1


@dataclass(frozen=True)
class NofM(Pattern):
    """``n`` of ``m`` neighbours in the row ``(i, *k)`` of an output, as GPUs multiply 2:4."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m or self.m < 2:
            raise ValueError(f"pattern {self.name!r}: expected n:m with n from 1 to m, and m at least 2")

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    def fits(self, shape: Sequence[int]) -> bool:
        return math.prod(shape[2:]) % self.m == 0

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        return math.prod(shape) // self.m, self.m, 1

    def kept(self, shape: Sequence[int], density: float) -> int:
        return self.n if density > 0 else 0

    def densities(self, wanted: Iterable[float], shape: Sequence[int]) -> tuple[float, ...]:
        return (self.n / self.m,)


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of neighbouring outputs x inputs at one kernel position."""

    outputs: int
    inputs: int

    def __post_init__(self) -> None:
        if self.outputs < 1 or self.inputs < 1:
            raise ValueError(f"pattern {self.name!r}: expected blocks of at least 1x1")

    @property
    def name(self) -> str:
        return f"{self.outputs}x{self.inputs}"

    def fits(self, shape: Sequence[int]) -> bool:
        return shape[1] % self.outputs == 0 and shape[2] % self.inputs == 0

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        entries = self.outputs * self.inputs
        return 1, math.prod(shape) // entries, entries

    def open(self, weight: Tensor) -> Tensor:
        g, o, i, *kernel = weight.shape
        a, b, t = self.outputs, self.inputs, math.prod(kernel)
        cut = weight.reshape(g, o // a, a, i // b, b, t).permute(0, 1, 3, 5, 2, 4)
        return cut.reshape(1, -1, a * b)

    def close(self, opened: Tensor, shape: Sequence[int]) -> Tensor:
        g, o, i, *kernel = shape
        a, b, t = self.outputs, self.inputs, math.prod(kernel)
        cut = opened.reshape(g, o // a, i // b, t, a, b).permute(0, 1, 4, 2, 5, 3)
        return cut.reshape(tuple(shape))


@dataclass(frozen=True)
class WholeChannels(Pattern):
    """Whole input channels, the same number in every group: the layer becomes a thinner one."""

    @property
    def name(self) -> str:
        return "channels"

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        g, o, i, *kernel = shape
        return g, i, o * math.prod(kernel)

    def open(self, weight: Tensor) -> Tensor:
        g, _, i = weight.shape[:3]
        return weight.transpose(1, 2).reshape(g, i, -1)

    def close(self, opened: Tensor, shape: Sequence[int]) -> Tensor:
        g, o, i, *kernel = shape
        return opened.reshape(g, i, o, *kernel).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Taps(Pattern):
    """A box of kernel positions: the layer becomes one with a smaller kernel.

    Attributes
    ----------
    extent, corner
        Of the box, one number a kernel axis: how many positions, and the first of them.
    """

    extent: tuple[int, ...]
    corner: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.extent) != len(self.corner) or not self.extent or min(self.extent) < 1 or min(self.corner) < 0:
            raise ValueError(f"pattern {self.name!r}: expected a size of at least 1 and a corner on each kernel axis")

    @property
    def name(self) -> str:
        return f"taps-{'x'.join(map(str, self.extent))}@{'x'.join(map(str, self.corner))}"

    @property
    def box(self) -> tuple[slice, ...]:
        """The positions that stay."""
        return tuple(slice(c, c + e) for c, e in zip(self.corner, self.extent, strict=True))

    def fits(self, shape: Sequence[int]) -> bool:
        kernel = shape[3:]
        if len(kernel) != len(self.extent) or self.extent == tuple(kernel):
            return False
        return all(part.stop <= k for part, k in zip(self.box, kernel, strict=True))

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        return 1, math.prod(shape[3:]), math.prod(shape[:3])

    def open(self, weight: Tensor) -> Tensor:
        g, o, i, *kernel = weight.shape
        return weight.reshape(g * o * i, math.prod(kernel)).mT.unsqueeze(0)

    def close(self, opened: Tensor, shape: Sequence[int]) -> Tensor:
        return opened.squeeze(0).mT.reshape(tuple(shape))

    def kept(self, shape: Sequence[int], density: float) -> int:
        return math.prod(self.extent) if density > 0 else 0

    def densities(self, wanted: Iterable[float], shape: Sequence[int]) -> tuple[float, ...]:
        return (math.prod(self.extent) / math.prod(shape[3:]),)

    def chosen(self, scores: Tensor, density: float, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        mask = torch.zeros_like(scores, dtype=torch.bool)
        if density > 0:
            mask[(..., *self.box)] = True
        return mask


def largest(scores: Float[Tensor, "pools units"], count: int) -> Bool[Tensor, "pools units"]:
    """Mask of so many largest scores of each pool; of equal ones those that come first."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    # NumPy's selection takes a tenth of the time of topk.
    known = scores.detach().to("cpu", torch.promote_types(scores.dtype, torch.float32)).numpy()
    least = torch.from_numpy(np.partition(known, -count, axis=1)[:, -count, None].copy()).to(scores)
    mask = scores >= least
    if bool((mask.sum(1) > count).any()):
        tied, above = scores == least, scores > least
        mask = above | (tied & (tied.cumsum(1) <= count - above.sum(1, keepdim=True)))
    return mask


# Where units begin to stay and where all of them stays, in shares of the border.
_BAND = 0.6, 1.4


def ramp(scores: Float[Tensor, "pools units"], count: int) -> Float[Tensor, "pools units"]:
    """How much of each unit stays, if so many of each pool are to stay, by scores that are squares.

    The border lies in the middle between the last unit that stays and the first that goes. Nothing stays of what is
    well below it, all of what is well above, and in between a share that grows with the size (as firm thresholding has
    it; Gao and Bruce 1997). So scores that differ by rounding give shares that differ by rounding.
    """
    if not 0 < count < scores.shape[1]:
        return torch.full_like(scores, float(count > 0))
    go = scores.shape[1] - count
    parted = np.partition(scores.detach().cpu().numpy(), go, axis=1)
    sizes = np.sqrt(np.stack([parted[:, go], parted[:, :go].max(1)], axis=1))
    border = torch.from_numpy(sizes.mean(1, keepdims=True)).to(scores)
    low, high = _BAND
    # Of a border of nothing all that is anything stays.
    steep = 1 / ((high - low) * border.clamp_min(torch.finfo(scores.dtype).tiny))
    return scores.sqrt().mul_(steep).sub_(low / (high - low)).clamp_(0, 1)


def taps(scores: Tensor) -> tuple[Taps, ...]:
    """For every size of box smaller than the kernel, the box of the largest sum of scores ``[g, o, i, *k]``."""
    kernel = tuple(scores.shape[3:])
    energy = scores.sum(dim=(0, 1, 2))
    best: dict[tuple[int, ...], tuple[float, Taps]] = {}
    for extent in itertools.product(*(range(1, k + 1) for k in kernel)):
        if extent == kernel:
            continue
        for corner in itertools.product(*(range(k - e + 1) for k, e in zip(kernel, extent, strict=True))):
            box = Taps(extent, corner)
            value = float(energy[box.box].sum())
            if extent not in best or value > best[extent][0]:
                best[extent] = value, box
    return tuple(box for _, box in best.values())


_PLAIN: dict[str, Pattern] = {p.name: p for p in (Unstructured(), EvenRows(), WholeChannels())}


def pattern(name: str) -> Pattern:
    """The pattern of a name.

    Raises
    ------
    ValueError
        If there is none; the message quotes the name.
    """
    if name in _PLAIN:
        return _PLAIN[name]
    if match := re.fullmatch(r"(\d{1,4}):(\d{1,4})", name):
        return NofM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d{1,4})x(\d{1,4})", name):
        return Blocks(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"taps-(\d{1,4}(?:x\d{1,4})*)@(\d{1,4}(?:x\d{1,4})*)", name):
        extent, corner = (tuple(map(int, part.split("x"))) for part in match.groups())
        return Taps(extent, corner)
    raise ValueError(
        f"unknown pattern {name!r}; expected {', '.join(map(repr, _PLAIN))}, n:m as in '2:4', outputs x inputs of a "
        "block as in '4x4', or a box of kernel positions as in 'taps-1x3@1x0'"
    )


# Their names in 0.1, until 0.3.
Rows, Channels = EvenRows, WholeChannels
