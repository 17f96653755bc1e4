"""What batches look like when a model gets them: told to people, and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectrim.cli.batches import Batches
from spectrim.cli.common import Output
from spectrim.cli.subject import running
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.chance import draws_kept
from spectrim.nn.watch.nesting import logits, tensors

# Inputs of one kind of data differ less than this from batch to batch; a normalisation more or less, by more.
_SPREAD, _SHIFT = 1.7, 1.0


@dataclass(frozen=True)
class Inputs:
    """The inputs of a reference, as their first batch shows them."""

    settings: str  # how built-in data are prepared; empty for others
    dtype: str
    shape: tuple[int, ...]
    # Of all numbers, of floating-point inputs.
    mean: float = 0.0
    spread: float = 0.0

    @classmethod
    def of(cls, batches: Iterable[Any], model: nn.Module | None = None) -> Inputs | None:
        """Of a reference's batches, as a model takes them; None if they hold no tensor."""
        with draws_kept():
            batch = next(iter(batches), None)
        first = next(tensors(batch), None)
        if first is None:
            return None
        # Of a list of images the first tensor is a sample itself.
        of_one = first.shape if model is not None and Feed().decide(model, batch).layout.listed else first.shape[1:]
        settings = batches.preparation if isinstance(batches, Batches) else ""
        inputs = cls(settings, str(first.dtype).removeprefix("torch."), tuple(of_one))
        if not first.is_floating_point() or not first.numel():
            return inputs
        spread, mean = torch.std_mean(first.double(), correction=0)
        return dataclasses.replace(inputs, mean=float(mean), spread=float(spread))

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape)) or "numbers"
        seen = f", mean {self.mean:.3g} and spread {self.spread:.3g}" if self.spread else ""
        return f"{size} {self.dtype}{seen}{f' ({self.settings})' if self.settings else ''}"

    def differs(self, other: Inputs) -> bool:
        """Whether the two are prepared differently, as far as can be seen."""
        if (self.dtype, len(self.shape)) != (other.dtype, len(other.shape)):
            return True
        if self.settings and other.settings:
            return self.settings != other.settings
        if not self.spread or not other.spread:
            return False
        small, large = sorted((self.spread, other.spread))
        return self.shape != other.shape or large > _SPREAD * small or abs(self.mean - other.mean) > _SHIFT * large


def class_note(batches: Iterable[Any], model: nn.Module) -> str:
    """What is to be seen to where words stand for others, or fewer, classes than a model answers with."""
    if not isinstance(batches, Batches) or not batches.names or not (batch := next(iter(batches), None)):
        return ""
    with running(model, "--test"):
        answers = logits(Feed().decide(model, batch)(model, batch)).shape[-1]
    if answers == len(batches.names):
        return ""
    return (
        f"The {len(batches.names):,} classes of the samples are numbered from 0 in alphabetical order, "
        f"and the model answers with {answers} numbers: accuracy is right if these are its first classes."
    )


def tell_preprocessing(
    out: Output, references: Mapping[str, Iterable[Any] | None], model: nn.Module
) -> tuple[str, ...]:
    """Say how the inputs of every option are prepared, and return notes on those that differ from the first."""
    known: dict[str, Inputs] = {}
    for option, batches in references.items():
        found = None if batches is None else Inputs.of(batches, model)
        if found is not None:
            known[option] = found
            out.say(f"{option}: inputs are {found}")
    options = list(known)
    notes = tuple(
        f"{options[0]} and {option} are prepared differently: {known[options[0]]} against {known[option]}. A network "
        "takes data prepared in one way."
        for option in options[1:]
        if known[options[0]].differs(known[option])
    )
    told = class_note(references.get("--test") or (), model)
    notes += (told,) if told else ()
    for note in notes:
        out.say(f"note: {note}")
    return notes
