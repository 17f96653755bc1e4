"""Learned ranks in one call, and several budgets in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.cost import counted
from spectrim.cost.latency import Latency
from spectrim.errors import called_as
from spectrim.network.file_kinds import path_of
from spectrim.nn.copying import copy_model
from spectrim.nn.find import Which
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.layout import Mask, Where
from spectrim.nn.watch.sampling import Sampling
from spectrim.search.file_size import on_file
from spectrim.selection.budget import COSTS, Budget, BudgetLike
from spectrim.train.learning import LearnedResult, LearningRun
from spectrim.train.loop import Evaluate
from spectrim.train.objective import Loss
from spectrim.train.recipe import Recipe


@called_as("Write learn_ranks(model, batches, 'macs=50%')", model=nn.Module)
def learn_ranks(
    model: nn.Module,
    batches: Iterable[Any],
    budget: BudgetLike | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    learning: Recipe | None = None,
    tuning: Recipe | None = None,
    patience: int | None = 5,
    weigh: bool = True,
    skip: Which | Iterable[Which] = (),
    only: Which | Iterable[Which] = (),
    groups: bool | Mapping[str, Sequence[str]] = False,
    rows: int | str | None = "auto",
    positions: int | None = None,
    mask: Mask = None,
    samples: Where = None,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    checkpoint: str | Path | None = None,
    latency: Latency | None = None,
    progress: bool | None = None,
    accelerate: bool | None = None,
    **options: Any,
) -> LearnedResult:
    """Learn the weights and ranks of a network together, within a budget, then fine-tune the factored network.

    Parameters
    ----------
    model
        Left untouched, and the teacher of both trainings unless there is another one.
    batches
        Training batches, as for :func:`spectrim.fine_tune`, with a length.
    budget
        For the whole network. ``multiplier=`` among the options takes its place.
    calibration
        Batches of inputs for the low-rank copies and for the final fit; the first 2,048 samples of ``batches`` if None.
        With their labels they judge whether learning has paid, best if they are none that are trained on.
    learning
        Training of the dense network with the penalty. The C steps are spread evenly over its epochs.
    tuning
        Training of the factored network afterwards.
    patience
        Stop learning at the end of an epoch when so many C steps have changed no choice and the weights are within 5 %
        of their low-rank copies; None never stops early.
    weigh
        Weigh errors in output energy by the gradients that reach each layer.
    skip, only
        Layers to leave alone or keep to; see :func:`spectrim.find`.
    groups
        Layers that may share factors: True finds them (:func:`spectrim.group`), a mapping names them.
    rows, positions, mask, samples
        How many rows of the calibration batches statistics and fits rest on, which of their tokens are data, and where
        a batch's samples are; see :func:`spectrim.calibrate`.
    teacher, loss, evaluate, progress, accelerate
        As for :func:`spectrim.fine_tune`; ``evaluate``, of which more is better, is used in tuning, and in place of the
        loss to judge whether learning has paid.
    checkpoint
        Folder of two training checkpoints. A call that was killed and made again continues from them and ends in the
        same weights, bit for bit on a CPU.
    latency
        How time is measured, for a latency budget.
    **options
        Of :class:`LearnedRanks`: ``schedule``, ``multiplier``, ``methods``, ``energy``, ... Within a budget ``energy``
        is ``"output"`` by default.

    Returns
    -------
    LearnedResult

    Raises
    ------
    InfeasibleBudgetError
        If the budget cannot be met.

    Notes
    -----
    Where a few steps of learning have done harm, the network that :func:`spectrim.compress` makes of the given weights
    within the budget is fine-tuned and returned, and a note of the report says so. With a multiplier, and where
    milliseconds are limited, the two are not compared.
    """
    limits = None if budget is None else _limits(model, budget, options)
    folder = None if checkpoint is None else path_of(checkpoint, "checkpoint")
    run = LearningRun(
        model, batches, calibration=calibration, learning=learning or Recipe(), tuning=tuning or Recipe(),
        patience=patience, weigh=weigh, skip=skip, only=only, groups=groups,
        sampling=Sampling(rows, positions), feed=Feed(None, samples, mask), evaluate=evaluate, latency=latency,
        training={"teacher": teacher, "loss": loss, "progress": progress, "accelerate": accelerate}, options=options,
    )  # fmt: skip
    return run.point(copy_model(model), limits, folder)


def budget_path(
    model: nn.Module,
    batches: Iterable[Any],
    budgets: Sequence[BudgetLike],
    *,
    calibration: Iterable[Any] | None = None,
    learning: Recipe | None = None,
    tuning: Recipe | None = None,
    patience: int | None = 5,
    weigh: bool = True,
    skip: Which | Iterable[Which] = (),
    only: Which | Iterable[Which] = (),
    groups: bool | Mapping[str, Sequence[str]] = False,
    rows: int | str | None = "auto",
    positions: int | None = None,
    mask: Mask = None,
    samples: Where = None,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    checkpoint: str | Path | None = None,
    latency: Latency | None = None,
    progress: bool | None = None,
    accelerate: bool | None = None,
    done: Callable[[LearnedResult], None] | None = None,
    **options: Any,
) -> tuple[LearnedResult, ...]:
    """Several budgets from one run: every one goes on from the dense weights that the one before has learned.

    Parameters
    ----------
    budgets
        In the order they are met; the loosest first, so that each starts close to the next.
    learning, tuning
        For every budget.
    done
        Called with every result as soon as it is there.

    Returns
    -------
    tuple of LearnedResult
        One a budget: the points of an accuracy-cost curve. The other parameters are those of :func:`learn_ranks`.
    """
    if not budgets:
        raise ValueError("give at least one budget")
    limits = [_limits(model, budget, options) for budget in budgets]
    folder = None if checkpoint is None else path_of(checkpoint, "checkpoint")
    run = LearningRun(
        model, batches, calibration=calibration, learning=learning or Recipe(), tuning=tuning or Recipe(),
        patience=patience, weigh=weigh, skip=skip, only=only, groups=groups,
        sampling=Sampling(rows, positions), feed=Feed(None, samples, mask), evaluate=evaluate, latency=latency,
        training={"teacher": teacher, "loss": loss, "progress": progress, "accelerate": accelerate}, options=options,
    )  # fmt: skip
    net = copy_model(model)
    results = []
    for number, budget in enumerate(limits):
        place = None if folder is None else folder / f"{number:02d}"
        results.append(run.point(net, budget, place, number, limits[number:]))
        if done is not None:
            done(results[-1])
    return tuple(results)


def _limits(model: nn.Module, budget: BudgetLike, options: Mapping[str, Any]) -> Budget:
    """A budget over costs that there will be, of bytes of files."""
    limits = Budget.of(budget)
    limits.check([*COSTS, *counted.further(options.get("costs"))])
    return on_file(model, limits)
