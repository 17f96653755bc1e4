"""Which outputs of a model have a row for each position of its inputs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.masks import mask_of
from spectrim.nn.watch.nesting import output_tensors, transformed
from spectrim.nn.watch.observe import observe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Positions:
    """Which output tensors have the positions of the inputs on their second axis.

    Sizes alone do not tell: a batch may be padded to as many tokens as there are classes.

    Attributes
    ----------
    known
        By the place of an output; None where it is not known, and sizes have to tell.
    """

    known: tuple[bool, ...] | None = None

    @classmethod
    def of(cls, model: nn.Module, batch: Any, feed: Feed) -> Positions:
        """See which sizes of outputs follow when inputs have a position less; nothing is run without a mask."""
        layout = feed.decide(model, batch).layout
        size = layout.size(batch)
        data = mask_of(batch, size, layout)
        if data is None or data.shape[1] < 2 or layout.is_turned(batch, size):
            return cls()
        whole, shapes = layout.picked(batch, torch.arange(min(size, 2))), []
        try:
            with observe(model, forward=feed) as run:
                for part in (whole, _shorter(whole, data.shape[1])):
                    shapes.append([tuple(tensor.shape) for tensor in output_tensors(run(part))])
        except Exception as error:  # a model may refuse other lengths than its batches have
            log.info("which outputs have positions is told by their sizes: %s", error)
            return cls()
        return cls(tuple(a[1:2] != b[1:2] for a, b in zip(*shapes, strict=False)))

    def of_output(self, place: int, output: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of an output that has its samples in front, if it has positions."""
        fits = mask is not None and output.dim() > 1 and output.shape[:2] == mask.shape
        return mask if fits and self.may_have(place) else None

    def may_have(self, place: int) -> bool:
        """Whether an output has positions as far as is known."""
        return self.known is None or all(self.known[place : place + 1])


def _shorter(batch: Any, length: int) -> Any:
    """A batch without the last position of what has so many behind its samples."""

    def cut(tensor: Tensor) -> Tensor:
        for axis in range(1, tensor.dim()):
            tensor = tensor.narrow(axis, 0, length - 1) if tensor.shape[axis] == length else tensor
        return tensor

    return transformed(batch, cut)
