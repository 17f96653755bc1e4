"""Run by tests as a program: learns the ranks of a small residual network and writes the factored one.

python learning_script.py OUT CHECKPOINT

One run for each line of standard input, as tests.train.mortal says.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import spectrim as st
from spectrim.train import LearnedResult, Recipe, Schedule, budget_path, learn_ranks, randomness
from tests.train import mortal
from tests.train.small import accuracy, fixed_batches, loader

LEARNING = Recipe(epochs=4, lr=0.02, checkpoint_every=2)
TUNING = Recipe(epochs=2, lr=0.02, checkpoint_every=2)
SCHEDULE = Schedule(0.1, 1.6, 8)


class Stop(Exception):
    """Stands for whatever ends a process."""


class Stopping:
    """Batches that end the run when one too many is asked for, over all epochs together."""

    def __init__(self, at: int) -> None:
        self.batches, self.left = loader(), at

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if not self.left:
                raise Stop
            self.left -= 1
            yield batch


class Residual(nn.Module):
    """Three convolutions with BatchNorm, a skip connection, dropout, a linear head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
            self.norm0 = nn.BatchNorm2d(width)
            self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.norm1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.drop = nn.Dropout(0.2)
            self.head = nn.Linear(width, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.norm0(self.stem(inputs)))
        change = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(hidden)))))
        return self.head(self.drop(torch.relu(hidden + change).mean((2, 3))))


@functools.cache
def calibration() -> list[tuple[Tensor, Tensor]]:
    """The same batches in every process, with the generators left as they are."""
    state = randomness.capture()
    batches = fixed_batches(48, 24)
    randomness.restore(state)
    return batches


def options(**changes: Any) -> dict[str, Any]:
    """Arguments that make a run of seconds."""
    return {
        "calibration": calibration(),
        "learning": LEARNING,
        "tuning": TUNING,
        "schedule": SCHEDULE,
        "evaluate": accuracy,
        **changes,
    }


def learn(batches: Any = None, **changes: Any) -> LearnedResult:
    """Half the parameters, from the same start each time."""
    batches = loader() if batches is None else batches
    return learn_ranks(Residual(), batches, st.Budget(parameters=0.5), **options(**changes))


def path(batches: Any = None, **changes: Any) -> tuple[LearnedResult, ...]:
    """Two budgets of a run, with 12 batches of learning and 6 of tuning each."""
    batches = loader() if batches is None else batches
    budgets = [st.Budget(parameters=share) for share in (0.7, 0.4)]
    learning, tuning = replace(LEARNING, epochs=2), replace(TUNING, epochs=1)
    return budget_path(Residual(), batches, budgets, **options(learning=learning, tuning=tuning, **changes))


def shuffled() -> DataLoader:
    """Given images in random order. No image draws from python's generator, from which beartype draws in tests."""
    images = [pair for inputs, labels in calibration() for pair in zip(inputs, labels, strict=True)]
    return DataLoader(images, 8, shuffle=True)  # type: ignore[arg-type]


def write(out: str, checkpoint: str) -> None:
    result = learn(shuffled(), checkpoint=checkpoint)
    st.save(result.model, result.plan, out)
    result.trajectory.write(out + ".json")


if __name__ == "__main__":
    torch.set_num_threads(1)
    mortal.serve(functools.partial(write, *sys.argv[1:]))
