"""What a training run reports."""

from __future__ import annotations

from dataclasses import dataclass


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
class TrainingResult:
    """The outcome of a training run. The weights are in the model that was passed.

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
