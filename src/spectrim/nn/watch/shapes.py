"""Input shapes of a layer for one sample, from the calls of a whole batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spectrim.network.layer import LayerSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call of a layer."""

    shape: Shape  # spatial shape of the input; empty for linear layers
    rows: int  # images, or rows of a linear layer
    whole: bool  # whether samples may lie on an axis of the input, so that each has an equal part of the call

    @classmethod
    def of(cls, spec: LayerSpec, shape: Shape, samples: int) -> Call:
        """Of an input of this shape, in a batch of so many samples."""
        if spec.is_linear:
            rows = math.prod(shape[:-1])
            # Samples of positions, positions of samples as torch's attention has them, or rows that are all in one.
            whole = shape[0] % samples == 0 or shape[1] == samples if len(shape) > 2 else rows % samples == 0
            return cls((), rows, whole)
        axes = len(spec.kernel)
        rows = shape[0] if len(shape) > axes + 1 else 1
        return cls(tuple(shape[-axes:]), rows, rows % samples == 0)


def of_one_sample(calls: Sequence[Call], samples: int) -> tuple[tuple[float, ...], ...]:
    """Input shapes of a layer for one sample.

    A call in which every sample has its part is as many calls for one sample: models that fold frames or crops into the
    batch axis call the layer several times a sample. Calls with some samples each, as of a model that loops over its
    images, are as many as their rows make for one sample, at least one. Where such images differ in size, those of
    about one size are taken for one of mean size.
    """
    parts = [call for call in calls if not call.whole]
    shapes: list[tuple[float, ...]] = []
    for call in calls:
        if call.whole:
            each = call.rows // samples
            shapes += [call.shape] * each if call.shape else [(each,)]
        elif parts:
            shapes += _merged(parts, samples)
            parts = []
    return tuple(shapes)


def _merged(calls: Sequence[Call], samples: int) -> Iterator[tuple[float, ...]]:
    rows = sum(call.rows for call in calls)
    if not calls[0].shape:
        number = max(1, round(len(calls) / samples))
        # A part of a row where some samples have none, as of an expert or the words of a rare cluster.
        each = rows / samples / number
        yield from ((int(each) if each.is_integer() else each,) for _ in range(number))
        return
    images = sorted((call.shape for call in calls for _ in range(call.rows)), key=math.prod)
    number = max(1, round(rows / samples))
    cuts = [n * rows // number for n in range(number + 1)]
    for first, last in itertools.pairwise(cuts):
        yield _mean(images[first:last])


def _mean(shapes: Sequence[Shape]) -> Shape:
    """A shape of mean sides, the last one such that as many numbers are in it as in these on average."""
    if len(set(shapes)) == 1:
        return shapes[0]
    sides = [max(1, round(sum(side) / len(shapes))) for side in zip(*shapes, strict=True)]
    numbers = sum(map(math.prod, shapes)) / len(shapes)
    return (*sides[:-1], max(1, round(numbers / math.prod(sides[:-1]))))
