"""The samples of a batch: how many, which positions are data, how long they are, a key for each, and a few of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn

from spectrim.nn.watch.batches import Feed, Forward
from spectrim.nn.watch.keys import keys_of, mixed, odd, ranked
from spectrim.nn.watch.layout import Layout
from spectrim.nn.watch.masks import check_not_inverted, mask_of, positions_second, tensor_of


@dataclass(frozen=True)
class Samples:
    """What the samples of one batch are."""

    size: int  # how many
    # A number made from each sample's inputs, by which is drawn: the same sample has the same key in any batch, order
    # or cut, where there is a mask with any padding, and as a rule in any units.
    keys: Int64[Tensor, " size"]
    bits: Int64[Tensor, " size"]  # the same of all bits, by which it is told apart
    mask: Bool[Tensor, "size positions"] | None  # ``[size, positions]``, True where a token is data; None if all are
    # The length of each sample in units of the mean length of the run; a sample of twice the length gives twice the
    # rows.
    share: Float64[Tensor, " size"]
    # Sizes of the input tensors beside that of the samples, by which a layer that is given the positions before the
    # samples is known.
    lengths: frozenset[int] = frozenset()
    turned: bool = False  # whether the inputs have their positions before the samples
    apart: Bool[Tensor, " size"] | None = None  # samples of which no row is drawn; None if there are none
    _chosen: dict[Hashable, Chosen] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        batch: Any,
        layout: Layout = Layout(),  # noqa: B008 (frozen)
        *,
        mean: float | None = None,
    ) -> Samples:
        """The samples of a batch.

        Parameters
        ----------
        batch
            Tensors, mappings or tuples whose first element is the inputs; labels make no difference.
        layout
            Where samples are in the batch, and what says which positions are data.
        mean
            Mean length of a sample of the run, in tokens that are data, or else in numbers of the inputs.

        Raises
        ------
        CalibrationError
            If the mask is not there, has another shape, or is true of padding.
        """
        size = layout.size(batch)
        found = mask_of(batch, size, layout)
        columns = layout.columns(batch, size, without=tensor_of(batch, layout))
        if found is not None:
            check_not_inverted(found, columns)
        share = lengths_of(columns, found, size) / mean if mean else torch.ones(size).double()
        if found is not None:
            columns = [[positions_second(part, found.shape[1]) for part in column] for column in columns]
        keys, bits = keys_of(columns, found, size)
        return cls(size, keys, bits, found, share, layout.lengths(batch, size), layout.is_turned(batch, size))

    @property
    def filled(self) -> Bool[Tensor, " size"]:
        """Whether there is data in a sample, and not padding alone."""
        return torch.ones(self.size, dtype=torch.bool) if self.mask is None else self.mask.any(1)


class Chosen(NamedTuple):
    """Rows of what a layer sees."""

    # ``[n]``, into the rows as :func:`spectrim.nn.watch.patches.patches_at` counts them; no row twice.
    index: Int64[Tensor, " n"]
    sample: Int64[Tensor, " n"]  # ``[n]``, the sample of the batch that each belongs to


def lengths_of(columns: list[list[Tensor]], mask: Tensor | None, size: int) -> Tensor:
    """How long each sample is: tokens that are data, or numbers of its inputs."""
    if mask is not None:
        return mask.sum(1).double()
    lengths = torch.zeros(size, dtype=torch.float64)
    for column in columns:
        lengths += torch.cat([torch.full((len(part),), float(part[0].numel())) for part in column])
    return torch.where(lengths > 0, lengths, 1.0)


def energies_of(columns: list[list[Tensor]], size: int) -> Tensor:
    """The sum of squares ``[size]`` of the numbers of each sample; what is no number, as tokens, has none."""
    energies = torch.zeros(size, dtype=torch.float64)
    for column in columns:
        if column[0].is_floating_point():
            norms = [torch.linalg.vector_norm(part.float().unsqueeze(-1).flatten(1), dim=1) for part in column]
            energies += torch.cat(norms).double().cpu().square()
    return energies


def spread(batches: Iterable[Any], most: int, layout: Layout, held: Sequence[Tensor] = ()) -> list[Any]:
    """So many samples at most, in parts of batches, chosen by their contents: their order makes no difference.

    Of those that are ``held``, if any are. Of samples that are there several times about their share is chosen.
    """
    parts: list[_Part] = []
    times: Counter[int] = Counter()
    among = held if any(bool(each.any()) for each in held) else itertools.repeat(None)
    for batch, each in zip(batches, among, strict=False):
        samples = Samples.of(batch, layout)
        index = (samples.filled if each is None else each & samples.filled).nonzero().flatten()
        keys, bits = samples.keys[index], samples.bits[index]
        parts.append((batch, index, torch.stack([_apart(keys, bits, times), bits])))
        if sum(len(index) for _, index, _ in parts) > 2 * most:
            parts = _fewer(parts, most, layout)
    return [_part(batch, index, layout) for batch, index, _ in _fewer(parts, most, layout) if len(index)]


# A batch, which of its samples, and keys and bits of these, ``[2, n]``.
_Part = tuple[Any, Tensor, Tensor]


def _apart(keys: Int64[Tensor, " n"], bits: Int64[Tensor, " n"], times: Counter[int]) -> Int64[Tensor, " n"]:
    """The keys, with others for samples whose equals came before: no sample goes or stays with all of them."""
    before = []
    for each in bits.tolist():
        before.append(times[each])
        times[each] += 1
    again = torch.tensor(before, dtype=torch.int64)
    return torch.where(again > 0, mixed(keys + odd(again)), keys)


def _fewer(parts: Sequence[_Part], most: int, layout: Layout) -> list[_Part]:
    """Those of the smallest keys, where there are more; what goes is not held on to."""
    keys, bits = torch.cat([each for _, _, each in parts], dim=1)
    if len(keys) <= most:
        return list(parts)
    left = torch.zeros(len(keys), dtype=torch.bool)
    left[ranked(keys, bits)[:most]] = True
    found = []
    for (batch, index, keys), stays in zip(parts, left.split([len(index) for _, index, _ in parts]), strict=True):
        if bool(stays.any()):
            found.append((_part(batch, index[stays], layout), torch.arange(int(stays.sum())), keys[:, stays]))
    return found


def _part(batch: Any, index: Tensor, layout: Layout) -> Any:
    return batch if len(index) == layout.size(batch) else layout.picked(batch, index)


def first_batches(batches: Iterable[Any], most: int, layout: Layout) -> Iterator[Any]:
    """Whole batches, until there are so many samples."""
    for batch in batches:
        yield batch
        most -= layout.size(batch)
        if most <= 0:
            return


def contents(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> str:
    """How many samples there are, and a digest of their inputs: ``512 samples 9c41...``."""
    feed = Feed.of(forward)
    count = total = 0
    for batch in batches:
        samples = Samples.of(batch, feed.decide(model, batch).layout)
        count += samples.size
        total += int(samples.bits.sum())
    return f"{count:,} samples {total % 2**64:016x}"


def read_again(then: object, read: Callable[[], str]) -> tuple[str, bool]:
    """What batches hold, and whether they are as they were.

    Samples that are cut or turned at random are others in every reading, which tells nothing: they count as unchanged.

    Parameters
    ----------
    then
        What they held; None where that is not known.
    read
        Reads them.
    """
    now = read()
    return now, then in (None, now) or read() != now
