"""What a training run reports."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from spectrim.network.printing import Grid, Printed, count, folded


@dataclass(frozen=True)
class EpochRecord:
    """One line of the history.

    Attributes
    ----------
    epoch
        Number of epochs finished, so the first record has 1.
    loss
        Mean training loss of the epoch (task and distillation, without the penalty).
    lr
        Learning rate of the first parameter group at the last step of the epoch.
    metric
        What ``evaluate`` returned after this epoch, or None.
    """

    epoch: int
    loss: float
    lr: float
    metric: float | None = None


@dataclass(frozen=True)
class TrainingResult(Printed):
    """The outcome of a training run. The weights are in the model that was passed. It prints as a table of its epochs.

    Attributes
    ----------
    history
        One record an epoch.
    best, best_epoch
        Highest metric and its epoch, None without ``evaluate``.
    last
        The last metric, None without ``evaluate``.
    epochs, steps
        What was done in all, over every resumed part.
    seconds
        Time spent in the loop, evaluation included, over every resumed part.
    """

    history: tuple[EpochRecord, ...]
    best: float | None
    best_epoch: int | None
    epochs: int
    steps: int
    seconds: float

    @property
    def last(self) -> float | None:
        return next((r.metric for r in reversed(self.history) if r.metric is not None), None)

    def rows(self) -> list[dict[str, Any]]:
        """The epochs as plain values, one dict an epoch: ``epoch``, ``loss``, ``lr``, ``metric`` or None."""
        return [dataclasses.asdict(record) for record in self.history]

    _records = rows

    def _grid(self) -> Grid:
        metric = self.last is not None
        lines = [
            [str(r.epoch), f"{r.loss:.4g}", f"{r.lr:.3g}", *(["" if r.metric is None else f"{r.metric:.2f}"] * metric)]
            for r in self.history
        ]
        best = f"; best metric {self.best:.2f}, after epoch {self.best_epoch}" if self.best is not None else ""
        return Grid(
            [">epoch", ">loss", ">learning rate", *([">metric"] * metric)],
            folded(lines, lambda rest: ["...", *[""] * (len(rest[0]) - 1)]),
            title=f"{count(self.epochs, 'epoch')}, {count(self.steps, 'step')} in {self.seconds:.1f} s{best}",
        )

    def __repr__(self) -> str:
        last = f", last metric {self.last:.4g}" if self.last is not None else ""
        return f"TrainingResult({count(self.epochs, 'epoch')}, {count(self.steps, 'step')}, {self.seconds:.1f} s{last})"
