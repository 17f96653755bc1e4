"""What samples batches hold, as a short text: the same whatever their order and their cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from spectrim.nn.watch.batches import Feed, Forward
from spectrim.nn.watch.masks import Mask
from spectrim.nn.watch.samples import Samples


def contents(model: nn.Module, batches: Iterable[Any], *, mask: Mask = None, forward: Forward | None = None) -> str:
    """How many samples there are, and a digest of their inputs: ``512 samples 9c41...``."""
    feed = Feed.of(forward)
    count = total = 0
    for batch in batches:
        samples = Samples.of(batch, mask, layout=feed.decide(model, batch).layout)
        count += samples.size
        total += int(samples.keys.sum())
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
