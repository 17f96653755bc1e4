"""Which rows of what a layer sees are kept: the same ones of a sample in whatever batch and order it comes.

A row is one position of one sample: a token of a linear layer, an output position of a convolution. Of every sample as
many rows are kept as the run asks for, spread evenly over its positions; where in each part of them is drawn with a
number made from the *contents* of the sample, in any units. So neither the cut into batches nor their order changes
what is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from spectrim.errors import CalibrationError
from spectrim.network.layer import LayerSpec
from spectrim.nn.watch.keys import in_unit_interval, mixed, odd, shifted
from spectrim.nn.watch.layout import Layout, samples_first
from spectrim.nn.watch.masks import mask_of
from spectrim.nn.watch.nesting import tensors
from spectrim.nn.watch.samples import Chosen, Samples, energies_of, lengths_of

# Samples below which a network chosen by them is a guess: on a ResNet-20 at 60 % of the MACs 1 sample leaves 9 % of
# accuracy, 2 leave 44 %, 8 leave 85 % and 16 leave 96 %, where weights alone leave 91 %.
GUESSED = 16
# Samples of equal energy below which a run of many counts as decided by a few.
_DECIDED = 4
# Samples that a run is taken to have where nothing says how many: few, so that rather too many rows are kept.
FEW = 64
# A number of rows, or of positions, that is meant; torch counts them in twice as many bits.
_LARGEST = 2**31 - 1
_MEANT = f"a positive int of at most {_LARGEST:,}"


@dataclass(frozen=True)
class Sampling:
    """How many rows are asked for, and of which samples none; see :func:`spectrim.calibrate`."""

    rows: int | str | None = "auto"  # over the whole run: a number, None for all, or ``"auto"``
    positions: int | None = None  # of each sample, in place of ``rows``
    apart: frozenset[int] = field(default=frozenset(), repr=False)  # of samples left out: their :attr:`Samples.bits`

    def __post_init__(self) -> None:
        rows, positions = self.rows, self.positions
        if not (rows is None or rows == "auto" or _is_number(rows)):
            raise ValueError(f"rows={rows!r}: expected {_MEANT}, None for all positions, or 'auto'")
        if not (positions is None or _is_number(positions)):
            raise ValueError(f"positions={positions!r}: expected {_MEANT}, of positions a sample, or None")

    @property
    def options(self) -> dict[str, Any]:
        """What a caller says, by the names of :func:`spectrim.calibrate`."""
        return {"rows": self.rows, "positions": self.positions}

    def positions_in(self, run: Extent, enough: Callable[[], int]) -> int | None:
        """Positions of a sample of mean length in a run; where it is left to us, as many as are ``enough``."""
        if self.rows is None or self.positions is not None:
            return self.positions
        return run.positions(self.rows) if isinstance(self.rows, int) else enough()


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST


class Extent:
    """What is known of a run before it is made: how many samples there are, and how long they are on average.

    Parameters
    ----------
    batches
        A list or tuple is looked through. A DataLoader says by its sampler how many samples there are, and anything
        else by an attribute ``samples``; their mean length is that of the first batch. Where nothing tells, the run
        is taken to have 64 samples: rather too many rows than too few.
    layout
        Where samples are in a batch, and what says which positions are data.
    apart
        What samples are told apart by of which no row is to be drawn.

    Raises
    ------
    CalibrationError
        For a batch without samples; the message has its number.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        layout: Layout = Layout(),  # noqa: B008 (frozen)
        apart: Iterable[int] = (),
    ) -> None:
        self.layout = layout
        self._apart = torch.tensor(sorted(apart), dtype=torch.int64)
        self._seen = 0
        self._mean: float | None = None
        self._different: set[int] = set()
        self._energy = self._squared = 0.0
        if isinstance(batches, list | tuple) and batches:
            lengths = torch.cat([self._lengths(batch, number) for number, batch in enumerate(batches)])
            self.samples: int | None = max(1, int((lengths > 0).sum()))  # those of padding alone are none
            self._mean = float(lengths.sum()) / self.samples
        else:
            self.samples = _count(batches)

    def see(self, batch: Any) -> Samples:
        """The samples of the next batch."""
        if self._mean is None:
            lengths = self._lengths(batch, self._seen)
            self._mean = float(lengths.sum() / (lengths > 0).sum().clamp_min(1))
        self._size(batch, self._seen)
        self._seen += 1
        samples = Samples.of(batch, self.layout, mean=self._mean)
        if len(self._apart):
            samples = dataclasses.replace(samples, apart=torch.isin(samples.bits, self._apart))
        if len(self._different) < GUESSED:
            self._different.update(samples.bits[samples.filled].tolist())
        energies = energies_of(self.layout.columns(batch, samples.size), samples.size)
        self._energy += float(energies.sum())
        self._squared += float(energies.square().sum())
        return samples

    def said_of_samples(self, samples: int) -> Iterator[str]:
        """What a user should know where so many samples were seen and few of them differ, or outweigh the others."""
        different = len(self._different)
        # What cannot be told apart, as batches of a type of one's own, has the key 0.
        if different < min(GUESSED, samples) and 0 not in self._different:
            yield (
                f"among {samples:,} calibration samples there are only {different} different ones, too few: the "
                "network may be worthless on other data, however well its outputs agree on these. Calibrate on a "
                "hundred or more"
            )
        # So many samples of equal energy would have the sums that these have.
        elif self._squared and samples >= GUESSED and (equal := self._energy**2 / self._squared) < _DECIDED:
            yield (
                f"{equal:.1f} of {samples:,} calibration samples have nearly all of the energy of the inputs, so that "
                "layers which see them as they are rest on those alone, and so do the errors that are stated. Look "
                "for samples in another unit, and leave them out or bring inputs to one scale"
            )

    def _size(self, batch: Any, number: int) -> int:
        """Samples of a batch, which must hold some."""
        size, shapes = self.layout.size(batch), [tuple(t.shape) for t in tensors(self.layout.inputs(batch))]
        if not size:
            raise CalibrationError(f"calibration batch {number} is empty: it holds no sample; leave it out")
        if shapes and not any(map(math.prod, shapes)):
            raise CalibrationError(
                f"calibration batch {number} is empty: its inputs have the shape {shapes[0]}; leave it out"
            )
        return size

    def _lengths(self, batch: Any, number: int) -> Tensor:
        size = self._size(batch, number)
        return lengths_of(self.layout.columns(batch, size), mask_of(batch, size, self.layout), size)

    def positions(self, rows: int) -> int:
        """Positions of a sample of mean length that give at least so many rows over the run; one or more."""
        return max(1, -(-rows // max(self.samples or FEW, 1)))


def choose(spec: LayerSpec, shape: tuple[int, ...], positions: int | None, samples: Samples, seed: int = 0) -> Chosen:
    """Rows of what a layer sees, as many of every sample as its length asks for.

    A layer may be given its rows in any of these ways. With samples or windows in front, ``(samples * m, ...)``: a
    sample owns ``m`` of them, one after the other, or its part of flattened rows ``(samples * positions, features)``.
    Positions in front, ``(positions, samples, features)``: known by the second size, where the first is no multiple of
    the number of samples or is a length of the batch. Data only, as many rows as the mask has: in the order of the
    mask. Anything else, such as the tokens that an expert is given, has no samples: the rows are taken as one, and are
    said to belong to the samples in equal parts.

    A mask applies where there are as many rows as it has entries, and to convolutions of as many positions. Where
    there are not, as behind a pooling, it says nothing of the rows, and all of them count.

    Parameters
    ----------
    shape
        Of the layer's input.
    positions
        Rows of a sample of mean length; None for all.
    samples
        Of the batch.
    """
    # Layers with as many rows in the same order are given the same ones.
    alike = (*leading(spec, shape), _turned(spec, shape, samples), positions, seed)
    if samples.mask is not None and not spec.is_linear:
        alike = (*alike, shape, spec.kernel, spec.stride, spec.sides, spec.dilation)
    if alike not in samples._chosen:
        samples._chosen[alike] = _chosen(_Rows.of(spec, shape, samples), positions, seed, samples.apart)
    return samples._chosen[alike]


def _chosen(rows: _Rows, positions: int | None, seed: int, apart: Tensor | None) -> Chosen:
    keys = mixed(rows.keys + odd(seed))
    # A fraction of a row is one with that probability; a sample of one row always gives it.
    wanted = (
        rows.counts
        if positions is None
        else (positions * rows.share + in_unit_interval(keys)).long().minimum(rows.counts)
    )
    wanted = torch.where(rows.counts == 1, 1, wanted)
    if apart is not None and not rows.owners:
        wanted = wanted.masked_fill(apart, 0)
    if torch.equal(wanted, rows.counts):
        return rows.all()
    part = torch.arange(len(wanted)).repeat_interleave(wanted)
    stratum = torch.arange(len(part)) - (wanted.cumsum(0) - wanted)[part]
    of, strata = rows.counts[part], wanted[part]
    low, high = stratum * of // strata, (stratum + 1) * of // strata
    drawn = mixed(keys[part] + odd(stratum + 1))
    # 31 bits of the number, as a share of the width of the stratum.
    rank = low + (shifted(drawn, 33) * (high - low) >> 31)
    return rows.at(part, rank)


@dataclass(frozen=True)
class _Rows:
    """The rows that are data, part by part: as a rule a part is a sample."""

    counts: Tensor  # rows of each part
    keys: Tensor
    share: Tensor
    # Index of every row, part by part; None where that of row ``r`` of part ``p`` is ``p * steps[0] + r * steps[1]``.
    flat: Tensor | None
    steps: tuple[int, int]
    owners: int = 0  # samples, where all rows are one part

    @classmethod
    def of(cls, spec: LayerSpec, shape: tuple[int, ...], samples: Samples) -> _Rows:
        front, total = leading(spec, shape)
        size, mask = samples.size, _read(spec, shape, samples.mask)
        data = None if mask is None else mask.sum(1)
        if mask is not None and data is not None and total != mask.numel() and total == int(data.sum()):
            return cls(data, samples.keys, samples.share, torch.arange(total), (0, 1))
        turned = _turned(spec, shape, samples)
        if total % size or (front % size and not turned):
            key, length = samples.keys.sum().reshape(1), torch.tensor([float(size)]).double()
            return cls(torch.tensor([total]), key, length, None, (0, 1), size)
        each = total // size
        steps = (1, size) if turned else (each, 1)
        if mask is None or each != mask.shape[1]:
            # What has another number of rows than the mask has positions does not grow with the data in it.
            share = samples.share if mask is None else torch.ones_like(samples.share)
            return cls(samples.filled * each, samples.keys, share, None, steps)
        part, position = mask.nonzero(as_tuple=True)
        return cls(mask.sum(1), samples.keys, samples.share, part * steps[0] + position * steps[1], steps)

    def at(self, part: Tensor, rank: Tensor) -> Chosen:
        if self.flat is None:
            index = part * self.steps[0] + rank * self.steps[1]
        else:
            index = self.flat[(self.counts.cumsum(0) - self.counts)[part] + rank]
        return Chosen(index, index * self.owners // int(self.counts[0]) if self.owners else part)

    def all(self) -> Chosen:
        part = torch.arange(len(self.counts)).repeat_interleave(self.counts)
        return self.at(part, torch.arange(len(part)) - (self.counts.cumsum(0) - self.counts)[part])


def unmasked(spec: LayerSpec, shape: tuple[int, ...], samples: Samples) -> int:
    """How many rows a layer is given of a sample with padding where the mask says nothing of them; 0 where it does."""
    mask, (front, total), size = _read(spec, shape, samples.mask), leading(spec, shape), samples.size
    if mask is None or bool(mask.all()) or total % size or front % size or total == int(mask.sum()):
        return 0
    each = total // size
    return 0 if each in (1, mask.shape[1]) else each


def leading(spec: LayerSpec, shape: tuple[int, ...]) -> tuple[int, int]:
    """Size of the first axis before a row's own, and rows in all."""
    axes = len(spec.kernel)
    leading = shape[:-1] if spec.is_linear else shape[: -axes - 1]
    positions = () if spec.is_linear else spec.output_shape(tuple(shape[-axes:]))
    return (leading[0] if leading else 1), math.prod((*leading, *positions))


def _read(spec: LayerSpec, shape: tuple[int, ...], mask: Tensor | None) -> Tensor | None:
    """The mask of a convolution's answers: each is data where the middle of its patch is."""
    axes = len(spec.kernel)
    sides = tuple(shape[-axes:]) if axes else ()
    if mask is None or not axes or spec.transposed or math.prod(sides) != mask.shape[1]:
        return mask
    place = torch.zeros(1, dtype=torch.int64)
    for axis, (side, count) in enumerate(zip(sides, spec.output_shape(sides), strict=True)):
        middle = spec.dilation[axis] * (spec.kernel[axis] - 1) // 2 - spec.sides[axis][0]
        at = (torch.arange(count) * spec.stride[axis] + middle).clamp(0, side - 1)
        place = (place.unsqueeze(1) * side + at).flatten()
    return mask[:, place]


def choose_places(front: int, each: int, positions: int | None, samples: Samples, seed: int = 0) -> Int64[Tensor, " n"]:
    """The same for rows that lie sample by sample, ``[front, each]``."""
    return choose(_ROW, (front, each, 1), positions, samples, seed).index


@functools.lru_cache(maxsize=2)
def _normal_numbers(seed: int) -> Tensor:
    """A table that is only read: drawing it takes longer than a batch of a small network, so it is kept."""
    with torch.inference_mode(False):
        return torch.randn(_TABLE, generator=torch.Generator().manual_seed(seed))


def directions(outputs: Tensor, samples: Samples, seed: int = 0, *, positions: bool = True) -> Tensor:
    """A tensor of standard normal numbers of the shape of a network's outputs, drawn by the contents of the samples.

    The same sample is given the same numbers in any batch and order; where outputs belong to padding there are zeros,
    token by token where they have ``positions``.
    The numbers of a sample are a stretch of one table of a million, which starts where its key says.
    """
    in_front = samples_first(outputs, samples.size, samples.turned)
    drawn = _drawn(in_front, samples, seed, positions)
    return drawn if in_front is outputs else drawn.movedim(0, 1)


def _drawn(outputs: Tensor, samples: Samples, seed: int, positions: bool) -> Tensor:
    """The same for outputs that have their samples in front."""
    table = _normal_numbers(seed)
    mask, size = samples.mask, samples.size
    if not outputs.dim() or outputs.shape[0] != size:
        start = int(shifted(mixed(samples.keys.sum().reshape(1)), 20)) % _TABLE
        return table[(start + torch.arange(outputs.numel())) % _TABLE].reshape(outputs.shape).to(outputs)
    start = (shifted(mixed(samples.keys + odd(seed)), 20) % _TABLE).unsqueeze(1)
    if mask is None or not positions or outputs.dim() < 2 or outputs.shape[1] != mask.shape[1]:
        place = torch.arange(outputs[0].numel()).expand(size, -1)
        return (table[(start + place) % _TABLE] * samples.filled.unsqueeze(1)).reshape(outputs.shape).to(outputs)
    # The place among the data, so that padding makes no difference.
    width = max(1, outputs[0, 0].numel())
    place = (mask.cumsum(1) - 1).clamp_min(0).unsqueeze(2) * width + torch.arange(width)
    drawn = table[(start.unsqueeze(2) + place) % _TABLE] * mask.unsqueeze(2)
    return drawn.reshape(outputs.shape).to(outputs)


def pointwise(spec: LayerSpec) -> LayerSpec:
    """A convolution of the same inputs whose patches are single positions."""
    ones, none = (1,) * len(spec.kernel), (0,) * len(spec.kernel)
    return dataclasses.replace(
        spec, kernel=ones, stride=ones, padding=none, dilation=ones, output_padding=none, transposed=False
    )


def mean_rows(spec: LayerSpec, shape: tuple[int, ...], samples: Samples) -> float:
    """Rows that a sample of mean length has, as far as this batch tells."""
    rows = _Rows.of(spec, shape, samples)
    return float(rows.counts.sum()) / max(float(rows.share.sum()), 1e-12)


def _turned(spec: LayerSpec, shape: tuple[int, ...], samples: Samples) -> bool:
    """Whether the positions come before the samples."""
    if not spec.is_linear or len(shape) != 3 or shape[1] != samples.size:
        return False
    if shape[0] == samples.size:
        return samples.turned
    return bool(shape[0] % samples.size) or shape[0] in samples.lengths


def _count(batches: Any) -> int | None:
    """Samples of the whole run, if anything tells without reading it."""
    try:
        if isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset):
            samples = len(batches.sampler) if batches.batch_size is not None else len(batches)  # type: ignore[arg-type]
            return min(samples, len(batches) * (batches.batch_size or 1)) if batches.drop_last else samples
    except TypeError:
        return None
    told = getattr(batches, "samples", None)
    return told if isinstance(told, int) and told > 0 else None


# A linear layer of one number: its rows are the places of a tensor.
_ROW = LayerSpec(("",), 1, 1)
# Numbers of the table that directions are taken from.
_TABLE = 1 << 20
